"""Devices of the Linux vTPM proxy, in a guest whose kernel has it: they outlive instances and managers.

`./dev e2e qemu` adds a TPM 1.2 and a relay over vsock to the guest's script (VTPM_PROXY_MORE).
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from guest_rig import Transcript, machine

SCRIPTS = Path(__file__).parent / "guest"
SECRET = "a host's secret"
EXTENDED = "0x" + hashlib.sha256(bytes(32) + b"\x5a" * 32).hexdigest().upper()
MORE = bool(os.environ.get("VTPM_PROXY_MORE"))
only_in_more = pytest.mark.skipif(not MORE, reason="./dev e2e qemu has it")
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def host() -> Transcript:
    files = {path.name: path.read_text() for path in SCRIPTS.iterdir() if path.is_file()}
    with machine("manager", files | {"secret": SECRET.ljust(16)}) as vm:
        transcript = vm.boot(["step=proxy", "initcall_blacklist=init_tis", *(["more"] if MORE else [])])
        sys.stdout.write(f"{transcript.seconds:.1f} s\n{transcript.text}")
        assert transcript.finished, transcript.text[-6000:]
        return transcript


def document(host: Transcript, beginning: str) -> dict[str, object]:
    return dict(json.loads(host.good(beginning)))


def test_without_the_module_it_is_named_and_nothing_is_attached(host: Transcript) -> None:
    refused = next(step for step in host.steps if step.command == "vtpm-attach web host --frontend proxy")
    assert refused.code == 1
    assert "there is no /dev/vtpmx" in refused.output
    assert "modprobe tpm_vtpm_proxy" in refused.output
    assert "nothing was attached" in refused.output


def test_a_device_appears_and_is_the_guests_users(host: Transcript) -> None:
    shown = document(host, "vtpm-attach web host --frontend proxy --owner")
    assert (shown["endpoint"], shown["device"], shown["tcti"]) == ("/dev/tpmrm0", "/dev/tpm0", "device:/dev/tpmrm0")
    assert re.fullmatch(r"\d+:\d+", str(shown["device_numbers"]))
    assert host.good("stat -c").split() == ["nobody", "640"] * 2


def test_the_service_of_a_guest_of_xen_makes_another_device_of_it(host: Transcript) -> None:
    assert SECRET in host.good("secret through-the-service")
    assert EXTENDED in host.good("secret through-the-service")
    said = host.good("cat /tmp/service")
    assert "as /tmp/vtpmrm, are a TPM 2.0, of /dev/tpm0" in said
    assert said.strip().endswith("vtpm-guest-device: ended; /dev/tpm0 is free again\nended 0")


@only_in_more
def test_a_tpm_1_2_has_a_device_without_resource_manager(host: Transcript) -> None:
    shown = document(host, "vtpm-attach old")
    assert (shown["endpoint"], shown["device"], shown["resource_manager_numbers"]) == ("/dev/tpm1", "/dev/tpm1", None)
    version, *registers = host.good("cat /sys/class/tpm/tpm1/tpm_version_major").strip().splitlines()
    assert version == "1"
    assert len(registers) == 24
    assert "/dev/tpmrm1: No such file" in host.step("ls /dev/tpm1 /dev/tpmrm1").output


def test_a_command_wakes_a_hibernated_one_which_has_kept_its_pcrs(host: Transcript) -> None:
    host.good("state_is web hibernated")
    assert SECRET in host.good("secret after-hibernation")
    assert EXTENDED in host.good("secret after-hibernation")


def test_what_a_killed_instance_took_is_answered_with_failure_and_the_device_stays(host: Transcript) -> None:
    in_flight = host.good("cat /tmp/in-flight /tmp/in-flight.log")
    assert re.search(r"^ended [1-9]", in_flight)
    assert "ended 124" not in in_flight, "nobody answered it"
    assert "ERROR" in in_flight
    assert "Esys_GetCapability(0x101)" in host.step("secret of-a-crashed-one").output
    assert SECRET in next(step for step in host.steps if step.command.startswith("tpm2 nvread")).output


def test_a_device_is_used_while_there_is_no_manager_and_by_the_next_one(host: Transcript) -> None:
    assert SECRET in host.good("secret without-a-manager")
    assert EXTENDED in host.good("secret without-a-manager")
    shown = document(host, "cat /tmp/shown")
    assert (shown["endpoint"], shown["state"]) == ("/dev/tpmrm0", "running")


@only_in_more
def test_a_sleepers_device_too(host: Transcript) -> None:
    assert len(host.good("cat /sys/class/tpm/tpm1/pcrs").split("\n")) >= 24


def test_detach_takes_the_device_away_also_from_who_uses_it(host: Transcript) -> None:
    host.good("vtpm-detach web")
    gone = [step for step in host.steps if step.command in ("ls /dev/tpm0", "ls /dev/tpmrm0", "ls /dev/tpm1")]
    assert [step.code != 0 for step in gone] == [True] * (3 if MORE else 2)


@only_in_more
def test_a_relay_over_vsock(host: Transcript) -> None:
    reads = [step for step in host.steps if step.command.startswith("tpm2 nvread")]
    assert [(step.code, SECRET in step.output) for step in reads] == [(0, True)] * 2
    assert "vsock:any:9443: client here is here" in host.good("cat /tmp/serve.log")


def test_nothing_went_wrong_unseen(host: Transcript) -> None:
    host.good("stop_manager")
    assert host.step("grep -i").code == 1, host.step("grep -i").output
