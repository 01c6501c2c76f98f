"""The manager on machines whose TPM has registers: our own drivers, and a reboot with new firmware at locality 2."""

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from guest_rig import Machine, Transcript, machine

SCRIPTS = Path(__file__).parent / "guest"
FIRST_FIRMWARE, NEW_FIRMWARE = "1.0", "2.0"
SECRET = "a guest's secret"
NO_DRIVER = "initcall_blacklist=init_tis"
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def files(**more: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in SCRIPTS.iterdir() if path.is_file()} | more


def ran(vm: Machine, step: str, *kernel: str, firmware: str = "", device: str = "tpm-tis") -> Transcript:
    transcript = vm.boot([f"step={step}", *kernel], firmware=firmware, device=device)
    assert transcript.finished, f"{step}:\n{transcript.text[-6000:]}"
    sys.stdout.write(f"{step}: {transcript.seconds:.1f} s\n{transcript.text}")
    return transcript


def localities(transcript: Transcript, when: str) -> dict[int | None, tuple[bool, str]]:
    lines = transcript.good("python /data/localities.py").split("\n")
    found = [json.loads(line) for line in lines if line]
    return {each["locality"]: (each["usable"], each["text"]) for each in found if each["when"] == when}


@pytest.fixture(scope="module")
def predicted() -> str:
    """What a reference machine with the new firmware has in PCR 1."""
    with machine("small", files()) as vm:
        value = ran(vm, "reference", firmware=NEW_FIRMWARE).good("cat /sys/class/tpm").strip().lower()
    assert re.fullmatch("[0-9a-f]{64}", value)
    return value


@pytest.fixture(scope="module")
def vm(predicted: str) -> Iterator[Machine]:
    """The machine: new at first, it keeps its disk and its TPM from one boot to the next."""
    with machine("manager", files(predicted=predicted, secret=SECRET)) as made:
        yield made


@pytest.fixture(scope="module")
def buffers() -> Iterator[Future[Transcript]]:
    """Another machine, with a CRB; it runs beside the first one, which leaves half of two processors alone."""

    def boot() -> Transcript:
        with machine("manager", files()) as other:
            return ran(other, "crb", NO_DRIVER, "initcall_blacklist=crb_acpi_driver_init", device="tpm-crb")

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(boot)


@pytest.fixture(scope="module")
def first(vm: Machine, buffers: Future[Transcript]) -> Transcript:
    """The installation; the other machine runs meanwhile."""
    return ran(vm, "install", firmware=FIRST_FIRMWARE)


@pytest.fixture(scope="module")
def second(vm: Machine, first: Transcript) -> Transcript:
    """The reboot with new firmware."""
    assert first.finished
    return ran(vm, "upgraded", NO_DRIVER, firmware=NEW_FIRMWARE)


def test_the_kernels_driver_keeps_the_page_until_it_is_unbound(first: Transcript) -> None:
    assert first.good("readlink").strip().endswith("/tpm_tis")
    ((locality, (usable, text)),) = localities(first, "bound").items()
    assert (locality, usable) == (None, False)
    assert "echo MSFT0101:00 > /sys/bus/platform/drivers/tpm_tis/unbind" in text
    assert set(localities(first, "unbound")) == {0, 1, 2, 3, 4}


def test_each_locality_is_seen_by_the_tpm_as_what_it_is(first: Transcript) -> None:
    found = localities(first, "unbound")
    assert [found[number][0] for number in range(5)] == [True, True, True, True, False]
    assert [number for number in range(5) if "PCR 20 can be reset" in found[number][1]] == [2]
    assert "neither requested nor seized" in found[4][1]


def test_nothing_but_the_page_of_locality_two_is_mapped(first: Transcript) -> None:
    maps = first.good("grep /dev/mem").strip().splitlines()
    (line,) = maps
    span, _, offset, *_ = line.split()
    begin, end = (int(half, 16) for half in span.split("-"))
    assert (int(offset, 16), end - begin) == (0xFED42000, 0x1000)


def test_a_guests_secret_survives_the_reboot_with_approved_firmware(
    first: Transcript, second: Transcript, predicted: str
) -> None:
    assert first.good("cat /sys/class/tpm/tpm0/pcr-sha256/1").strip().lower() != predicted
    for command in (
        "vtpm-recovery-key new",
        "vtpm-approve new-key",
        "vtpm-manager init",
        "vtpm-manager approve",
    ):
        first.good(command)
    signed = [step for step in first.steps if step.command.startswith("vtpm-approve sign")]
    assert [step.code for step in signed] == [0, 0, 0, 0]
    for command in ("start_manager", "vtpm-add", "vtpm-attach", "tpm2 nvdefine", "tpm2 nvwrite", "stop_manager"):
        first.good(command)
    second.good("start_manager")
    assert second.good("tpm2 nvread").strip() == SECRET
    second.good("stop_manager")


def attempts(transcript: Transcript) -> dict[str, str]:
    lines = transcript.good("python /data/unseal.py").strip().splitlines()
    return {where: result for where, _, result in (line.partition(" | ") for line in lines)}


def test_locality_zero_of_the_same_machine_cannot_unseal(second: Transcript) -> None:
    assert attempts(second)["at locality 2"] == "unsealed 64 bytes"
    assert attempts(second)["at locality 0"].startswith("WrongLocality 0x907 exit 7:")


def test_firmware_that_nobody_approved_does_not_unseal(second: Transcript) -> None:
    refused = attempts(second)["at locality 2 with another PCR 1"]
    assert refused.startswith("NotApproved ")
    assert " exit 5: " in refused
    assert "PCR 1 is " in refused


def test_the_firmwares_locality_is_seized_and_the_log_says_so(second: Transcript) -> None:
    assert second.step("ls /dev/tpm0").code != 0
    assert "from a lower locality" in second.good("grep seized")


def test_buffers_work_at_the_locality_that_qemu_has_and_every_wrong_setting_has_its_message(
    buffers: Future[Transcript],
) -> None:
    transcript = buffers.result()
    opening, *rest = transcript.good("python /data/registers.py").strip().splitlines()
    assert opening == "random 600 600 32; SRK provisioned"
    said = {setting: (kind, code) for setting, kind, code, _ in (line.split(" | ") for line in rest)}
    assert said == {
        "crb:locality=2": ("RegistersInvalid", "7"),
        "tis:locality=0": ("WrongInterface", "7"),
        "tis:base=0xfed50000": ("RegistersInvalid", "7"),
        "crb:base=0xfed50000": ("RegistersInvalid", "7"),
        "tis:path=/dev/none": ("PathMissing", "7"),
        "tis:path=/dev/null": ("PageRefused", "7"),
    }
    found = localities(transcript, "unbound")
    assert [found[number][0] for number in range(5)] == [True, False, False, False, False]
    assert "through crb:" in found[0][1]
