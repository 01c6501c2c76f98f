"""One instance end to end: a real keeper, a real instance, real libtpms, a real ring."""

import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vtpm_instance_rig import (
    GET_TEST_RESULT,
    SHUTDOWN_CLEAR,
    Bench,
    KeeperProcess,
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
    receive_response,
    running_keeper,
    transact,
    until,
)

from frontend_backend.messages_instance import InstanceState, Orders

INDEX = 0x01500001
MakeBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


@pytest.fixture
def make_bench(keeper: KeeperProcess) -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(**options: str) -> Bench:
        made.append(Bench(keeper, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def test_a_fresh_vtpm_serves_and_its_first_state_is_committed_before_it_is_ready(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert bench.record.states == [InstanceState.READY]
    assert (bench.record.generation, bench.record.fresh) == (1, False)
    with bench.data() as sock:
        assert rc(transact(sock, get_random(16))) == 0
        assert rc(transact(sock, pcr_extend(16))) == 0
        assert transact(sock, pcr_read(16))[-32:] == extended(b"\x11" * 32)
