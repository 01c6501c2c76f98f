"""A vTPM that left, or may have, runs nowhere here: not at a start, and not while its group is being opened."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend.messages_admin import ExitCode
from manager.client import RemoteError
from manager.errors import GroupClosedError
from manager.migration_records import frozen, is_frozen
from manager.migration_state import Peer
from manager.recovery_pair import RecoveryPrivate
from storage.store_records import GroupFlags, PutGroup, PutVtpm, RecordFlags


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model, "sha256:7", RecoveryPrivate.new()) as made:
        yield made


async def attached(running: RunningDaemon, group: str) -> UUID:
    await running.ask("add", name="web", group=group)
    await running.ask("attach", vtpm="web", guest="g")
    return running.registry.find("web").uuid


async def older(running: RunningDaemon, vtpm: UUID, *, left: bool) -> None:
    """Leave rows and records as a manager of before epochs did; `left`: another manager claimed the vTPM."""
    attachment = running.registry.catalogue.find_attachment(vtpm)
    assert attachment is not None
    running.registry.catalogue.renew(replace(attachment, epoch=0))
    record = running.registry.record(vtpm)
    record = replace(record, flags=RecordFlags(int(record.flags) & ~int(RecordFlags.ATTACHED)))
    group = running.registry.committer.store.group(record.group)
    changes = PutVtpm(frozen(record) if left else record), PutGroup(replace(group, flags=GroupFlags.NONE))
    await running.registry.committer.commit(*changes)


def runs(running: RunningDaemon, vtpm: UUID) -> bool:
    return running.attachments.running(vtpm) is not None or vtpm in running.attachments.sleepers


@pytest.mark.parametrize("left", [False, True])
async def test_an_older_row_of_a_vtpm_that_left_is_not_taken_over_at_a_start(
    model: ModelTpm, place: Any, left: bool
) -> None:
    async with running_daemon(model, place) as running:
        vtpm = await attached(running, "default")
        await running.attachments._instances.stop(running.attachments._instances.running[vtpm])
        await older(running, vtpm, left=left)
    async with running_daemon(model, place) as running:
        record = running.registry.record(vtpm)
        assert runs(running, vtpm) is not left
        assert is_frozen(record.flags) is left
        assert bool(record.flags & RecordFlags.ATTACHED) is not left
        assert (running.registry.catalogue.find_attachment(vtpm) is None) is left


async def test_while_a_group_is_opened_nobody_has_a_vtpm_that_may_have_left_of_it(model: ModelTpm, place: Any) -> None:
    """Its group was closed when the store was put back to an earlier time: whether it left is seen when it is open."""
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        vtpm = await attached(running, "bound")
        await running.ask("detach", vtpm="web")
        group = running.registry.record(vtpm).group
        peer = Peer("c", "pem", "finger-c", leave_vtpms=(vtpm,), until=1)
        box = running.daemon._moves.box
        await box.save(lambda state: replace(state, doubtful=(group,), claimants=(peer,)))
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running, trio.open_nursery() as nursery:
        model.pcrs[1] = bytes(32)
        async with running.daemon._moves.box._saving:  # the opening waits before it has frozen anything
            nursery.start_soon(lambda: running.ask("group-open", group="bound"))
            with trio.fail_after(20):
                while not running.opened.store.is_open(group):  # noqa: ASYNC110 - it tells nobody
                    await trio.sleep(0.01)
            with pytest.raises(RemoteError) as caught:
                await running.ask("attach", vtpm="web", guest="g")
            assert caught.value.exit_code is ExitCode.DENIED
            assert "opened" in str(caught.value)
            with pytest.raises(RemoteError, match="opened"):  # also where an instance ran on
                await running.ask("quote", vtpm="web", nonce="00" * 16, pcrs="0-7")
            with pytest.raises(GroupClosedError):  # what a claim by another manager asks first
                running.registry.record(vtpm)
            assert not is_frozen(running.opened.store.get(vtpm).flags), "the window is open"
        with trio.fail_after(20):
            while running.opened.closed:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert is_frozen(running.registry.record(vtpm).flags)
        assert not runs(running, vtpm)
        with pytest.raises(RemoteError, match="frozen"):
            await running.ask("attach", vtpm="web", guest="g")


async def test_an_attachment_that_ends_as_its_group_is_opened_counts_no_more_in_the_record_either(
    model: ModelTpm, place: Any
) -> None:
    """Else its row, kept by somebody and put back after the vTPM was taken back, would count."""
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        vtpm = await attached(running, "bound")
        peer = Peer("c", "pem", "finger-c", leave_vtpms=(vtpm,), until=1)
        group = running.registry.record(vtpm).group
        box = running.daemon._moves.box
        await box.save(lambda state: replace(state, doubtful=(group,), claimants=(peer,)))
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running:
        model.pcrs[1] = bytes(32)
        assert running.registry.catalogue.find_attachment(vtpm) is not None
        await running.ask("group-open", group="bound")
        record = running.registry.record(vtpm)
        assert is_frozen(record.flags)
        assert running.registry.catalogue.find_attachment(vtpm) is None
        assert not record.flags & RecordFlags.ATTACHED
