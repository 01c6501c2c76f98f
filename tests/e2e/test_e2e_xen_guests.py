"""What a Linux guest of Xen makes of a TPM 2.0: compatibility mode, a whole device, its boot measured, a late attach.

The guest is a PV domain with Debian's kernel and its unmodified xen-tpmfront; the manager and vtpm-xen run in dom0.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import xen_dom0 as dom0
import xen_domains as domains
from xen_rig import Domain, XenHost, domain_config, xen_host

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("VTPM_XEN_DOMAINS") != "yes", reason="a minute: ./dev e2e xen runs it"),
]
RAW, WHOLE = "TPM2TOOLS_TCTI=device:/dev/tpm0", "TPM2TOOLS_TCTI=device:/dev/vtpmrm"
MEASURED = "kernel,cmdline,initrd"
EXTRA = "comma=a,b 'quoted words'"


@dataclass
class Rig:
    """A host whose manager has a vTPM for the domain web, and one that it gets while it runs."""

    host: XenHost
    uuids: dict[str, str]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    prepared = dom0.Prepared({"web": "2.0", "late": "2.0"}, {"web": "web --measure toolstack", "late": "web"})
    with xen_host(prepared, progress=sys.stdout) as host:
        domains.start_manager(host)
        domains.start_back_end(host)
        yield Rig(host, prepared.uuids)


@pytest.fixture(scope="module")
def host(rig: Rig) -> XenHost:
    return rig.host


@pytest.fixture(scope="module")
def vtpm(rig: Rig) -> str:
    return rig.uuids["web"]


@pytest.fixture(scope="module")
def web(host: XenHost, vtpm: str) -> Domain:
    """A domain with Python, as a guest: with xen-tpmfront, from the guests' image."""
    config = domain_config("web", memory=256, vtpm=[f"backend=0,uuid={vtpm}"], extra=f"quiet {EXTRA}")
    web = host.create("web", config)
    web.ready()
    web.good("cd /tmp && busybox cpio -id 'modules/*' </guest/guest.cpio && insmod modules/xen-tpmfront.ko")
    appears(web, "/dev/tpm0")
    return web


def appears(domain: Domain, device: str) -> None:
    """Wait for a device node; in a shell of its own, for the domain's shell is its first process."""
    domain.good(f"(for i in $(seq 100); do [ -e {device} ] && exit; sleep 0.1; done; exit 1)")


def pcr(domain: Domain, tcti: str, number: int) -> str:
    return domain.good(f"{tcti} tpm2 pcrread sha256:{number}").split("0x")[-1].lower()


def after(*digests: bytes) -> str:
    value = bytes(32)
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value.hex()


def test_what_the_toolstack_boots_is_measured_before_the_guest_runs(host: XenHost, web: Domain, vtpm: str) -> None:
    shown = dom0.shown(host, vtpm)
    assert (shown["measure"], shown["measured"], shown["late_attach"]) == ("toolstack", MEASURED, False)
    files = host.good("sha256sum /guest/vmlinux /guest/boot.cpio").splitlines()
    kernel, initrd = (bytes.fromhex(line.split()[0]) for line in files)
    cmdline = web.good("cat /proc/cmdline")
    assert EXTRA in cmdline
    assert pcr(web, RAW, 4) == after(kernel)
    assert pcr(web, RAW, 5) == after(hashlib.sha256(cmdline.encode()).digest(), initrd)
    told = json.loads(host.good("vtpm-event-log web --json"))
    assert (told["pcr4"], told["pcr5"]) == (pcr(web, RAW, 4), pcr(web, RAW, 5))


def test_the_drivers_probes_leave_no_error_in_the_guests_log(web: Domain) -> None:
    """Reading every file of sysfs sends every TPM 1.2 command that the driver knows."""
    said = web.good("cd /sys/class/tpm/tpm0/device; cat pcrs caps owned enabled active temp_deactivated; cat pubek")
    assert said.count("PCR-") == 24
    assert "TCG version: 1.2" in said
    assert f"PCR-00: {'00 ' * 20}".strip() in said
    assert web.good("cat /sys/class/tpm/tpm0/tpm_version_major") == "1"
    first, second = (web.good("head -c 64 /dev/hwrng | sha256sum") for _ in range(2))
    assert first != second
    assert web.run("dmesg | grep -i -e 'tpm error' -e 'tpm.*fail'")[0] == 1
    web.good(f"{RAW} tpm2 getrandom --hex 8")


def start_service(web: Domain) -> str:
    """Run the service as it is copied into a guest: one file, Python's own library; returns what it says."""
    run = "echo $$ >/tmp/pid; exec python3.11 -I -S /tmp/vtpm-guest-device"
    web.good(f"(setsid sh -c '{run}' >/tmp/said 2>&1; echo code $? >>/tmp/said) &")
    return web.good("for i in $(seq 100); do grep -q -e 'are a TPM' -e code /tmp/said && break; sleep 0.1; done; "
                    "cat /tmp/said")  # fmt: skip


def ended(web: Domain) -> str:
    return web.good("for i in $(seq 100); do grep -q code /tmp/said && break; sleep 0.1; done; cat /tmp/said")


def test_the_service_makes_a_whole_tpm_2_0_device(web: Domain) -> None:
    web.good("cp /opt/project/frontend_backend/guest_device.py /tmp/vtpm-guest-device")
    assert "/dev/tpm1 and /dev/tpmrm1, as /dev/vtpmrm, are a TPM 2.0, of /dev/tpm0" in start_service(web)
    assert web.good("cat /sys/class/tpm/tpm1/tpm_version_major") == "2"
    assert web.good("cat /sys/class/tpm/tpm1/pcr-sha256/4").lower() == pcr(web, WHOLE, 4)
    # a resource manager: what programs leave behind is not the next one's trouble
    for _ in range(4):
        web.good(f"{WHOLE} tpm2 createprimary -Q -G ecc -c /tmp/primary")
    assert not web.good(f"{WHOLE} tpm2 getcap handles-transient")
    code, said = web.run("python3.11 -I -S /tmp/vtpm-guest-device")
    assert (code, "used by another program" in said) == (1, True), said


def test_a_vtpm_that_is_taken_away_ends_the_service_with_a_word_and_it_comes_back(
    host: XenHost, web: Domain, vtpm: str
) -> None:
    host.good("xl vtpm-detach web 0")
    said = ended(web)
    assert "/dev/tpm0 is gone: the host took the vTPM away" in said
    assert "code 1" in said
    assert web.run("ls /dev/tpm1 /dev/tpmrm1 /dev/vtpmrm 2>&1")[0] != 0
    code, said = web.run("python3.11 -I -S /tmp/vtpm-guest-device")
    assert (code, "modprobe xen-tpmfront" in said) == (3, True), said
    host.good(f"xl vtpm-attach web uuid={vtpm}")
    appears(web, "/dev/tpm0")
    assert "are a TPM 2.0" in start_service(web)
    assert pcr(web, WHOLE, 4) == json.loads(host.good("vtpm-event-log web --json"))["pcr4"]
    web.good("kill $(cat /tmp/pid)")
    assert "/dev/tpm0 is free again" in ended(web)
    web.good(f"{RAW} tpm2 getrandom --hex 8")


def test_a_vtpm_that_a_running_guest_gets_is_late_and_its_quotes_say_so(rig: Rig, web: Domain) -> None:
    host = rig.host
    host.good(f"xl vtpm-attach web uuid={rig.uuids['late']}")
    appears(web, "/dev/tpm1")
    late = dom0.shown(host, "late")
    assert (late["late_attach"], late["measured"], late["bound_domain"]) == (True, None, web.number)
    host.good("cd /tmp && vtpm-group-enroll default -o request && vtpm-check-quote new-ca ca.key ca.pem && "
              "vtpm-check-quote challenge request --unchecked-ek -o challenge --keep kept && "
              "vtpm-group-enroll default --challenge challenge -o proof && vtpm-check-quote certify request proof kept "
              "--ca-key ca.key --ca-cert ca.pem -o ak.pem")  # fmt: skip
    for name, wanted in (
        ("late", "not checked  attach: the guest ran before"),
        ("web", "ok  attach: before the guest"),
    ):
        host.good(f"cd /tmp && vtpm-quote {name} --nonce 00ff -o {name}.quote && vtpm-event-log {name} -o {name}.log")
        log = f"--event-log {name}.log" if name == "web" else ""
        said = host.good(f"cd /tmp && vtpm-check-quote {name}.quote --ak ak.pem --ca ca.pem --nonce 00ff {log}")
        assert wanted in re.sub(" {2,}", "  ", said), said
        assert ("ok  boot: PCR 4 and 5 is" in re.sub(" {2,}", "  ", said)) == (name == "web"), said
