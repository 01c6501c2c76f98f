"""`vtpm-approve`: the approver's tool, with nothing but files."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from approval_rig import target

from manager.approval import Approval
from manager.approval_key import ApproverPrivate, ApproverPublic
from manager.approval_target import NO_GROUP, Target
from manager.cli_approval import main
from manager.hwtpm_records import AnchorInfo

INDEX = AnchorInfo(0x01800200, b"\x00\x0b" + bytes(range(32)), 2)
ZERO, SEVEN = "aa" * 32, "bb" * 32


class Desk:
    """The approver's desk: his key, and what was carried to him."""

    def __init__(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base, self._capsys = base, capsys
        self.key = str(base / "saa.pem")
        assert self.run("new-key", self.key)[0] == 0
        self.saa = ApproverPrivate.load(self.key)
        self.target = target(self.saa, INDEX, least=3)
        self.group = self.write("group.json", self.target.to_json())
        self.output = str(base / "out")

    def write(self, name: str, content: Any) -> str:
        path = self.base / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def run(self, *words: str) -> tuple[int, str]:
        code = main([*words])
        captured = self._capsys.readouterr()
        return code, captured.out + captured.err

    def sign(self, *options: str, sequence: int = 3, group: str = "") -> tuple[int, str]:
        Path(self.output).unlink(missing_ok=True)
        words = ("sign", "--key", self.key, "--group", group or self.group, "--sequence", str(sequence))
        return self.run(*words, "-o", self.output, *options)

    def signed(self) -> Approval:
        approval = Approval.from_armoured(Path(self.output).read_text())
        approval.verify(self.saa.public)
        self.target.check(approval, self.saa.public)
        return approval


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def test_the_tool_loads_neither_tpm_libraries_nor_a_catalogue() -> None:
    code = "import sys, manager.cli_approval; print(sorted(n for n in sys.modules if n.split('.')[0] in "
    code += "('tpm2_pytss', 'trio', 'sqlalchemy', 'storage', 'vtpm_instance')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_new_key_is_kept_private_and_never_overwritten(desk: Desk) -> None:
    assert stat.S_IMODE(os.stat(desk.key).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(desk.key + ".pub").st_mode) == 0o644
    before = Path(desk.key).read_bytes()
    code, said = desk.run("new-key", desk.key)
    assert code == 4
    assert "exists already" in said
    assert Path(desk.key).read_bytes() == before
    assert ApproverPublic.load(desk.key + ".pub").fingerprint == desk.saa.public.fingerprint


def test_a_key_with_a_passphrase_takes_it(desk: Desk) -> None:
    phrase, wrong = desk.write("phrase", "secret\n"), desk.write("wrong", "other\n")
    locked = str(desk.base / "locked.pem")
    assert desk.run("new-key", locked, "--passphrase-file", phrase)[0] == 0
    key = ApproverPrivate.load(locked, b"secret")
    group = desk.write("locked.json", target(key, INDEX).to_json())
    words = ("sign", "--key", locked, "--group", group, "--sequence", "1", "-o", desk.output)
    values = ("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")
    for more, code in (((), 5), (("--passphrase-file", wrong), 5), (("--passphrase-file", phrase), 0)):
        assert desk.run(*words, *values, *more)[0] == code


def test_an_approval_says_what_was_asked_for(desk: Desk) -> None:
    times = ("--valid-from", "2026-11-01", "--valid-until", "2099-12-31T12:00:00+01:00")
    code, said = desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN.upper()}", "--comment", "firmware 1.2", *times)
    assert code == 0, said
    approval = desk.signed()
    assert dict(approval.values) == {0: bytes.fromhex(ZERO), 7: bytes.fromhex(SEVEN)}
    assert (approval.sequence, approval.comment) == (3, "firmware 1.2")
    code, said = desk.run("show", desk.output, "--json")
    shown = json.loads(said)
    assert shown["valid_from"] == "2026-11-01T00:00:00+00:00"
    assert shown["valid_until"] == "2099-12-31T11:00:00+00:00"
    assert shown["pcrs"] == f"0={ZERO},7={SEVEN}"
    assert shown["approved_policy"] == approval.approved_policy().hex()
    assert shown["genuine"] is None
    assert json.loads(desk.run("show", desk.output, "--saa", desk.key + ".pub", "--json")[1])["genuine"] is True


YAML = f"""sha1:
  0 : 0x{"00" * 20}
  7 : 0x{"00" * 20}
sha256:
  0 : 0x{ZERO.upper()}
  1 : 0x{"11" * 32}
  7 : 0x{SEVEN.upper()}
"""


def rows(name: str) -> list[dict[str, Any]]:
    """As vtpm-group-predict prints them: an approval's, then those that are only told."""
    return [
        {"name": name, "by": "approval", "pcr": 0, "approved": "00" * 32, "present": ZERO},
        {"name": name, "by": "approval", "pcr": 7, "approved": "00" * 32, "present": SEVEN},
        {"name": name, "by": "present", "pcr": 7, "approved": None, "present": SEVEN},
    ]


@pytest.mark.parametrize(
    "form",
    [
        lambda _desk: YAML,
        lambda desk: rows(desk.target.name),
        lambda desk: desk.target.to_json() | {"pcr_values": f"0={ZERO},7={SEVEN}"},
        lambda desk: [
            target(desk.saa, INDEX).to_json() | {"pcr_values": f"0={'cc' * 32},7={SEVEN}"},
            desk.target.to_json() | {"pcr_values": f"0={ZERO},7={SEVEN}"},
        ],
    ],
    ids=["tpm2_pcrread", "predict", "target", "targets"],
)
def test_values_are_taken_from_what_tools_print(desk: Desk, form: Callable[[Desk], Any]) -> None:
    code, said = desk.sign("--pcrs-from", desk.write("values", form(desk)))
    assert code == 0, said
    assert dict(desk.signed().values) == {0: bytes.fromhex(ZERO), 7: bytes.fromhex(SEVEN)}


def test_a_value_given_by_itself_counts_before_that_of_a_file(desk: Desk) -> None:
    assert desk.sign("--pcrs-from", desk.write("values", YAML), "--pcr", f"7={'dd' * 32}")[0] == 0
    assert dict(desk.signed().values)[7] == b"\xdd" * 32
    assert desk.sign("--pcrs-from", desk.write("values", YAML), "--pcr", f"4={'dd' * 32}")[0] == 0
    assert desk.signed().selection == (0, 4, 7)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pcr", f"0={ZERO}"), 2, "asks for PCR 7"),
        (("--pcr", "0=00"), 2, "is no predicted PCR"),
        (("--pcr", f"0={ZERO}", "--pcr", f"24={ZERO}"), 2, "does not exist"),
        (("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", "--pcr", f"16={SEVEN}"), 6, "PCR 16"),
        (("--pcrs-from", "/nonexistent"), 3, "cannot be read"),
        (("--valid-until", "tomorrow"), 2, "is no time"),
        (("--valid-until", "2001-01-01"), 6, "ends before it begins"),
        (("--valid-from", "1960-01-01"), 6, "a time is out of range"),
        (("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", "--pcr", f"07={ZERO}"), 2, "two values for PCR 7"),
        (("--comment", "x" * 201), 6, "too long"),
        (("--comment", "\x07"), 6, "cannot be printed"),
        (("--comment", "\udcff"), 6, "no UTF-8"),
        (("--sequence", "2"), 4, "takes 3 and above"),
        (("--sequence", "0"), 4, "takes 3 and above"),
    ],
)
def test_what_cannot_be_signed_is_refused_and_no_file_made(
    desk: Desk, options: tuple[str, ...], code: int, words: str
) -> None:
    full = () if "--pcr" in options or "--pcrs-from" in options else ("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")
    found, said = desk.sign(*full, *options)
    assert found == code, said
    assert words in said
    assert not Path(desk.output).exists()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "", "{", "[]", '["x"]', "{}", "sha256:\n", '{"name": "acme"}', "\x00\xff", "[1]"]
)
def test_a_file_that_is_no_target_or_no_values_is_refused(desk: Desk, content: str) -> None:
    path = desk.write("bad", content)
    assert desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", group=path)[0] in (2, 6)
    assert desk.sign("--pcrs-from", path)[0] == 6


def test_two_values_for_one_pcr_are_refused(desk: Desk) -> None:
    found = rows(desk.target.name)
    found[2]["present"] = ZERO
    code, said = desk.sign("--pcrs-from", desk.write("values", found))
    assert (code, "two values for PCR 7" in said) == (6, True)


def test_of_several_targets_one_is_named(desk: Desk) -> None:
    several = [desk.target.to_json(), target(desk.saa, INDEX, name="other").to_json()]
    path = desk.write("several", several)
    values = ("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")
    assert desk.sign(*values, group=path)[0] == 2
    assert desk.sign(*values, "--name", "acme", group=path)[0] == 0
    assert desk.sign(*values, "--name", str(desk.target.group), group=path)[0] == 0


def test_another_approver_is_told_that_it_is_not_his(desk: Desk) -> None:
    path = desk.write("foreign", target(ApproverPrivate.new(), INDEX).to_json())
    code, said = desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", group=path)
    assert (code, "takes the approver" in said) == (4, True)


def test_an_earlier_approval_shows_that_the_target_was_exchanged(desk: Desk) -> None:
    values = ("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")
    assert desk.sign(*values)[0] == 0
    earlier = desk.write("earlier", Path(desk.output).read_text())
    assert desk.sign(*values, "--previous", earlier)[0] == 0
    thief = Target(**{name: getattr(desk.target, name) for name in desk.target.__slots__} | {"nv_name": bytes(34)})
    code, said = desk.sign(*values, "--previous", earlier, group=desk.write("stolen", thief.to_json()))
    assert (code, "Name" in said) == (4, True)
    assert not Path(desk.output).exists()


def test_an_earlier_approval_shows_that_fewer_pcrs_are_asked_for(desk: Desk) -> None:
    """What PCRs a target asks for is in no digest: whoever carries it may leave out the one that he wants to change."""
    assert desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")[0] == 0
    earlier = desk.write("earlier", Path(desk.output).read_text())
    fewer = desk.write("fewer", desk.target.to_json() | {"approved_pcrs": "sha256:0"})
    assert desk.sign("--pcr", f"0={ZERO}", group=fewer)[0] == 0, "he sees what he signs"
    code, said = desk.sign("--pcr", f"0={ZERO}", "--previous", earlier, group=fewer)
    assert (code, "PCR 7" in said) == (4, True)
    assert not Path(desk.output).exists()
    assert desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", "--previous", earlier, group=fewer)[0] == 0


@pytest.mark.parametrize("index", [-1, 2**32, 2**70])
def test_a_target_whose_index_cannot_be_is_refused(desk: Desk, index: int) -> None:
    told = desk.write("strange", desk.target.to_json() | {"revocation_index": index})
    assert desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", group=told)[0] == 6


def test_an_output_that_exists_is_kept(desk: Desk) -> None:
    Path(desk.output).write_text("precious")
    words = ("sign", "--key", desk.key, "--group", desk.group, "--sequence", "3", "-o", desk.output)
    code, said = desk.run(*words, "--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")
    assert (code, "exists already" in said) == (2, True)
    assert Path(desk.output).read_text() == "precious"


def test_check_tells_genuine_from_not_and_what_holds(desk: Desk) -> None:
    assert desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}")[0] == 0
    check = ("check", desk.output, "--saa", desk.key + ".pub", "--json")
    code, said = desk.run(*check)
    assert (code, json.loads(said)["not_compared"], json.loads(said)["holds"]) == (0, "0,7", None)
    same = ("--group", desk.group, "--pcrs-from", desk.write("values", YAML))
    code, said = desk.run(*check, *same)
    assert (code, json.loads(said)["holds"]) == (0, True)
    code, said = desk.run(*check, *same, "--pcr", f"7={ZERO}")
    assert (code, json.loads(said)["differing"]) == (5, "7")
    assert desk.run(*check, "--pcrs-from", desk.write("values", YAML))[0] == 2
    other = desk.write("other.json", target(desk.saa, INDEX).to_json())
    assert desk.run(*check, "--group", other)[0] == 4
    revoked = target(desk.saa, INDEX, store=desk.target.store, group=desk.target.group, least=4, kind=desk.target.kind)
    assert desk.run(*check, "--group", desk.write("revoked.json", revoked.to_json()))[0] == 4
    stranger = str(desk.base / "stranger.pem")
    desk.run("new-key", stranger)
    assert desk.run("check", desk.output, "--saa", stranger + ".pub")[0] == 6
    text = Path(desk.output).read_text()
    Path(desk.output).write_text(text.replace(text[100], "A" if text[100] != "A" else "B", 1))
    assert desk.run(*check)[0] == 6
    assert NO_GROUP.int == 0


@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_that_is_no_key_is_refused(desk: Desk, content: bytes) -> None:
    path = desk.base / "nokey"
    path.write_bytes(content)
    assert desk.sign("--pcr", f"0={ZERO}", "--pcr", f"7={SEVEN}", "--key", str(path))[0] == 6
    assert desk.run("show", desk.output, "--saa", str(path))[0] in (3, 6)


def test_the_manager_is_not_given_a_private_key(desk: Desk) -> None:
    with pytest.raises(Exception, match="wanted is the public one"):
        ApproverPublic.load(desk.key)
