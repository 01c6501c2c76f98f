"""vtpm-xen's socket: which domain gets which vTPM, and what becomes of the vTPM when another one comes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon
from vtpm_instance_commands import extended, pcr_read
from xen_server_rig import (
    DB,
    ZEROES,
    Connection,
    Guest,
    bound,
    extend,
    pcr,
    refused,
    until_shown,
)

from frontend_backend.channel_trio import receive_message_trio
from frontend_backend.front import RingFrontEnd
from frontend_backend.messages_xen import Bound, XenCode, XenRefusal, decode_xen, encode_xen
from manager.client import RemoteError
from manager.xen_events import AT_ONCE
from storage.catalogue_rows import AttachmentRow
from storage.errors import CatalogueError
from storage.store_records import RecordFlags

ONCE = extended(b"\x11" * 32)


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


async def attached(running: RunningDaemon, name: str = "v", **options: Any) -> dict[str, Any]:
    family = options.pop("tpm", "2.0")
    await running.ask("add", name=name, tpm=family)
    (shown,) = await running.ask("attach", vtpm=name, guest="web", frontend="xen", **options)
    return shown


async def events(running: RunningDaemon, *kinds: str) -> list[str]:
    with trio.fail_after(10):
        while running.daemon._hibernation.events._waiting:  # noqa: ASYNC110 - they are written once a second
            await trio.sleep(0.05)
    return [found["kind"] for found in await running.ask("events") if found["kind"] in kinds]


async def test_the_domain_that_the_attachment_names_gets_its_vtpm(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running, localities="0-2", xsm_label="system_u:system_r:domU_t")
        assert (shown["domain"], shown["localities"], shown["bound_domain"]) == ("web", "0,1,2", None)
        assert os.stat(shown["endpoint"]).st_mode & 0o777 == 0o600
        guest = Guest(5, label="system_u:system_r:domU_t", ran_before=True)
        connection, reply = await bound(running.layout.xen_socket, guest.bind(shown["uuid"]))
        with connection:
            assert reply == Bound(shown["endpoint"], "2.0", True, 0b111, 1)
            await extend(reply.endpoint)
            (now,) = await running.ask("show", vtpm="v")
            assert (now["bound_domain"], now["bound_name"], now["bound_device"]) == (5, "web", 0)
            assert now["pid"] == shown["pid"], "the first since the attach: nobody has used it"
            assert now["late_attach"] is True
        await until_shown(running, "v", bound_domain=None)
        assert await events(running, "bound", "unbound") == ["bound", "unbound"]


async def test_what_does_not_match_is_refused_in_words(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        path = running.layout.xen_socket
        shown = await attached(running, xsm_label="a:b:c")
        good = Guest(5, label="a:b:c")
        web = shown["uuid"]
        cases: list[tuple[Any, XenCode, str]] = [
            (Guest(5, name="db", uuid=str(DB), label="a:b:c").bind(web), XenCode.DENIED, "is for domain web"),
            (Guest(5, name="", uuid="", label="a:b:c").bind(web), XenCode.DENIED, "xenstore-chmod"),
            (Guest(5, name="WEB", label="a:b:c").bind(web), XenCode.DENIED, "not for WEB"),
            (Guest(5).bind(web), XenCode.DENIED, "XSM label a:b:c"),
            (Guest(5, label="a:b:d").bind(web), XenCode.DENIED, "a:b:d"),
            (good.join(web), XenCode.WRONG_FRONTEND, "--instance-domain"),
            (good.bind(str(DB)), XenCode.UNKNOWN, "no vTPM"),
            (Guest(0x7FF0, label="a:b:c").bind(web), XenCode.UNKNOWN, "no vTPM"),
            (Guest(-1, label="a:b:c").bind(web), XenCode.UNKNOWN, "no vTPM"),
        ]
        for request, code, words in cases:
            got, text = await refused(path, request)
            assert (got, words in text) == (code, True), (request, text)
        await running.ask("add", name="idle")
        (idle,) = await running.ask("show", vtpm="idle")
        code, text = await refused(path, good.bind(idle["uuid"]))
        assert (code, "vtpm-attach idle" in text) == (XenCode.UNKNOWN, True)
        (plain,) = await running.ask("attach", vtpm="idle", guest="web", frontend="ring")
        for request in (good.bind(plain["uuid"]), good.join(plain["uuid"])):
            assert (await refused(path, request))[0] is XenCode.WRONG_FRONTEND
        (now,) = await running.ask("show", vtpm="v")
        assert (now["bound_domain"], now["pid"]) == (None, shown["pid"]), "a refusal changes nothing"
        connection, _ = await bound(path, good.bind(web))
        connection.close()


async def test_by_uuid_and_any(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        path = running.layout.xen_socket
        by_uuid = await attached(running, domain=str(DB).upper())
        assert by_uuid["domain"] == str(DB)
        assert (await refused(path, Guest(4, name=str(DB)).bind(by_uuid["uuid"])))[0] is XenCode.DENIED
        assert (await refused(path, Guest(4, name=str(DB), uuid="").bind(by_uuid["uuid"])))[0] is XenCode.DENIED
        connection, _ = await bound(path, Guest(4, name="", uuid=str(DB)).bind(by_uuid["uuid"]))
        connection.close()
        anyone = await attached(running, "w", domain="any")
        connection, _ = await bound(path, Guest(9, name="", uuid="").bind(anyone["uuid"]))
        with connection:
            code, text = await refused(path, Guest(10, name="", uuid="").bind(anyone["uuid"]))
            assert (code, "domain 9" in text) == (XenCode.TAKEN, True)


async def test_another_domain_or_another_boot_finds_no_pcrs_of_the_one_before(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        path = running.layout.xen_socket
        shown = await attached(running)
        guest = Guest(3)
        connection, reply = await bound(path, guest.bind(shown["uuid"]))
        await extend(reply.endpoint)
        code, text = await refused(path, guest.rebooted(4).bind(shown["uuid"]))
        assert (code, "domain 3" in text) == (XenCode.TAKEN, True)
        assert (await refused(path, Guest(3, device=1).bind(shown["uuid"])))[0] is XenCode.TAKEN
        connection.close()
        await until_shown(running, "v", bound_domain=None)
        connection, reply = await bound(path, guest.bind(shown["uuid"]))  # the same one: vtpm-xen began anew
        assert await pcr(reply.endpoint) == ONCE
        connection.close()
        await until_shown(running, "v", bound_domain=None)
        connection, reply = await bound(path, guest.rebooted(4).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES
            (now,) = await running.ask("show", vtpm="v")
            assert now["pid"] != shown["pid"]
            await extend(reply.endpoint)
    async with running_daemon(model, place) as running:  # what it saved at the stop is resumed for nobody else
        connection, reply = await bound(running.layout.xen_socket, guest.rebooted(5).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES


async def test_the_device_of_the_same_domain_may_ask_again_while_its_old_connection_is_open(
    model: ModelTpm, place: Any
) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        first, reply = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        await extend(reply.endpoint)
        second, _ = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        await first.over()
        assert await pcr(reply.endpoint) == ONCE
        first.close()
        (now,) = await running.ask("show", vtpm="v")
        assert now["bound_domain"] == 3
        second.close()


async def test_a_resumed_domain_goes_on_and_no_other_one_does(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        path = running.layout.xen_socket
        shown = await attached(running, domain="any")
        connection, reply = await bound(path, Guest(3).bind(shown["uuid"]))
        await extend(reply.endpoint)
        connection.close()
        await until_shown(running, "v", bound_domain=None)
        for stranger in (Guest(7, uuid=str(DB), resumed=True), Guest(7, uuid="", resumed=True)):
            code, text = await refused(path, stranger.bind(shown["uuid"]))
            assert (code, "Boot that guest anew" in text) == (XenCode.DENIED, True)
        connection, reply = await bound(path, Guest(8, resumed=True, ran_before=True).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ONCE
            (now,) = await running.ask("show", vtpm="v")
            assert (now["bound_domain"], now["late_attach"]) == (8, False), "its first boot counts"
        await running.ask("detach", vtpm="v")
        await running.ask("attach", vtpm="v", guest="web", frontend="xen")
        connection, reply = await bound(path, Guest(9, resumed=True).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES
            (now,) = await running.ask("show", vtpm="v")
            assert now["late_attach"], "it went on before it had this attachment's TPM"


async def test_a_manager_that_begins_anew_does_not_disturb_a_guest(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place, stop=False) as running:
        shown = await attached(running)
        connection, reply = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        await extend(reply.endpoint)
    await connection.over()
    connection.close()
    async with running_daemon(model, place) as running:
        connection, again = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        with connection:
            assert again == reply
            assert await pcr(reply.endpoint) == ONCE
            (now,) = await running.ask("show", vtpm="v")
            assert (now["pid"], now["bound_domain"], now["state"]) == (shown["pid"], 3, "running")


async def test_a_crash_under_a_guest_is_no_power_cycle_until_it_boots(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        path = running.layout.xen_socket
        shown = await attached(running)
        connection, reply = await bound(path, Guest(3).bind(shown["uuid"]))
        await extend(reply.endpoint)
        os.kill(shown["pid"], signal.SIGKILL)
        await until_shown(running, "v", state="needs-reset")
        connection.close()
        connection, reply = await bound(path, Guest(3).bind(shown["uuid"]))
        connection.close()
        await until_shown(running, "v", state="needs-reset", bound_domain=None)
        connection, reply = await bound(path, Guest(4).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES
        # and one that nobody had yet is started up for the first
        await running.ask("detach", vtpm="v")
        (shown,) = await running.ask("attach", vtpm="v", guest="web", frontend="xen")
        os.kill(shown["pid"], signal.SIGKILL)
        await until_shown(running, "v", state="needs-reset")
        connection, reply = await bound(path, Guest(5).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES


async def test_a_reset_for_another_domain_is_the_end_of_what_the_one_before_had(
    model: ModelTpm, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue fails right after it: the one before runs on, and a fresh TPM is not that of its boot."""
    async with running_daemon(model, place) as running:
        path = running.layout.xen_socket
        shown = await attached(running, domain="any")
        connection, reply = await bound(path, Guest(3, name="a").bind(shown["uuid"]))
        await extend(reply.endpoint)
        connection.close()
        await until_shown(running, "v", bound_domain=None)
        catalogue = running.attachments._catalogue
        renew = catalogue.renew

        def fails(row: AttachmentRow) -> None:
            if row.bound_domain == 4:
                raise CatalogueError("the database is away")
            renew(row)

        with monkeypatch.context() as patch:
            patch.setattr(catalogue, "renew", fails)
            assert (await refused(path, Guest(4, name="b").bind(shown["uuid"])))[0] is XenCode.FAILED
        connection, reply = await bound(path, Guest(3, name="a", ran_before=True).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES
            (now,) = await running.ask("show", vtpm="v")
            assert now["late_attach"], "its PCRs do not tell of its boot any more"


async def test_a_row_that_was_put_back_gives_nobody_what_another_left(model: ModelTpm, place: Any) -> None:
    """Its MAC holds, and it is of the same attachment: it says that nobody had the vTPM yet, or who had it before."""
    async with running_daemon(model, place) as running:
        path, catalogue = running.layout.xen_socket, running.attachments._catalogue
        shown = await attached(running)
        vtpm = UUID(shown["uuid"])
        rows = [catalogue.find_attachment(vtpm)]
        for number in (3, 4, 5, 3):
            connection, reply = await bound(path, Guest(number).bind(shown["uuid"]))
            assert await pcr(reply.endpoint) == ZEROES, number
            await extend(reply.endpoint)
            connection.close()
            await until_shown(running, "v", bound_domain=None)
            rows.append(catalogue.find_attachment(vtpm))
            row = rows[0] if number == 3 else rows[1]
            assert row is not None
            catalogue.renew(row)
    async with running_daemon(model, place) as running:  # resumed by the next manager
        connection, reply = await bound(running.layout.xen_socket, Guest(6).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES


async def test_a_hibernated_one_is_woken(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        connection, reply = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        await extend(reply.endpoint)
        with RingFrontEnd.connect(reply.endpoint) as ring:  # vtpm-xen's, which notices nothing
            ring.transact(pcr_read(7), timeout=20)
            await running.ask("hibernate", vtpm="v")
            answer = await trio.to_thread.run_sync(lambda: ring.transact(pcr_read(7), timeout=20))
            assert answer[-32:] == ONCE
        connection.close()
        await running.ask("hibernate", vtpm="v")
        connection, reply = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        with connection:
            assert (await running.ask("show", vtpm="v"))[0]["state"] == "running"
            assert await pcr(reply.endpoint) == ONCE
        await running.ask("hibernate", vtpm="v")
        connection, reply = await bound(running.layout.xen_socket, Guest(4).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ZEROES, "another boot wakes nothing of the one before"


async def test_startup_state_is_xens_save(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await attached(running)
        await running.ask("detach", vtpm="v")
        (shown,) = await running.ask("attach", vtpm="v", guest="web", frontend="xen", startup="state")
        connection, reply = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        await extend(reply.endpoint)
        connection.close()
        await until_shown(running, "v", bound_domain=None)
        connection, reply = await bound(running.layout.xen_socket, Guest(4).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint) == ONCE


async def test_detach_ends_the_binding(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        connection, _ = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        with connection:
            await running.ask("detach", vtpm="v")
            await connection.over()
        assert (await refused(running.layout.xen_socket, Guest(3).bind(shown["uuid"])))[0] is XenCode.UNKNOWN
        (now,) = await running.ask("show", vtpm="v")
        assert (now["state"], now["domain"], now["bound_domain"]) == ("detached", None, None)


async def test_a_quarantined_one_is_not_bound(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        vtpm = running.registry.find("v").uuid
        await running.registry.flag(vtpm, add=RecordFlags.QUARANTINED)
        code, text = await refused(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        assert (code, "quarantined" in text) == (XenCode.FAILED, True)


async def test_a_flapping_guest_does_not_fill_the_events(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        for _ in range(AT_ONCE):
            connection, _ = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
            connection.close()
            assert (await refused(running.layout.xen_socket, Guest(3).bind(str(DB))))[0] is XenCode.UNKNOWN
        kept = await events(running, "bound", "unbound", "bind-refused")
        assert len(kept) <= 2 * AT_ONCE + 2
        assert kept.count("bind-refused") <= AT_ONCE + 1


async def test_what_is_no_message_is_answered_and_dropped(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        for garbage in (b"\xc1", bytes(32_768), os.urandom(64), encode_xen(Bound("/x", "2.0", True, 1, 0))):
            with Connection(running.layout.xen_socket) as connection:
                connection.sock.send(garbage)
                with trio.fail_after(20):
                    reply = decode_xen((await receive_message_trio(connection.sock))[0])
                    assert isinstance(reply, XenRefusal)
                await connection.over()
        Connection(running.layout.xen_socket).close()
        shown = await attached(running)
        connection, _ = await bound(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        connection.close()


async def test_only_root_and_the_managers_user_may_ask(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        assert running.layout.xen_socket.stat().st_mode & 0o777 == 0o600
        if os.geteuid() != 0:
            pytest.skip("only root can become somebody else")
        running.base.chmod(0o711)
        running.layout.runtime_dir.chmod(0o711)
        running.layout.xen_socket.chmod(0o666)  # and whoever gets to it all the same
        shown = await attached(running)
        request = Guest(3).bind(shown["uuid"])

        def as_nobody() -> bytes:
            code = (
                "import os,socket,sys;os.setresuid(65534,65534,65534);"
                "s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET);s.connect(sys.argv[1]);"
                "s.settimeout(20)\ntry:\n s.send(bytes.fromhex(sys.argv[2]));print(s.recv(9999).hex())\n"
                "except OSError:print()"
            )
            argv = [sys.executable, "-I", "-c", code, str(running.layout.xen_socket), encode_xen(request).hex()]
            return subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout.strip()

        assert await trio.to_thread.run_sync(as_nobody) == b""
        (now,) = await running.ask("show", vtpm="v")
        assert now["bound_domain"] is None


async def test_an_option_that_cannot_be_is_a_mistake_of_use(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="v")
        with pytest.raises(RemoteError, match="no firmware") as caught:
            await running.ask("attach", vtpm="v", guest="web", frontend="xen", startup="none")
        assert caught.value.exit_code == 2
        assert (await running.ask("show", vtpm="v"))[0]["state"] == "added"
