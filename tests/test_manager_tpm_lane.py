import threading

import pytest
import trio
from fixtures_tpm import running_swtpm

from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmUnavailable
from manager.tpm_lane import LaneStatistics, TpmLane


async def test_calls_of_many_tasks_run_one_after_another() -> None:
    lane = TpmLane()
    with running_swtpm() as swtpm:
        tpm = await lane.run(HardwareTpm.open, swtpm.setting)
        lengths: list[int] = []

        async def ask(count: int) -> None:
            lengths.append(len(await lane.run(tpm.random, count)))

        async with trio.open_nursery() as nursery:
            for count in range(1, 9):
                nursery.start_soon(ask, count)
        await lane.run(tpm.close)
    assert sorted(lengths) == list(range(1, 9))
    assert lane.statistics() == LaneStatistics(waiting=0, served=10, failed=0)


async def test_an_error_of_the_tpm_reaches_the_caller_and_is_counted() -> None:
    lane = TpmLane()
    with running_swtpm() as swtpm:
        tpm = await lane.run(HardwareTpm.open, swtpm.setting)
        await lane.run(tpm.close)
        with pytest.raises(TpmUnavailable):
            await lane.run(tpm.clock)
    assert lane.statistics() == LaneStatistics(waiting=0, served=3, failed=1)


async def test_a_running_call_is_not_cancelled_and_a_waiting_one_is() -> None:
    lane = TpmLane()
    started, go_on = threading.Event(), threading.Event()
    ended: list[str] = []

    def slow() -> None:
        started.set()
        assert go_on.wait(10)
        ended.append("slow")

    def never() -> None:
        ended.append("never")

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.run, slow)
            await trio.to_thread.run_sync(started.wait)
            nursery.start_soon(lane.run, never)
            await trio.testing.wait_all_tasks_blocked()
            assert lane.statistics().waiting == 2
            scope.cancel()
            go_on.set()
    assert ended == ["slow"]
    assert lane.statistics() == LaneStatistics(waiting=0, served=1, failed=0)
