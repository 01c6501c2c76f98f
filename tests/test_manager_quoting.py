"""Quotes as the manager hands them out: how often, to whom, and what it says where there is none."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from fixtures_tpm import running_swtpm
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend import messages_instance as m
from frontend_backend.messages_admin import ExitCode
from manager import quoting
from manager.attestation import key_of, renew
from manager.client import RemoteError
from manager.errors import ConflictError
from manager.hwtpm import HardwareTpm
from manager.running import Running
from manager.token_bucket import TokenBucket
from storage.catalogue import Happened

NONCE = "00ff"


@asynccontextmanager
async def attached() -> AsyncIterator[tuple[RunningDaemon, Running]]:
    """A manager with one vTPM that runs."""
    model = ModelTpm()
    with installation(model) as place:
        async with running_daemon(model, place) as daemon:
            await daemon.ask(
                "add",
                name="web",
                count=None,
                first=1,
                uuid=None,
                group="default",
                tpm="2.0",
                label=(),
                state_image=None,
            )
            await daemon.ask(
                "attach", vtpm="web", guest="g", frontend="socket", owner=None, mode="0660", startup="clear"
            )
            running = daemon.attachments.running(daemon.registry.find("web").uuid)
            assert running is not None
            yield daemon, running


async def give_key(daemon: RunningDaemon) -> None:
    """Put an attestation key of a real TPM into the default group's record."""
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        key = tpm.attester.new_key()
    groups = daemon.daemon._groups
    happened = Happened("group-enrolled", "test")
    await groups.rewrite(groups.find("default"), lambda seal: replace(seal, ak=key.to_json()), happened)
    assert key_of(groups.seal(groups.find("default").uuid)).public.area == key.public.area


async def refused(daemon: RunningDaemon, **arguments: str) -> RemoteError:
    with pytest.raises(RemoteError) as error:
        await daemon.ask("quote", **({"vtpm": "web", "nonce": NONCE, "pcrs": "all"} | arguments))
    return error.value


async def test_a_guest_may_ask_five_times_at_once_and_then_once_a_second() -> None:
    async with attached() as (daemon, running):
        quotes = daemon.daemon._quotes
        codes = []
        for _ in range(8):
            reply = await quotes.for_guest(running, m.Quote(b"n", b"no evidence"))
            assert isinstance(reply, m.Refusal)
            codes.append(reply.code)
        assert codes[:5] == [m.RefusalCode.MALFORMED] * 5
        assert codes[7] is m.RefusalCode.LIMIT
        running.guest_quotes = TokenBucket(1, 5)
        for nonce in (b"", bytes(65)):
            reply = await quotes.for_guest(running, m.Quote(nonce, b""))
            assert isinstance(reply, m.Refusal)
            assert reply.code is m.RefusalCode.MALFORMED


async def test_no_more_guests_wait_for_the_hardware_than_it_can_bear() -> None:
    async with attached() as (daemon, running):
        daemon.daemon._quotes._guests = quoting.GUESTS_WAITING
        reply = await daemon.daemon._quotes.for_guest(running, m.Quote(b"n", b""))
        assert isinstance(reply, m.Refusal)
        assert reply.code is m.RefusalCode.LIMIT


async def test_what_cannot_be_quoted_is_refused_with_what_helps() -> None:
    async with attached() as (daemon, running):
        error = await refused(daemon)
        assert (error.exit_code, "vtpm-group-enroll default" in str(error)) == (ExitCode.CONFLICT, True)
        await give_key(daemon)
        for arguments, code in (
            ({"nonce": "xx"}, ExitCode.USAGE),
            ({"nonce": ""}, ExitCode.USAGE),
            ({"nonce": "00" * 65}, ExitCode.USAGE),
            ({"pcrs": "24"}, ExitCode.USAGE),
            ({"pcrs": "none"}, ExitCode.USAGE),
            ({"vtpm": "mail"}, ExitCode.NOT_FOUND),
        ):
            assert (await refused(daemon, **arguments)).exit_code is code
        report = running.report
        assert report is not None
        assert report.quotes
        running.report = replace(report, quotes=False)
        error = await refused(daemon)
        assert (error.exit_code, "earlier version" in str(error)) == (ExitCode.CONFLICT, True)


async def test_an_instance_that_gives_no_evidence_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with attached() as (daemon, running):
        await give_key(daemon)
        monkeypatch.setattr(quoting, "EVIDENCE_SECONDS", 0.3)
        os.kill(running.pid, signal.SIGSTOP)
        try:
            error = await refused(daemon)
        finally:
            os.kill(running.pid, signal.SIGCONT)
        assert (error.exit_code, "gave no evidence" in str(error)) == (ExitCode.BUSY, True)
        assert running.quote is None


async def test_a_key_that_was_given_up_is_gone_from_the_record_only() -> None:
    async with attached() as (daemon, _):
        await give_key(daemon)
        groups = daemon.daemon._groups
        seal = groups.seal(groups.find("default").uuid)
        assert replace(renew(seal), ak=seal.ak) == seal
        with pytest.raises(ConflictError, match="no attestation key"):
            key_of(renew(seal))


def test_a_bucket_fills_as_time_goes_by() -> None:
    bucket = TokenBucket(rate=2, burst=3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(10.4)
    assert bucket.take(10.5)
    assert not bucket.take(10.9)
    assert [bucket.take(99.0) for _ in range(4)] == [True, True, True, False]
