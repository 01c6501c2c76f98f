import dataclasses
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from frontend_backend.messages_admin import ExitCode
from manager.__main__ import main
from manager.config import MAX_RUNTIME_DIR, AdminConfig, AnchorConfig, Config, InstanceConfig, Layout, TpmConfig
from manager.config_ranges import RANGES
from manager.errors import ConfigurationError, ConflictError, IntegrityError, ManagerError
from manager.notify import notify
from manager.state_files import discard, image_path, make_image, open_locked
from storage.state_image import StateImage


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_a_configuration_reads_what_it_wrote(tmp_path: Path) -> None:
    config = Config(
        TpmConfig(tcti='swtpm:path="quoted"\\', locality=0, srk_name="00ff"),
        AnchorConfig(strict=True, interval_seconds=1.5),
        instance=InstanceConfig(uid_base=0),
        admin=AdminConfig(operator_uids=(1, 2), socket_group="wheel"),
    )
    assert Config.load(written(tmp_path, config.to_toml())) == config


def test_nothing_said_is_the_default_and_the_default_is_not_weak(tmp_path: Path) -> None:
    config = Config.load(written(tmp_path, ""))
    assert config == Config()
    assert (config.tpm.locality, config.tpm.pcrs) == (2, "sha256:0,2,7")
    assert Config.load(written(tmp_path, "[anchor]\ninterval_seconds = 60")).anchor.interval_seconds == 60.0


@pytest.mark.parametrize(
    "text",
    [
        "[tpm2]",
        "tpm = 1",
        "[tpm]\nlocalty = 2",
        '[tpm]\nlocality = "2"',
        "[tpm]\nlocality = true",
        "[anchor]\nstrict = 1",
        '[anchor]\nstrict = "false"',
        "[anchor]\ninterval_seconds = true",
        "[admin]\noperator_uids = 5",
        '[admin]\noperator_uids = ["5"]',
        "[admin]\noperator_uids = [true]",
        "[tpm",
        "\x00",
    ],
)
def test_what_is_not_known_or_of_another_type_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError):
        Config.load(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "[anchor]\ninterval_seconds = nan",
        "[anchor]\ninterval_seconds = -1",
        "[anchor]\ninterval_seconds = 0",
        "[tpm]\nbusy_seconds = nan",
        "[instance]\nstart_timeout = 0",
        "[instance]\nuid_base = -5",
        "[instance]\nuid_base = 4294967295",
        "[instance]\nhibernate_after = nan",
        "[instance]\ncommit_timeout = inf",
        f"[quota]\nrunning = 1{'0' * 400}",
        f"[tpm]\nbusy_seconds = 1{'0' * 400}",
        "[instance]\nper_keeper = -1",
        "[quota]\nrunning = -1",
        "[quota]\nnv_bytes = 99999999999",
        "[admin]\noperator_uids = [0, -1]",
    ],
)
def test_a_number_that_means_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    """An interval below zero ended the manager with a traceback, once it ran."""
    with pytest.raises(ConfigurationError, match="cannot be: "):
        Config.load(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "[anchor]\ninterval_seconds = inf",
        "[instance]\nstart_timeout = inf",
        "[instance]\nstop_timeout = 0",
        "[instance]\nrestart_seconds = inf",
        "[instance]\nhibernate_after = -1",
        "[catalogue]\nevents_kept = -1",
        "[catalogue]\nevents_days = 99999999999",
    ],
)
def test_a_number_that_had_a_meaning_is_still_taken(tmp_path: Path, text: str) -> None:
    """An installation that was set up so must start after an upgrade, and after `reseal` has written the file anew."""
    config = Config.load(written(tmp_path, text))
    assert Config.load(written(tmp_path, config.to_toml())) == config


def test_a_number_that_is_refused_is_told_as_it_was_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"uid_base: 4294967295 cannot be: 0 to 4294901758$"):
        Config.load(written(tmp_path, "[instance]\nuid_base = 4294967295"))


def test_every_number_has_a_range() -> None:
    elsewhere = {("tpm", "locality"), ("store", "tombstone_days")}  # which say so themselves
    numbers = {
        (section.name, key.name)
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), section.name))
        if key.type in (int, float, tuple[int, ...])
    }
    assert numbers == set(RANGES) | elsewhere
    for (section, key), (low, high) in RANGES.items():
        value = getattr(getattr(Config(), section), key)
        assert all(low <= number <= high for number in (value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[admin]\nsocket_mode = "999"', "socket_mode cannot be used"),
        ('[admin]\nsocket_group = "no-such-group-here"', "no group"),
        ('[migration]\nlisten = "tcp:99999"', "is no address"),
        ('[catalogue]\nurl = "mysql://host/x"', "'mysql' is no database"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_by_run_and_check_before_anything_starts(
    short: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    written(short, text)
    places = ["--state-dir", str(short), "--runtime-dir", str(short / "run")]
    assert main(["run", *places]) == ExitCode.USAGE
    assert said in capsys.readouterr().err
    assert not (short / "run").exists()
    assert main(["preflight", *places]) == ExitCode.USAGE, "an upgrade must not hand over to code that refuses this"
    assert said in capsys.readouterr().err
    main(["check", "--json", *places])
    (found,) = [row for row in json.loads(capsys.readouterr().out) if said in row["text"]]
    assert (found["verdict"], found["code"]) == ("failed", ExitCode.USAGE)


def test_a_file_that_is_not_there_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="init"):
        Config.load(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError):
        Config.load(tmp_path / "binary")


def test_a_runtime_directory_leaves_room_for_the_longest_socket() -> None:
    fitting = Layout(Path("/s"), Path("/" + "r" * (MAX_RUNTIME_DIR - 1)))
    fitting.check()
    longest = fitting.sockets / str(uuid4()) / "swtpm.sock.ctrl"
    assert len(str(longest)) == 107
    with pytest.raises(ConfigurationError, match="--runtime-dir"):
        Layout(Path("/s"), Path("/" + "r" * MAX_RUNTIME_DIR)).check()


# --- telling systemd ------------------------------------------------------------------------------


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vt") as made:
        yield Path(made)


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_where_it_listens(short: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"{short}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + address[1:] if abstract else address)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address[1:] if abstract else address)
        notify("READY=1")
        assert systemd.recv(64) == b"READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


# --- state images as files ------------------------------------------------------------------------


def test_an_image_is_locked_for_one_and_missing_is_never_new(tmp_path: Path) -> None:
    import os

    path = image_path(tmp_path / "state", uuid4(), "")
    with pytest.raises(IntegrityError, match="Put it back"):
        open_locked(path, create=False)
    assert not path.exists()
    first = open_locked(path, create=True)
    with pytest.raises(ConflictError, match="in use"):
        open_locked(path, create=False)
    os.close(first)
    os.close(open_locked(path, create=False))
    assert path.stat().st_mode & 0o777 == 0o600


def test_links_and_directories_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("target")
    for path in (tmp_path / "link", tmp_path):
        with pytest.raises(ManagerError, match="nothing was started"):
            open_locked(path, create=True)
    with pytest.raises(ManagerError):
        discard(tmp_path / "link", uuid4(), ours=False)
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_an_image_is_made_once_and_never_over_something_else(tmp_path: Path) -> None:
    import os

    vtpm, store, path = uuid4(), uuid4(), tmp_path / "a.img"
    descriptor = open_locked(path, create=True)
    make_image(descriptor, path, vtpm, store, "2.0")
    make_image(descriptor, path, vtpm, store, "2.0")  # a start that was cut short left it
    with pytest.raises(ConflictError):
        make_image(descriptor, path, uuid4(), store, "2.0")
    with pytest.raises(ConflictError):
        make_image(descriptor, path, vtpm, uuid4(), "2.0")
    assert StateImage.open(descriptor, vtpm, store).vtpm == vtpm
    os.close(descriptor)


def test_discarding_removes_ours_and_empties_what_was_named(tmp_path: Path) -> None:
    import os

    vtpm, store = uuid4(), uuid4()
    ours, named = tmp_path / "ours", tmp_path / "named"
    for path in (ours, named):
        descriptor = open_locked(path, create=True)
        make_image(descriptor, path, vtpm, store, "2.0")
        os.close(descriptor)
    discard(ours, vtpm, ours=True)
    discard(ours, vtpm, ours=True)
    assert not ours.exists()
    image = named.read_bytes()
    discard(named, uuid4(), ours=False)
    assert named.read_bytes() == image, "another vTPM's image is not ours to empty"
    discard(named, vtpm, ours=False)
    assert named.read_bytes() == b""
    discard(tmp_path / "nowhere", vtpm, ours=False)  # gone already: a removal must be able to end
    with pytest.raises(ManagerError, match="its key is gone"):
        discard(tmp_path, vtpm, ours=False)


def test_discarding_keeps_a_file_that_never_was_a_state_image(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.write_bytes(b"x" * 9000)
    discard(thesis, uuid4(), ours=False)
    assert thesis.read_bytes() == b"x" * 9000
