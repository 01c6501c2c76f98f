"""swtpm's state files, read and written by both: the real swtpm is at the other side of each of these."""

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swtpm_rig import SWTPM, endorsement_key, get_secret, make_endorsement_key, put_secret, refused, running

from storage import swtpm_blob, swtpm_linear
from storage.swtpm_crypto import (
    Kdf,
    KeyFormat,
    SwtpmKey,
    SwtpmKey128,
    SwtpmKey256,
    key_of_file,
    key_of_password,
)
from storage.swtpm_errors import (
    SwtpmBadHeader,
    SwtpmDamaged,
    SwtpmForeign,
    SwtpmKeyMissing,
    SwtpmKeyUnusable,
    SwtpmLocked,
    SwtpmNoRoom,
    SwtpmNotEncrypted,
    SwtpmStateError,
    SwtpmTooNew,
    SwtpmWrongKey,
    SwtpmWrongKeySize,
)
from storage.swtpm_files import NAMES, SwtpmFiles, Where, open_files
from storage.swtpm_linear import TABLE_BYTES, Table, fitted, pack_table, placed, unpack_table

HEX_128, HEX_256 = "0123456789abcdef" * 2, "fedcba9876543210" * 4
PASSWORD = b"a passphrase of more than thirty-two characters\n"
SECRET = b"kept in NV"
KEYS: dict[str, tuple[bytes | None, str, SwtpmKey | None]] = {
    "plain": (None, "", None),
    "hex-128": (HEX_128.encode(), "file={}", SwtpmKey128(bytes.fromhex(HEX_128))),
    "hex-256": (f"0x{HEX_256}\n".encode(), "file={},mode=aes-256-cbc", SwtpmKey256(bytes.fromhex(HEX_256))),
    "binary-256": (bytes(range(32)), "file={},format=binary,mode=aes-256-cbc", SwtpmKey256(bytes(range(32)))),
    "pbkdf2": (PASSWORD, "pwdfile={}", key_of_password(PASSWORD, Kdf.PBKDF2, 16)),
    "pbkdf2-256": (PASSWORD, "pwdfile={},mode=aes-256-cbc", key_of_password(PASSWORD, Kdf.PBKDF2, 32)),
    "sha512": (b"short", "pwdfile={},kdf=sha512,mode=aes-cbc", key_of_password(b"short", Kdf.SHA512, 16)),
    "sha512-256": (PASSWORD, "pwdfile={},kdf=sha512,mode=aes-256-cbc", key_of_password(PASSWORD, Kdf.SHA512, 32)),
}
DIRECTORY, FILE = "dir", "file"


def options(place: Path, kind: str, key: str, tmp_path: Path, *more: str) -> list[str]:
    words = ["--tpmstate", f"dir={place}" if kind == DIRECTORY else f"backend-uri=file://{place}", *more]
    content, form, _ = KEYS[key]
    if content is not None:
        (tmp_path / "key").write_bytes(content)
        words += ["--key", form.format(tmp_path / "key")]
    return words


def opened(place: Path, kind: str, *, tpm2: bool = True) -> SwtpmFiles:
    return open_files(Where(str(place), kind == DIRECTORY, tpm2))


def new_place(tmp_path: Path, kind: str, name: str = "state") -> Path:
    place = tmp_path / name
    if kind == DIRECTORY:
        place.mkdir()
    return place


def moved(source: Path, target: Path, kind: str, key: SwtpmKey | None, *, tpm2: bool = True) -> None:
    """Every blob, taken out of one state and written by us to another one."""
    old, new = opened(source, kind, tpm2=tpm2), opened(target, kind, tpm2=tpm2)
    old.lock()
    new.lock()
    assert old.sizes()
    for name in old.sizes():
        image = old.load(name)
        assert image is not None
        blob = swtpm_blob.unpack_stored(image, key)
        if key is None:
            assert swtpm_blob.pack_stored(blob, None) == image
        new.store(name, swtpm_blob.pack_stored(blob, key))
    old.close()
    new.close()


@pytest.mark.parametrize("kind", [DIRECTORY, FILE])
@pytest.mark.parametrize("key", KEYS)
def test_a_state_of_swtpms_is_read_and_swtpm_reads_what_we_write(tmp_path: Path, key: str, kind: str) -> None:
    theirs, ours = new_place(tmp_path, kind), new_place(tmp_path, kind, "ours")
    with running(SWTPM, *options(theirs, kind, key, tmp_path, "--tpm2")) as one:
        put_secret(one, SECRET)
        assert one.stop() == 0
    moved(theirs, ours, kind, KEYS[key][2])
    with running(SWTPM, *options(ours, kind, key, tmp_path, "--tpm2")) as one:
        assert get_secret(one, len(SECRET)) == SECRET


@pytest.mark.parametrize("kind", [DIRECTORY, FILE])
@pytest.mark.parametrize("key", ["plain", "hex-256"])
def test_so_is_one_of_a_tpm_1_2(tmp_path: Path, key: str, kind: str) -> None:
    theirs, ours = new_place(tmp_path, kind), new_place(tmp_path, kind, "ours")
    with running(SWTPM, *options(theirs, kind, key, tmp_path)) as one:
        public = make_endorsement_key(one)
        assert one.stop() == 0
    moved(theirs, ours, kind, KEYS[key][2], tpm2=False)
    with running(SWTPM, *options(ours, kind, key, tmp_path)) as one:
        assert endorsement_key(one) == public


@pytest.mark.parametrize("decrypted", [True, False])
@pytest.mark.parametrize(  # swtpm itself cannot do with keys of two sizes: it keeps the IV's length (0x20 [measured])
    ("key", "migration"),
    [("plain", "plain"), ("plain", "hex-128"), ("hex-128", "pbkdf2"), ("hex-256", "plain"), ("hex-256", "pbkdf2-256")],
)
def test_blobs_of_the_control_channel_are_understood_both_ways(
    tmp_path: Path, key: str, migration: str, decrypted: bool
) -> None:
    place = new_place(tmp_path, DIRECTORY)
    words = options(place, DIRECTORY, key, tmp_path, "--tpm2")
    content, form, migration_key = KEYS[migration]
    if content is not None:
        (tmp_path / "migration").write_bytes(content)
        words += ["--migration-key", form.format(tmp_path / "migration")]
    with running(SWTPM, *words) as one:
        put_secret(one, SECRET)
        flags = bytes(3) + bytes([decrypted])
        answer = one.control((0x0C).to_bytes(4) + flags + (1).to_bytes(4) + bytes(4), 65536)
        assert answer[:4] == bytes(4)
        image = answer[16:]
        stored = opened(place, DIRECTORY).load("permall")
        assert stored is not None
        blob = swtpm_blob.unpack_stored(stored, KEYS[key][2])
        encrypted = bool(answer[7] & 2)
        assert swtpm_blob.unpack_transfer(image, KEYS[key][2], migration_key, encrypted=encrypted) == blob
        ours, says = swtpm_blob.pack_transfer(blob, KEYS[key][2], migration_key, decrypted=decrypted)
        assert says == encrypted
        assert len(ours) == len(image)
        assert ours[:10] == image[:10]
        assert one.control((0x0E).to_bytes(4)) == bytes(4)
        request = (0x0D).to_bytes(4) + (2 * says).to_bytes(4) + (1).to_bytes(4) + len(ours).to_bytes(4) + ours
        assert one.control(request) == bytes(4)
        assert one.control((2).to_bytes(4) + bytes(4)) == bytes(4)


def test_images_of_version_1_are_read() -> None:
    key = SwtpmKey128(bytes(range(16)))
    assert swtpm_blob.unpack_stored(bytes.fromhex("0101000a00000000000f") + b"plain", None) == b"plain"
    digest = subprocess.run(["sha256sum"], input=b"old state", capture_output=True, check=True).stdout[:64]
    plain = bytes.fromhex(digest.decode()) + b"old state"
    words = ["openssl", "enc", "-aes-128-cbc", "-K", bytes(range(16)).hex(), "-iv", "00" * 16]
    encrypted = subprocess.run(words, input=plain, capture_output=True, check=True).stdout
    image = bytes.fromhex("0101000a0001") + (10 + len(encrypted)).to_bytes(4) + encrypted
    assert swtpm_blob.unpack_stored(image, key) == b"old state"
    with pytest.raises(SwtpmWrongKey):
        swtpm_blob.unpack_stored(image, SwtpmKey128(bytes(16)))


def test_what_does_not_open_says_why() -> None:
    key, other = KEYS["hex-128"][2], KEYS["pbkdf2"][2]
    plain, sealed = swtpm_blob.pack_stored(b"blob", None), swtpm_blob.pack_stored(b"blob", key)
    cases: list[tuple[bytes, SwtpmKey | None, type[SwtpmStateError], int]] = [
        (b"", None, SwtpmBadHeader, 0x03),
        (plain[:-1], None, SwtpmBadHeader, 0x03),
        (b"\x02\x03" + plain[2:], None, SwtpmTooNew, 0x2E),
        (plain[:3] + b"\x0c" + plain[4:], None, SwtpmBadHeader, 0x2B),
        (plain, key, SwtpmNotEncrypted, 0x09),
        (sealed, None, SwtpmKeyMissing, 0x0D),
        (sealed, other, SwtpmWrongKey, 0x21),
        (sealed, KEYS["hex-256"][2], SwtpmWrongKeySize, 0x28),
        (plain[:10] + b"\0\7" + plain[12:], None, SwtpmDamaged, 0x09),
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), key, SwtpmWrongKey, 0x21),
        (sealed[:20] + bytes([sealed[20] ^ 1]) + sealed[21:], key, SwtpmWrongKey, 0x21),
    ]
    for image, with_key, kind, result in cases:
        with pytest.raises(kind) as caught:
            swtpm_blob.unpack_stored(image, with_key)
        assert caught.value.result == result
        assert "as they were" in str(caught.value)


@given(st.binary(max_size=200), st.sampled_from([None, KEYS["hex-128"][2], KEYS["hex-256"][2]]))
@settings(max_examples=300)
def test_hostile_bytes_are_refused_in_one_way(content: bytes, key: SwtpmKey | None) -> None:
    framed = b"\2\1\0\x0a" + content[:2].ljust(2, b"\0") + (10 + len(content)).to_bytes(4) + content
    readers: list[Callable[[bytes], object]] = [
        lambda image: swtpm_blob.unpack_stored(image, key),
        lambda image: swtpm_blob.unpack_transfer(image, key, key, encrypted=False),
    ]
    for image in (content, framed):
        for reader in readers:
            with suppress(SwtpmStateError):
                reader(image)


@given(st.binary(max_size=3000), st.sampled_from(list(KEYS)), st.sampled_from(list(KEYS)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_packed_comes_out_again(blob: bytes, key: str, migration: str, decrypted: bool) -> None:
    file_key, migration_key = KEYS[key][2], KEYS[migration][2]
    assert swtpm_blob.unpack_stored(swtpm_blob.pack_stored(blob, file_key), file_key) == blob
    image, encrypted = swtpm_blob.pack_transfer(blob, file_key, migration_key, decrypted=decrypted)
    assert swtpm_blob.unpack_transfer(image, file_key, migration_key, encrypted=encrypted) == blob


def test_keys_are_read_as_swtpm_reads_them() -> None:
    for text in (HEX_128, f"0x{HEX_128}", f"{HEX_128}\n", f"{HEX_128} a comment"):
        assert key_of_file(text.encode(), KeyFormat.HEX, 16) == SwtpmKey128(bytes.fromhex(HEX_128))
    for text in ("", "0x", HEX_128[:-1], HEX_128 + "0", f" {HEX_128}", "x" * 32, HEX_256):
        with pytest.raises(SwtpmKeyUnusable):
            key_of_file(text.encode(), KeyFormat.HEX, 16)
    with pytest.raises(SwtpmKeyUnusable, match="128 bits"):
        key_of_file(bytes(16), KeyFormat.BINARY, 32)
    assert "0123" not in repr(key_of_file(HEX_128.encode(), KeyFormat.HEX, 16))


# --- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DIRECTORY, FILE])
def test_the_lock_is_swtpms_lock(tmp_path: Path, kind: str) -> None:
    place = new_place(tmp_path, kind)
    if kind == FILE:  # swtpm 0.7.1 does not lock files: two of ours do, where they are told to
        pid = os.fork()
        if pid == 0:
            os.execvp("python3", ["python3", "-c", _HOLD_LOCK, str(place)])
        try:
            where = Where(str(place), False, True, lock=True)
            while not place.exists() or not place.read_bytes():
                pass
            with pytest.raises(SwtpmLocked):
                open_files(where).lock(retries=2)
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        open_files(where).lock()
        return
    with running(SWTPM, "--tpm2", "--tpmstate", f"dir={place}") as one:
        with pytest.raises(SwtpmLocked, match="Could not lock access to lockfile"):
            opened(place, kind).lock(retries=2)
        assert one.stop() == 0
    ours = opened(place, kind)
    ours.lock()
    code, text = refused(
        [*SWTPM, "socket"], "--tpm2", "--tpmstate", f"dir={place}", "--flags", "not-need-init", "--server", "port=0"
    )
    assert code == 1
    assert "Could not lock access to lockfile" in text
    ours.unlock()
    with running(SWTPM, "--tpm2", "--tpmstate", f"dir={place}"):
        pass


_HOLD_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], 'r+b' if __import__('os').path.exists(sys.argv[1]) else 'w+b')
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(bytes(192)); file.flush()
time.sleep(60)
"""


@pytest.mark.parametrize("kind", [DIRECTORY, FILE])
def test_blobs_are_stored_listed_and_deleted(tmp_path: Path, kind: str) -> None:
    place = new_place(tmp_path, kind)
    files = opened(place, kind)
    assert files.sizes() == {}
    assert files.load("permall") is None
    assert not files.delete("savestate")
    for round_ in range(4):
        for number, name in enumerate(NAMES):
            files.store(name, bytes([round_, number]) * (700 * (round_ + 1)))
    assert files.sizes() == dict.fromkeys(NAMES, 5600)
    assert files.delete("volatilestate")
    assert files.load("volatilestate") is None
    files.close()
    files = opened(place, kind)
    assert files.load("permall") == bytes([3, 0]) * 2800
    assert files.load("savestate") == bytes([3, 2]) * 2800
    files.close()


def test_modes_are_those_of_swtpm(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        default = open_files(Where(str(new_place(tmp_path, DIRECTORY)), True, True))
        default.lock()
        default.store("permall", b"x")
        wanted = open_files(Where(str(new_place(tmp_path, DIRECTORY, "b")), True, True, mode=0o606))
        wanted.store("permall", b"x")
    finally:
        os.umask(previous)
    assert (tmp_path / "state/tpm2-00.permall").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "state/.lock").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b/tpm2-00.permall").stat().st_mode & 0o777 == 0o606


def test_a_backup_is_kept_and_what_was_refused_too(tmp_path: Path) -> None:
    place = new_place(tmp_path, DIRECTORY)
    files = open_files(Where(str(place), True, True, backup=True))
    assert not files.recover()
    for image in (b"one", b"two", b"three"):
        files.store("permall", image)
    assert (place / "tpm2-00.permall.bak").read_bytes() == b"two"
    assert files.recover()
    assert files.load("permall") == b"two"
    assert (place / "tpm2-00.permall.refused-0").read_bytes() == b"three"
    files.store("permall", b"four")
    (place / "tpm2-00.permall").unlink()
    assert files.load("permall") is None  # it may be another process's, which is about to replace it
    files.lock()
    assert files.load("permall") == b"two"


def test_no_link_is_followed_and_no_other_kind_of_file_read(tmp_path: Path) -> None:
    place = new_place(tmp_path, DIRECTORY)
    (tmp_path / "elsewhere").write_bytes(b"not to be touched")
    files = opened(place, DIRECTORY)
    for name in ("tpm2-00.permall", "TMP2-00.permall"):
        (place / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SwtpmStateError):
        files.load("permall")
    with pytest.raises(SwtpmStateError):
        files.store("permall", b"x")
    assert (tmp_path / "elsewhere").read_bytes() == b"not to be touched"
    os.mkfifo(place / "tpm2-00.savestate")
    with pytest.raises(SwtpmDamaged):
        files.load("savestate")


def test_a_file_that_is_something_else_is_never_formatted(tmp_path: Path) -> None:
    for content in (b"a letter to my aunt", b"\1" + bytes(500)):
        place = tmp_path / "file"
        place.write_bytes(content)
        with pytest.raises(SwtpmForeign):
            opened(place, FILE)
        assert place.read_bytes() == content
    (tmp_path / "new").write_bytes(bytes(4096))
    opened(tmp_path / "new", FILE).store("permall", b"x" * 3000)


def test_swtpm_goes_on_with_a_file_whatever_we_did_to_it(tmp_path: Path) -> None:
    place = tmp_path / "state"
    words = ["--tpm2", "--tpmstate", f"backend-uri=file://{place}"]
    with running(SWTPM, *words) as one:
        put_secret(one, SECRET)
        assert one.control((0x0A).to_bytes(4)) == bytes(4)  # STORE_VOLATILE: a second section
        assert one.stop() == 0
    for _ in range(3):
        files = opened(place, FILE)
        for name in ("permall", "volatilestate", "permall", "permall"):
            image = files.load(name)
            if image is not None:
                files.store(name, image)
        files.close()
        with running(SWTPM, *words) as one:
            assert get_secret(one, len(SECRET)) == SECRET
            assert one.ioctl("-v").returncode == 0
            assert one.stop() == 0
    assert opened(place, FILE).load("volatilestate") is not None


def swtpm_remove(table: Table, content: bytearray, number: int) -> Table:
    """What swtpm's own compaction (SWTPM_NVRAM_Linear_RemoveFile) makes of a file."""
    gone = table[number]
    rest = {other: section for other, section in table.items() if other != number}
    later = {other: section for other, section in rest.items() if section.offset > gone.offset}
    if later:
        begin = min(section.offset for section in later.values())
        end = max(section.end for section in later.values())
        content[gone.offset : gone.offset + end - begin] = content[begin:end]
    return rest | {other: replace(section, offset=section.offset - gone.room) for other, section in later.items()}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 300)), max_size=12), st.integers(0, 2))
@settings(max_examples=300)
def test_no_store_overwrites_what_lives_and_swtpm_can_compact_what_we_leave(
    steps: list[tuple[int, int]], removed: int
) -> None:
    table: Table = {}
    content = bytearray(8192)
    held: dict[int, bytes] = {}
    for step, (number, length) in enumerate(steps):
        new = placed(table, number, length)
        section = new[number]
        lives = [(other.offset, other.offset + other.length) for other in table.values()]
        assert all(section.offset + length <= begin or section.offset >= end for begin, end in lives if begin < end)
        held[number] = bytes([step + 1]) * length
        content[section.offset : section.offset + length] = held[number]
        table = fitted(new, max(one.end for one in new.values()))
        assert unpack_table(pack_table(table), "") == table
        order = sorted(table.values(), key=lambda one: one.offset)
        assert all(first.end == second.offset for first, second in pairwise(order))
        assert order[0].offset >= TABLE_BYTES
    if removed in table:
        table = swtpm_remove(table, content, removed)
        for number, section in table.items():
            assert content[section.offset : section.offset + section.length] == held[number]


def test_what_has_no_room_for_more_keeps_the_old_state(tmp_path: Path) -> None:
    place = tmp_path / "device"
    place.write_bytes(bytes(4096))
    files = opened(place, FILE)
    assert isinstance(files, swtpm_linear.SwtpmLinear)
    files._is_device = True  # as of a device, nothing is added to it
    files.store("permall", b"x" * 1500)
    with pytest.raises(SwtpmNoRoom):
        files.store("permall", b"y" * 3000)
    assert files.load("permall") == b"x" * 1500
    files.store("permall", b"z" * 1500)
    assert files.load("permall") == b"z" * 1500
    assert place.stat().st_size == 4096
