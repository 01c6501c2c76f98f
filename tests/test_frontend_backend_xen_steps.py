"""Everything that may happen to a device, after each single step of its handshake and of a command."""

from collections.abc import Callable

import pytest
from xen_happenings import HAPPENINGS
from xen_model import DRIVER_DOMAIN, FRONTS, Device, QuietModel
from xen_parties import LinuxFront


def _live(model: QuietModel, happening: Callable[[Device], None], at: int) -> bool:
    """Let one device live, with something that happens after `at` steps; False if it came to rest before."""
    device = model.devices[0]
    device.wants()
    parties = device.parties()
    steps = idle = turn = 0
    while steps < at and idle < len(parties):
        if parties[turn % len(parties)]():
            steps, idle = steps + 1, 0
        else:
            idle += 1
            turn += 1
    device.troubled = True
    happening(device)
    model.settle()
    if device.attached and device.alive and not device.front.gone:
        device.wants()
    model.teardown()
    return steps == at


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("happening", HAPPENINGS)
def test_a_device_gets_over_it_after_any_step(happening: str, front: type[LinuxFront]) -> None:
    own, at, went_on = (0, 0, True) if front is LinuxFront else (DRIVER_DOMAIN, 0, True)
    while went_on:
        model = QuietModel(own, front)
        went_on = _live(model, HAPPENINGS[happening], at)
        at += 1
    assert at > 30, "the life of a device has more steps"
