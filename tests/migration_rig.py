"""Two hosts between which vTPMs move: each with a manager, a store and a hardware TPM of its own; QEMU spoken by hand."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
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

    def authorise(self, other: "Host", *options: str) -> None:
        certificate = ("--certificate", str(other.certificate), "--address", other.address)
        self.command("vtpm-migrate-authorise", other.name, *certificate, *options)

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

    def allow(self, destination: Host) -> None:
        """Both operators say that this vTPM may move, and the destination makes an incoming one, attached."""
        self.source.authorise(destination, "--leave", self.name)
        destination.authorise(self.source, "--come", self.uuid)
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
