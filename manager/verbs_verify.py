"""The verb `verify`: the running manager's store, catalogue and state images. Offline: cli_offline."""

import itertools
import os
from collections.abc import AsyncGenerator, Iterator
from typing import Final
from uuid import UUID

import trio

from frontend_backend.messages_admin import Note
from manager.errors import UsageError
from manager.findings import Finding, Subject, Verdict, stored_in
from manager.services import Arguments, Caller, Document, Services
from manager.verify import verify_all, verify_store, verify_vtpm
from storage.errors import CatalogueDamaged, StorageError

_AT_ONCE: Final = 16  # findings that a thread makes before others get a turn
_NOTE_EVERY: Final = 2000


async def verify(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Judge one vTPM, or the store, the catalogue and every vTPM."""
    if bool(arguments["vtpm"]) == arguments["all"]:
        raise UsageError("name one vTPM, or say --all")
    registry = services.registry
    if not arguments["all"]:
        row = registry.find(arguments["vtpm"])
        subject = await _subject(services)
        async for finding in _in_thread(verify_vtpm(subject, row)):
            yield finding.document()
        return
    for finding in await _store(services):
        yield finding.document()
    try:
        subject = await _subject(services)
    except CatalogueDamaged as error:
        yield Finding("catalogue", Verdict.DAMAGED, str(error)).document()
        return
    checked = 0
    async for finding in _in_thread(verify_all(subject)):
        yield finding.document()
        checked += 1
        if checked % _NOTE_EVERY == 0:
            yield Note(f"{checked} checks done, {len(subject.audit.vtpms)} vTPMs in all")


async def _subject(services: Services) -> Subject:
    """Read the catalogue, then what the store has, while nothing is added: a removal in between is looked at again.

    Saves wait for the list of records only, not for the catalogue.
    """
    registry = services.registry
    catalogue, store = registry.catalogue, registry.committer.store

    def still_named(vtpm: UUID) -> bool:
        return catalogue.find_vtpm(vtpm) is not None

    async with registry.adding:
        audit = await trio.to_thread.run_sync(catalogue.audit)
        async with registry.committer.lock:
            stored, marked = await trio.to_thread.run_sync(stored_in, store)
    return Subject(
        store,
        stored,
        marked,
        audit,
        catalogue.groups(),
        services.layout.state_images,
        still_named,
        catalogue.find_attachment,
        lambda vtpm: services.attachments.lock(vtpm).locked(),
    )


async def _store(services: Services) -> list[Finding]:
    """Open the store's image a second time, while nothing is committed, and compare."""
    committer = services.registry.committer

    def again() -> list[Finding]:
        descriptor = os.open(services.layout.store, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with committer.store.reopen(descriptor) as opened_again:
                return list(verify_store(committer.store, opened_again))
        except StorageError as error:
            return [Finding("store", Verdict.DAMAGED, f"it could not be opened again: {error}")]
        finally:
            os.close(descriptor)

    async with committer.lock:
        return await trio.to_thread.run_sync(again)


async def _in_thread(findings: Iterator[Finding]) -> AsyncGenerator[Finding]:
    """Let a thread do the reading and decrypting, a few at a time."""
    while batch := await trio.to_thread.run_sync(lambda: list(itertools.islice(findings, _AT_ONCE))):
        for finding in batch:
            yield finding
