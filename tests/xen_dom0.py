"""Arrangement (a) of docs/xen.md for tests: manager, instances and `vtpm-xen` in dom0, commands of guests' TPMs.

The installation is made on this machine, with the TPM that the host will have: Python is twenty times slower in dom0.
"""

import json
import re
import struct
from pathlib import Path

from e2e_rig import Installation
from fixtures_tpm import SwtpmProcess
from vtpm_instance_commands import command12
from xen_rig import Domain, XenHost

STATE, RUNTIME, LOG, XEN_LOG = "/data/state", "/run/vtpm-manager", "/run/manager.log", "/run/vtpm-xen.log"
START_SECONDS = 240.0  # 20 on a quiet machine
SHOWN_SECONDS = 20.0
INDEX, INDEX12 = "0x1500016", 0x1001
_PIDS = "/run/{}.pid"


class Prepared:
    """An installation with vTPMs that are attached to domains, for a host that has not been switched on yet."""

    def __init__(self, vtpms: dict[str, str], domains: dict[str, str]) -> None:
        """vtpms: name -> family; domains: the vTPM's name -> the domain's, and further options of vtpm-attach."""
        self._vtpms, self._domains = vtpms, domains
        self.uuids: dict[str, str] = {}

    def __call__(self, directory: Path) -> Path:
        """Make it, in a host's directory; returns what belongs on the host's data disk."""
        tpm = SwtpmProcess(directory / "tpm")
        tpm.start()
        made = Installation(directory / "installing")
        made.base.mkdir()
        try:
            made.init("--no-recovery", "--pcrs", "none", tcti=tpm.tcti)
            made.start()
            for name, family in self._vtpms.items():
                self.uuids[name] = made.command("vtpm-add", "--name", name, "--tpm", family, "--quiet").out.strip()
            for name, words in self._domains.items():
                made.command("vtpm-attach", name, *words.split(), "--frontend", "xen")
            assert made.stop() == 0, made.tail()
        finally:
            tpm.stop()
        made.configure("tcti", "tis:locality=2")
        content = directory / "content"
        content.mkdir()
        made.state.rename(content / "state")
        return content


def _start(host: XenHost, name: str, command: str, log: str) -> None:
    host.good(f"setsid {command} >>{log} 2>&1 & echo $! >{_PIDS.format(name)}")


def start_manager(host: XenHost) -> None:
    words = f"--state-dir {STATE} --runtime-dir {RUNTIME}"
    _start(host, "manager", f"vtpm-manager run {words}", LOG)


def start_back_end(host: XenHost) -> None:
    _start(host, "vtpm-xen", f"vtpm-xen run --runtime-dir {RUNTIME}", XEN_LOG)


def pid(host: XenHost, name: str) -> str:
    return host.good(f"cat {_PIDS.format(name)}")


def up(host: XenHost) -> None:
    """Wait until both are ready."""
    begun = "".join(f"read -r {word} <{_PIDS.format(name)}; " for word, name in (("m", "manager"), ("x", "vtpm-xen")))
    ready = f"[ -S {RUNTIME}/admin.sock ] && grep -q ready {XEN_LOG} && exit"
    alive = "[ -d /proc/$m ] && [ -d /proc/$x ] || break"  # without a fork, which dom0 feels
    waiting = f"{begun}for _ in $(seq {int(START_SECONDS)}); do {ready}; {alive}; sleep 1; done"
    host.good(f"{waiting}; cat {LOG} {XEN_LOG}; exit 1", START_SECONDS * 2)


def until(host: XenHost, condition: str, seconds: float = SHOWN_SECONDS) -> str:
    """Wait for a condition of dom0's shell; returns what it printed when it held."""
    script = f"for _ in $(seq {int(seconds * 5)}); do ({condition}) && exit; sleep 0.2; done; exit 1"
    return host.good(script, seconds + 20)


def shown(host: XenHost, name: str) -> dict[str, object]:
    return dict(json.loads(host.good(f"vtpm-show {name} --json")))


def device(guest: Domain) -> str:
    """Wait until the guest's driver has made a device; returns what the kernel said of it."""
    return guest.good("for _ in $(seq 100); do [ -c /dev/tpm0 ] && break; sleep 0.1; done; ls -l /dev/tpm0")


# --- a TPM 2.0's guest ---


def write_secret(guest: Domain, secret: str) -> None:
    for command in (
        f"tpm2 nvdefine -Q {INDEX} -C o -s {len(secret)} -a 'ownerread|ownerwrite'",
        f"printf %s '{secret}' >/tmp/secret",
        f"tpm2 nvwrite {INDEX} -C o -i /tmp/secret",
    ):
        guest.good(command)


def read_secret(guest: Domain, size: int) -> str:
    return guest.good(f"tpm2 nvread {INDEX} -C o -s {size}")


def pcr(guest: Domain, number: int) -> str:
    (value,) = re.findall(r": 0x([0-9A-F]{64})", guest.good(f"tpm2 pcrread sha256:{number}"))
    return str(value).lower()


# --- a TPM 1.2's guest; TPM Main specification 1.2, part 3 ---


def raw(guest: Domain, command: bytes) -> bytes:
    """The answer's parameters; its code must be 0."""
    answer = bytes.fromhex(guest.good(f"raw /dev/tpm0 {command.hex()}"))
    assert int.from_bytes(answer[2:6]) == len(answer)
    assert answer[6:10] == bytes(4), answer.hex()
    return answer[10:]


def pcr12(guest: Domain, number: int) -> str:
    return raw(guest, command12(0x15, struct.pack(">I", number))).hex()


def extend12(guest: Domain, number: int, digest: bytes) -> str:
    return raw(guest, command12(0x14, struct.pack(">I", number) + digest)).hex()


def write_secret12(guest: Domain, secret: str) -> None:
    """Into an NV space that asks for nothing: a TPM without an owner has its NV unlocked."""
    anyone = struct.pack(">H3xB20x", 3, 0x1F)  # no PCRs, every locality
    public = struct.pack(">HI", 0x18, INDEX12) + anyone * 2 + struct.pack(">HI3xI", 0x17, 1, len(secret))
    raw(guest, command12(0xCC, public + bytes(20)))
    raw(guest, command12(0xCD, struct.pack(">III", INDEX12, 0, len(secret)) + secret.encode()))


def read_secret12(guest: Domain, size: int) -> str:
    return raw(guest, command12(0xCF, struct.pack(">III", INDEX12, 0, size)))[4:].decode()
