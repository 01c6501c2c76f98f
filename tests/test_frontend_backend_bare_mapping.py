"""A mapping without a descriptor: shared, and never left dangling."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend_backend.bare_mapping import map_without_descriptor
from frontend_backend.local import LocalRing, map_page
from frontend_backend.tpmif import PAGE_SIZE

NAME = "bare-mapping-test"


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = os.memfd_create(NAME)
    os.ftruncate(descriptor, PAGE_SIZE)
    yield descriptor
    os.close(descriptor)


def mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count(NAME)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_is_shared_and_holds_no_descriptor(memfd: int) -> None:
    before = descriptors()
    ours, theirs = map_without_descriptor(memfd), map_without_descriptor(memfd)
    assert descriptors() == before
    assert (len(ours), ours.readonly, ours.format) == (PAGE_SIZE, False, "B")
    ours[-4:] = b"last"
    assert bytes(theirs[-4:]) == os.pread(memfd, 4, PAGE_SIZE - 4) == b"last"
    standard = map_page(memfd)
    assert descriptors() == before + 1 or sys.version_info >= (3, 13), "or there is no need for it any more"
    standard.release()


def test_it_is_unmapped_with_its_last_view_and_not_before(memfd: int) -> None:
    page = map_without_descriptor(memfd)
    words, slice_ = page.cast("Q"), page[8:16]
    assert mapped() == 1
    page.release()
    words[1] = 0x0102030405060708
    assert slice_[0] == 8, "a view of a released page still has memory under it"
    slice_.release()
    assert mapped() == 1
    words.release()
    del page, words, slice_
    assert mapped() == 0


def test_what_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_without_descriptor(-1)


def test_a_ring_costs_one_descriptor() -> None:
    before = descriptors()
    front, back = LocalRing.pair(map_without_descriptor)
    for ring in (front, back):
        ring.forget_page_descriptor()
    assert descriptors() == before + 2
    front.close()
    back.close()
    assert descriptors() == before
