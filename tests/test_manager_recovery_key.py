import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from hypothesis import given
from hypothesis import strategies as st

from manager.recovery_errors import (
    RecoveryFileExists,
    RecoveryFileMissing,
    RecoveryFileUnreadable,
    RecoveryFileUnwritten,
    RecoveryPassphraseWrong,
)
from manager.recovery_key import RecoveryPrivate, RecoveryPublic, main, write_recovery_files

PASSPHRASE = b"correct horse"


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def openssl(*arguments: str) -> bytes:
    return subprocess.run(("openssl", *arguments), check=True, capture_output=True, timeout=30).stdout


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "recovery.pem")


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_pair_of_files_is_written_and_read_back(file: str, passphrase: bytes | None) -> None:
    key = RecoveryPrivate.new()
    assert write_recovery_files(file, key, passphrase) == file + ".pub"
    assert (mode(file), mode(file + ".pub")) == (0o600, 0o644)
    assert RecoveryPublic.load(file + ".pub").to_pem() == key.public.to_pem()
    again = RecoveryPrivate.load(file, passphrase)
    assert again.public.signing_fingerprint == key.public.signing_fingerprint
    assert again.public.escrow_fingerprint == key.public.escrow_fingerprint


def test_the_mode_does_not_depend_on_the_umask(file: str) -> None:
    before = os.umask(0o077)
    try:
        write_recovery_files(file, RecoveryPrivate.new())
    finally:
        os.umask(before)
    assert (mode(file), mode(file + ".pub")) == (0o600, 0o644)


def test_a_signature_of_a_statement_verifies(file: str) -> None:
    key = RecoveryPrivate.new()
    digest = os.urandom(32)
    key.public.signing.verify(key.sign_statement(digest), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


def test_a_private_key_does_not_print_itself() -> None:
    key = RecoveryPrivate.new()
    assert repr(key) == f"<RecoveryPrivate {key.public.signing_fingerprint[:16]}>"


@pytest.mark.parametrize("existing", ["", ".pub"])
def test_neither_file_is_ever_overwritten(file: str, existing: str) -> None:
    Path(file + existing).write_bytes(b"precious")
    with pytest.raises(RecoveryFileExists, match="exists already"):
        write_recovery_files(file, RecoveryPrivate.new())
    assert Path(file + existing).read_bytes() == b"precious"
    assert len(list(Path(file).parent.iterdir())) == 1


def test_a_directory_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecoveryFileUnwritten, match="No key was made"):
        write_recovery_files(str(tmp_path / "none" / "r.pem"), RecoveryPrivate.new())


def test_a_full_disk_leaves_nothing(file: str) -> None:
    with pytest.raises(RecoveryFileUnwritten):
        limited(file)
    assert list(Path(file).parent.iterdir()) == []


def limited(file: str) -> None:
    """Write with a file size limit of a hundred bytes: the disk's refusal in the middle of a file."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        write_recovery_files(file, RecoveryPrivate.new())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_passphrase_is_asked_for_and_checked(file: str) -> None:
    write_recovery_files(file, RecoveryPrivate.new(), PASSPHRASE)
    assert b"ENCRYPTED" in Path(file).read_bytes()
    with pytest.raises(RecoveryPassphraseWrong, match="is protected by a passphrase"):
        RecoveryPrivate.load(file)
    with pytest.raises(RecoveryPassphraseWrong, match="not opened by this passphrase") as refused:
        RecoveryPrivate.load(file, b"wrong")
    assert refused.value.code == 5


def test_a_passphrase_too_many_does_no_harm(file: str) -> None:
    write_recovery_files(file, RecoveryPrivate.new())
    assert RecoveryPrivate.load(file, PASSPHRASE)


def test_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(RecoveryFileMissing) as refused:
        RecoveryPublic.load(str(tmp_path / "none"))
    assert refused.value.code == 3


@pytest.mark.parametrize("escrow", [("X25519",), ("EC", "-pkeyopt", "ec_paramgen_curve:P-256")])
def test_keys_an_operator_made_with_openssl_are_read(tmp_path: Path, escrow: tuple[str, ...]) -> None:
    signing = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    second = openssl("genpkey", "-algorithm", *escrow)
    private = tmp_path / "private.pem"
    private.write_bytes(signing + b"\na remark of the operator\n" + second)
    publics = b""
    for pem in (signing, second):
        (tmp_path / "one.pem").write_bytes(pem)
        publics += openssl("pkey", "-in", str(tmp_path / "one.pem"), "-pubout")
    (tmp_path / "public.pem").write_bytes(publics)
    public = RecoveryPublic.load(str(tmp_path / "public.pem"))
    assert public.to_pem() == RecoveryPrivate.load(str(private)).public.to_pem()
    assert public.signing_point[0] == 4
    assert len(public.signing_point) == 65


def public_pem(*algorithms: tuple[str, ...]) -> bytes:
    result = b""
    for algorithm in algorithms:
        private = openssl("genpkey", "-algorithm", *algorithm)
        result += subprocess.run(
            ("openssl", "pkey", "-pubout"), input=private, check=True, capture_output=True, timeout=30
        ).stdout
    return result


P256 = ("EC", "-pkeyopt", "ec_paramgen_curve:P-256")
P384 = ("EC", "-pkeyopt", "ec_paramgen_curve:P-384")


@pytest.mark.parametrize(
    ("algorithms", "why"),
    [
        ([P256], "wanted are two"),
        ([P256, P256, P256], "wanted are two"),
        ([("X25519",), P256], "first key is not P-256"),
        ([P384, P256], "first key is not P-256"),
        ([P256, P384], "second key is neither"),
        ([P256, ("ED25519",)], "second key is neither"),
    ],
)
def test_other_kinds_of_keys_are_refused(algorithms: list[tuple[str, ...]], why: str) -> None:
    with pytest.raises(RecoveryFileUnreadable, match=why):
        RecoveryPublic.parse(public_pem(*algorithms))


def test_one_key_for_both_purposes_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    both = RecoveryPrivate(key, key)
    with pytest.raises(RecoveryFileUnreadable, match="both keys are the same"):
        RecoveryPublic.parse(both.public.to_pem())
    with pytest.raises(RecoveryFileUnreadable, match="both keys are the same"):
        RecoveryPrivate.parse(both.to_pem())


def test_a_private_file_is_no_public_file_and_the_other_way_round() -> None:
    key = RecoveryPrivate.new()
    with pytest.raises(RecoveryFileUnreadable, match="PUBLIC KEY"):
        RecoveryPublic.parse(key.to_pem())
    with pytest.raises(RecoveryFileUnreadable, match="PRIVATE KEY"):
        RecoveryPrivate.parse(key.public.to_pem())


@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_parses_or_is_unreadable(at: int, byte: int) -> None:
    pem = bytearray(PUBLIC_PEM)
    pem[at % len(pem)] = byte
    try:
        RecoveryPublic.parse(bytes(pem))
    except RecoveryFileUnreadable:
        return


PUBLIC_PEM = RecoveryPrivate.new().public.to_pem()


def test_a_huge_file_is_not_read_whole(file: str) -> None:
    Path(file).write_bytes(b" " * 100_000)
    with pytest.raises(RecoveryFileUnreadable, match="longer than"):
        RecoveryPublic.load(file)


def test_the_command_makes_and_shows_keys(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", file, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["schema"] == "vtpm-recovery-key/1"
    assert made["public_file"] == file + ".pub"
    for name, private in ((file, True), (file + ".pub", False)):
        assert main(["show", name, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["private"] is private
        assert shown["signing_fingerprint"] == made["signing_fingerprint"]
        assert shown["escrow_fingerprint"] == made["escrow_fingerprint"]


def test_the_command_tells_people_what_to_do_with_the_files(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", file]) == 0
    out = capsys.readouterr().out
    assert f"Keep {file} off line and safe; give {file}.pub to `vtpm-manager init`." in out
    assert "PRIVATE" not in out
    assert main(["show", file]) == 0
    assert "signing_fingerprint:" in capsys.readouterr().out


def test_the_command_takes_the_passphrase_from_a_file(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "passphrase"
    secret.write_bytes(PASSPHRASE + b"\nsecond line\n")
    assert main(["new", file, "--passphrase-file", str(secret)]) == 0
    assert RecoveryPrivate.load(file, PASSPHRASE)
    assert main(["show", file]) == 5
    assert main(["show", file, "--passphrase-file", str(secret)]) == 0
    assert main(["show", file, "--passphrase-file", str(tmp_path / "none")]) == 3
    secret.write_bytes(b"\n")
    assert main(["new", file + "2", "--passphrase-file", str(secret)]) == 5
    assert not os.path.exists(file + "2")
    capsys.readouterr()


def test_the_commands_exit_codes_are_the_documented_ones(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", file]) == 3
    assert capsys.readouterr().err.startswith("vtpm-recovery-key: ")
    assert main(["new", file]) == 0
    capsys.readouterr()
    assert main(["new", file, "--json"]) == 4
    failure = json.loads(capsys.readouterr().out)
    assert failure["code"] == 4
    assert "exists already" in failure["error"]
    Path(file).write_bytes(b"rubbish")
    assert main(["show", file]) == 6
    with pytest.raises(SystemExit) as usage:
        main(["neu", file])
    assert usage.value.code == 2
    capsys.readouterr()
