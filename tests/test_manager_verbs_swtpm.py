"""A state that is handed out as swtpm's files while others want the vTPM: an attach, a claim, a removal."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend.messages_admin import ExitCode
from manager.client import RemoteError, request
from manager.migration_records import frozen
from storage.state_format import Blobs, pack_blobs
from storage.store_records import PutVtpm, RecordFlags

BLOBS = Blobs({"permall": b"a state, which only libtpms would look into" * 20})


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


class Export:
    """One `vtpm-export`, as the command asks for it."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("state")
        self.code: ExitCode | None = None
        self.done = trio.Event()

    async def run(self, running: RunningDaemon) -> None:
        path, arguments = str(running.layout.admin_socket), {"vtpm": "web", "yes": True}
        try:
            await trio.to_thread.run_sync(lambda: request(path, "export", arguments, (self.memory,)))
        except RemoteError as error:
            self.code = error.exit_code
        self.done.set()

    @property
    def content(self) -> bytes:
        return os.pread(self.memory, 1 << 20, 0)


async def imported(running: RunningDaemon) -> None:
    memory = os.memfd_create("state")
    os.write(memory, pack_blobs(BLOBS))
    path, arguments = str(running.layout.admin_socket), {"name": "web", "tpm": "2.0"}
    await trio.to_thread.run_sync(lambda: request(path, "import", arguments, (memory,)))
    os.close(memory)
    await running.ask("group-update", group="default", allow_export="yes")


async def claimed(running: RunningDaemon) -> None:
    record = running.registry.record(running.registry.find("web").uuid)
    await running.registry.committer.commit(PutVtpm(frozen(record)))


async def removed(running: RunningDaemon) -> None:
    await running.registry.remove(running.registry.find("web"), "by a test")


async def saved(running: RunningDaemon) -> None:
    """What an attach, a guest's save and a detach leave: another generation."""
    record = running.registry.record(running.registry.find("web").uuid)
    new = replace(record, generation=record.generation + 1, flags=RecordFlags.FRESH)
    await running.registry.committer.commit(PutVtpm(new))


@pytest.mark.parametrize(
    ("meanwhile", "code"), [(claimed, ExitCode.CONFLICT), (removed, ExitCode.NOT_FOUND), (saved, ExitCode.CONFLICT)]
)
async def test_an_export_waits_for_whoever_changes_the_vtpm_and_judges_it_after_that(
    model: ModelTpm, place: Any, meanwhile: Callable[[RunningDaemon], Any], code: ExitCode
) -> None:
    async with running_daemon(model, place) as running, trio.open_nursery() as nursery:
        await imported(running)
        export = Export()
        async with running.attachments.lock(running.registry.find("web").uuid):
            nursery.start_soon(export.run, running)
            with trio.move_on_after(0.5):
                await export.done.wait()
            await meanwhile(running)
        await export.done.wait()
        assert export.code is code
        assert export.content == b"", "nothing went out"
