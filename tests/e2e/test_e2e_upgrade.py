"""`vtpm-manager upgrade`: the installed code takes over in the same process, while guests save all the time."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, DEADLINE, Guest, Installation, installation, wait_for
from qemu_client import qemu, say

from frontend_backend.release import RELEASE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TREE = Path(__file__).resolve().parents[2]
PACKAGES = ("manager", "vtpm_instance", "frontend_backend", "storage")
NEXT = "9.9.9"
INDEX = 0x1500016


class Upgradable(Installation):
    """An installation whose code is a copy of ours, in a virtual environment of its own, and can be replaced."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.code, self.venv = base / "code", base / "venv"
        self.install("first")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.venv)], check=True)
        (site,) = self.venv.glob("lib/python3*/site-packages")
        libraries = sysconfig.get_path("purelib")
        (site / "code.pth").write_text(f"{self.code}\n{libraries}\n")  # without the .pth files there: our own tree's
        script = self.venv / "bin" / "vtpm-manager"
        script.write_text(
            f"#!{self.venv}/bin/python\nimport sys\nfrom manager.__main__ import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)

    def install(self, name: str, *changes: tuple[str, str, str]) -> None:
        """Put a copy of the code, with changes (file, old text, new text), in the place of what is installed."""
        tree = self.base / name
        for package in PACKAGES:
            shutil.copytree(TREE / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in changes:
            text = (tree / file).read_text()
            assert old in text, f"{file} has no {old!r}"
            (tree / file).write_text(text.replace(old, new))
        link = self.base / "link"
        link.symlink_to(tree)
        link.replace(self.code)

    def spawn(self) -> None:
        assert self.manager is None
        places = ("--state-dir", str(self.state), "--runtime-dir", str(self.runtime))
        notify = self.base / "notify"
        environment = os.environ | ({"NOTIFY_SOCKET": str(notify)} if notify.exists() else {})
        with self.log.open("ab") as log:
            self.manager = subprocess.Popen(
                [str(self.venv / "bin" / "vtpm-manager"), "run", *places], stderr=log, env=environment
            )

    def status(self) -> dict[str, object]:
        return dict(self.vtpm_manager("status", "--json").json)


def release(name: str) -> tuple[str, str, str]:
    return "frontend_backend/release.py", f'"{RELEASE}"', f'"{name}"'


class Systemd:
    """What systemd hears of its service."""

    def __init__(self, base: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(base / "notify"))
        self.sock.settimeout(DEADLINE)

    def next(self) -> str:
        return self.sock.recv(4096).decode().splitlines()[0]


@pytest.fixture
def systemd(made: "Upgradable") -> Iterator[Systemd]:
    heard = Systemd(made.base)
    yield heard
    heard.sock.close()


@pytest.fixture
def made() -> Iterator[Upgradable]:
    with installation(Upgradable) as one:
        assert isinstance(one, Upgradable)
        one.init()
        yield one


class Counter:
    """Writes 1, 2, 3, ... into NV, and extends a PCR with each, until told to stop."""

    def __init__(self, endpoint: str) -> None:
        self.guest = Guest(endpoint)
        self.guest.define(INDEX, 8)
        self.written = 0
        self.problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self.guest.write(INDEX, (self.written + 1).to_bytes(8))
                self.written += 1
                assert int.from_bytes(self.guest.read(INDEX, 8)) == self.written
        except BaseException as error:  # noqa: BLE001 - raised where the thread is joined
            self.problem = error

    def goes_on(self) -> None:
        """Wait until it has written more than now."""
        seen = self.written
        wait_for(lambda: self.problem or self.written > seen + 5, "more writes")
        assert self.problem is None, self.problem

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self.problem is None, self.problem
        assert int.from_bytes(self.guest.read(INDEX, 8)) == self.written
        self.guest.close()


@contextmanager
def counting(*endpoints: str) -> Iterator[list[Counter]]:
    counters = [Counter(endpoint) for endpoint in endpoints]
    try:
        yield counters
    finally:
        for counter in counters:
            counter._stop.set()
    for counter in counters:
        counter.stop()


def test_the_installed_code_takes_over_and_no_command_is_lost(made: Upgradable, systemd: Systemd) -> None:
    made.start()
    assert systemd.next() == "READY=1"
    for name in ("web", "db"):
        made.add(name)
    shown = [made.attach(name) for name in ("web", "db")]
    made.add("vm")
    control = str(made.attach("vm", "guest", "--frontend", "qemu")["control"])
    assert made.manager is not None
    pid, keeper = made.manager.pid, made.status()["keeper_pid"]
    with counting(*(one["endpoint"] for one in shown)) as counters, qemu(control) as machine:
        for counter in counters:
            counter.goes_on()
        made.install("second", release(NEXT))
        done = made.vtpm_manager("upgrade", "--json").json
        assert (done["state"], done["release"], done["from_release"], done["pid"]) == ("upgraded", NEXT, RELEASE, pid)
        for counter in counters:
            counter.goes_on()
        assert tpm.rc(say(machine.data, tpm.nv_define(INDEX, 8))) == 0
    assert [systemd.next(), systemd.next()] == ["RELOADING=1", "READY=1"]
    status = made.status()
    assert (status["pid"], status["keeper_pid"], status["release"]) == (pid, keeper, NEXT)
    assert f"3 vTPMs, of release {RELEASE}: ends with the last of them" in str(status["keepers_hold"])
    for name, before in zip(("web", "db"), shown, strict=True):
        now = made.show(name)
        assert (now["pid"], now["release"], now["outdated"], now["state"]) == (before["pid"], RELEASE, True, "running")
    # a reset renews an instance, a new one is of the new code, and the old keeper goes with its last
    made.command("vtpm-reset-platform", "web")
    web = made.show("web")
    assert (web["release"], web["outdated"]) == (NEXT, False)
    assert (made.show("vm")["release"], made.status()["keepers"]) == (RELEASE, 2)
    made.command("vtpm-reset-platform", "vm")
    with qemu(control) as machine:
        assert tpm.rc(say(machine.data, tpm.nv_write(INDEX, bytes(8)))) == 0
    assert made.show("vm")["release"] == NEXT
    made.command("vtpm-detach", "db")
    assert made.attach("db")["release"] == NEXT
    wait_for(lambda: made.status()["keepers"] == 1, "the old keeper to go")
    # no zombie either: it is a child of this process, whose earlier code had started it
    wait_for(lambda: str(keeper) not in os.listdir("/proc"), "its end")
    guest = Guest(web["endpoint"])
    assert int.from_bytes(guest.read(INDEX, 8)) == counters[0].written
    guest.close()
    assert made.stop() == 0
    assert systemd.next() == "STOPPING=1"


REFUSED = (
    ("frontend_backend/messages_keeper.py", "VERSION: Final = ", "VERSION: Final = 7", "the keepers' protocol"),
    ("frontend_backend/messages_instance.py", "VERSION: Final = ", "VERSION: Final = 7", "the instances' protocol"),
    ("storage/catalogue_schema.py", "SCHEMA: Final = ", "SCHEMA: Final = 1  # ", "the catalogue's schema"),
    ("storage/store_format.py", "FORMAT_VERSION: Final = ", "FORMAT_VERSION: Final = 1  # ", "store"),
    ("manager/config.py", "    events_days: int", "    events_years: int", "unknown key 'events_days'"),
    ("manager/daemon.py", "import trio", "import trio_of_the_future", "No module named 'trio_of_the_future'"),
    ("manager/__main__.py", "def main(", "def nothing(", "cannot import name 'main'"),
)


def test_code_that_cannot_take_over_is_refused_and_nothing_changes(made: Upgradable) -> None:
    made.start()
    made.add("web")
    shown = made.attach("web")
    before = made.status()
    with counting(shown["endpoint"]) as (counter,):
        for number, (file, old, new, says) in enumerate(REFUSED):
            made.install(f"refused-{number}", release(NEXT), (file, old, new))
            refused = made.vtpm_manager("upgrade", check=False)
            assert (refused.code, says in refused.err) == (4, True), refused.err
            assert "Nothing was changed" in refused.err
            counter.goes_on()
    after = made.status()
    assert (after["run"], after["release"], after["keeper_pid"]) == (before["run"], RELEASE, before["keeper_pid"])
    assert made.show("web")["pid"] == shown["pid"]


def spawner_of(keeper: int) -> int:
    """The child that is no instance."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    others = ("vtpm-instance", "vtpm-standby")
    return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() not in others)


def test_a_spawner_of_replaced_code_makes_nothing_and_the_upgrade_does(made: Upgradable) -> None:
    made.start()
    for name in ("web", "db"):
        made.add(name)
    shown = made.attach("web")
    made.install("second", release(NEXT))
    os.kill(spawner_of(int(str(made.status()["keeper_pid"]))), 9)
    refused = made.command("vtpm-attach", "db", "guest", check=False)
    assert refused.code == 1, refused.err
    assert made.show("web")["pid"] == shown["pid"], "running ones go on"
    made.vtpm_manager("upgrade")
    assert made.attach("db")["release"] == NEXT
    assert made.show("web")["pid"] == shown["pid"]


def test_a_hibernated_vtpm_wakes_after_an_upgrade_also_where_its_old_keeper_cannot_make_instances(
    made: Upgradable,
) -> None:
    made.start()
    guests = {}
    for name in ("web", "db"):
        made.add(name)
        guests[name] = Guest(made.attach(name)["endpoint"])
        guests[name].define(INDEX, 8)
        guests[name].write(INDEX, name.ljust(8).encode())
        guests[name].close()
    keeper = int(str(made.status()["keeper_pid"]))
    for name in guests:
        made.command("vtpm-hibernate", name)
    made.install("second", release(NEXT))
    made.vtpm_manager("upgrade")
    assert guests["web"].read(INDEX, 8) == b"web     "
    assert made.show("web")["outdated"], "it woke in the keeper that had its sockets"
    os.kill(spawner_of(keeper), 9)
    wait_for(lambda: _answers(guests["db"]), "new sockets, and an answer there")
    assert guests["db"].read(INDEX, 8) == b"db      "
    assert made.show("db")["release"] == NEXT
    for guest in guests.values():
        guest.close()


def _answers(guest: Guest) -> bool:
    try:
        return guest.code(tpm.get_random(8)) == 0
    except OSError:
        return False


def test_a_stop_during_an_upgrade_is_a_stop(made: Upgradable) -> None:
    made.start()
    made.add("web")
    made.attach("web")
    made.install("second", release(NEXT))
    with subprocess.Popen(
        [str(BIN / "vtpm-manager"), "upgrade", "--socket", str(made.runtime / "admin.sock")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as upgrade:
        wait_for(lambda: "upgrade" in made.log.read_text(), "the request")
        assert made.stop() == 0, made.tail()
        upgrade.kill()
    wait_for(lambda: not made.processes(), "everything to end")


def test_code_that_cannot_be_run_after_all_leaves_the_old_code_serving(made: Upgradable) -> None:
    """It can go between the question and the step: here it takes its own right to be executed away."""
    made.start()
    made.add("web")
    shown = made.attach("web")
    before = made.status()
    script = made.venv / "bin" / "vtpm-manager"
    text = script.read_text()
    with counting(shown["endpoint"]) as (counter,):
        script.write_text(text.replace("import sys\n", "import os, sys\nos.chmod(sys.argv[0], 0o644)\n"))
        refused = made.vtpm_manager("upgrade", check=False)
        assert refused.code == 1, refused.err
        assert "cannot be run" in refused.err
        counter.goes_on()
    after = made.status()
    assert (after["pid"], after["release"], after["keeper_pid"]) == (before["pid"], RELEASE, before["keeper_pid"])
    assert after["run"] != before["run"]
    assert made.show("web")["pid"] == shown["pid"]
    script.write_text(text)
    script.chmod(0o755)
    made.install("second", release(NEXT))
    assert made.vtpm_manager("upgrade", "--json").json["release"] == NEXT, "the next one may do"
    assert made.status()["upgrade_failed"] is None


def test_new_code_that_crashes_leaves_the_instances_for_code_that_does_not(made: Upgradable) -> None:
    made.start()
    made.add("web")
    shown = made.attach("web")
    assert made.manager is not None
    with counting(shown["endpoint"]) as (counter,):
        made.install("crashes", release(NEXT), ("manager/daemon.py", "    layout.check()\n", "    os.abort()\n"))
        words = [str(BIN / "vtpm-manager"), "upgrade", "--socket", str(made.runtime / "admin.sock")]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as upgrade:
            assert made.manager.wait(DEADLINE) == -signal.SIGABRT
            upgrade.kill()
        made.manager = None
        made.install("first-again")
        made.start()
        counter.goes_on()
    assert made.show("web")["pid"] == shown["pid"]
    assert not made.show("web")["outdated"]


def test_nothing_grows_from_upgrade_to_upgrade(made: Upgradable) -> None:
    made.start()
    made.add("web")
    shown = made.attach("web")
    assert made.manager is not None
    held = []
    with counting(shown["endpoint"]) as (counter,):
        for number in range(3):
            made.install(f"next-{number}", release(f"{NEXT}.{number}"))
            made.vtpm_manager("upgrade")
            counter.goes_on()
            wait_for(lambda: len(made.processes()) == 6, "manager, TPM, keeper, spawner, instance and the next")
            held.append(kinds_of(made.manager.pid))
    assert held[0] == held[1] == held[2]


def kinds_of(pid: int) -> list[str]:
    """What a process has open; sockets and files of whatever number."""
    folder = Path(f"/proc/{pid}/fd")
    targets = [os.readlink(folder / name) for name in os.listdir(folder)]
    return sorted(re.sub(r"\d+", "", target) for target in targets if not target.endswith(("-wal", "-shm", ".sqlite")))
