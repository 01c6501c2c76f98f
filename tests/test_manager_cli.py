import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from frontend_backend.messages_admin import AdminRequest, Done, ExitCode, Failure, Note, Row, decode_admin, encode_admin
from manager import cli, client
from manager.__main__ import main as manager_main
from manager.errors import BusyError, ManagerError, NotFoundError
from manager.output import as_table, render
from manager.verb_table import BY_NAME, VERBS

DOCUMENT = {"schema": 1, "uuid": "u-1", "name": "web", "pid": None, "fresh": True}


@contextmanager
def answering(*replies: bytes) -> Iterator[tuple[str, list[Any]]]:
    """A manager's socket that takes one request and gives these datagrams."""
    heard: list[Any] = []
    with (
        tempfile.TemporaryDirectory(prefix="vt") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        path = f"{folder}/a"
        sock.bind(path)
        sock.listen()

        def serve() -> None:
            near, _ = sock.accept()
            with near:
                data, descriptors, _, _ = socket.recv_fds(near, 65536, 4)
                heard.append((decode_admin(data), len(descriptors)))
                for descriptor in descriptors:
                    os.close(descriptor)
                with contextlib.suppress(BrokenPipeError):  # who asked may have seen enough
                    for reply in replies:
                        near.send(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path, heard
        thread.join(10)


def rows(*documents: dict[str, Any]) -> list[bytes]:
    return [*(encode_admin(Row(document)) for document in documents), encode_admin(Done())]


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["--json"], lambda text: json.loads(text) == DOCUMENT),
        (["--jsonl"], lambda text: json.loads(text) == DOCUMENT),
        (["--quiet"], lambda text: text == "u-1\n"),
        ([], lambda text: "pid    -" in text and "fresh  yes" in text),
    ],
)
def test_an_answer_is_printed_as_it_was_asked_for(
    capsys: pytest.CaptureFixture[str], words: list[str], check: Callable[[str], bool]
) -> None:
    with answering(encode_admin(Note("by the way")), *rows(DOCUMENT)) as (path, heard):
        assert cli.main(["show", "web", "--socket", path, *words]) == 0
    assert heard == [(AdminRequest("show", {"vtpm": "web"}), 0)]
    out, err = capsys.readouterr()
    assert check(out), out
    assert err == "by the way\n"


def test_add_prints_the_uuid_alone_and_hands_the_file_over(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with answering(*rows(DOCUMENT)) as (path, heard):
        assert cli.main(["add", "--state-image", str(tmp_path / "d"), "--socket", path]) == 0
    ((asked, descriptors),) = heard
    assert (asked.arguments["state_image"], descriptors) == (str(tmp_path / "d"), 1)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == "u-1\n"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["attach", "web", "g"], {"vtpm": "web", "guest": "g", "frontend": "socket"}),
        (["attach", "web", "g", "--tcp", "0"], {"vtpm": "web", "guest": "g", "frontend": "socket", "tcp": 0}),
        (["list"], {}),
    ],
)
def test_a_manager_of_before_an_upgrade_is_asked_only_what_was_said(words: list[str], asked: dict[str, Any]) -> None:
    with answering(*rows(DOCUMENT)) as (path, heard):
        assert cli.main([*words, "--socket", path]) == 0
    assert heard == [(AdminRequest(words[0], asked), 0)]


@pytest.mark.parametrize(
    "words",
    [
        ["show", "\udcff"],
        ["add", "--name", "\udcfcn\udcef"],
        ["add", "--count", "99999999999999999999"],
        ["attach", "web", "g", "--nv-bytes", "99999999999999999999"],
        ["events", "--limit", "99999999999999999999"],
    ],
)
def test_what_no_message_can_hold_is_a_usage_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="vt") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        sock.bind(f"{folder}/a")
        sock.listen()
        assert cli.main([*words, "--socket", f"{folder}/a"]) == ExitCode.USAGE
    assert "cannot be sent" in capsys.readouterr().err


def test_an_output_file_that_is_there_is_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`vtpm-migrate-identity --anew -o FILE` must not make a new identity and then find no place for it."""
    taken = tmp_path / "taken"
    taken.write_text("mine")
    nobody = str(tmp_path / "nobody")
    assert cli.main(["migrate-identity", "--anew", "--yes", "-o", str(taken), "--socket", nobody]) == ExitCode.CONFLICT
    assert "is there already" in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_an_endpoint_that_there_is_not_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(*rows(DOCUMENT | {"endpoint": None})) as (path, _):
        words = ["attach", "web", "g", "--frontend", "xen", "--instance-domain", "any", "--quiet"]
        assert cli.main([*words, "--socket", path]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("verb", "code"), [(["verify", "--all"], ExitCode.FAILURE), (["list"], ExitCode.OK)])
@pytest.mark.parametrize("form", ["--json", "--jsonl"])
def test_a_judgement_whose_reader_is_gone_is_whole_or_a_failure(
    monkeypatch: pytest.MonkeyPatch, verb: list[str], code: ExitCode, form: str
) -> None:
    """Line by line it stops, and nobody has judged the rest; a whole document is judged before it is printed."""
    near, far = os.pipe()
    os.close(near)
    with answering(*rows(DOCUMENT | {"code": 0}, DOCUMENT | {"code": 6})) as (path, _), os.fdopen(far, "w", 1) as gone:
        monkeypatch.setattr("sys.stdout", gone)
        whole = ExitCode.INTEGRITY if verb[0] == "verify" else ExitCode.OK
        assert cli.main([*verb, form, "--socket", path]) == (code if form == "--jsonl" else whole)
        with open(os.devnull, "w") as nowhere:  # for what closing it would still write
            os.dup2(nowhere.fileno(), far)


def test_a_configuration_without_its_state_directory_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--all", "--config", "/c", "--socket", "/nowhere/a"]) == ExitCode.USAGE
    assert "--config goes with --state-dir" in capsys.readouterr().err


def test_the_tpms_status_is_asked_of_the_manager_that_the_environment_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every other verb of a running manager is."""
    with answering(*rows(DOCUMENT)) as (path, heard):
        monkeypatch.setenv(client.SOCKET_VARIABLE, path)
        assert manager_main(["tpm-status", "--json"]) == 0
    assert heard == [(AdminRequest("tpm-status", {}), 0)]
    assert json.loads(capsys.readouterr().out) == DOCUMENT


def test_an_approval_that_is_not_there_is_not_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert manager_main(["approve", str(tmp_path / "a"), "--state-dir", str(tmp_path)]) == ExitCode.NOT_FOUND
    assert "Nothing was changed" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not")
@pytest.mark.parametrize("verb", ["approve", "restore"])
def test_a_file_that_may_not_be_read_is_denied(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """A restore ended with 1, an approval with 3."""
    with tempfile.TemporaryDirectory(prefix="vt") as folder:
        os.chmod(folder, 0o777)
        given = Path(folder, "given")
        given.touch(0o600)
        os.seteuid(65534)
        try:
            code = manager_main([verb, str(given), "--state-dir", f"{folder}/state"])
        finally:
            os.seteuid(0)
        assert (code, os.listdir(folder)) == (ExitCode.DENIED, ["given"])
    assert "given: Permission denied" in (said := capsys.readouterr().err)
    assert "othing was changed" in said
    assert "Errno" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not")
def test_another_users_state_directory_is_denied_and_not_taken_for_an_empty_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryDirectory(prefix="vt") as folder:
        os.chmod(folder, 0o711)
        state = Path(folder, "state")
        state.mkdir(mode=0o700)
        (state / "store.img").write_bytes(b"somebody's")
        os.seteuid(65534)
        try:
            code = manager_main(["init", "--no-recovery", "--pcrs", "none", "--state-dir", str(state)])
        finally:
            os.seteuid(0)
        assert (code, os.listdir(state)) == (ExitCode.DENIED, ["store.img"])
    assert "this user may not" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="root may read everything; only root can become somebody who may not")
def test_another_users_configuration_is_denied_and_not_taken_for_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").touch(0o600)
    os.seteuid(65534)
    try:
        assert manager_main(["check", "--state-dir", str(tmp_path)]) == ExitCode.DENIED
    finally:
        os.seteuid(0)
    said = capsys.readouterr().err
    assert "Permission denied" in said
    assert "init" not in said


@pytest.mark.parametrize("code", [code for code in ExitCode if code is not ExitCode.OK])
def test_a_failure_has_its_code_in_the_status_and_in_the_document(
    capsys: pytest.CaptureFixture[str], code: ExitCode
) -> None:
    with answering(encode_admin(Failure(code, "no"))) as (path, _):
        assert cli.main(["list", "--json", "--socket", path]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == {"code": int(code), "kind": code.name.lower(), "message": "no"}
    assert err == "vtpm-list: no\n"


@pytest.mark.parametrize(
    ("replies", "kind"),
    [([], BusyError), ([b"\xc1"], ManagerError), ([encode_admin(AdminRequest("list"))], ManagerError)],
)
def test_a_manager_that_answers_nonsense_or_nothing_is_told(replies: list[bytes], kind: type[ManagerError]) -> None:
    with answering(*replies) as (path, _), pytest.raises(kind):
        client.request(path, "list", {})


def test_a_file_that_is_not_there_is_not_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "saa.pem.pub")
    assert cli.main(["group-add", "tenant", "--saa", missing, "--socket", str(tmp_path / "nobody")]) == 3
    assert missing in capsys.readouterr().err


def test_no_manager_is_not_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.SOCKET_VARIABLE, "/nowhere/admin.sock")
    assert cli.main(["list"]) == ExitCode.NOT_FOUND
    assert "vtpm-manager run" in capsys.readouterr().err
    with pytest.raises(NotFoundError):
        client.request("/" + "x" * 200, "list", {})


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["attach", "web"], ["add", "--tpm", "3"], ["list", "--json", "--quiet"]]
)
def test_usage_errors_exit_with_two(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    "words",
    [
        ["init", "--tcti", "embedded"],
        ["init", "--no-recovery", "--recovery", "x"],
        ["init", "--no-recovery"],
        ["init", "--no-recovery", "--pcrs", "sha1:0"],
    ],
)
def test_init_without_a_way_back_is_a_usage_error_and_makes_nothing(words: list[str], tmp_path: Path) -> None:
    assert manager_main([*words, "--state-dir", str(tmp_path / "s")]) == ExitCode.USAGE
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("verb", ["run", "check", "reseal"])
def test_without_an_installation_each_says_to_make_one(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--state-dir", str(tmp_path / "s"), "--runtime-dir", str(tmp_path / "r")]
    assert manager_main([verb, *places]) == ExitCode.USAGE
    assert "vtpm-manager init" in capsys.readouterr().err


# --- what is printed ------------------------------------------------------------------------------


def test_tables_are_aligned_and_empty_ones_have_a_head() -> None:
    documents = [{"name": "a", "state": None}, {"name": "longer", "state": False}]
    assert as_table(documents, ["name", "state"]) == "NAME    STATE\na       -\nlonger  no"
    assert as_table([], ["name"]) == "NAME"
    assert render(BY_NAME["list"], [], "json") == "[]"
    assert render(BY_NAME["list"], [], "quiet") == ""


def test_every_command_of_the_table_is_installed() -> None:
    scripts = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"vtpm-{verb.name} = " in scripts for verb in VERBS)


@pytest.mark.parametrize(
    ("main", "verb", "command"), [(cli.main, "list", "vtpm-list"), (manager_main, "scrub", "vtpm-manager scrub")]
)
def test_an_error_names_the_command_that_was_given(
    main: Callable[[list[str]], int], verb: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--socket", str(tmp_path / "admin.sock")]) == 3
    assert capsys.readouterr().err.startswith(f"{command}: no manager answers")
