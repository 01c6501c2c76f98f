"""The systemd units are accepted by systemd, and keep what the design depends on."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from own_root import needs_own_root

UNITS = Path(__file__).resolve().parent.parent / "images" / "systemd"
MANAGER, INSTANCES = UNITS / "vtpm-manager.service", UNITS / "vtpm-instances.service"
XEN, GUEST = UNITS / "vtpm-xen.service", UNITS / "guest" / "vtpm-guest-device.service"
WORST_EXPOSURE = {MANAGER.name: 3.1, INSTANCES.name: 1.5, XEN.name: 1.3, GUEST.name: 1.9}
COMMAND = re.compile("/opt/vtpm-manager/bin/vtpm-(manager|xen)|/usr/local/sbin/vtpm-guest-device")

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def settings(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit with its values, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key].append(value)
    return found


def installed(directory: Path) -> list[Path]:
    """The units with a command that exists on every machine in place of ours."""
    made = []
    for unit in (MANAGER, INSTANCES, XEN, GUEST):
        copy = directory / unit.name
        copy.write_text(COMMAND.sub("/bin/true", unit.read_text(encoding="utf-8")), encoding="utf-8")
        made.append(copy)
    return made


@needs_systemd
def test_systemd_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, installed(tmp_path))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    complaints = [line for line in done.stderr.splitlines() if "vtpm-" in line]
    assert not complaints
    assert done.returncode == 0, done.stderr


@needs_systemd
def test_the_sandbox_is_as_tight_as_the_documents_say(tmp_path: Path) -> None:
    for unit in installed(tmp_path):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
        assert exposure is not None, done.stdout + done.stderr
        assert float(exposure[1]) <= WORST_EXPOSURE[unit.name]


def test_restarting_the_manager_leaves_keeper_and_instances_alone() -> None:
    unit = settings(MANAGER)
    assert unit["KillMode"] == ["process"]
    assert unit["KillSignal"] == ["SIGHUP"], "SIGHUP is: step down, keep instances"
    assert unit["RuntimeDirectoryPreserve"] == ["yes"], "the keeper's socket lies there"
    assert unit["OOMPolicy"] == ["continue"]
    assert "PrivateTmp" not in unit, "removed when the manager stops, under the keeper"
    assert "yes" not in unit["MemoryDenyWriteExecute"], "cffi's closures need it"
    assert unit["ProtectProc"] == ["default"], "the manager looks up its instances' users"


def test_the_spawner_may_do_what_shuts_instances_in() -> None:
    unit = settings(MANAGER)
    assert unit["RestrictNamespaces"] == ["user mnt net ipc"]
    assert {"CAP_SETUID", "CAP_SETGID", "CAP_SETFCAP"} <= set(unit["CapabilityBoundingSet"][0].split())
    assert "CAP_SYS_ADMIN" not in unit["CapabilityBoundingSet"][0]
    allowed = {name for line in unit["SystemCallFilter"] for name in line.split()}
    assert {"mount", "umount2", "pivot_root", "unshare", "seccomp", "landlock_restrict_self"} <= allowed


@needs_own_root
@pytest.mark.skipif(os.geteuid() != 0, reason="capabilities are taken from root")
def test_with_the_units_capabilities_instances_have_every_measure() -> None:
    (capabilities,) = settings(MANAGER)["CapabilityBoundingSet"]
    kept = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities.split())
    command = ["setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all", "--no-new-privs", sys.executable]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, "-m", "vtpm_instance.keeper", "--check"], capture_output=True, check=True, cwd=root, timeout=60
    )
    assert [each["name"] for each in json.loads(done.stdout)["features"] if not each["active"]] == []


def pipes_of(user: int) -> list[int]:
    """Two pipes' four ends, made by another user, as an instance makes its doorbell: reading, writing, twice."""
    ours, theirs = socket.socketpair()
    if not (child := os.fork()):
        os.setresuid(user, user, user)
        socket.send_fds(theirs, [b"x"], [*os.pipe(), *os.pipe()])
        os._exit(0)
    os.waitpid(child, 0)
    with ours, theirs:
        return socket.recv_fds(ours, 1, 4)[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="capabilities are taken from root")
def test_the_back_end_of_xen_opens_an_instances_doorbell_anew_in_its_sandbox() -> None:
    """Through /proc, of which it sees little, and though the pipes are another user's."""
    unit = settings(XEN)
    (capabilities,), (hidden,), (subset,) = (
        unit[key] for key in ("CapabilityBoundingSet", "ProtectProc", "ProcSubset")
    )
    kept = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities.split())
    sandbox = f'mount -t proc -o hidepid={hidden},subset={subset} proc /proc && exec "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", sandbox, "sh"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount /proc")
    heard, its_ring, its_heard, rung = pipes_of(65534)
    limits = ["setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all", "--no-new-privs", sys.executable, "-c"]
    try:
        done = subprocess.run(
            [*command, *limits, f"{OPENS_ANEW}\nopens_anew({heard}, {rung})"],
            capture_output=True,
            text=True,
            check=False,
            cwd=UNITS.parent.parent,
            pass_fds=(heard, rung),
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr
        assert os.read(its_heard, 10) == b"\0"
    finally:
        for descriptor in (heard, its_ring, its_heard, rung):
            os.close(descriptor)


OPENS_ANEW = """
from pathlib import Path
from frontend_backend.doorbell import PipeDoorbell

def opens_anew(heard, rung):
    doorbell = PipeDoorbell.adopt(heard, rung, patient=False, wary=True)
    doorbell.ring()
    print(doorbell.drain(), Path("/proc/meminfo").exists())
"""


def test_a_refused_store_is_not_tried_again_and_again() -> None:
    assert settings(MANAGER)["RestartPreventExitStatus"] == ["2 3 5 6"]


def test_instances_are_stopped_before_the_manager_and_not_by_its_restart() -> None:
    unit = settings(INSTANCES)
    assert unit["After"] == ["vtpm-manager.service"], "stopped in reverse order"
    for binding in ("Requires", "BindsTo", "PartOf", "Requisite"):
        assert binding not in unit
    assert "/opt/vtpm-manager/bin/vtpm-manager stop" in unit["ExecStop"][0]


def test_the_manager_has_longer_to_stop_than_its_instances() -> None:
    assert int(settings(MANAGER)["TimeoutStopSec"][0]) > 60 + 30


def test_the_back_end_of_xen_leaves_the_managers_directory_and_comes_before_guests() -> None:
    unit = settings(XEN)
    manager = settings(MANAGER)
    for key in ("RuntimeDirectory", "RuntimeDirectoryMode", "RuntimeDirectoryPreserve"):
        assert unit[key] == manager[key], "its stop must not take the manager's sockets away"
    assert "xendomains.service" in unit["Before"][0], "'xl create' waits 10 s for state 2"
    assert unit["StartLimitIntervalSec"] == ["0"], "it ends with xenstored and must be there again with the next one"
    # xenstored: Xen's own unit, and Debian's script for all daemons (/etc/init.d/xen), which systemd calls xen.service
    assert {"xenstored.service", "xen.service"} <= set(unit["After"][0].split()), "until then there is no xenstore"
    assert not any("vtpm-manager" in value for value in unit["After"]), (
        "devices are announced before the manager is there"
    )


def test_the_guests_service_is_started_by_its_rule_when_there_is_a_device_and_not_without_one() -> None:
    unit = settings(GUEST)
    assert unit["RestartPreventExitStatus"] == ["2 3 5"]
    assert "DeviceAllow" in unit
    assert "modprobe@tpm_vtpm_proxy.service" in unit["Wants"][0].split()
    assert unit["After"] == unit["Wants"], "DeviceAllow= looks for /dev/vtpmx before ExecStartPre= runs"
    lines = (GUEST.parent / "70-vtpm-guest-device.rules").read_text().splitlines()
    (rule,) = (line for line in lines if line and not line.startswith("#"))
    assert f'ENV{{SYSTEMD_WANTS}}+="{GUEST.name}"' in rule
    assert 'DRIVERS=="vtpm"' in rule, "not the device that the service makes, or it would make one of that"
