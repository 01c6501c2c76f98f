"""What must shut instances in is there, or nothing starts; what is not there is told."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from manager_rig import ModelTpm, installation, running_daemon
from own_root import needs_own_root

from frontend_backend.messages_admin import ExitCode
from frontend_backend.messages_keeper import FEATURES, ConfinementReply, Feature
from manager import confinement
from manager.config import Config, InstanceConfig
from manager.errors import ConfigurationError, DeniedError
from manager.maintenance import Verdict, check

FOUND = ConfinementReply(
    "fork", "kill", (Feature("landlock", False, "the kernel has none"), Feature("seccomp", True, ""))
)


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


def with_instance(config: Config, **changes: Any) -> Config:
    return replace(config, instance=replace(config.instance, **changes))


@pytest.mark.parametrize("changes", [{"spawn": "clone"}, {"seccomp": "allow"}, {"require": ("selinux",)}])
def test_words_that_mean_nothing_are_configuration_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="instance"):
        confinement.keeper_options(InstanceConfig(**changes))


def test_what_is_required_must_be_active() -> None:
    confinement.insist(InstanceConfig(require=("seccomp",)), FOUND)
    for required in (("landlock",), ("seccomp", "user")):
        with pytest.raises(DeniedError, match="require is not met") as refused:
            confinement.insist(InstanceConfig(require=required), FOUND)
        assert refused.value.code is ExitCode.DENIED
    with pytest.raises(DeniedError, match="older"):
        confinement.insist(InstanceConfig(require=("seccomp",)), None)
    confinement.insist(InstanceConfig(), None)


@needs_own_root
async def test_status_shows_what_is_active_and_a_manager_whose_requirement_is_not_met_does_not_start(
    model: ModelTpm, place: Any
) -> None:
    base, layout, config = place
    strict = with_instance(config, require=("seccomp", "landlock", "network"))
    async with running_daemon(model, (base, layout, strict), stop=True) as running:
        (status,) = await running.ask("status")
    assert (status["spawn"], status["seccomp"]) == ("fork", "kill")
    assert {"seccomp", "landlock", "mounts"} <= set(status["confinement"].split(", "))
    logging = with_instance(config, require=("seccomp",), seccomp="log")
    with pytest.RaisesGroup(DeniedError, flatten_subgroups=True):
        async with running_daemon(model, (base, layout, logging)):
            pass
    # nobody has to wait for that keeper to end by itself: put right, the configuration works at once
    async with running_daemon(model, (base, layout, replace(strict, admin=config.admin))) as running:
        (status,) = await running.ask("status")
    assert status["seccomp"] == "kill"


def test_check_tells_each_feature_and_fails_for_a_required_one(place: Any) -> None:
    _, layout, config = place
    logging = with_instance(config, seccomp="log")
    verdicts = {f.what: f.verdict for f in check(layout, logging) if f.what.startswith("instances: ")}
    assert set(verdicts) == {f"instances: {name}" for name in FEATURES}
    assert verdicts["instances: seccomp"] is Verdict.WEAK
    found = {f.what: f for f in check(layout, with_instance(logging, require=("seccomp",)))}
    assert found["instances: seccomp"].verdict is Verdict.FAILED
    assert found["instances: seccomp"].code is ExitCode.DENIED
