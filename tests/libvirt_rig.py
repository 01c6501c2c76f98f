"""A libvirtd of the test's own: own mounts, users, directories and processes; nothing of the machine's is changed.

It runs as the first process but one of a PID namespace, so that everything it started ends with it, in a mount
namespace in which /etc/libvirt, /run, /var/lib, /var/log, /var/cache and the users are the test's.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from guest_rig import KERNEL, built_image

QEMU_USER: Final = ("libvirt-qemu", 64055)  # as Debian's package libvirt-daemon-system makes it
SWTPM_USER: Final = ("libvirt-swtpm", 64056)  # whom libvirt runs swtpm as; another one, so that a mix-up is found out
DISK_BYTES: Final = 16 * 1024 * 1024
BOOT_SECONDS: Final = 300.0  # 6 on a quiet machine
START_SECONDS: Final = 120.0  # libvirtd asks QEMU what it can do: 10 s on a quiet machine
HAS_LIBVIRT: Final = all(map(shutil.which, ("libvirtd", "virsh", "unshare", "qemu-system-x86_64"))) and not os.geteuid()

_UNSHARE: Final = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private")
_DAEMON = """\
unix_sock_dir = "{base}/sock"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:{base}/libvirtd.log"
"""
# dynamic_ownership as it is by default: whether libvirt gives our sockets away is of interest
_QEMU = """\
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
seccomp_sandbox = 0
stdio_handler = "file"
remember_owner = 0
user = "{qemu}"
group = "{qemu}"
swtpm_user = "{swtpm}"
swtpm_group = "{swtpm}"
"""
# A /dev/kvm that may be opened and does not work has libvirt ask QEMU anew for each of its 20 questions.
_START = """\
set -e
mount --bind {base}/passwd /etc/passwd
mount --bind {base}/group /etc/group
mount --bind {base}/etc /etc/libvirt
for place in /run /var/log /var/cache /var/lib; do mount -t tmpfs -o mode=755 tmpfs $place; done
mkdir /run/lock
if [ -e /dev/kvm ]; then mount --bind {base}/kvm /dev/kvm; fi
libvirtd --pid-file {base}/libvirtd.pid &
wait $!
"""
_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>512</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{base}/kernel</kernel>
    <initrd>{base}/initrd</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom'><model>qemu64</model></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='unsafe'/>
      <source file='{base}/{name}.img'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{base}/{name}.console' append='on'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {tpm}
  </devices>
</domain>
"""


class Libvirt:
    """A running libvirtd, spoken to by virsh."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, commands: Sequence[Path] = (), environment: Mapping[str, str] | None = None) -> None:
        """Start libvirtd; it finds what is in `commands` before the machine's commands."""
        for name in ("etc", "sock"):
            (self.base / name).mkdir()
        names = {"base": self.base, "qemu": QEMU_USER[0], "swtpm": SWTPM_USER[0]}
        (self.base / "etc" / "libvirtd.conf").write_text(_DAEMON.format(**names))
        (self.base / "etc" / "qemu.conf").write_text(_QEMU.format(**names))
        users, groups = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
        for name, number in (QEMU_USER, SWTPM_USER):
            users += f"{name}:x:{number}:{number}::/nonexistent:/usr/sbin/nologin\n"
            groups += f"{name}:x:{number}:\n"
        (self.base / "kvm").touch(0o600)
        (self.base / "passwd").write_text(users)
        (self.base / "group").write_text(groups)
        image = built_image("small")
        shutil.copy(image.kernel, self.base / "kernel")
        shutil.copy(image.initrd, self.base / "initrd")
        path = ":".join([*map(str, commands), os.environ["PATH"]])
        with (self.base / "start.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*_UNSHARE, "sh", "-c", _START.format(base=self.base)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": path, "LANG": "C.UTF-8", "LIBVIRT_RIG": str(self.base), **(environment or {})},
            )
        deadline = time.monotonic() + START_SECONDS
        while self.virsh("version", check=False).returncode:
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        where = f"qemu+unix:///system?socket={self.base}/sock/libvirt-sock"
        done = subprocess.run(
            ["virsh", "-c", where, *words], capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
        if check:
            assert done.returncode == 0, f"virsh {' '.join(words)}:\n{done.stdout}{done.stderr}{self.said()}"
        return done

    def said(self) -> str:
        logs = [self.base / "start.log", self.base / "libvirtd.log"]
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())

    def define(self, name: str, uuid: str, tpm: str, files: Mapping[str, bytes]) -> None:
        """Define a domain with this <tpm> element; `files` are on its disk, `guest.sh` is what it runs."""
        content = Path(tempfile.mkdtemp(dir=self.base))
        for file, data in files.items():
            (content / file).write_bytes(data)
        disk = self.base / f"{name}.img"
        with disk.open("wb") as made:
            made.truncate(DISK_BYTES)
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(content), str(disk)], check=True)
        file = self.base / f"{name}.xml"
        words = {"base": self.base, "name": name, "uuid": uuid, "tpm": tpm, "cmdline": " ".join(KERNEL)}
        file.write_text(_DOMAIN.format(**words))
        self.virsh("define", "--validate", str(file))

    def boot(self, name: str) -> str:
        """Start a domain, wait until it has switched itself off, and return what it has printed."""
        self.start_domain(name)
        return self.transcript(name)

    def start_domain(self, name: str) -> None:
        (self.base / f"{name}.console").unlink(missing_ok=True)
        for last in (False, False, True):
            done = self.virsh("start", name, check=last)
            if "socket did not show up" not in done.stderr:  # libvirt waits a second for swtpm, however busy we are
                assert done.returncode == 0, f"{done.stderr}{self.said()}"
                return

    def printed(self, name: str) -> str:
        console = self.base / f"{name}.console"
        return console.read_text(errors="replace").replace("\r", "") if console.exists() else ""

    def transcript(self, name: str) -> str:
        """Wait until a domain has switched itself off, and return what it has printed."""
        deadline = time.monotonic() + BOOT_SECONDS
        while self.virsh("domstate", name).stdout.strip() != "shut off":
            assert time.monotonic() < deadline, f"{name} does not end:\n{self.printed(name)[-2000:]}\n{self.said()}"
            time.sleep(0.2)
        text = self.printed(name)
        assert "@@DONE 0" in text, text[-3000:]
        return text.partition("@@USERSPACE")[2].partition("@@DONE")[0]

    def commands(self, name: str) -> list[int]:
        """Processes that this libvirtd has started, with `name` in their command line."""
        mine = str(self.base).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if name.encode() in (entry / "cmdline").read_bytes() and mine in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End libvirtd and everything it has started: they are of one PID namespace."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def libvirt(commands: Sequence[Path] = (), environment: Mapping[str, str] | None = None) -> Iterator[Libvirt]:
    """A libvirtd with directories in a place with a short name, which everybody may pass through."""
    base = Path(tempfile.mkdtemp(prefix="lv"))
    base.chmod(0o755)
    made = Libvirt(base)
    try:
        made.start(commands, environment)
        yield made
    finally:
        made.stop()
        shutil.rmtree(base, ignore_errors=True)
