"""Counted before they are spent: descriptors, running vTPMs, vTPMs of a group, crashes."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from manager_rig import ModelTpm, installation, running_daemon

from frontend_backend.messages_admin import ExitCode
from manager.capacity import Capacity, descriptor_limit_of, descriptors_in_use, room_of_keeper
from manager.client import RemoteError
from manager.config import InstanceConfig, QuotaConfig
from manager.crash_budget import CrashBudget
from manager.errors import BusyError


def test_the_manager_has_one_descriptor_for_each_and_as_many_keepers_as_it_takes() -> None:
    assert Capacity(0, 20_000, 20_000, 65_530).most == 19_232
    assert Capacity(0, 1024, 20_000, 65_530).most == 256
    assert Capacity(10, 20_000, 20_000, 65_530).most == 10
    assert Capacity(30_000, 20_000, 20_000, 65_530).most == 19_232
    assert Capacity(0, 100, 100, 65_530).most == 0
    assert Capacity(0, 524_288, 524_288, 65_530).most == 63_530, "each ring is a mapping"
    assert Capacity(0, 20_000, 84, 65_530).most == 64 * 4, "as many keepers as there may be"
    assert Capacity(0, 20_000, 20_000, 65_530, per_keeper=10).most == 640


def test_what_fits_into_a_keeper() -> None:
    assert room_of_keeper(20_000) == 3987
    assert room_of_keeper(20_000, per_keeper=100) == 100
    assert room_of_keeper(84, per_keeper=100) == 4
    assert room_of_keeper(0) == 0


def test_what_is_found_is_this_machines() -> None:
    found = Capacity.found(0, 20_000, 7)
    assert (found.keeper_limit, found.per_keeper) == (20_000, 7)
    assert found.mappings > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a /proc of its own")
def test_capacity_is_found_where_proc_shows_processes_only() -> None:
    """systemd's ProcSubset=pid hides /proc/sys."""
    find = "import os; from manager.capacity import Capacity; print(Capacity.found(0, 20_000).mappings)"
    script = 'mount -t proc -o subset=pid proc /proc || exit 77; test ! -e /proc/sys && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, find],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip(f"mounting is not allowed here: {done.stderr}")
    assert (done.returncode, done.stdout) == (0, "65530\n"), done.stderr


def test_no_room_is_said_before_anything_is_spent() -> None:
    Capacity(3, 20_000, 20_000, 65_530).check(2)
    with pytest.raises(BusyError, match=r"quota\.running"):
        Capacity(3, 20_000, 20_000, 65_530).check(3)
    with pytest.raises(BusyError, match="LimitNOFILE"):
        Capacity(0, 1024, 20_000, 65_530).check(256)


def test_a_process_tells_its_limit_and_what_it_has_open() -> None:
    assert descriptor_limit_of(os.getpid()) == int(subprocess.check_output(["sh", "-c", "ulimit -n"]))
    assert descriptor_limit_of(2**22 + 1) is None
    before = descriptors_in_use()
    with Path(os.devnull).open():
        assert descriptors_in_use() == before + 1


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource; from manager.capacity import raise_descriptor_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900));"
        "print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert subprocess.check_output([sys.executable, "-c", code]).split() == [b"900"] * 3


def test_each_crash_waits_longer_until_there_are_too_many() -> None:
    budget = CrashBudget.of(InstanceConfig(restarts=5, restart_seconds=60.0))
    assert [budget.spend(float(moment)) for moment in range(7)] == [0.0, 0.25, 0.5, 1.0, 2.0, None, None]
    assert budget.spend(1000.0) == 0.0, "long ago is forgotten"
    many = CrashBudget(100, 1e9)
    assert [many.spend(0.0) for _ in range(20)][-1] == 30.0, "there is a longest wait"


def with_quota(place: Any, **quota: int) -> Any:
    base, layout, config = place
    return base, layout, replace(config, quota=QuotaConfig(**quota))


async def refused(running: Any, verb: str, **arguments: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await running.ask(verb, **arguments)
    return caught.value


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


async def test_a_quota_of_running_vtpms(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, with_quota(place, running=1)) as running:
        for name in ("first", "second"):
            await running.ask("add", name=name)
        await running.ask("attach", vtpm="first", guest="g")
        error = await refused(running, "attach", vtpm="second", guest="g")
        assert error.exit_code is ExitCode.BUSY
        assert "quota.running" in str(error)
        (shown,) = await running.ask("show", vtpm="second")
        assert shown["state"] == "added", "nothing was changed"
        (status,) = await running.ask("status")
        assert (status["running"], status["running_most"]) == (1, 1)
        await running.ask("detach", vtpm="first")
        await running.ask("attach", vtpm="second", guest="g")


async def test_a_quota_of_vtpms_in_a_group(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, with_quota(place, vtpms_per_group=3)) as running:
        await running.ask("add", name="one")
        error = await refused(running, "add", count=3, name="more-{}")
        assert error.exit_code is ExitCode.DENIED
        assert "vtpms_per_group" in str(error)
        assert len(await running.ask("list")) == 1, "all of them, or none"
        await running.ask("add", count=2, name="more-{}")
        error = await refused(running, "add", name="four")
        assert "has 3 of the 3" in str(error)
        await running.ask("remove", vtpm="one", yes=True)
        await running.ask("add", name="four")
        (status,) = await running.ask("status")
        assert status["vtpms_per_group_most"] == 3


async def test_an_instance_that_leaves_its_ring_but_lives_is_ended_and_replaced(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        (shown,) = await running.ask("attach", vtpm="web", guest="g")
        old = running.attachments.running(running.registry.find("web").uuid)
        assert old is not None
        os.kill(shown["pid"], signal.SIGSTOP)  # it does not notice what comes, and does not end by itself
        with socket.socket(fileno=os.dup(old.ring.fileno())) as doorbell:
            doorbell.shutdown(socket.SHUT_RDWR)
        with trio.fail_after(20):
            await old.ended.wait()
            while (await running.ask("show", vtpm="web"))[0]["state"] != "needs-reset":  # noqa: ASYNC110 - another process
                await trio.sleep(0.01)
        (status,) = await running.ask("status")
        assert children_of(status["keeper_pid"]).count("vtpm-instance") == 1, "the old one is gone"
        await running.ask("reset-platform", vtpm="web")
        (shown,) = await running.ask("show", vtpm="web")
        assert (shown["state"], shown["reason"]) == ("running", None)


def children_of(pid: int) -> list[str]:
    """Names of a process's children (proc(5))."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/comm").read_text().strip() for child in found]


async def test_an_attachment_that_cannot_be_recorded_leaves_no_instance(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        with closing(sqlite3.connect(running.layout.catalogue)) as other:
            other.execute("CREATE TRIGGER no BEFORE INSERT ON attachments BEGIN SELECT RAISE(ABORT, 'no'); END")
            await refused(running, "attach", vtpm="web", guest="g")
            (shown,) = await running.ask("show", vtpm="web")
            assert (shown["pid"], shown["guest"]) == (None, None)
            (status,) = await running.ask("status")
            assert "vtpm-instance" not in children_of(status["keeper_pid"])
            other.execute("DROP TRIGGER no")
        (shown,) = await running.ask("attach", vtpm="web", guest="g")
        assert "vtpm-instance" in children_of(status["keeper_pid"])
