"""Quotas inside an instance: the bucket's arithmetic on a given clock, and what a TPM may define."""

import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_vtpm_instance_vtpm import Parts
from vtpm_instance_commands import (
    STARTUP_CLEAR,
    authorised,
    command12,
    get_random,
    nv_define,
    nv_read,
    nv_write,
    rc,
    sized,
)

from frontend_backend.tpmhdr import TpmFamily, command
from storage.state_image import Emulator
from vtpm_instance.libtpms import PERMANENT, Tpm, the_tpm
from vtpm_instance.metered import FRESH_STATE, INDEX_BYTES, OBJECT_BYTES, Bucket, Limits, MeteredVtpm, growth_of
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import Startup

INDEX = 0x1500016


class Clock:
    def __init__(self) -> None:
        self.now, self.looks = 1000.0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


def test_a_bucket_lets_a_second_s_worth_through_and_then_its_rate() -> None:
    clock = Clock()
    bucket = Bucket(10, clock.now)
    assert [bucket.take(1, clock) for _ in range(10)] == [0.0] * 10
    assert clock.looks == 0, "nobody looks at a clock below the rate"
    for _ in range(50):
        wait = bucket.take(1, clock)
        assert wait == pytest.approx(0.1)
        clock.now += wait


def test_a_bucket_fills_up_while_nothing_is_taken_and_no_further() -> None:
    clock = Clock()
    bucket = Bucket(10, clock.now)
    for _ in range(10):
        bucket.take(1, clock)
    clock.now += 3600.0
    assert [bucket.take(1, clock) for _ in range(10)] == [0.0] * 10
    assert bucket.take(1, clock) > 0.0


def test_no_rate_is_no_limit() -> None:
    clock = Clock()
    bucket = Bucket(0, clock.now)
    assert {bucket.take(1_000_000, clock) for _ in range(1000)} == {0.0}
    assert clock.looks == 0


def test_a_clock_that_goes_backwards_gives_nothing_away() -> None:
    clock = Clock()
    bucket = Bucket(2, clock.now)
    clock.now -= 500.0
    assert [bucket.take(1, clock) for _ in range(3)] == [0.0, 0.0, 0.5]


@given(st.integers(1, 10_000), st.lists(st.tuples(st.integers(0, 20), st.floats(0.0, 2.0)), max_size=200))
def test_whoever_waits_as_told_never_gets_more_than_the_rate_and_a_second_s_worth(
    rate: int, steps: list[tuple[int, float]]
) -> None:
    clock = Clock()
    began = clock.now
    bucket, taken = Bucket(rate, began), 0
    for count, pause in steps:
        taken += count
        clock.now += bucket.take(count, clock)
        assert taken <= rate + rate * (clock.now - began) + 1e-6 * rate
        clock.now += pause


def test_a_machine_that_is_switched_off_and_on_all_the_time_saves_no_more_than_its_share(tmp_path: Path) -> None:
    parts, clock = Parts(tmp_path / "state.img"), Clock()

    def pause(seconds: float) -> None:
        clock.now += seconds

    emulator = Emulator("libtpms", "0.9.2")
    keeper = StateKeeper(parts.record.vtpm, parts.record.lease, parts.descriptor, parts.link, emulator)
    limits = Limits(saves_per_second=2)
    vtpm = MeteredVtpm(
        the_tpm(), keeper, TpmFamily.TPM_2_0, Startup.NONE, lambda _condition, _cause: None, limits, clock, pause
    )
    began = clock.now
    vtpm.start(power=False)
    for _ in range(10):
        vtpm.power_on()
        vtpm.execute(STARTUP_CLEAR, 0)
        vtpm.power_off()
    assert parts.record.commits > 20
    assert parts.record.commits <= 2 + 2 * (clock.now - began)
    parts.close()


# NV


@pytest.fixture
def tpm() -> Iterator[tuple[Tpm, dict[str, bytes]]]:
    blobs: dict[str, bytes] = {}
    the_tpm().start(TpmFamily.TPM_2_0, blobs, fresh=True)
    assert rc(the_tpm().process(STARTUP_CLEAR)) == 0
    yield the_tpm(), blobs
    the_tpm().terminate()


def defined_with(index: int, size: int, auth: bytes, policy: bytes) -> bytes:
    public = struct.pack(">IHI", index, 0xB, 0x20006) + sized(policy) + struct.pack(">H", size)
    return authorised(0x12A, (0x40000001).to_bytes(4), sized(auth) + sized(public))


def test_a_fresh_tpm_has_the_state_that_quotas_begin_at(tpm: tuple[Tpm, dict[str, bytes]]) -> None:
    assert len(tpm[1][PERMANENT]) == FRESH_STATE[TpmFamily.TPM_2_0]
    the_tpm().terminate()
    blobs: dict[str, bytes] = {}
    the_tpm().start(TpmFamily.TPM_1_2, blobs, fresh=True)
    assert len(blobs[PERMANENT]) == FRESH_STATE[TpmFamily.TPM_1_2]


@pytest.mark.parametrize(
    "command",
    [
        nv_define(INDEX, 1),
        nv_define(INDEX, 2048),
        defined_with(INDEX, 100, b"", bytes(32)),
        defined_with(INDEX, 8, b"\x01" * 20, b""),
        defined_with(INDEX, 64, b"\x01" * 7, bytes(32)),
    ],
)
def test_what_an_index_takes_is_known_before(tpm: tuple[Tpm, dict[str, bytes]], command: bytes) -> None:
    before = len(tpm[1][PERMANENT])
    assert rc(tpm[0].process(command)) == 0
    assert growth_of(TpmFamily.TPM_2_0, command) == len(tpm[1][PERMANENT]) - before


def test_what_a_new_authorisation_value_takes_is_known_before(tpm: tuple[Tpm, dict[str, bytes]]) -> None:
    """Or small indices could be made larger than they were when they were asked for."""
    process = tpm[0].process
    change = (0x13B).to_bytes(4)
    policy = sha256(bytes(32) + (0x16C).to_bytes(4) + change).digest()  # PolicyCommandCode: it takes the ADMIN role
    assert rc(process(defined_with(INDEX, 8, b"", policy))) == 0
    begun = process(command(0x176, b"\x40\0\0\7" * 2 + sized(bytes(16)) + sized(b"") + b"\1" + b"\0\x10\0\x0b"))
    session = begun[10:14]
    assert rc(process(command(0x16C, session + change))) == 0
    authorisations = session + sized(b"") + b"\0" + sized(b"")
    body = INDEX.to_bytes(4) + len(authorisations).to_bytes(4) + authorisations + sized(b"\x01" * 32)
    packet = command(0x13B, body, 0x8002)
    before = len(tpm[1][PERMANENT])
    assert rc(process(packet)) == 0
    assert growth_of(TpmFamily.TPM_2_0, packet) == len(tpm[1][PERMANENT]) - before == 32


@pytest.mark.parametrize("make", [lambda: nv_read(INDEX, 8), lambda: nv_write(INDEX, b"x"), get_random])
def test_other_commands_ask_for_nothing(make: Callable[[], bytes]) -> None:
    assert growth_of(TpmFamily.TPM_2_0, make()) == 0
    assert growth_of(TpmFamily.TPM_1_2, make()) == 0


def test_a_persistent_object_needs_room_and_its_removal_none() -> None:
    evict = authorised(0x120, (0x40000001).to_bytes(4) + (0x80000000).to_bytes(4), (0x81000001).to_bytes(4))
    assert growth_of(TpmFamily.TPM_2_0, evict) == OBJECT_BYTES
    removal = authorised(0x120, (0x40000001).to_bytes(4) + (0x81000001).to_bytes(4), (0x81000001).to_bytes(4))
    assert growth_of(TpmFamily.TPM_2_0, removal) == 0


def test_an_index_of_a_tpm_1_2_asks_for_its_data() -> None:
    pcrs = b"\0\3\0\0\0\x1f" + bytes(20)
    public = b"\0\x18" + (0x10000).to_bytes(4) + pcrs + pcrs + b"\0\x17\0\0\0\1" + b"\0\0\0" + (77).to_bytes(4)
    assert growth_of(TpmFamily.TPM_1_2, command12(0xCC, public + bytes(20))) == 77 + INDEX_BYTES


@given(st.binary(max_size=120), st.sampled_from([0x12A, 0x120, 0x13B, 0xCC]), st.sampled_from(list(TpmFamily)))
def test_what_makes_no_sense_is_left_to_the_tpm(body: bytes, code: int, family: TpmFamily) -> None:
    command = b"\x80\x02" + (10 + len(body)).to_bytes(4) + code.to_bytes(4) + body
    assert growth_of(family, command) >= 0
