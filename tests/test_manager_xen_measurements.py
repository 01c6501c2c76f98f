"""Boots of Xen guests measured by what the toolstack booted, or by what `vtpm-measure` said, at each of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio
from manager_rig import ModelTpm, installation, running_daemon
from vtpm_instance_commands import extended
from xen_server_rig import Guest, bound, pcr, refused, until_shown

from frontend_backend.local import LocalRing
from frontend_backend.measurements import Measurement
from frontend_backend.messages_xen import Bind, XenCode
from frontend_backend.release import RELEASE
from manager.boot_measurements import Boots
from manager.running import Running

CMDLINE = "root=/dev/xvda1 quiet"


@pytest.fixture
def place() -> Iterator[tuple[ModelTpm, Any]]:
    model = ModelTpm()
    with installation(model) as made:
        yield model, made


def booted(guest: Guest, vtpm: str, kernel: Path, cmdline: str = CMDLINE, initrd: str = "") -> Bind:
    return replace(guest.bind(vtpm), kernel=str(kernel), cmdline=cmdline, initrd=initrd)


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


async def test_each_boot_is_measured_by_what_the_toolstack_booted(place: tuple[ModelTpm, Any], tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"a kernel")
    async with running_daemon(*place) as running:
        path = running.layout.xen_socket
        await running.ask("add", name="v")
        (shown,) = await running.ask("attach", vtpm="v", guest="web", frontend="xen", measure=("toolstack",))
        assert (shown["measure"], shown["measured"]) == ("toolstack", None)
        connection, reply = await bound(path, booted(Guest(5), shown["uuid"], kernel))
        with connection:
            assert await pcr(reply.endpoint, 4) == extended(sha256(b"a kernel"))
            assert await pcr(reply.endpoint, 5) == extended(sha256(CMDLINE.encode()))
            (now,) = await running.ask("show", vtpm="v")
            assert (now["measured"], now["late_attach"]) == ("kernel,cmdline", False)
        await until_shown(running, "v", bound_domain=None)
        # the guest boots another kernel; one that comes back has booted nothing
        kernel.write_bytes(b"another kernel")
        for guest in (Guest(6), Guest(6)):
            connection, reply = await bound(path, booted(guest, shown["uuid"], kernel))
            with connection:
                assert await pcr(reply.endpoint, 4) == extended(sha256(b"another kernel"))
            await until_shown(running, "v", bound_domain=None)
        # what cannot be read is no boot that is not measured; of one that comes back nothing is read, be it gone
        kernel.unlink()
        connection, reply = await bound(path, booted(Guest(6), shown["uuid"], kernel))
        with connection:
            assert await pcr(reply.endpoint, 4) == extended(sha256(b"another kernel"))
        await until_shown(running, "v", bound_domain=None)
        code, text = await refused(path, booted(Guest(7), shown["uuid"], kernel))
        assert (code, "cannot be read" in text) == (XenCode.FAILED, True)
        # a boot loader chose: nothing is known of the kernel, and nothing is made up
        connection, reply = await bound(path, Guest(8).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint, 4) == bytes(32)
            (now,) = await running.ask("show", vtpm="v")
            assert now["measured"] is None


async def test_what_was_said_after_the_attach_is_in_the_first_boot(place: tuple[ModelTpm, Any]) -> None:
    async with running_daemon(*place) as running:
        await running.ask("add", name="v")
        (shown,) = await running.ask("attach", vtpm="v", guest="web", frontend="xen")
        said = Measurement.of("cmdline", [CMDLINE.encode()]).to_text()
        (now,) = await running.ask("measure", vtpm="v", measure=(said,))
        assert (now["measure"], now["measured"]) == ("cmdline", None)
        connection, reply = await bound(running.layout.xen_socket, Guest(5).bind(shown["uuid"]))
        with connection:
            assert await pcr(reply.endpoint, 5) == extended(sha256(CMDLINE.encode()))
            await trio.lowlevel.checkpoint()
            (now,) = await running.ask("show", vtpm="v")
            assert now["measured"] == "cmdline"
            (log,) = await running.ask("event-log", vtpm="v")
            assert (log["pcr5"], log["late_attach"]) == (extended(sha256(CMDLINE.encode())).hex(), False)


async def test_a_platform_reset_under_a_guest_is_no_boot_of_it(place: tuple[ModelTpm, Any], tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"a kernel")
    async with running_daemon(*place) as running:
        path = running.layout.xen_socket
        await running.ask("add", name="v")
        (shown,) = await running.ask("attach", vtpm="v", guest="web", frontend="xen", measure=("toolstack",))
        connection, _ = await bound(path, booted(Guest(5), shown["uuid"], kernel))
        with connection:
            (now,) = await running.ask("show", vtpm="v")
            assert now["late_attach"] is False
            (now,) = await running.ask("reset-platform", vtpm="v")
            assert (now["late_attach"], now["measured"]) == (True, "kernel,cmdline"), "who ran may say anything in them"
        await until_shown(running, "v", bound_domain=None)
        connection, _ = await bound(path, booted(Guest(6), shown["uuid"], kernel))
        with connection:
            (now,) = await running.ask("show", vtpm="v")
            assert now["late_attach"] is False


def test_an_instance_of_a_release_that_cannot_measure_is_told_nothing_that_it_would_refuse() -> None:
    front, back = LocalRing.pair()
    with front, back:
        running = Running(uuid4(), 1, 1, back, "clear", "clear")
        running.measure = Measurement.of("cmdline", [CMDLINE.encode()]).to_text()
        for release, told in (("0.2.0", 0), (None, 0), (RELEASE, 1)):
            boots = Boots(lambda _vtpm: None, lambda _row: None, lambda _running, release=release: release)
            assert len(boots.begin(running)) == told
            assert bool(running.measured) == bool(told), "the row says what the PCRs have"
