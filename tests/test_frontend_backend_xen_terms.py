"""What a back end is told about a device, how often it looks, and what a vCPU's registers say."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend_backend.xen_hypercalls import DomainInfo, Hypervisor
from frontend_backend.xen_mapping import Mapping
from frontend_backend.xen_pace import Pace
from frontend_backend.xen_terms import Place, Terms, parse_uuid
from frontend_backend.xen_vcpu import CONTEXT_BYTES, speaks_of_a_past, was_restored
from frontend_backend.xs_trio import Permission
from manager.xen_backend_identity import may_write


def test_a_place_names_both_ends() -> None:
    place = Place(own=3, domain=5, device=1)
    assert place.path == "/local/domain/3/backend/vtpm/5/1"
    assert place.front == "/local/domain/5/device/vtpm/1"


@given(localities=st.integers(0, 255), claimed=st.integers(0, 255))
def test_only_the_localities_of_the_map_may_be_claimed(localities: int, claimed: int) -> None:
    assert Terms(localities=localities).allows(claimed) == (claimed in range(5) and bool(localities & 1 << claimed))


@pytest.mark.parametrize(
    "untrusted",
    [None, b"", b"11111111222233334444555555555555", b"{11111111-2222-3333-4444-555555555555}", b"\xb2" * 36,
     b"11111111-2222-3333-4444-55555555555g", b"11111111-2222-3333-4444-555555555555\n"],
)  # fmt: skip
def test_what_is_no_uuid_is_none(untrusted: bytes | None) -> None:
    assert parse_uuid(untrusted) is None


def test_a_uuid_is_sixteen_bytes_in_small_or_capital_letters() -> None:
    assert parse_uuid(b"ABCDEF00-1111-2222-3333-444444444444") == parse_uuid(b"abcdef00-1111-2222-3333-444444444444")
    assert parse_uuid(b"ABCDEF00-1111-2222-3333-444444444444") == bytes.fromhex("abcdef00111122223333444444444444")


@given(steps=st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_a_pace_lets_no_more_through_than_its_burst_and_rate(steps: list[float]) -> None:
    pace = Pace(rate=5.0, burst=10.0)
    now = 0.0
    for spent, step in enumerate(steps, start=1):
        now += step
        now += pace.spend(now)
        assert spent <= 10 + 5 * now + 1e-6


def test_only_nodes_that_a_domain_cannot_write_are_believed() -> None:
    assert not may_write((Permission(0), Permission(5, read=True)), 5)
    assert may_write((Permission(5), Permission(0, read=True)), 5), "its own"
    assert may_write((Permission(0), Permission(5, read=True, write=True)), 5)
    assert may_write((Permission(0, read=True, write=True),), 5), "everybody's"
    assert not may_write((Permission(0, read=True, write=True), Permission(5, read=True)), 5), "but not this one's"
    assert may_write((), 5), "nothing is known"


@pytest.mark.parametrize(("hvm", "offset", "value"), [(False, 5112, 0xFFFFFFFF81000000), (True, 4984, 0x80050033)])
def test_a_processor_that_a_kernel_ran_on_speaks_of_it(hvm: bool, offset: int, value: int) -> None:
    fresh = bytearray(CONTEXT_BYTES)
    fresh[4984:4992] = (0x11).to_bytes(8, "little")  # CR0 as a PVH guest starts: protected mode, no paging
    assert not speaks_of_a_past(bytes(fresh), hvm=hvm)
    fresh[offset : offset + 8] = value.to_bytes(8, "little")
    assert speaks_of_a_past(bytes(fresh), hvm=hvm)


class SmallContext(Hypervisor):
    """Xen as it answers for a 32-bit guest: its processor takes half the room, what lies behind stays as it was."""

    def domctl(self, command: int, domain: int, payload: bytes = b"") -> tuple[int, bytes]:
        del command
        self.data[:2800] = bytes(2800)
        return domain, payload


def test_what_another_domain_left_in_the_buffer_is_nobodys_past() -> None:
    pages = os.memfd_create("pages")
    os.ftruncate(pages, 4 * 4096)
    xen = SmallContext(-1, Mapping(pages, 0, 4 * 4096))
    os.close(pages)
    xen.data[:] = b"\xff" * len(xen.data)
    info = DomainInfo(5, "", 0, paused=True, dying=False, shutdown_code=None, hvm=False, ssidref=0)
    assert was_restored(xen, info) is False
