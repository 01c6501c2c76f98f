"""The command in swtpm's place, driven as users of swtpm drive it, beside the real one."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import swtpm_rig as rig
import vtpm_instance_rig as tpm
from swtpm_rig import OURS, STARTED, SWTPM, get_secret, put_secret, refused, running

from storage import swtpm_blob
from storage.swtpm_crypto import SwtpmKey256
from vtpm_instance.swtpm_command import main as swtpm_main

SECRET = b"kept in NV"
GET_CAPABILITY, INIT, SHUTDOWN, STORE_VOLATILE, STOP = ((n).to_bytes(4) for n in (1, 2, 3, 0x0A, 0x0E))
OK = bytes(4)
INIT_NOW, INIT_DELETING = INIT + bytes(4), INIT + (1).to_bytes(4)


def blob_request(kind: int, flags: int = 1) -> bytes:
    return (0x0C).to_bytes(4) + flags.to_bytes(4) + kind.to_bytes(4) + bytes(4)


def taken_out(one: rig.Running, kind: int, flags: int = 1) -> tuple[int, bytes]:
    answer = one.control(blob_request(kind, flags), 1 << 20)
    assert len(answer) == 16 + int.from_bytes(answer[12:16])
    return int.from_bytes(answer[:4]), answer[16:]


def put_in(one: rig.Running, kind: int, blob: bytes, flags: int = 0) -> int:
    head = (0x0D).to_bytes(4) + flags.to_bytes(4) + kind.to_bytes(4) + len(blob).to_bytes(4)
    return int.from_bytes(one.control(head + blob))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    place = tmp_path / "state"
    place.mkdir()
    return place


@pytest.fixture
def short() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="sw"))
    yield place
    shutil.rmtree(place)


def of(state: Path, *more: str) -> list[str]:
    return ["--tpm2", "--tpmstate", f"dir={state}", *more]


# --- state ------------------------------------------------------------------------------------------

KEYS = {"plain": [], "key": ["--key", "file=KEY,mode=aes-256-cbc"], "password": ["--key", "pwdfile=KEY"]}


def keyed(tmp_path: Path, kind: str) -> list[str]:
    (tmp_path / "key").write_text("ab" * 32)
    return [word.replace("KEY", str(tmp_path / "key")) for word in KEYS[kind]]


@pytest.mark.parametrize("backend", ["dir={}", "backend-uri=file://{}/state"])
@pytest.mark.parametrize("kind", KEYS)
def test_a_tpm_moves_from_swtpm_to_us_and_back(tmp_path: Path, state: Path, kind: str, backend: str) -> None:
    words = ["--tpm2", "--tpmstate", backend.format(state), *keyed(tmp_path, kind)]
    with running(SWTPM, *words) as one:
        put_secret(one, SECRET)
        assert one.stop() == 0
    with running(OURS, *words) as one:
        assert get_secret(one, len(SECRET)) == SECRET
        assert tpm.rc(one.tpm(tpm.nv_write(rig.INDEX, SECRET[::-1]))[0]) == 0
        assert one.stop() == 0
    with running(SWTPM, *words) as one:
        assert get_secret(one, len(SECRET)) == SECRET[::-1]


@pytest.mark.parametrize("kind", KEYS)
def test_so_does_a_tpm_1_2(tmp_path: Path, state: Path, kind: str) -> None:
    words = ["--tpmstate", f"dir={state}", *keyed(tmp_path, kind)]
    with running(OURS, *words) as one:
        public = rig.make_endorsement_key(one)
        assert one.stop() == 0
    with running(SWTPM, *words) as one:
        assert rig.endorsement_key(one) == public
        assert one.stop() == 0
    with running(OURS, *words) as one:
        assert rig.endorsement_key(one) == public


def test_what_is_acknowledged_survives_kill_9(state: Path) -> None:
    with running(OURS, *of(state)) as one:
        put_secret(one, SECRET)
        one.process.kill()
        one.process.wait()
        with running(SWTPM, *of(state)) as other:
            assert get_secret(other, len(SECRET)) == SECRET


@pytest.mark.parametrize(
    ("more", "saved"),
    [
        ("", ["fsync", "renameat TMP2-00.permall", "fsync"]),
        (",fsync=false", ["renameat TMP2-00.permall"]),
        (  # the permanent state is never taken away, only replaced
            ",backup",
            ["fsync", "unlinkat tpm2-00.permall.bak", "linkat tpm2-00.permall", "renameat TMP2-00.permall", "fsync"],
        ),
    ],
)
def test_a_save_is_flushed_before_its_answer_unless_told_otherwise(
    tmp_path: Path, state: Path, more: str, saved: list[str]
) -> None:
    trace = tmp_path / "trace"
    with running(OURS, "--tpm2", "--tpmstate", f"dir={state}{more}", "--seccomp", "action=none") as one:
        calls = "trace=fsync,/unlink,/link,/rename,sendto"
        words = ["strace", "-e", calls, "-o", str(trace), "-p", str(one.process.pid)]
        with tpm.connect(one.data) as sock:
            assert tpm.rc(tpm.transact(sock, tpm.nv_define(rig.INDEX, 8))) == 0
            with subprocess.Popen(words, stderr=subprocess.PIPE) as tracer:
                assert tracer.stderr is not None
                assert b"attached" in tracer.stderr.readline()
                assert tpm.rc(tpm.transact(sock, tpm.nv_write(rig.INDEX, b"a save!!"))) == 0
                tracer.terminate()
    traced = [line.split("(") for line in trace.read_text().splitlines() if "(" in line]
    seen = [f"{call} {rest.split(chr(34))[1]}" if call.endswith("at") else call for call, rest in traced]
    assert seen == [*saved, "sendto"]


def test_a_state_that_does_not_load_is_never_replaced(tmp_path: Path, state: Path) -> None:
    with running(OURS, *of(state)) as one:
        put_secret(one, SECRET)
        assert one.stop() == 0
    permanent = state / "tpm2-00.permall"
    good = permanent.read_bytes()
    garbage = good[:16] + bytes(len(good) - 16)  # of the right form, and nothing that libtpms knows
    broken = [good[:-1], b"", good[:10] + bytes(len(good) - 10), garbage]
    for content in broken:
        permanent.write_bytes(content)
        code, text = refused([*OURS, "socket"], *of(state), "--server", "port=0", "--flags", "not-need-init")
        assert (code, permanent.read_bytes()) == (1, content)
        assert "changed" in text or "as they were" in text
        with running(OURS, *of(state), flags=None) as one:
            assert one.control(INIT_NOW) != OK
            assert one.tpm(tpm.get_random())[0][6:] == bytes.fromhex("00000101")
            permanent.write_bytes(good)
            assert one.control(INIT_NOW) == OK  # the same process, once a good state is there again
            assert one.stop() == 0


def test_no_new_tpm_is_made_beside_parts_of_an_old_one(state: Path) -> None:
    with running(OURS, *of(state)) as one:
        assert one.control(STORE_VOLATILE) == OK
        assert one.stop() == 0
    (state / "tpm2-00.permall").rename(state / "elsewhere")
    code, text = refused([*OURS, "socket"], *of(state), "--server", "port=0", "--flags", "not-need-init")
    assert code == 1
    assert "no new TPM was made" in text
    assert sorted(path.name for path in state.iterdir()) == [".lock", "elsewhere", "tpm2-00.volatilestate"]


def test_the_wrong_key_and_no_key_change_nothing(tmp_path: Path, state: Path) -> None:
    with running(OURS, *of(state), *keyed(tmp_path, "key")) as one:
        put_secret(one, SECRET)
        assert one.stop() == 0
    content = (state / "tpm2-00.permall").read_bytes()
    assert SECRET not in content
    (tmp_path / "key").write_text("cd" * 32)
    wrong = ["--key", f"file={tmp_path}/key,mode=aes-256-cbc"]
    for words, expected in ((wrong, "right key"), ([], "--key"), (["--key", f"pwdfile={tmp_path}/key"], "256 bit key")):
        code, text = refused([*OURS, "socket"], *of(state), *words, "--server", "port=0", "--flags", "not-need-init")
        assert code == 1
        assert expected in text
    assert (state / "tpm2-00.permall").read_bytes() == content


def test_a_backup_steps_in_for_a_state_that_is_refused(state: Path) -> None:
    words = ["--tpm2", "--tpmstate", f"dir={state},backup"]
    with running(OURS, *words) as one:
        put_secret(one, SECRET)
        assert one.stop() == 0
    permanent = state / "tpm2-00.permall"
    for bad in (b"no blob at all", permanent.read_bytes()[:16] + bytes(500)):
        permanent.write_bytes(bad if bad[:2] != b"\2\1" else bad[:6] + len(bad).to_bytes(4) + bad[10:])
        with running(OURS, *words) as one:
            assert get_secret(one, len(SECRET)) == SECRET
            assert one.stop() == 0
    assert len(list(state.glob("tpm2-00.permall.refused-*"))) == 2


def test_no_backup_steps_in_where_the_newest_state_is_sound(tmp_path: Path, state: Path) -> None:
    words = ["--tpm2", "--tpmstate", f"dir={state},backup"]
    start_now = ["--server", "port=0", "--flags", "not-need-init"]
    with running(OURS, *words, *keyed(tmp_path, "key")) as one:
        put_secret(one, SECRET)
        assert one.control(STORE_VOLATILE) == OK
        assert one.stop() == 0
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    assert "tpm2-00.permall.bak" in before
    (tmp_path / "wrong").write_text("cd" * 32)
    wrong = ["--key", f"file={tmp_path}/wrong,mode=aes-256-cbc"]
    for given in (wrong, []):
        assert refused([*OURS, "socket"], *words, *given, *start_now)[0] == 1
        assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    key = SwtpmKey256(bytes.fromhex("ab" * 32))
    volatile = state / "tpm2-00.volatilestate"
    blob = swtpm_blob.unpack_stored(volatile.read_bytes(), key)
    for bad in (b"no blob at all", swtpm_blob.pack_stored(blob[:20] + bytes(len(blob) - 20), key)):
        volatile.write_bytes(bad)
        assert refused([*OURS, "socket"], *words, *keyed(tmp_path, "key"), *start_now)[0] == 1
        volatile.write_bytes(before[volatile.name])
        assert {path.name: path.read_bytes() for path in state.iterdir()} == before


def test_messages_never_go_into_a_state_or_a_socket(tmp_path: Path, state: Path) -> None:
    process = start("socket", *of(state), "--ctrl", f"type=unixio,path={state}/c", "--flags", STARTED,
                    preexec_fn=lambda: os.closerange(0, 3))  # fmt: skip
    deadline = time.monotonic() + rig.READY_SECONDS
    while not (state / "tpm2-00.permall").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    places = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    process.terminate()
    assert ended(process) == 0
    assert places == ["/dev/null"] * 3


def test_two_cannot_have_one_state(state: Path) -> None:
    for first, second in ((SWTPM, OURS), (OURS, SWTPM), (OURS, OURS)):
        with running(first, *of(state)) as one:
            words = [*of(state), "--server", "port=0", "--flags", "not-need-init"]
            code, text = refused([*second, "socket"], *words)
            assert code == 1
            assert "Could not lock access to lockfile" in text
            assert one.stop() == 0


def test_nor_where_the_lock_file_was_deleted(state: Path) -> None:
    with running(OURS, *of(state)) as one:
        put_secret(one, SECRET)
        (state / ".lock").unlink()
        assert tpm.rc(one.tpm(tpm.nv_write(rig.INDEX, SECRET[::-1]))[0]) == 0  # it has made a new one
        assert refused([*OURS, "socket"], *of(state), "--server", "port=0", "--flags", "not-need-init")[0] == 1
        (state / ".lock").unlink()
        with running(SWTPM, *of(state)) as other:
            content = (state / "tpm2-00.permall").read_bytes()
            assert one.tpm(tpm.nv_write(rig.INDEX, SECRET))[0][6:10] != OK
            assert one.control(STOP) == OK
            assert (state / "tpm2-00.permall").read_bytes() == content
            assert other.stop() == 0
        assert one.control(INIT_NOW) == OK
        assert get_secret_after_startup(one) == SECRET[::-1]


def test_a_disk_that_is_full_keeps_the_last_state(state: Path) -> None:
    with running(OURS, *of(state, "--seccomp", "action=none")) as one:
        put_secret(one, SECRET)
        content = (state / "tpm2-00.permall").read_bytes()
        resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        assert one.tpm(tpm.nv_write(rig.INDEX, SECRET[::-1]))[0][6:10] != OK
        assert (state / "tpm2-00.permall").read_bytes() == content
        resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert one.control(INIT_NOW) == OK
        assert get_secret_after_startup(one) == SECRET
        assert one.stop() == 0


# --- control channel --------------------------------------------------------------------------------


@pytest.mark.parametrize("tpm2", [True, False])
def test_swtpm_ioctl_does_what_it_does_with_swtpm(state: Path, tmp_path: Path, tpm2: bool) -> None:
    steps = [
        *(["-i"], ["-e"], ["-l", "3"], ["-l", "5"], ["-r", "3"], ["-h", "measured"], ["-e"], ["-g"], ["-v"]),
        *(["-b", "4096"], ["--info", "1"], ["--save", "permanent", "B"], ["--save", "volatile", "V"], ["--stop"]),
        *(["-b", "3072"], ["--load", "permanent", "B"], ["--load", "volatile", "V"], ["-i"], ["-C"], ["-s"]),
    ]
    seen = {}
    for command in (SWTPM, OURS):
        place = tmp_path / command[0].rpartition("/")[2]
        place.mkdir()
        words = ["--tpmstate", f"dir={place}", *(["--tpm2"] if tpm2 else [])]
        with running(command, *words, flags=None) as one:
            seen[command] = []
            for step in steps:
                done = one.ioctl(*(str(place / word) if word in ("B", "V") else word for word in step))
                seen[command].append((step, done.returncode, done.stdout.replace(" ", ""), done.stderr))
            assert one.process.wait(10) == 0
    assert seen[OURS] == seen[SWTPM]


def test_a_running_tpm_moves_between_swtpm_and_us_by_its_blobs(tmp_path: Path) -> None:
    key = tmp_path / "migration"
    key.write_text("12" * 16)
    for number, (first, second) in enumerate(((SWTPM, OURS), (OURS, SWTPM), (OURS, OURS))):
        places = [tmp_path / f"{number}{name}" for name in "ab"]
        for place in places:
            place.mkdir()
        more = ["--migration-key", f"file={key}"]
        if number == 2:  # keys of two sizes: swtpm cannot do that
            more += keyed(tmp_path, "key")
        with running(first, *of(places[0]), *more) as one, running(second, *of(places[1]), *more, flags=None) as other:
            put_secret(one, SECRET)
            assert tpm.rc(one.tpm(tpm.pcr_extend(16))[0]) == 0
            for kind in (1, 2):
                result, blob = taken_out(one, kind)
                assert result == 0
                assert SECRET not in blob
                assert put_in(other, kind, blob) == 0
            assert taken_out(one, 3)[0] == 0x800
            assert other.control(INIT_DELETING) == OK
            assert get_secret(other, len(SECRET)) == SECRET
            assert other.tpm(tpm.pcr_read(16))[0][-32:] == tpm.extended(b"\x11" * 32)
            first_numbers, other_numbers = one.tpm(tpm.get_random())[0], other.tpm(tpm.get_random())[0]
            assert first_numbers != other_numbers or first is not second
            assert other.stop() == 0


def test_a_tpm_1_2_with_a_saved_state_moves_too(tmp_path: Path) -> None:
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
    words = [["--tpmstate", f"dir={place}"] for place in places]
    with running(OURS, *words[0]) as one, running(OURS, *words[1], flags=None) as other:
        extend = tpm.command12(0x14, (5).to_bytes(4) + b"\x22" * 20)
        assert [tpm.rc(answer) for answer in one.tpm(extend, tpm.command12(0x98))] == [0, 0]
        for kind in (1, 2, 3):
            result, blob = taken_out(one, kind)
            assert result == 0
            assert put_in(other, kind, blob) == 0
        assert other.control(INIT_DELETING) == OK
        read = tpm.command12(0x15, (5).to_bytes(4))
        answers = [other.tpm(read)[0], other.tpm(read)[0]]  # swtpm's target is in failure mode from the first one on
        assert [tpm.rc(answer) for answer in answers] == [0, 0]
        assert answers[0] == one.tpm(read)[0]
        assert other.stop() == 0


def test_a_blob_that_is_refused_drops_what_was_put_in_before(state: Path) -> None:
    with running(OURS, *of(state), flags=None) as one:
        assert one.control(INIT_NOW) == OK
        good = taken_out(one, 1)[1]
        before = (state / "tpm2-00.permall").read_bytes()
        assert put_in(one, 1, good) == 0x0A
        assert one.control(STOP) == OK
        before = (state / "tpm2-00.permall").read_bytes()
        assert put_in(one, 1, good) == 0
        assert put_in(one, 3, good) == 0x34
        assert put_in(one, 1, good[:22] + bytes(len(good) - 22)) != 0
        assert put_in(one, 1, b"\0" * 20) == 0x03
        assert one.control(INIT_NOW) == OK
        assert one.control(STOP) == OK
        assert (state / "tpm2-00.permall").read_bytes()[:16] == before[:16]


def test_a_state_that_is_put_in_is_not_mixed_with_what_was_stored(tmp_path: Path) -> None:
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
    with running(OURS, *of(places[0])) as one, running(OURS, *of(places[1])) as other:
        put_secret(one, SECRET)
        blob = taken_out(one, 1)[1]
        assert tpm.rc(other.tpm(tpm.pcr_extend(16))[0]) == 0
        assert other.control(STORE_VOLATILE) == OK
        assert other.stop() == 0
    with running(OURS, *of(places[1]), flags=None) as other:
        assert put_in(other, 1, blob) == 0
        assert other.control(INIT_NOW) == OK
        assert not (places[1] / "tpm2-00.volatilestate").exists()
        assert other.control(INIT_NOW) == OK
        assert get_secret_after_startup(other) == SECRET
        assert other.tpm(tpm.pcr_read(16))[0][-32:] == bytes(32)


def test_a_volatile_state_that_is_put_in_alone_goes_with_the_stored_one(state: Path) -> None:
    with running(OURS, *of(state)) as one:
        assert tpm.rc(one.tpm(tpm.pcr_extend(16))[0]) == 0
        volatile = taken_out(one, 2)[1]
        one.process.kill()
        one.process.wait()
    content = (state / "tpm2-00.permall").read_bytes()
    for command in (SWTPM, OURS):
        (state / "tpm2-00.permall").write_bytes(content)
        with running(command, *of(state), flags=None) as one:
            assert put_in(one, 2, volatile) == 0
            assert one.control(INIT_DELETING) == OK
            assert one.tpm(tpm.pcr_read(16))[0][-32:] == tpm.extended(b"\x11" * 32)
            assert one.stop() == 0
    (state / "tpm2-00.permall").unlink()
    with running(OURS, *of(state), flags=None) as one:
        assert put_in(one, 2, volatile) != 0
    assert not (state / "tpm2-00.permall").exists()


def test_random_numbers_never_come_twice(state: Path) -> None:
    drawn: dict[tuple[str, ...], list[bytes]] = {}
    for command in (SWTPM, OURS):
        with running(command, *of(state)) as one:
            assert one.control(STORE_VOLATILE) == OK
            blobs = [(kind, taken_out(one, kind)[1]) for kind in (1, 2)]
            assert one.stop() == 0
        drawn[command] = []
        for _ in range(2):
            with running(command, *of(state), flags=None) as one:
                assert [put_in(one, *blob) for blob in blobs] == [0, 0]
                assert one.control(INIT_NOW) == OK
                drawn[command].append(one.tpm(tpm.get_random())[0])
                assert one.control(STORE_VOLATILE) == OK
                one.process.kill()
                one.process.wait()
        for _ in range(2):
            with running(command, *of(state), flags=None) as one:
                assert one.control(INIT_NOW) == OK
                drawn[command].append(one.tpm(tpm.get_random())[0])
                one.process.kill()
                one.process.wait()
        for path in state.iterdir():
            path.unlink()
    assert drawn[SWTPM][0] == drawn[SWTPM][1]
    assert drawn[SWTPM][2] == drawn[SWTPM][3]
    assert len(set(drawn[OURS])) == 4


def test_the_lock_is_released_for_a_migration_only_with_the_option(state: Path) -> None:
    try_lock = ["--server", "port=0", "--flags", "not-need-init"]
    with running(OURS, *of(state)) as one:
        taken_out(one, 3)
        assert refused([*OURS, "socket"], *of(state), *try_lock)[0] == 1
        assert one.stop() == 0
    with running(OURS, *of(state), "--migration", "release-lock-outgoing") as one:
        put_secret(one, SECRET)
        for kind in (1, 2, 3):
            taken_out(one, kind)
        before = (state / "tpm2-00.permall").read_bytes()
        with running(SWTPM, *of(state)) as other:  # the destination, on the same files
            assert get_secret(other, len(SECRET)) == SECRET
            assert one.control((0x13).to_bytes(4) + bytes(4)) == (9).to_bytes(4)
            assert tpm.rc(other.tpm(tpm.nv_write(rig.INDEX, SECRET[::-1]))[0]) == 0
            now = (state / "tpm2-00.permall").read_bytes()
            assert now != before
            assert one.control(STOP) == OK  # what was given away is not written over
            assert (state / "tpm2-00.permall").read_bytes() == now
            assert other.stop() == 0
        assert one.control((0x13).to_bytes(4) + bytes(4)) != OK  # the state is not the one that it had
        assert one.control(INIT_NOW) == OK
        assert get_secret_after_startup(one) == SECRET[::-1]


def get_secret_after_startup(one: rig.Running) -> bytes:
    assert tpm.rc(one.tpm(tpm.STARTUP_CLEAR)[0]) == 0
    return get_secret(one, len(SECRET))


def test_the_source_of_a_migration_that_failed_goes_on(state: Path) -> None:
    with running(OURS, *of(state), "--migration", "release-lock-outgoing") as one:
        put_secret(one, SECRET)
        for kind in (1, 2, 3):
            taken_out(one, kind)
        assert get_secret(one, len(SECRET)) == SECRET
        assert refused([*SWTPM, "socket"], *of(state), "--server", "port=0", "--flags", "not-need-init")[0] == 1


def test_the_destination_takes_the_lock_with_the_first_blob(state: Path, tmp_path: Path) -> None:
    with running(OURS, *of(state), "--migration", "release-lock-outgoing") as one:
        put_secret(one, SECRET)
        with running(OURS, *of(state), "--migration", "incoming", flags=None) as other:
            blobs = [taken_out(one, kind)[1] for kind in (1, 2)]
            assert put_in(other, 1, blobs[0]) == 0x1F
            taken_out(one, 3)
            assert put_in(other, 1, blobs[0]) == 0
            assert put_in(other, 2, blobs[1]) == 0
            assert one.control(SHUTDOWN) == OK
            assert other.control(INIT_DELETING) == OK
            assert get_secret(other, len(SECRET)) == SECRET
            assert other.stop() == 0


def test_a_stored_volatile_state_is_gone_on_from(state: Path) -> None:
    with running(OURS, *of(state)) as one:
        assert tpm.rc(one.tpm(tpm.pcr_extend(16))[0]) == 0
        assert one.control(STORE_VOLATILE) == OK
        assert one.stop() == 0
    for command in (SWTPM, OURS):  # not deleted without the flag
        with running(command, *of(state), flags=None) as one:
            assert one.control(INIT_NOW) == OK
            assert one.tpm(tpm.pcr_read(16))[0][-32:] == tpm.extended(b"\x11" * 32)
            assert one.stop() == 0
    with running(OURS, *of(state), flags=None) as one:
        assert one.control(INIT_DELETING) == OK
        assert not (state / "tpm2-00.volatilestate").exists()
        assert one.tpm(tpm.pcr_read(16))[0][-32:] == tpm.extended(b"\x11" * 32)


def test_reset_saves_what_the_guest_did_not_unless_told_otherwise(state: Path, tmp_path: Path) -> None:
    sizes = {}
    for flags in ("startup-clear", "startup-clear,disable-auto-shutdown"):
        place = tmp_path / flags.replace(",", "-")
        place.mkdir()
        with running(OURS, *of(place), flags=flags) as one:
            put_secret(one, SECRET)
            before = (place / "tpm2-00.permall").stat().st_size
            assert one.stop() == 0
            sizes[flags] = (place / "tpm2-00.permall").stat().st_size - before
    assert sizes["startup-clear"] > 1000
    assert sizes["startup-clear,disable-auto-shutdown"] == 0


# --- sockets ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def connect_tcp(port: int) -> socket.socket:
    deadline = time.monotonic() + rig.READY_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 20)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def start(*words: str, **more: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*OURS, *words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=rig.environment(), **more
    )  # type: ignore[call-overload, no-any-return]


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(rig.READY_SECONDS)
    finally:
        process.kill()
        process.communicate()


def test_several_data_connections_are_served_at_once(state: Path) -> None:
    with running(OURS, *of(state)) as one, tpm.connect(one.data) as first, tpm.connect(one.data) as second:
        for sock in (first, second, first):
            assert tpm.rc(tpm.transact(sock, tpm.get_random())) == 0


def test_what_a_successor_put_in_our_place_is_left_to_it(state: Path, short: Path) -> None:
    other = short / "other"
    other.mkdir()
    words = ["--ctrl", f"type=unixio,path={short}/s.ctrl", "--pid", f"file={short}/pid"]
    first = rig.Running(start("socket", *of(state), *words), short)
    rig.await_ready(first)
    (short / "pid").unlink()
    second = rig.Running(start("socket", *of(other), *words), short)
    deadline = time.monotonic() + rig.READY_SECONDS
    while not (short / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.process.terminate()
    assert ended(first.process) == 0
    kept = (short / "pid").exists(), second.ctrl.exists()
    second.process.terminate()
    assert ended(second.process) == 0
    assert kept == (True, True)
    assert not (short / "pid").exists()
    assert not second.ctrl.exists()


def test_tcp_ports(state: Path) -> None:
    data, control = free_port(), free_port()
    process = start("socket", *of(state), "--server", f"port={data}", "--ctrl", f"type=tcp,port={control}", "--flags",
                    STARTED)  # fmt: skip
    with connect_tcp(data) as sock:
        assert tpm.rc(tpm.transact(sock, tpm.get_random())) == 0
        assert tpm.rc(tpm.transact(sock, tpm.get_random())) == 0
    with connect_tcp(control) as sock:
        sock.sendall(SHUTDOWN)
        assert sock.recv(4) == OK
    assert ended(process) == 0


def test_a_port_of_p_or_of_the_environment_takes_one_command_a_connection(state: Path) -> None:
    for words, environment in ((["-p", "PORT"], {}), (["--server", "type=tcp,disconnect"], {"TPM_PORT": "PORT"})):
        port = str(free_port())
        more = {name: value.replace("PORT", port) for name, value in environment.items()}
        process = subprocess.Popen(
            [*OURS, "socket", "--tpm2", *(word.replace("PORT", port) for word in words), "--flags", STARTED],
            env=rig.environment() | more | {"TPM_PATH": str(state)},
        )
        for _ in range(2):
            with connect_tcp(int(port)) as sock:
                assert tpm.rc(tpm.transact(sock, tpm.get_random())) == 0
                assert sock.recv(1) == b""
        process.terminate()
        assert ended(process) == 0


def test_sockets_that_are_handed_over(state: Path) -> None:
    ours, theirs = socket.socketpair()
    control, controlled = socket.socketpair()
    words = ["--server", f"type=tcp,fd={theirs.fileno()}", "--ctrl", f"type=unixio,clientfd={controlled.fileno()}"]
    process = start("socket", *of(state), *words, "--flags", STARTED, pass_fds=(theirs.fileno(), controlled.fileno()))
    theirs.close()
    controlled.close()
    with ours, control:
        ours.settimeout(20)
        control.settimeout(20)
        assert tpm.rc(tpm.transact(ours, tpm.get_random())) == 0
        control.sendall(GET_CAPABILITY)
        assert len(control.recv(8)) == 8
        ours.close()
        assert ended(process) == 0  # a socket that was handed over implies -t


@pytest.mark.parametrize("form", ["--fd {}", "--server type=unixio,fd={}", "--ctrl type=unixio,fd={}"])
def test_each_other_form_of_a_descriptor(state: Path, short: Path, form: str) -> None:
    if form.startswith("--fd"):
        ours, theirs = socket.socketpair()
    else:
        theirs = socket.create_server(str(short / "s"), family=socket.AF_UNIX)
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(str(short / "s"))
    words = form.format(theirs.fileno()).split()
    process = start("socket", *of(state), *words, "--flags", STARTED, pass_fds=(theirs.fileno(),))
    theirs.close()
    with ours:
        ours.settimeout(20)
        if "--ctrl" in form:
            ours.sendall(SHUTDOWN)
            assert ours.recv(4) == OK
        else:
            assert tpm.rc(tpm.transact(ours, tpm.get_random())) == 0
            process.terminate()
        assert ended(process) == 0


def test_terminate_ends_with_the_connection(state: Path, short: Path) -> None:
    for words, name in ((["-t"], "s"), ([], "c")):
        control = f"type=unixio,path={short}/c" + ("" if words else ",terminate")
        process = start("socket", *of(state), *words, "--server", f"type=unixio,path={short}/s", "--ctrl", control)
        deadline = time.monotonic() + rig.READY_SECONDS
        while not (short / "c").exists() or not (short / "s").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with tpm.connect(short / name) as sock:
            if name == "c":
                sock.sendall(GET_CAPABILITY)
                assert len(sock.recv(8)) == 8
            else:
                assert len(tpm.transact(sock, tpm.get_random())) == 10
        assert ended(process) == 0
        assert not (short / "s").exists()
        assert not (short / "c").exists()


def test_modes_and_owners_of_sockets(state: Path, short: Path) -> None:
    owner = ",uid=nobody,gid=1" if os.geteuid() == 0 else ""
    words = ["--server", f"type=unixio,path={short}/s,mode=0604{owner}", "--ctrl", f"type=unixio,path={short}/c"]
    process = start("socket", *of(state), *words)
    deadline = time.monotonic() + rig.READY_SECONDS
    while not (short / "s").exists() or (short / "s").stat().st_mode & 0o777 != 0o604:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (short / "c").stat().st_mode & 0o777 == 0o770
    if owner:
        assert (short / "s").stat().st_uid == 65534
        assert (short / "s").stat().st_gid == 1
    process.terminate()
    assert ended(process) == 0


def test_a_file_in_the_socket_s_place_is_left_alone(state: Path, short: Path) -> None:
    (short / "precious").write_text("not a socket")
    code, text = refused([*OURS, "socket"], *of(state), "--server", f"type=unixio,path={short}/precious")
    assert code == 1
    assert "left as it is" in text
    assert (short / "precious").read_text() == "not a socket"


# --- process ----------------------------------------------------------------------------------------


def test_a_daemon_is_ready_when_its_parent_ends(state: Path, short: Path) -> None:
    words = ["--server", f"type=unixio,path={short}/s", "--pid", f"file={short}/pid", "--log", f"file={short}/log"]
    command = [*OURS, "socket", *of(state), *words, "-d", "--flags", STARTED]
    subprocess.run(command, check=True, timeout=rig.READY_SECONDS, env=rig.environment())
    pid = int((short / "pid").read_text())
    with tpm.connect(short / "s") as sock:
        assert tpm.rc(tpm.transact(sock, tpm.get_random())) == 0
    assert os.getsid(pid) == pid
    assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + rig.READY_SECONDS
    while (short / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, _ = refused([*OURS, "socket"], "--tpm2", "--tpmstate", f"dir={state}/missing", *words, "-d")
    assert code == 1


def test_log_pid_descriptor_and_systemd_are_served(state: Path, short: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, open(short / "pid", "wb") as pid:
        notified.bind(str(short / "notify"))
        notified.settimeout(rig.READY_SECONDS)
        words = ["--pid", f"fd={pid.fileno()}", "--log", f"file={short}/log,prefix=mine: "]
        process = subprocess.Popen(
            [*OURS, "socket", *of(state), *words, "--ctrl", f"type=unixio,path={short}/c", "--flags", "startup-state"],
            pass_fds=(pid.fileno(),),
            env=rig.environment() | {"NOTIFY_SOCKET": str(short / "notify")},
        )
        assert notified.recv(100) == b"READY=1"
    assert (short / "pid").read_text() == str(process.pid)
    process.terminate()
    assert ended(process) == 0
    assert (short / "log").read_text().startswith("mine: ")
    assert "Startup(state)" in (short / "log").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users and root directories")
def test_runas_and_chroot(short: Path) -> None:
    (short / "jail/state").mkdir(parents=True)
    os.chmod(short, 0o711)
    os.chown(short / "jail/state", 65534, 65534)
    words = ["--tpmstate", "dir=/state", "--chroot", f"{short}/jail", "--runas", "nobody", "--tpm2"]
    words += ["--ctrl", "type=unixio,path=/state/c", "--server", "type=unixio,path=/state/s", "--flags", STARTED]
    (short / "jail/state/key").write_text("ab" * 16)
    process = start("socket", *words, "--key", "file=/state/key")
    deadline = time.monotonic() + rig.READY_SECONDS
    while not (short / "jail/state/tpm2-00.permall").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "Uid:\t65534\t65534\t65534\t65534" in status
    assert os.readlink(f"/proc/{process.pid}/root") == str(short / "jail")
    with tpm.connect(short / "jail/state/s") as sock:
        assert tpm.rc(tpm.transact(sock, tpm.nv_define(rig.INDEX, 8))) == 0
    process.terminate()
    assert ended(process) == 0


def test_it_answers_to_the_name_swtpm(state: Path, tmp_path: Path) -> None:
    name = tmp_path / "swtpm"
    name.symlink_to(OURS[0])
    with running((str(name),), *of(state)) as one:
        put_secret(one, SECRET)
    help_text = subprocess.run([name, "socket", "--help"], capture_output=True, text=True, check=True).stdout
    assert help_text.startswith("Usage: swtpm socket [options]")


def test_what_it_prints(state: Path, tmp_path: Path) -> None:
    def printed(command: tuple[str, ...], *words: str) -> dict[str, object]:
        done = subprocess.run([*command, "socket", *words], capture_output=True, text=True, check=True, timeout=20)
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    for words in (["--tpm2"], []):
        theirs = printed(SWTPM, *words, "--print-capabilities")
        ours = printed(OURS, *words, "--print-capabilities")
        assert isinstance(theirs["features"], list)
        assert isinstance(ours["features"], list)
        assert set(theirs["features"]) <= set(ours["features"])
        assert ours["type"] == "swtpm"
    with running(OURS, *of(state)) as one:
        put_secret(one, SECRET)
        assert one.control(STORE_VOLATILE) == OK
        states = printed(OURS, *of(state), "--print-states")  # without a lock, which swtpm 0.7.1 wants
        one.process.kill()
        one.process.wait()
        assert states == printed(SWTPM, *of(state), "--print-states")
        assert [each["name"] for each in states["states"]] == ["permall", "volatilestate"]  # type: ignore[attr-defined]
    assert printed(OURS, "--tpm2", "--print-info", "1")["TPMSpecification"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Missing TPM interface type."),
        (["bogus"], "Unsupported TPM interface type 'bogus'."),
        (["cuse", "-n", "x"], "The cuse interface is not supported"),
        (["socket", "stray"], "swtpm: Unknown parameter 'stray'"),
        (["socket", "--bogus"], "socket: unrecognized option '--bogus'\nUsage: "),
        (["socket", "--server", "port=0"], "Missing backend URI"),
        (["socket", "--tpm2", "--tpmstate", "dir=/nonexistent", "--server", "port=0"], "/nonexistent"),
        (
            ["socket", "--tpm2", "--tpmstate", "dir=/tmp", "--server", "port=0", "--profile", "name=null"],
            "libtpms 0.10",
        ),
        (["socket", "--tpm2", "--tpmstate", "dir=/tmp", "--server", "port=0", "--pcap", "file=/tmp/x"], "--pcap"),
        (["socket", "--key", "file=/nonexistent", "--tpmstate", "dir=/tmp"], "Unable to open file /nonexistent"),
        (["socket", "--ctrl", "type=unixio,fd=77"], "Bad filedescriptor 77 for UnixIO control channel"),
        (["socket", "--runas", "nobodyatall"], "User 'nobodyatall' does not exist"),
        (
            ["socket", "--tpmstate", "dir=/tmp", "--server", "port=1,bindaddr=nowhere"],
            "Could not parse the bind address",
        ),
        (["chardev", "--vtpm-proxy", "--tpmstate", "dir=/tmp"], "/dev/vtpmx"),
        (["chardev", "-c", "/nonexistent", "--tpmstate", "dir=/tmp"], "Cannot open /nonexistent"),
    ],
)
def test_mistakes_are_said_and_end_with_1(words: list[str], expected: str) -> None:
    if "--vtpm-proxy" in words and Path("/dev/vtpmx").exists():
        pytest.skip("this host has a vTPM proxy")
    code, text = refused(OURS, *words)
    assert code == 1
    assert expected in text
    assert "Traceback" not in text


def test_a_character_device_that_is_a_socket_or_a_terminal_is_served(state: Path) -> None:
    ours, theirs = socket.socketpair()
    process = start(
        "chardev", *of(state), "--fd", str(theirs.fileno()), "--flags", STARTED, pass_fds=(theirs.fileno(),)
    )
    theirs.close()
    with ours:
        ours.settimeout(20)
        assert tpm.rc(tpm.transact(ours, tpm.get_random())) == 0
        set_locality = bytes.fromhex("8001 0000000b 20001000 03")
        assert tpm.rc(tpm.transact(ours, set_locality)) == 0x101  # not allowed without the option
    assert ended(process) == 0
    assert sys.executable


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["socket", "--nosuch"], 1),
        (["socket", "--manager", "--nosuch"], 2),
        (["socket", "--manager=/nowhere", "--tpmstate", "dir=/x"], 2),
    ],
)
def test_wrong_words_are_swtpms_one_or_the_managers_two(
    words: list[str], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert swtpm_main(words) == code
    assert capfd.readouterr().err
