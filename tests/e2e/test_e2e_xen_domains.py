"""Xen with the manager outside dom0: in a driver domain, and apart from the instances' domains. `./dev e2e xen`."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import xen_dom0 as dom0
import xen_domains as domains
from xen_rig import Domain, XenHost

WEBS = ("web1", "web2")
SECRET, OTHER_SECRET = "a-guests-secret", "another-guests"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("VTPM_XEN_DOMAINS") != "yes", reason="minutes: ./dev e2e xen runs it"),
]
# without its last part, which extends a PCR: the manager is to open its store in the same boot
UNSEAL = (Path(__file__).parent / "guest" / "unseal.py").read_text().partition("extend_pcr_1()\nprint")[0]


class Shown(XenHost):
    """A host that shows what its domains' programs said when a test fails."""

    def opened(self, name: str) -> Domain:
        domain = super().opened(name)
        self.logs = {**getattr(self, "logs", {}), name: domain}
        return domain

    def show_logs(self) -> None:
        self.run("xl list; xenstore-ls -f /local/domain | grep -E 'vtpm|error'")
        for domain in getattr(self, "logs", {}).values():
            with suppress(AssertionError, TimeoutError):
                domain.run("tail -n 40 /run/*.log; ps", 20)


@contextmanager
def machine(disks: int, memory: int, prepare: Callable[[Path], Path] | None = None) -> Iterator[XenHost]:
    """A host with data disks and a TPM that stay over its reboots; what happens is shown while it happens.

    prepare: returns what the manager's disk, the first after dom0's, begins with.
    """
    directory = Path(tempfile.mkdtemp(prefix="xen", dir=os.environ.get("TMPDIR")))
    (directory / "tpm").mkdir()
    content = prepare(directory) if prepare else None
    host = Shown(
        directory,
        disks=disks,
        memory=memory,
        content=content,
        content_disk=1,
        progress=sys.stdout,
    )
    try:
        host.boot()
        yield host
    except (AssertionError, TimeoutError):
        host.show_logs()
        raise
    finally:
        host.power_cut()
        shutil.rmtree(directory)


def reboot(host: XenHost) -> None:
    host.note("the host loses its power and comes up again: same disks, same TPM")
    host.power_cut()
    host.boot()


def test_a_driver_domain_with_the_page_of_locality_two_serves_a_guest_over_a_host_reboot() -> None:
    with machine(disks=1, memory=2048) as host:
        vtpmd = domains.driver_domain(host, "vtpmd", "/dev/vdd")
        domains.only_locality_two(vtpmd)
        domains.install(vtpmd)
        domains.start_both(vtpmd)
        vtpm = domains.new_vtpm(vtpmd, "web1", "--domain any")
        guest = domains.guest(host, "web1", "vtpmd", vtpm)
        domains.write_secret(guest, SECRET)
        domains.sealed_and_opened(guest, "sealed-by-the-guest")
        assert '"locality": 2' in vtpmd.good("vtpm-manager tpm-status --json")
        assert f" {vtpm} " in host.good("xl vtpm-list web1")
        reboot(host)
        opens_at_locality_two_only(host)
        vtpmd = domains.driver_domain(host, "vtpmd", "/dev/vdd")
        domains.start_both(vtpmd)
        guest = domains.guest(host, "web1", "vtpmd", vtpm)
        assert domains.read_secret(guest, SECRET) == SECRET


def opens_at_locality_two_only(host: XenHost) -> None:
    """What dom0 could do with the driver domain's disk: the same sealed object, at locality 2 and at locality 0."""
    host.good("umount /data && mount -t ext4 -o ro /dev/vdd /data")
    host.write("/tmp/unseal.py", UNSEAL)
    at_two, at_zero = host.good("/opt/vtpm-manager/bin/python /tmp/unseal.py; umount /data").splitlines()
    assert at_two == "at locality 2 | unsealed 64 bytes", at_two
    assert "WrongLocality 0x907" in at_zero, at_zero  # TPM_RC_LOCALITY


def test_a_manager_domain_and_instance_domains_keep_two_guests_apart_over_restarts_of_everything() -> None:
    prepared = dom0.Prepared(dict.fromkeys(WEBS, "2.0"), {name: f"{name} --instance-domain any" for name in WEBS})
    with machine(disks=3, memory=3072, prepare=prepared) as host:
        manager = domains.driver_domain(host, "vtpmmgr", "/dev/vdd")
        domains.only_locality_two(manager)
        domains.start_both(manager)
        vtpms = [prepared.uuids[name] for name in WEBS]
        guests = both(lambda number: started(host, number, vtpms[number - 1]))
        for guest, secret in zip(guests, (SECRET, OTHER_SECRET), strict=True):
            domains.write_secret(guest, secret)
        domains.sealed_and_opened(guests[0], "sealed-by-the-guest")
        host.good("xl destroy vtpmmgr")
        answers_without_a_manager(guests[0])
        manager = again(host, "vtpmmgr")
        for number, vtpm in enumerate(vtpms, 1):
            wired_anew(host, f"vtpm-web{number}", vtpm)
        domains.write_more(guests[0])
        apart(guests)
        for name in ("web1", "vtpm-web1"):
            host.good(f"xl destroy {name}")
        guest = started(host, 1, vtpms[0])
        assert domains.read_secret(guest, SECRET) == SECRET
        reboot(host)
        again(host, "vtpmmgr")
        guest = started(host, 1, vtpms[0])
        assert domains.read_secret(guest, SECRET) == SECRET


def started(host: XenHost, number: int, vtpm: str) -> Domain:
    """The instance domain of a vTPM, without access to the TPM, and the guest that it serves."""
    name = f"web{number}"
    instance = domains.instance_domain(host, f"vtpm-{name}", f"/dev/vd{'def'[number]}", "vtpmmgr", vtpm)
    domains.no_tpm_at_all(instance)
    domains.start_instance(instance)
    return domains.guest(host, name, f"vtpm-{name}", vtpm)


def both(do: Callable[[int], Domain]) -> list[Domain]:
    """Do it for guest 1 and guest 2, at the same time: while one waits the other one works."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(do, (1, 2)))


def again(host: XenHost, name: str) -> Domain:
    """The manager's domain once more, on its disk."""
    manager = domains.driver_domain(host, name, "/dev/vdd")
    domains.start_both(manager)
    return manager


def wired_anew(host: XenHost, instance: str, vtpm: str) -> None:
    """Give a device whose back end's domain is gone another back end. xl does not find it any more (4.17)."""
    code, said = host.run(f"xl vtpm-detach {instance} {vtpm}")
    assert (code, "Unknown device" in said) == (1, True), "xl has learnt it: docs/xen.md needs no more than that"
    host.good(f"for at in /local/domain /libxl; do xenstore-rm $at/$(xl domid {instance})/device/vtpm/0; done")
    host.good(f"xl vtpm-attach {instance} uuid={vtpm} backend=vtpmmgr")


def answers_without_a_manager(guest: Domain) -> None:
    """What changes nothing that is durable is answered all the same."""
    assert len(guest.good("tpm2 getrandom --hex 8")) == 16


def apart(guests: list[Domain]) -> None:
    """Each reads its own secret where the other has its own, at the same index."""
    for guest, secret in zip(guests, (SECRET, OTHER_SECRET), strict=True):
        assert domains.read_secret(guest, secret) == secret
