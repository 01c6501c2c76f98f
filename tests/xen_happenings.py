"""What may happen to a Xen device at any time, one function each."""

from collections.abc import Callable

from xen_model import Device


def _kexec(device: Device) -> None:
    device.parting = True  # Linux's driver finds our 5 or 6 on the way
    device.front.reopen("kexec")


def _refuse(device: Device) -> None:
    device.manager.ends()
    device.manager.willing = False
    device.parting = True


HAPPENINGS: dict[str, Callable[[Device], None]] = {
    "guest destroyed": Device.destroy,
    "device taken away": Device.detach,
    "back end dies": Device.restart_back,
    "instance dies": lambda device: device.back.lose_instance(),
    "manager ends the binding": lambda device: device.manager.ends(),
    "manager refuses from now on": _refuse,
    "driver bound anew": lambda device: device.front.reopen("rebind"),
    "suspended and resumed": lambda device: device.front.reopen("resume"),
    "another kernel": _kexec,
    "command cancelled": lambda device: device.front.cancel(),
}
