"""Which pages a start writes to is seen, and what is copied ahead is what it wrote to."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from vtpm_instance import footprint, syscalls
from vtpm_instance.footprint import LookAt

PAGES = 64


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def writing(memory: mmap.mmap, before: tuple[int, ...], after: tuple[int, ...]) -> Callable[[LookAt], None]:
    """A life that writes to pages, and is looked at by one that was forked between the two."""

    def life(look_at: LookAt) -> None:
        me = os.getpid()
        for page in before:
            memory[page * mmap.PAGESIZE] = 1
        told, tell = os.pipe()
        observer = os.fork()
        if observer == 0:
            os.close(tell)
            os.read(told, 1)
            look_at(me)
            os._exit(0)
        for page in after:
            memory[page * mmap.PAGESIZE] = 1
        os.close(tell)
        os.waitpid(observer, 0)

    return life


def test_what_is_written_after_the_observer_was_forked_is_found_and_nothing_else() -> None:
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * len(memory))
        start = address_of(memory)
        found = footprint.written_in(writing(memory, (2, 3), (3, 7, 8, 40)))
        mine = {(page - start) // mmap.PAGESIZE for page in found if start <= page < start + len(memory)}
        assert mine == {3, 7, 8, 40}


def test_a_life_that_fails_is_none_that_is_known() -> None:
    def life(_look_at: LookAt) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert footprint.written_in(life) == set()


def test_neighbours_are_one_call() -> None:
    page = mmap.PAGESIZE
    calls = footprint.calls_to_copy({page * number for number in (1, 2, 3, 7, 9)})
    assert [(address // page, length // page) for _, address, length, _ in calls] == [(1, 3), (7, 1), (9, 1)]


def test_hints_copy_pages_and_those_that_mean_nothing_harm_nobody() -> None:
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * len(memory))
        start, page = address_of(memory), mmap.PAGESIZE
        calls = footprint.calls_to_copy({start + 5 * page, start + 6 * page, 1 << 46})

        def life(look_at: LookAt) -> None:
            me = os.getpid()
            told, tell = os.pipe()
            observer = os.fork()
            if observer == 0:
                os.close(tell)
                os.read(told, 1)
                look_at(me)
                os._exit(0)
            syscalls.advise(calls)
            os.close(tell)
            os.waitpid(observer, 0)

        found = footprint.written_in(life)
        assert {(one - start) // page for one in found if start <= one < start + len(memory)} == {5, 6}
        assert memory[5 * page : 7 * page] == b"x" * (2 * page)


def test_a_spawner_knows_hundreds_of_pages_that_every_start_writes_to() -> None:
    script = "from vtpm_instance.warm import warm_up; print(sum(length for _, _, length, _ in warm_up()) // 4096)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 300 < int(run.stdout) < 2000, "a thousand or so are copied until the first answer"
