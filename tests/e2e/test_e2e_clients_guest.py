"""systemd and cryptsetup in a Linux guest, whose /dev/tpmrm0 is a vTPM behind QEMU: an encrypted disk over reboots."""

import subprocess
from pathlib import Path

import pytest
from e2e_rig import installation
from guest_rig import built_image
from qemu_rig import Agent
from qemu_tpms import SUBJECTS, Behind, Bench, Ours, Swtpm, place

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
ATTACH = "systemd-cryptsetup attach data /dev/vda - tpm2-device=auto,headless=1"
DETACH = "cryptsetup close data"


def load_modules(guest: Agent) -> None:
    guest.good("while read -r module; do insmod /modules/$module; done </modules/order")
    guest.good("test -b /dev/vda && test -c /dev/tpmrm0")


def encrypt(guest: Agent) -> None:
    cheap = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
    guest.good("printf %s 'of the administrator' >passphrase")
    guest.good(f"cryptsetup luksFormat -q --type luks2 {cheap} /dev/vda passphrase")
    guest.good('PASSWORD="$(cat passphrase)" systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs=7 /dev/vda')
    guest.good(ATTACH)
    guest.good("mke2fs -q /dev/mapper/data && mkdir /run/data && mount -t ext4 /dev/mapper/data /run/data")
    guest.good("echo 'on the disk' >/run/data/file && umount /run/data")
    guest.good(DETACH)


def content(guest: Agent) -> str:
    return guest.good("mkdir -p /run/data && mount -t ext4 -o ro /dev/mapper/data /run/data && cat /run/data/file")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_encrypted_disk_of_a_guest_opens_by_its_vtpm_at_each_boot(subject: str) -> None:
    with place() as directory, installation() as made:
        tpm: Behind
        if subject == "swtpm":
            tpm = Swtpm(directory)
        else:
            made.init()
            made.start()
            tpm = Ours(made, "disk")
        bench = Bench(directory, built_image("disks"))
        disk = directory / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "24M"], check=True)
        try:
            boots(bench, tpm, disk)
        finally:
            bench.close()
            tpm.close()


def boots(bench: Bench, tpm: Behind, disk: Path) -> None:
    qemu = bench.qemu(tpm, disk=disk)
    qemu.boot()
    guest = qemu.guest
    load_modules(guest)
    encrypt(guest)
    guest.good("printf %s 'of a service' | systemd-creds encrypt --name=s --with-key=tpm2 --tpm2-pcrs=7 - /tmp/s.cred")
    assert guest.good("systemd-creds decrypt --name=s /tmp/s.cred -") == "of a service"

    qemu.reboot()
    load_modules(guest)
    guest.good(ATTACH)
    assert content(guest) == "on the disk"
    guest.good(f"umount /run/data && {DETACH}")
    guest.good("cryptsetup open --token-only --type luks2 /dev/vda data")
    assert content(guest) == "on the disk"
    guest.good(f"umount /run/data && {DETACH}")
    guest.good(f"tpm2 pcrextend 7:sha256={'7b' * 32}")
    assert guest.run("cryptsetup open --token-only --type luks2 /dev/vda data")[0] != 0
    assert guest.run(ATTACH)[0] != 0
    assert guest.run("test -e /dev/mapper/data")[0] != 0
    qemu.quit()
