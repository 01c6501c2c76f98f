"""Hosts between which vTPMs move: each with a manager, a store and a hardware TPM of its own; QEMU spoken by hand."""

import itertools
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import vtpm_instance_rig as tpm
from blob_client import Machine, Saved
from e2e_rig import Installation, installation, wait_for

INDEX = 0x01500020
_numbers = itertools.count(1)


class Host(Installation):
    """A host; `name` is what others call it."""

    name = ""

    @property
    def address(self) -> str:
        return f"unix:{self.base}/migrate.sock"

    @property
    def certificate(self) -> Path:
        return self.base / "identity.pem"

    def set_up(self, name: str) -> None:
        self.name = name
        self.init()
        self.configure("listen", self.address)
        self.start()
        self.identify()

    def identify(self) -> None:
        self.certificate.unlink(missing_ok=True)
        self.command("vtpm-migrate-identity", "-o", str(self.certificate))

    def authorise(self, other: "Host", *options: str, address: str | None = None) -> None:
        certificate = ("--certificate", str(other.certificate), "--address", address or other.address)
        self.command("vtpm-migrate-authorise", other.name, *certificate, *options)

    def die(self) -> None:
        """The whole host goes off: manager, keeper and instances."""
        self.kill()
        wait_for(self._all_killed, "the end of its processes")

    def _all_killed(self) -> bool:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not self.processes()

    def events(self, kind: str) -> list[str]:
        rows = self.command("vtpm-events", "--json").json
        return [row["text"] for row in rows if row["kind"] == kind]

    def state_of(self, name: str) -> str:
        answer = self.command("vtpm-show", name, "--json", check=False)
        return str(answer.json["state"]) if answer.code == 0 else "none"


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts that are not paired yet."""
    if not names:
        yield []
        return
    with installation(Host) as first, hosts(*names[1:]) as others:
        first.set_up(names[0])
        yield [first, *others]


class Guest:
    """A vTPM that is to move from one host to another, and the QEMU that runs its machine."""

    def __init__(self, source: Host, *options: str) -> None:
        self.source = source
        self.name = f"web-{next(_numbers)}"
        self.uuid = source.add(self.name, *options)
        control = source.attach(self.name, self.name, "--frontend", "qemu")["control"]
        self.machine = Machine(control)
        self.machine.boot()
        self.machine.good(tpm.nv_define(INDEX, 8))
        self.content = self.uuid.encode()[:8]
        self.machine.good(tpm.nv_write(INDEX, self.content))
        self.machine.extend(10, b"\x77" * 32)
        self.pcr = self.machine.pcr(10)

    def saved(self) -> Saved:
        return self.machine.save()

    def allow(self, destination: Host, by: "Wire | None" = None) -> None:
        """Both operators say that it may move, and the destination makes an incoming one; `by`: the way there."""
        self.source.authorise(destination, "--leave", self.name)
        address = None if by is None else f"unix:{by.path}"
        destination.authorise(self.source, "--come", self.uuid, address=address)
        destination.command("vtpm-migrate-expect", self.source.name, self.uuid, "--name", self.name)

    def incoming(self, destination: Host) -> Machine:
        """The destination's QEMU, started with -incoming."""
        if destination.show(self.name)["guest"] is None:
            destination.attach(self.name, self.name, "--frontend", "qemu")
        machine = Machine(destination.show(self.name)["control"])
        machine.reset(incoming=True)
        return machine

    def check(self, machine: Machine) -> None:
        """The guest finds its TPM as it left it."""
        assert tpm.nv_content(machine.good(tpm.nv_read(INDEX, 8))) == self.content
        assert machine.pcr(10) == self.pcr

    def moved(self) -> Any:
        """The source says that it is gone."""
        return wait_for(lambda: self.source.state_of(self.uuid) == "removed", "the source to remove it")


class Wire:
    """What lies between two managers: lets connections through, holds what is said on them, or cuts them."""

    def __init__(self, path: str, target: str) -> None:
        self.path, self.target = path, target
        self.request_held = self.answer_held = self.cut = False
        self.seen = threading.Event()  # a request, or an answer, is being held
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def let_through(self, *, cut: bool = False) -> None:
        """Everything that comes from now on passes, or nothing; what is held is dropped, as by the death of a host."""
        self.cut, self.request_held, self.answer_held = cut, False, False
        self.seen.clear()
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.let_through()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        far = socket.socket(socket.AF_UNIX)
        with near, far, suppress(OSError):
            with self._lock:
                self._open += [near, far]
            if self.cut:
                self.seen.set()
                return
            if self.request_held:
                self.seen.set()
                while near.recv(65536):
                    pass
                return
            far.connect(self.target)
            self._copy(near, far)

    def _copy(self, near: socket.socket, far: socket.socket) -> None:
        """TLS 1.3 without tickets: after its first flight the server says nothing but its answer."""
        answered = 0
        while True:
            ready, _, _ = select.select([near, far], [], [])
            for sock in ready:
                piece = sock.recv(65536)
                if not piece:
                    return
                if sock is near:
                    far.sendall(piece)
                    answered += bool(answered)  # the second flight of the client was sent
                elif self.answer_held and answered > 1:
                    self.seen.set()
                    while near.recv(65536):
                        pass
                    return
                else:
                    near.sendall(piece)
                    answered = max(answered, 1)
