"""What shuts instances in: what the configuration wants, what the keeper has, and what `check` finds without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import trio

from frontend_backend import messages_keeper as m
from frontend_backend.messages_keeper import FEATURES
from frontend_backend.release import RELEASE
from manager.config import InstanceConfig
from manager.errors import ConfigurationError, DeniedError, KeeperError, KeeperRefusedError, ManagerError
from manager.keeper_client import Keeper

MODES: Final = ("fork", "exec")
ON_VIOLATION: Final = ("kill", "errno", "log")
_END_SECONDS: Final = 10.0  # a keeper without instances ends within milliseconds
_PROBE_SECONDS: Final = 60.0  # a spawner is warm after half a second; a loaded machine takes more


def keeper_options(config: InstanceConfig) -> tuple[str, ...]:
    """Return the keeper's options.

    Raises:
        ConfigurationError: the section [instance] has values that mean nothing.

    """
    for key, value, known in (("spawn", config.spawn, MODES), ("seccomp", config.seccomp, ON_VIOLATION)):
        if value not in known:
            raise ConfigurationError(f"[instance] {key}: {value!r} where one of {', '.join(known)} is due")
    if unknown := sorted(set(config.require) - set(FEATURES)):
        raise ConfigurationError(f"[instance] require: unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")
    return ("--spawn", config.spawn, "--seccomp", config.seccomp)


async def ask(keeper: Keeper) -> m.ConfinementReply | None:
    """Ask a keeper; None when it is of a version that does not know.

    Raises:
        KeeperError: it does not answer.

    """
    try:
        reply, _ = await keeper.ask(m.Confinement())
    except KeeperRefusedError:
        return None
    if not isinstance(reply, m.ConfinementReply):
        raise KeeperError(f"unexpected answer {type(reply).__name__} to Confinement")
    return reply


async def connect(path: Path, config: InstanceConfig) -> tuple[Keeper, m.ConfinementReply | None]:
    """Connect to the keeper at `path` and check that it has what is required.

    A keeper that runs already with other settings, or of another release, is replaced if it has no instances.

    Raises:
        DeniedError: what is required is not active; nothing was started.
        KeeperError, BusyError, ConfigurationError: see Keeper.connect and `keeper_options`.

    """
    options = keeper_options(config)
    keeper = await Keeper.connect(path, options)
    try:
        found = await ask(keeper)
        fits = _as_configured(config, found) and keeper.release == RELEASE
        if (not fits or required_but_missing(config, found)) and not await keeper.list():
            await end(keeper)
            keeper = await Keeper.connect(path, options)
            found = await ask(keeper)
        insist(config, found)
    except ManagerError:
        keeper.close()
        raise
    return keeper, found


def _as_configured(config: InstanceConfig, found: m.ConfinementReply | None) -> bool:
    return found is not None and (found.mode, found.on_violation) == (config.spawn, config.seccomp)


async def end(keeper: Keeper) -> None:
    """Stop a keeper that nobody needs and wait until it has ended: its place is free then. Raises KeeperError."""
    try:
        pidfd = os.pidfd_open(keeper.pid)
    except ProcessLookupError:
        keeper.close()
        return
    try:
        await keeper.ask(m.Stop())
        keeper.close()
        with trio.move_on_after(_END_SECONDS):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    keeper.reap()


def probe(config: InstanceConfig) -> m.ConfinementReply:
    """Start a spawner for a moment and ask it: what a keeper started by the caller, here and now, would have.

    Raises:
        KeeperError: it does not work here.
        ConfigurationError: see `keeper_options`.

    """
    command = [sys.executable, "-I", "-m", "vtpm_instance.keeper", "--check", *keeper_options(config)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise KeeperError(f"no spawner was ready within {_PROBE_SECONDS:g} s") from None
    if done.returncode:
        raise KeeperError(f"no instance could be started here: {done.stderr.strip() or done.returncode}")
    found = json.loads(done.stdout)
    features = tuple(m.Feature(each["name"], each["active"], each["why"]) for each in found["features"])
    return m.ConfinementReply(found["mode"], found["on_violation"], features)


def required_but_missing(config: InstanceConfig, found: m.ConfinementReply | None) -> list[str]:
    """Return a sentence for each feature that is required and not active."""
    if found is None:
        return [f"{name}: the running keeper is older and does not tell" for name in config.require]
    states = {feature.name: feature for feature in found.features}
    return [
        f"{name}: {states[name].why if name in states else 'not known to the running keeper'}"
        for name in config.require
        if name not in states or not states[name].active
    ]


def insist(config: InstanceConfig, found: m.ConfinementReply | None) -> None:
    """Check that everything required is active.

    Raises:
        DeniedError: something is not; nothing was started.

    """
    if missing := required_but_missing(config, found):
        raise DeniedError(
            f"[instance] require is not met ({'; '.join(missing)}); no vTPM was started, running ones go on; enable it "
            "in the system, or take it out of the configuration"
        )


def summary(config: InstanceConfig, found: m.ConfinementReply | None) -> dict[str, str | None]:
    """Return what `status` shows."""
    if found is None:
        return {"spawn": None, "seccomp": None, "confinement": None, "confinement_missing": "the keeper does not tell"}
    wanted = {"spawn": (config.spawn, found.mode), "seccomp": (config.seccomp, found.on_violation)}
    active = ", ".join(feature.name for feature in found.features if feature.active)
    missing = "; ".join(f"{feature.name}: {feature.why}" for feature in found.features if not feature.active)
    return {
        key: has if has == want else f"{has} until the keeper is started anew ({want} is configured)"
        for key, (want, has) in wanted.items()
    } | {"confinement": active or None, "confinement_missing": missing or None}
