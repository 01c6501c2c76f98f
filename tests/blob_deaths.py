"""A vTPM that is saved, goes on, or is restored, while its instance or its manager is killed at a system call of it.

What must hold: a volatile state that a guest went on with, or that was restored, is not had a second time; what a
guest was told is durable in NV is there; a state that nobody went on with is restored, or refused as used up.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import vtpm_instance_rig as tpm
from blob_client import Machine, RefusedError, Saved
from e2e_rig import Installation, wait_for
from hibernation_deaths import killed_at

PCR, INDEX = 10, 0x01500020
DIGEST = b"\x44" * 32
FAILURE = 0x101
ROLLBACK = 0x2E


@dataclass(frozen=True)
class Death:
    """Who dies, at which system call, of what is done: "export", "use" or "restore"."""

    step: str
    who: str
    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.step}-{self.who}-{self.call}-{self.number}"


def _deaths(step: str, who: str, **calls: int) -> list[Death]:
    return [Death(step, who, call, number) for call, most in calls.items() for number in range(1, most + 1)]


DEATHS = [
    *_deaths("export", "instance", sendto=4, getrandom=2),
    *_deaths("export", "manager", sendto=1),
    *_deaths("use", "instance", pwrite64=4, fdatasync=2, sendto=5),
    *_deaths("use", "manager", pwrite64=2, fdatasync=2, sendto=3),
    *_deaths("restore", "instance", recvfrom=2, sendto=16, pwrite64=1, fdatasync=1),
    *_deaths("restore", "manager", pwrite64=1, fdatasync=1, sendto=2),
]


class Trial:
    """One vTPM, one guest, one death. `acked`: what its guest was told is in NV."""

    def __init__(self, made: Installation, name: str) -> None:
        self.made, self.name = made, name
        made.add(name)
        self.control = made.attach(name, name, "--frontend", "qemu")["control"]
        self.machine = Machine(self.control)
        self.machine.boot()
        self.machine.good(tpm.nv_define(INDEX, 8))
        self.acked = b"acked" + bytes(3)
        self.machine.good(tpm.nv_write(INDEX, self.acked))
        self.machine.extend(PCR, DIGEST)
        self.pcr = self.machine.pcr(PCR)
        self.tried = self.acked  # what it was about to write when somebody died, perhaps
        self.saved: Saved | None = None
        self.lived = False  # a guest went on with what was saved

    # the steps

    def export(self) -> None:
        self.saved = self.machine.save()

    def use(self) -> None:
        """The guest goes on: first with what is never saved by itself, then it writes NV."""
        self.tried = b"after" + bytes(3)
        for command in (tpm.pcr_extend(PCR, DIGEST), tpm.nv_write(INDEX, self.tried)):
            code = self.machine.code(command)
            if code:
                assert code == FAILURE, hex(code)
                return
            self.lived = True
        self.acked = self.tried

    def restore(self) -> None:
        assert self.saved is not None
        self.machine.close()
        self.machine = Machine(self.control)
        self.machine.reset(incoming=True)
        self.machine.restore(self.saved)
        assert self.machine.pcr(PCR) == self.pcr
        self.lived = True
        self.machine.code(tpm.get_random(8))

    # what must be so afterwards

    def check(self) -> None:
        self.machine.close()
        if self.saved is not None and self._can_be_had():
            assert not self.lived, "a volatile state was had twice"
            self.machine.end()
            assert not self._can_be_had(), "a volatile state was had twice"
        self.machine.close()
        self._again(self._boot)
        found = tpm.nv_content(self.machine.good(tpm.nv_read(INDEX, 8)))
        assert found in (self.acked, self.tried), f"{found!r} where {self.acked!r} was acknowledged"
        assert self.machine.pcr(PCR) == bytes(32)
        self.machine.end()

    def _can_be_had(self) -> bool:
        """Restore what was saved; returns False when that is refused as used up."""
        try:
            self._again(self.restore_once)
        except RefusedError as error:
            if error.result != ROLLBACK:
                raise
            return False
        return True

    def _boot(self) -> None:
        self.machine.close()
        self.machine = Machine(self.control)
        self.machine.boot()

    def restore_once(self) -> None:
        assert self.saved is not None
        self.machine.close()
        self.machine = Machine(self.control)
        self.machine.reset(incoming=True)
        self.machine.restore(self.saved)
        assert self.machine.pcr(PCR) == self.pcr

    @staticmethod
    def _again(act: Callable[[], None]) -> None:
        """Do it, once the vTPM has an instance again."""

        def done() -> bool:
            try:
                act()
            except OSError:
                return False
            return True

        wait_for(done, "the next instance")


def die(made: Installation, name: str, death: Death) -> bool:
    """Have somebody die over a step, then see that everything is right; returns whether anybody did."""
    trial = Trial(made, name)
    if death.step != "export":
        trial.export()
    if death.step == "restore":
        trial.machine.end()
    instance = int(made.show(name)["pid"])
    manager = made.manager
    assert manager is not None
    with killed_at(instance if death.who == "instance" else manager.pid, death.call, death.number):
        failures = _in_thread(made, getattr(trial, death.step))
    assert not [error for error in failures if not isinstance(error, OSError | RefusedError)], failures
    _revive(made)
    trial.check()
    return made.manager is not manager or int(made.show(name)["pid"]) != instance


def _in_thread(made: Installation, act: Callable[[], None]) -> list[BaseException]:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except (OSError, RefusedError, AssertionError) as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(3.0)
    if thread.is_alive():  # it waits for a manager
        _revive(made)
        thread.join(40.0)
    assert not thread.is_alive(), f"nobody answers; the log:\n{made.tail()}"
    return failures


def _revive(made: Installation) -> None:
    """Start another manager where the last one was killed."""
    if made.manager is not None and made.manager.poll() is not None:
        made.manager = None
    if made.manager is None:
        made.start()
