"""Quotes as the manager hands them out: how often, to whom, and what it says where there is none."""

import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from fixtures_tpm import running_swtpm
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon
from vtpm_instance_commands import nv_define, rc

from frontend_backend import messages_instance as m
from frontend_backend.deep_quote import DeepQuoteCommand, Evidence
from frontend_backend.local import LocalRing
from frontend_backend.messages_admin import ExitCode
from frontend_backend.orders import Orders
from frontend_backend.tpmhdr import TpmFamily
from manager import quoting, ring_server
from manager.attestation import key_of, renew
from manager.client import RemoteError
from manager.errors import ConflictError
from manager.hwtpm import HardwareTpm
from manager.recovery_key import RecoveryPrivate
from manager.running import Running, Stage
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


async def give_key(daemon: RunningDaemon, group: str = "default") -> None:
    """Put an attestation key of a real TPM into a group's record."""
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        key = tpm.attester.new_key()
    groups = daemon.daemon._groups
    happened = Happened("group-enrolled", "test")
    await groups.rewrite(groups.find(group), lambda seal: replace(seal, ak=key.to_json()), happened)
    assert key_of(groups.seal(groups.find(group).uuid)).public.area == key.public.area


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


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        (b"", "bytes wanted"),
        (b"vTPMevid" + bytes(40), "no evidence of version 1"),
        (Evidence(TpmFamily.TPM_1_2, "libtpms 0", 0xFF, (bytes(20),) * 8).pack(), "of a TPM 1.2"),
        (Evidence(TpmFamily.TPM_2_0, "x", 1, (bytes(32),), b"p", b"a", b"s").pack(), "other PCRs"),
    ],
)
async def test_an_instance_that_was_taken_over_cannot_give_other_evidence(evidence: bytes, why: str) -> None:
    async with attached() as (daemon, running):
        await give_key(daemon)
        os.kill(running.pid, signal.SIGSTOP)  # so that only the words below are heard

        async def lie() -> None:
            while running.quote is None:  # noqa: ASYNC110 - set by the verb
                await trio.sleep(0.01)
            running.quote.made(m.QuoteMade(running.quote.ticket, evidence))

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lie)
                error = await refused(daemon, pcrs="0-7")
        finally:
            os.kill(running.pid, signal.SIGCONT)
        assert (error.exit_code, why in str(error)) == (ExitCode.INTEGRITY, True), str(error)


async def test_a_guest_of_a_closed_group_gets_no_quote() -> None:
    model = ModelTpm()
    with installation(model, recovery=RecoveryPrivate.new()) as place:
        async with running_daemon(model, place) as daemon:
            await daemon.ask("group-add", name="bound", pcrs="sha256:1")
            await daemon.ask("add", name="web", group="bound")
            await daemon.ask("attach", vtpm="web", guest="g")
            await give_key(daemon, "bound")
            uuid = daemon.registry.find("web").uuid
            model.pcrs[1] = b"\x11" * 32
        evidence = Evidence(TpmFamily.TPM_2_0, "x", 1, (bytes(32),), b"p", b"a", b"s").pack()
        front, back = LocalRing.pair()
        with front, back:
            async with running_daemon(model, place) as daemon:
                running = Running(uuid, 1, 0, back, "clear", "clear")
                reply = await daemon.daemon._quotes.for_guest(running, m.Quote(b"n", evidence))
            running.back.release()
            assert isinstance(reply, m.Refusal)
            assert (reply.code, "group bound is closed" in reply.text) == (m.RefusalCode.DENIED, True), reply


async def keep_busy(daemon: RunningDaemon, busy: threading.Event) -> None:
    """Have the hardware TPM be busy until the event is set."""
    await daemon.daemon._hardware.lane.run(busy.wait)


@asynccontextmanager
async def asking(daemon: RunningDaemon, running: Running) -> AsyncIterator[trio.SocketStream]:
    """Have a guest ask while the hardware TPM is busy; it is so until the block ends."""
    await give_key(daemon)
    busy = threading.Event()
    (shown,) = await daemon.ask("show", vtpm="web")
    guest = await trio.open_unix_socket(shown["endpoint"].removeprefix("unix:"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_busy, daemon, busy)
        try:
            await guest.send_all(DeepQuoteCommand(b"n", 1).pack(TpmFamily.TPM_2_0))
            with trio.fail_after(20):
                while not daemon.daemon._quotes._guests:  # noqa: ASYNC110 - counted by the manager's task
                    await trio.sleep(0.01)
            yield guest
        finally:
            busy.set()
    await guest.aclose()


async def test_a_stop_does_not_wait_until_the_hardware_has_quoted_for_the_guest() -> None:
    async with attached() as (daemon, running), asking(daemon, running) as guest:
        with trio.fail_after(20):
            assert await daemon.attachments._instances.stop(running)
            assert int.from_bytes((await guest.receive_some(4096))[6:10]) == 0x922


async def test_a_guest_that_waits_long_is_refused_and_its_tpm_saves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_server, "QUOTE_SECONDS", 0.3)
    async with attached() as (daemon, running), asking(daemon, running) as guest:
        with trio.fail_after(20):
            assert int.from_bytes((await guest.receive_some(4096))[6:10]) == 0x922
            await guest.send_all(nv_define(0x01500001, 8))
            assert rc(await guest.receive_some(4096)) == 0
        assert daemon.registry.record(running.vtpm).generation > 1


async def test_a_manager_that_ends_in_the_middle_costs_a_guest_its_quote_at_most() -> None:
    model, busy = ModelTpm(), threading.Event()
    with installation(model) as place:
        async with trio.open_nursery() as nursery:
            async with running_daemon(model, place, stop=False) as daemon:
                await daemon.ask("add", name="web")
                (shown,) = await daemon.ask("attach", vtpm="web", guest="g")
                await give_key(daemon)
                guest = await trio.open_unix_socket(shown["endpoint"].removeprefix("unix:"))
                nursery.start_soon(keep_busy, daemon, busy)
                await guest.send_all(DeepQuoteCommand(b"n", 1).pack(TpmFamily.TPM_2_0))
                with trio.fail_after(20):
                    while not daemon.daemon._quotes._guests:  # noqa: ASYNC110 - counted by the manager's task
                        await trio.sleep(0.01)
            busy.set()
        async with running_daemon(model, place) as daemon:  # it finds the request on the ring, and answers it
            with trio.fail_after(20):
                assert rc(await guest.receive_some(4096)) != 0
                await guest.send_all(nv_define(0x01500001, 8))
                assert rc(await guest.receive_some(4096)) == 0
            assert daemon.registry.record(daemon.registry.find("web").uuid).generation > 1
        await guest.aclose()


async def test_one_guest_has_one_quote_under_way() -> None:
    async with attached() as (daemon, running), asking(daemon, running):
        reply = await daemon.daemon._quotes.for_guest(running, m.Quote(b"n", b""))
        assert isinstance(reply, m.Refusal)
        assert reply.code is m.RefusalCode.LIMIT


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


async def test_a_quote_that_meets_a_hibernation_wakes_the_vtpm() -> None:
    """The instance has asked for its last commit, which is under way, when it is ordered to give evidence."""
    async with attached() as (daemon, running):
        with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
            tpm.provision_srk()
            key, groups = tpm.attester.new_key(), daemon.daemon._groups
            happened = Happened("group-enrolled", "test")
            await groups.rewrite(groups.find("default"), lambda seal: replace(seal, ak=key.to_json()), happened)
            daemon.model.attester = tpm.attester  # type: ignore[attr-defined] # the model signs nothing
            async with trio.open_nursery() as nursery:
                committer = daemon.daemon._committer
                async with committer.lock:  # a disk that takes long
                    running.order(Orders.HIBERNATE)
                    with trio.fail_after(20):
                        while not (running.told_to_sleep and running.busy):  # noqa: ASYNC110
                            await trio.sleep(0.01)
                    answers: list[list[dict[str, object]]] = []

                    async def ask() -> None:
                        answers.append(await daemon.ask("quote", vtpm="web", nonce=NONCE, pcrs="0-7"))

                    nursery.start_soon(ask)
                    with trio.fail_after(20):
                        while running.quote is None:  # noqa: ASYNC110
                            await trio.sleep(0.01)
                with trio.fail_after(20):
                    await running.ended.wait()
                    assert running.stage is Stage.HIBERNATED
                    while not answers:  # noqa: ASYNC110
                        await trio.sleep(0.01)
            assert answers[0][0]["nonce"] == NONCE
            now = daemon.attachments.running(running.vtpm)
            assert now is not None
            assert now.pid != running.pid


async def test_an_instance_that_ends_is_not_waited_for_though_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "EVIDENCE_SECONDS", 600.0)  # longer than a command waits
    async with attached() as (daemon, running):
        await give_key(daemon)
        os.kill(running.pid, signal.SIGSTOP)

        async def end() -> None:
            while running.quote is None:  # noqa: ASYNC110 - set by the verb
                await trio.sleep(0.01)
            os.kill(running.pid, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            error = await refused(daemon)
        assert (error.exit_code, "it ended" in str(error)) == (ExitCode.BUSY, True)


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
