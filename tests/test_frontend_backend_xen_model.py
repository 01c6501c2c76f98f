from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from xen_model import ConformingModel, HostileModel

_QUICK = {"deadline": None, "suppress_health_check": (), "database": None}


def test_devices_keep_their_promises_in_any_interleaving() -> None:
    run_state_machine_as_test(ConformingModel, settings=settings(max_examples=60, stateful_step_count=30, **_QUICK))


def test_a_hostile_guest_costs_only_its_own_vtpm() -> None:
    run_state_machine_as_test(HostileModel, settings=settings(max_examples=60, stateful_step_count=30, **_QUICK))
