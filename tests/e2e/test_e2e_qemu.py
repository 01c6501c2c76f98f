"""A Linux guest in QEMU whose TPM is ours: what it measures and seals lives through everything around it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Installation, installation
from guest_rig import Image, built_image
from qemu_guest import BOOT_PCRS, SEALED, devices, extend, measured_boot, pcrs, seal, unsealed
from qemu_rig import Agent, Qemu
from qemu_tpms import SUBJECTS, Behind, Bench, Ours, Swtpm, place

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
ZEROES = "0" * 64


@pytest.fixture(scope="module")
def image() -> Image:
    return built_image("client")


@pytest.fixture
def bench(image: Image) -> Iterator[Bench]:
    with place() as directory:
        made = Bench(directory, image)
        yield made
        made.close()


@pytest.fixture(scope="module")
def vtpms() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        yield made


def behind(subject: str, name: str, request: pytest.FixtureRequest, directory: Path, family: str = "2.0") -> Behind:
    """A TPM with no state yet."""
    if subject == "swtpm":
        made = Swtpm(directory, family)
        request.addfinalizer(made.close)
        return made
    return Ours(request.getfixturevalue("vtpms"), name, family)


def manager_comes_and_goes(tpm: Ours, guest: Agent) -> None:
    """The manager is killed, another takes over, that one is replaced in place; then the vTPM hibernates."""
    made, before = tpm.made, extend(guest, 16, "before")
    made.kill()
    assert pcrs(guest, "16")[16] == before  # nothing that the TPM reads needs a manager
    made.start()
    assert unsealed(guest) == (True, True)
    made.vtpm_manager("upgrade")
    assert unsealed(guest) == (True, True)
    pid = made.show(tpm.name)["pid"]
    tpm.hibernate()
    assert unsealed(guest) == (True, True)
    assert made.show(tpm.name)["pid"] not in {None, pid}
    assert pcrs(guest, "16")[16] == before


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_secret_survives_reboot_manager_hibernation_killed_qemu_and_another_device(
    subject: str, bench: Bench, request: pytest.FixtureRequest
) -> None:
    tpm = behind(subject, "life", request, bench.directory)
    qemu = bench.qemu(tpm)
    qemu.boot()
    guest = qemu.guest
    devices(guest)
    measured = measured_boot(guest)
    seal(guest)
    assert unsealed(guest) == (True, True)
    assert extend(guest, 7, "something else was booted") != measured[7]
    assert unsealed(guest) == (False, False)
    assert extend(guest, 16, "of this boot") != ZEROES

    qemu.reboot()
    assert measured_boot(guest) == measured
    assert pcrs(guest, "16")[16] == ZEROES
    assert unsealed(guest) == (True, True)
    if isinstance(tpm, Ours):
        manager_comes_and_goes(tpm, guest)

    qemu.kill()
    qemu = bench.qemu(tpm)
    qemu.boot()
    assert measured_boot(qemu.guest) == measured
    assert unsealed(qemu.guest) == (True, True)

    qemu.power_off()
    if isinstance(tpm, Ours):
        tpm.made.restart()
    qemu = bench.qemu(tpm, device="tpm-crb")
    qemu.boot()
    devices(qemu.guest)
    qemu.guest.good("dmesg | grep -q 'TPM2.*BXPC' && test -e /sys/bus/acpi/drivers/tpm_crb/MSFT0101:00")
    assert {number: measured_boot(qemu.guest)[number] for number in (0, 2, 4, 7)} == {
        number: measured[number] for number in (0, 2, 4, 7)
    }
    assert unsealed(qemu.guest) == (True, True)
    if isinstance(tpm, Ours):
        what_a_full_stop_does(tpm, qemu)
    else:
        qemu.quit()


def what_a_full_stop_does(tpm: Ours, qemu: Qemu) -> None:
    """A stop of everything under a running QEMU is as the end of swtpm: QEMU does not connect anew (docs/qemu.md)."""
    tpm.made.restart()
    assert qemu.guest.run(f"tpm2 unseal -c {SEALED} -p pcr:{BOOT_PCRS}")[0] != 0
    with pytest.raises(ConnectionResetError):
        qemu.reboot()
    assert qemu.process.wait(30) == 1
    assert tpm.made.show(tpm.name)["state"] == "running"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_secret_survives_a_reboot_under_ovmf(subject: str, bench: Bench, request: pytest.FixtureRequest) -> None:
    qemu = bench.qemu(behind(subject, "ovmf", request, bench.directory), device="tpm-crb", firmware="ovmf")
    qemu.boot()
    devices(qemu.guest)
    measured = measured_boot(qemu.guest)
    seal(qemu.guest)
    extend(qemu.guest, 4, "another kernel")
    assert unsealed(qemu.guest) == (False, False)
    qemu.reboot()
    again = measured_boot(qemu.guest)
    assert [again[number] == measured[number] for number in (0, 2, 4, 7)] == [True] * 4
    assert unsealed(qemu.guest) == (True, True)
    qemu.quit()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_guest_with_a_tpm_1_2(subject: str, bench: Bench, request: pytest.FixtureRequest) -> None:
    tpm = behind(subject, "old", request, bench.directory, "1.2")
    qemu = bench.qemu(tpm, disk=bench.disk())
    qemu.boot()
    guest = qemu.guest
    guest.good("test -c /dev/tpm0 && ! test -e /dev/tpmrm0 && dmesg | grep 'tpm_tis.*1.2 TPM'")
    measured = guest.good("head -n 8 /sys/class/tpm/tpm0/pcrs")
    assert "PCR-00: 00 00 00" not in measured
    assert measured.count("\n") == 7
    assert guest.good("cat /sys/class/tpm/tpm0/caps")
    if isinstance(tpm, Ours):
        tpm.hibernate()
        assert guest.good("head -n 8 /sys/class/tpm/tpm0/pcrs") == measured
    qemu.monitor.execute("stop")
    assert qemu.monitor.human("savevm one") == ""
    assert qemu.monitor.human("loadvm one") == ""
    qemu.monitor.execute("cont")
    assert guest.good("head -n 8 /sys/class/tpm/tpm0/pcrs") == measured
    qemu.quit()
