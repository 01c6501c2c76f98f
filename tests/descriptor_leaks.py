"""Comparing what is open before and after."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def open_descriptors() -> dict[str, str]:
    """Return what /proc/self/fd shows: descriptor number to what it refers to."""
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one with which the directory itself was read
    return links


@contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """Assert that the block leaves open exactly what was open before it."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before
