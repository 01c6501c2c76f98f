"""libvirt: a domain made from the XML that vtpm-attach prints, and one whose swtpm is our command, have their TPM."""

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import vtpm_instance_commands as tpm
from e2e_rig import BIN, Installation, alive, installation, may_enter, wait_for
from libvirt_rig import BOOT_SECONDS, HAS_LIBVIRT, QEMU_USER, SWTPM_USER, Libvirt, libvirt

ROOT = Path(__file__).resolve().parents[2]
INDEX, SECRET = 0x01500042, b"a domain's secret, kept by its TPM"
EMULATOR = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
# Each command is one write, each response one read: what Linux's TPM device takes.
GUEST = b"""\
exec 3<>/dev/tpm0
say() {
    dd if=/data/$1 bs=4096 count=1 2>/dev/null >&3
    echo "$1: $(dd bs=4096 count=1 2>/dev/null <&3 | od -An -v -tx1 | tr -d ' \\n')"
}
echo "model: $(cat /sys/class/tpm/tpm0/tpm_version_major)"
echo "pcr0: $(cat /sys/class/tpm/tpm0/pcr-sha256/0)"
say read
say define
say write
say read-again
[ -f /data/extend ] || exit 0
say extend
for number in 1 2 3 4 5 6 7 8; do
    echo "pcr16-$number: $(cat /sys/class/tpm/tpm0/pcr-sha256/16)"
    sleep 0.5
done
"""
FILES = {
    "guest.sh": GUEST,
    "define": tpm.nv_define(INDEX, len(SECRET)),
    "write": tpm.nv_write(INDEX, SECRET),
    "read": tpm.nv_read(INDEX, len(SECRET)),
    "read-again": tpm.nv_read(INDEX, len(SECRET)),
}
EXTENDED = tpm.extended(b"\x11" * 32).hex()  # PCR 16 after `extend`
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not HAS_LIBVIRT, reason="needs root, libvirt and QEMU"),
]


@pytest.fixture(scope="module")
def host() -> Iterator[Installation]:
    """A running manager, whose directories others may pass through, as /run."""
    with installation() as made:
        made.base.chmod(0o711)
        made.init()
        made.start()
        yield made


@pytest.fixture(scope="module")
def virt(host: Installation) -> Iterator[Libvirt]:
    """A libvirtd that finds our command as `swtpm`."""
    environment = {"VTPM_MANAGER_SOCKET": str(host.runtime / "admin.sock")}
    with libvirt((ROOT / "images" / "libvirt", BIN), environment) as made:
        yield made


def given(host: Installation, name: str, user: int, *options: str) -> str:
    """Make a vTPM and attach it for a user; returns its UUID."""
    vtpm = host.add(name, *options)
    host.attach(name, name, "--frontend", "qemu", "--owner", f"{user}:{user}")
    return vtpm


def said(transcript: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+): ([0-9A-Fa-f]*)$", transcript, flags=re.MULTILINE))


def check(transcript: str, *, first: bool) -> None:
    answers = said(transcript)
    assert answers["model"] == "2"
    assert int(answers["pcr0"], 16) not in (0, 2**256 - 1), "the firmware measured nothing"
    code = {name: int(answers[name][12:20], 16) for name in ("read", "define", "write", "read-again")}
    assert (code["read"] == 0) is not first, code
    assert (code["define"] == 0) is first, code
    assert (code["write"], code["read-again"]) == (0, 0), code
    assert SECRET.hex() in answers["read-again"]
    assert first or SECRET.hex() in answers["read"]


def test_a_domain_from_the_printed_xml_boots_and_keeps_its_tpm(host: Installation, virt: Libvirt) -> None:
    given(host, "external", QEMU_USER[1])
    shown = host.show("external")
    virt.define("external", str(uuid4()), shown["libvirt_xml"], FILES)
    check(virt.boot("external"), first=True)
    status = Path(shown["control"]).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (QEMU_USER[1], QEMU_USER[1], 0o600)
    host.restart()  # nothing is left of QEMU's connections, and of the processes
    check(virt.boot("external"), first=False)
    assert host.show("external")["state"] == "running"


def test_a_domain_does_not_get_a_tpm_that_is_another_users(host: Installation, virt: Libvirt) -> None:
    given(host, "foreign", SWTPM_USER[1])
    virt.define("foreign", str(uuid4()), host.show("foreign")["libvirt_xml"], FILES)
    refused = virt.virsh("start", "foreign", check=False)
    assert refused.returncode != 0
    assert "Permission denied" in refused.stderr


@pytest.mark.skipif(not may_enter(SWTPM_USER[1]), reason="other users may not enter the directory of this clone")
def test_a_domain_whose_swtpm_is_our_command_has_the_vtpm_of_its_uuid(host: Installation, virt: Libvirt) -> None:
    vtpm = str(uuid4())
    virt.define("managed", vtpm, EMULATOR, FILES | {"extend": tpm.pcr_extend(16)})
    refused = virt.virsh("start", "managed", check=False)
    assert refused.returncode != 0
    assert f"vTPM {vtpm} is not attached" in refused.stderr, "libvirt shows what our command says"
    assert f"--owner {SWTPM_USER[1]}" in refused.stderr
    given(host, "managed", SWTPM_USER[1], "--uuid", vtpm)
    instance = host.show("managed")["pid"]
    check(virt.boot("managed"), first=True)
    wait_for(lambda: not virt.commands("vtpm-swtpm"), "the end of our command, with its QEMU")
    assert host.show("managed")["pid"] == instance
    assert alive(instance), "the vTPM stays attached, switched off"
    virt.start_domain("managed")
    wait_for(lambda: "pcr16-2: " in virt.printed("managed"), "the guest", BOOT_SECONDS)
    assert virt.commands("vtpm-swtpm"), "this is how its end was noticed before"
    virt.virsh("save", "managed", str(virt.base / "saved"))
    virt.virsh("restore", str(virt.base / "saved"))
    transcript = virt.transcript("managed")
    check(transcript, first=False)
    answers = said(transcript)
    assert {answers[f"pcr16-{number}"].lower() for number in range(1, 9)} == {EXTENDED}, "it went on where it was"
