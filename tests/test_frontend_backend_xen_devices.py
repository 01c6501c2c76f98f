"""Xen's device files: the numbers against Linux's own headers, refusals, mappings that are taken away.

What the drivers themselves do is proven under Xen: `frontend_backend.xen_selfcheck`, run by tests/e2e.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from frontend_backend import xen_devices, xen_hypercalls
from frontend_backend.xen_device_file import open_device
from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrantOffers, DeviceGrants
from frontend_backend.xen_hypercalls import DomainInfo, HypercallError, Hypervisor
from frontend_backend.xen_kernel import (
    FIRST_RESERVED_DOMAIN,
    ChannelRefusedError,
    EventChannels,
    GrantOffers,
    GrantRefusedError,
    Grants,
    XenDeniedError,
    XenError,
    XenMissingError,
)
from frontend_backend.xen_mapping import Mapping

HEADERS = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
typedef uint16_t domid_t;
typedef uint32_t grant_ref_t;
#include <xen/evtchn.h>
#include <xen/gntdev.h>
#undef UNMAP_NOTIFY_CLEAR_BYTE
#undef UNMAP_NOTIFY_SEND_EVENT
#include <xen/gntalloc.h>
#define SAY(name, value) printf("%s %lu\\n", name, (unsigned long)(value));
#define AT(type, field) SAY(#type "." #field, offsetof(struct type, field))
int main(void)
{
    SAY("BIND_INTERDOMAIN", IOCTL_EVTCHN_BIND_INTERDOMAIN)
    SAY("BIND_UNBOUND_PORT", IOCTL_EVTCHN_BIND_UNBOUND_PORT)
    SAY("UNBIND", IOCTL_EVTCHN_UNBIND)
    SAY("NOTIFY", IOCTL_EVTCHN_NOTIFY)
    SAY("RESET", IOCTL_EVTCHN_RESET)
    SAY("MAP_GRANT_REF", IOCTL_GNTDEV_MAP_GRANT_REF)
    SAY("UNMAP_GRANT_REF", IOCTL_GNTDEV_UNMAP_GRANT_REF)
    SAY("ALLOC_GREF", IOCTL_GNTALLOC_ALLOC_GREF)
    SAY("DEALLOC_GREF", IOCTL_GNTALLOC_DEALLOC_GREF)
    SAY("_WRITABLE", GNTALLOC_FLAG_WRITABLE)
    AT(ioctl_evtchn_bind_interdomain, remote_port)
    AT(ioctl_gntdev_map_grant_ref, index)
    AT(ioctl_gntdev_map_grant_ref, refs)
    AT(ioctl_gntdev_grant_ref, ref)
    AT(ioctl_gntdev_unmap_grant_ref, count)
    AT(ioctl_gntalloc_alloc_gref, flags)
    AT(ioctl_gntalloc_alloc_gref, count)
    AT(ioctl_gntalloc_alloc_gref, index)
    AT(ioctl_gntalloc_alloc_gref, gref_ids)
    AT(ioctl_gntalloc_dealloc_gref, count)
}
"""


def test_ioctls_and_structs_are_those_of_linuxs_headers(tmp_path: Path) -> None:
    (tmp_path / "headers.c").write_text(HEADERS)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", "headers", "headers.c"], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "headers"], capture_output=True, text=True, check=True).stdout
    truth = {name: int(value) for name, value in (line.split() for line in said.splitlines())}
    for name in [name for name in truth if "." not in name]:
        assert getattr(xen_devices, name) == truth.pop(name), name
    assert truth == {
        "ioctl_evtchn_bind_interdomain.remote_port": 4,
        "ioctl_gntdev_map_grant_ref.index": 8,
        "ioctl_gntdev_map_grant_ref.refs": xen_devices._MAP_HEAD.size,
        "ioctl_gntdev_grant_ref.ref": 4,
        "ioctl_gntdev_unmap_grant_ref.count": 8,
        "ioctl_gntalloc_alloc_gref.flags": 2,
        "ioctl_gntalloc_alloc_gref.count": 4,
        "ioctl_gntalloc_alloc_gref.index": 8,
        "ioctl_gntalloc_alloc_gref.gref_ids": xen_devices._ALLOC_HEAD.size,
        "ioctl_gntalloc_dealloc_gref.count": 8,
    }


@pytest.mark.parametrize(
    ("opened", "module"),
    [
        (DeviceEventChannels.open, "xen-evtchn"),
        (DeviceGrants.open, "xen-gntdev"),
        (DeviceGrantOffers.open, "xen-gntalloc"),
        (Hypervisor.open, "xen-privcmd"),
    ],
)
def test_a_missing_device_says_which_module_to_load(opened: Callable[[], object], module: str) -> None:
    if os.path.exists("/dev/xen/evtchn"):
        pytest.skip("this machine runs on Xen")
    with pytest.raises(XenMissingError, match=rf"modprobe {module}\).*without Xen"):
        opened()
    assert Hypervisor.open_if_allowed() is None


def test_a_device_that_may_not_be_used_is_said_to_be_there(tmp_path: Path) -> None:
    device = tmp_path / "evtchn"
    device.touch(0o600)
    os.chmod(tmp_path, 0o711)
    if os.geteuid() == 0:
        with as_user(65534), pytest.raises(XenDeniedError, match="as root"):
            open_device(str(device), "xen-evtchn")
    else:
        device.chmod(0)
        with pytest.raises(XenDeniedError, match="as root"):
            open_device(str(device), "xen-evtchn")


def as_user(number: int) -> "closing[AsUser]":
    return closing(AsUser(number))


class AsUser:
    def __init__(self, number: int) -> None:
        os.seteuid(number)

    def close(self) -> None:
        os.seteuid(0)


@pytest.fixture
def nothing() -> Iterator[int]:
    """A device that knows no ioctl of Xen's."""
    descriptor = os.open("/dev/null", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def refusals(descriptor: int) -> list[tuple[type[XenError], str, Callable[[], object]]]:
    channels, grants = DeviceEventChannels(descriptor), DeviceGrants(descriptor)
    offers = DeviceGrantOffers(descriptor)
    hypervisor = Hypervisor(descriptor, Mapping(memfd(4), 0, 4 * 4096))
    cut_to_1, kernel = 65536 + 1, "Inappropriate ioctl"
    return [
        (ChannelRefusedError, "no domain", lambda: channels.bind_interdomain(FIRST_RESERVED_DOMAIN, 5)),
        (ChannelRefusedError, "no domain", lambda: channels.bind_interdomain(cut_to_1, 5)),
        (ChannelRefusedError, "no domain", lambda: channels.bind_interdomain(-1, 5)),
        (ChannelRefusedError, "no event channel 0", lambda: channels.bind_interdomain(1, 0)),
        (ChannelRefusedError, "no event channel 4294967296", lambda: channels.bind_interdomain(1, 1 << 32)),
        (ChannelRefusedError, kernel, lambda: channels.bind_interdomain(1, 5)),
        (ChannelRefusedError, "no domain", lambda: channels.bind_unbound(cut_to_1)),
        (ChannelRefusedError, kernel, lambda: channels.bind_unbound(1)),
        (ChannelRefusedError, "not bound here", lambda: channels.notify(5)),
        (ChannelRefusedError, "not bound here", lambda: channels.unmask(5)),
        (GrantRefusedError, "no domain", lambda: grants.map(cut_to_1, [8])),
        (GrantRefusedError, "cannot be grants", lambda: grants.map(1, [])),
        (GrantRefusedError, "cannot be grants", lambda: grants.map(1, [8] * 257)),
        (GrantRefusedError, "cannot be grants", lambda: grants.map(1, [1 << 32])),
        (GrantRefusedError, "cannot be grants", lambda: grants.map(1, [-1])),
        (GrantRefusedError, kernel, lambda: grants.map(1, [8])),
        (GrantRefusedError, "no domain", lambda: offers.offer(cut_to_1, 1)),
        (GrantRefusedError, "0 pages", lambda: offers.offer(1, 0)),
        (GrantRefusedError, "257 pages", lambda: offers.offer(1, 257)),
        (GrantRefusedError, kernel, lambda: offers.offer(1, 1)),
        (HypercallError, "Invalid argument", lambda: hypervisor.info(cut_to_1)),
        (HypercallError, kernel, lambda: hypervisor.info(1)),
    ]


def test_what_cannot_be_is_refused_before_the_kernel_cuts_it_to_what_can(nothing: int) -> None:
    for kind, said, action in refusals(nothing):
        with pytest.raises(kind, match=said):
            action()


def test_the_devices_are_what_the_protocols_say(nothing: int) -> None:
    channels = DeviceEventChannels(os.dup(nothing))
    grants, offers = DeviceGrants(os.dup(nothing)), DeviceGrantOffers(os.dup(nothing))
    assert isinstance(channels, EventChannels)
    assert isinstance(grants, Grants)
    assert isinstance(offers, GrantOffers)
    channels.unbind(5)
    for device in (channels, grants, offers):
        device.close()
        device.close()


def memfd(pages: int) -> int:
    descriptor = os.memfd_create("pages")
    os.ftruncate(descriptor, pages * 4096)
    return descriptor


def mapped(pages: int) -> int:
    maps = Path("/proc/self/maps").read_text()
    return sum(
        (int(line.split()[0].split("-")[1], 16) - int(line.split("-")[0], 16)) // 4096
        for line in maps.splitlines()
        if "memfd:pages" in line
    )


def test_a_detached_mapping_is_gone_at_once_and_its_views_are_harmless() -> None:
    before = len(os.listdir("/proc/self/fd"))
    descriptor = memfd(3)
    mapping = Mapping(descriptor, 4096, 2 * 4096)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    page = mapping.page
    assert len(page) == 2 * 4096
    page[4095:4099] = b"both"
    assert os.pread(descriptor, 4, 4096 + 4095) == b"both"
    word = page[4096:4100].cast("I")
    assert mapped(2) == 2
    mapping.detach()
    assert mapped(2) == 0
    mapping.detach()
    assert bytes(page) == bytes(2 * 4096)
    assert word[0] == 0
    word[0] = 1
    page[0:4] = b"lost"
    assert os.pread(descriptor, 3 * 4096, 0) == bytes(2 * 4096 - 1) + b"both" + bytes(4096 - 3)
    os.close(descriptor)


def test_a_mapping_nobody_detached_goes_with_its_last_view() -> None:
    descriptor = memfd(1)
    view = Mapping(descriptor, 0, 4096).page[8:]
    os.close(descriptor)
    assert mapped(1) == 1
    view[0] = 1
    del view
    assert mapped(1) == 0


def test_a_mapping_that_cannot_be_says_so() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Mapping(-1, 0, 4096)


def test_a_domain_that_is_not_paused_may_have_run() -> None:
    def seen(cpu_time: int, *, paused: bool) -> DomainInfo:
        return DomainInfo(1, "", cpu_time, paused, dying=False, shutdown_code=None, hvm=False, ssidref=0)

    runs = [seen(0, paused=True), seen(0, paused=False), seen(1, paused=True)]
    assert [info.has_run for info in runs] == [False, True, True]
    assert xen_hypercalls.DOMCTL_VERSIONS[0] == 0x15
