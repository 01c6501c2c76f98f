"""The wrapper on the real library, in this process: one TPM at a time."""

import hashlib
import struct
from collections.abc import Iterator

import pytest
from vtpm_instance_commands import (
    GET_TEST_RESULT,
    SHUTDOWN_STATE,
    STARTUP_CLEAR,
    STARTUP_STATE,
    command12,
    extended,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    rc,
)

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.errors import LibtpmsError, LibtpmsMisuseError, StateRefusedError
from vtpm_instance.libtpms import PERMANENT, SAVED, VOLATILE, Tpm, the_tpm

V20, V12 = TpmFamily.TPM_2_0, TpmFamily.TPM_1_2
INDEX = 0x01500001
STARTUP_12 = command12(0x99, b"\0\1")
STARTUP_12_STATE = command12(0x99, b"\0\2")


@pytest.fixture
def tpm() -> Iterator[Tpm]:
    tpm = the_tpm()
    yield tpm
    tpm.terminate()


def started(tpm: Tpm) -> dict[str, bytes]:
    blobs: dict[str, bytes] = {}
    tpm.start(V20, blobs, fresh=True)
    assert rc(tpm.process(STARTUP_CLEAR)) == 0
    return blobs


def test_there_is_one_tpm_a_process(tpm: Tpm) -> None:
    assert the_tpm() is tpm
    assert tpm.version() >= (0, 9, 0)


def test_extends_are_those_of_hashlib(tpm: Tpm) -> None:
    started(tpm)
    for digest in (b"\x11" * 32, b"\x22" * 32):
        assert rc(tpm.process(pcr_extend(7, digest))) == 0
    assert tpm.process(pcr_read(7))[-32:] == extended(b"\x11" * 32, b"\x22" * 32)


def test_what_is_stored_is_in_the_callers_dict_before_the_hook_is_told(tpm: Tpm) -> None:
    told: list[tuple[str, bool]] = []
    blobs: dict[str, bytes] = {}
    tpm.start(V20, blobs, lambda name, content: told.append((name, blobs[name] == content)), fresh=True)
    tpm.process(STARTUP_CLEAR)
    told.clear()
    assert rc(tpm.process(nv_define(INDEX, 8))) == 0
    assert rc(tpm.process(nv_write(INDEX, b"12345678"))) == 0
    assert rc(tpm.process(get_random())) == 0
    assert told == [(PERMANENT, True)] * 2


def test_state_comes_back_from_the_blobs(tpm: Tpm) -> None:
    blobs = started(tpm)
    for packet in (nv_define(INDEX, 4), nv_write(INDEX, b"back"), pcr_extend(7), SHUTDOWN_STATE):
        assert rc(tpm.process(packet)) == 0
    tpm.terminate()
    tpm.start(V20, dict(blobs))
    assert rc(tpm.process(STARTUP_STATE)) == 0
    assert nv_content(tpm.process(nv_read(INDEX, 4))) == b"back"
    assert tpm.process(pcr_read(7))[-32:] == extended(b"\x11" * 32)


def test_a_volatile_state_resumes_without_startup(tpm: Tpm) -> None:
    blobs = started(tpm)
    tpm.process(pcr_extend(7))
    volatile = tpm.volatile()
    tpm.terminate()
    tpm.start(V20, {**blobs, VOLATILE: volatile})
    assert tpm.process(pcr_read(7))[-32:] == extended(b"\x11" * 32)


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, 100), slice(0, -5), slice(9, None)])
def test_a_damaged_permanent_state_is_refused_and_not_replaced_by_a_fresh_tpm(tpm: Tpm, kept: slice) -> None:
    good = started(tpm)[PERMANENT]
    tpm.terminate()
    bad = good[kept]
    blobs = {PERMANENT: bad}
    with pytest.raises(StateRefusedError):
        tpm.start(V20, blobs)
    assert blobs == {PERMANENT: bad}
    assert tpm.running is None
    tpm.start(V20, {PERMANENT: good})
    assert rc(tpm.process(STARTUP_CLEAR)) == 0


@pytest.mark.parametrize("cut", [0, 2, 100, -4])
def test_a_damaged_volatile_state_is_refused(tpm: Tpm, cut: int) -> None:
    blobs = started(tpm)
    volatile = tpm.volatile()[:cut]
    tpm.terminate()
    with pytest.raises(StateRefusedError):
        tpm.start(V20, {**blobs, VOLATILE: volatile})
    assert tpm.running is None


@pytest.mark.parametrize("blobs", [{}, {VOLATILE: b"x"}, {PERMANENT: b"x", "other": b"y"}])
def test_blobs_that_cannot_be_a_state_are_refused(tpm: Tpm, blobs: dict[str, bytes]) -> None:
    with pytest.raises(StateRefusedError):
        tpm.start(V20, blobs)


def test_the_state_of_the_other_family_is_refused(tpm: Tpm) -> None:
    blobs = started(tpm)
    tpm.terminate()
    with pytest.raises(StateRefusedError):
        tpm.start(V12, dict(blobs))


def test_an_exception_of_the_hook_comes_out_of_process_and_the_tpm_fails(tpm: Tpm) -> None:
    blobs = started(tpm)
    tpm.terminate()

    def full(_name: str, _content: bytes | None) -> None:
        raise OSError(28, "no room")

    tpm.start(V20, blobs, full)
    with pytest.raises(OSError, match="no room"):
        tpm.process(STARTUP_CLEAR)
    assert rc(tpm.process(GET_TEST_RESULT)) in (0, 0x101)
    assert rc(tpm.process(get_random())) == 0x101


def test_an_exception_of_the_hook_comes_out_of_start(tpm: Tpm) -> None:
    def full(_name: str, _content: bytes | None) -> None:
        raise OSError(28, "no room")

    with pytest.raises(OSError, match="no room"):
        tpm.start(V20, {}, full, fresh=True)
    assert tpm.running is None


def test_wrong_order_of_calls_is_refused_by_us_because_libtpms_does_not(tpm: Tpm) -> None:
    with pytest.raises(LibtpmsMisuseError):
        tpm.process(GET_TEST_RESULT)
    with pytest.raises(LibtpmsMisuseError):
        tpm.volatile()
    blobs = started(tpm)
    with pytest.raises(LibtpmsMisuseError):
        tpm.start(V20, blobs)
    with pytest.raises(LibtpmsMisuseError):
        tpm.process(bytes(4097))
    with pytest.raises(LibtpmsMisuseError):
        tpm.buffer_size(V20, 3000)
    tpm.terminate()
    with pytest.raises(LibtpmsMisuseError):
        tpm.start(V20, blobs, fresh=True)


def test_the_locality_of_a_command_is_what_the_tpm_sees(tpm: Tpm) -> None:
    started(tpm)
    reset = struct.pack(">I", 20)  # PCR 20 may be reset at localities 2 and 4 only
    packet = struct.pack(">HII", 0x8002, 27, 0x13D) + reset + struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    assert rc(tpm.process(packet, 0)) == 0x907  # TPM_RC_LOCALITY
    assert rc(tpm.process(packet, 2)) == 0


def test_buffer_sizes_and_cancel(tpm: Tpm) -> None:
    assert tpm.buffer_size(V20) == (4096, 2808, 4096)
    started(tpm)
    assert tpm.cancel() == 0


def test_tpm_12_starts_extends_saves_and_restores(tpm: Tpm) -> None:
    deleted: list[str] = []
    blobs: dict[str, bytes] = {}

    def note(name: str, content: bytes | None) -> None:
        if content is None:
            deleted.append(name)

    tpm.start(V12, blobs, note, fresh=True)
    extend = command12(0x14, struct.pack(">I", 10) + b"\x01" * 20)
    read = command12(0x15, struct.pack(">I", 10))
    value = hashlib.sha1(bytes(20) + b"\x01" * 20).digest()
    assert [rc(tpm.process(packet)) for packet in (STARTUP_12, extend, command12(0x98))] == [0, 0, 0]
    assert set(blobs) == {PERMANENT, SAVED}
    tpm.terminate()
    tpm.start(V12, blobs, note)
    assert rc(tpm.process(STARTUP_12_STATE)) == 0
    assert tpm.process(read)[10:] == value
    assert deleted == [SAVED]


def test_a_libtpms_error_names_the_call() -> None:
    assert str(LibtpmsError("Process", 0x26)) == "libtpms: Process failed with 0x26"
