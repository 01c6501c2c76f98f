"""Approvals in a running manager, on the model TPM; the hardware's part is in test_manager_hwtpm_approval."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
from approval_rig import approve
from manager_rig import ModelTpm, RunningDaemon, installation, lost_answer, running_daemon

from frontend_backend.messages_admin import ExitCode
from manager.approval import SLOTS, Approval
from manager.approval_errors import ApprovalRoom
from manager.approval_key import ApproverPrivate
from manager.approval_records import approvals_in, free_slot, leasts, with_least
from manager.approval_target import Target
from manager.client import RemoteError
from manager.config import Config, Layout
from manager.hwtpm_errors import TpmTransport
from manager.hwtpm_records import AnchorInfo, SealedBlob
from manager.keys import BootArea, GroupSeal
from manager.policy import SealPolicy
from manager.recovery_pair import RecoveryPrivate

Place = tuple[Path, Layout, Config]
OURS = RecoveryPrivate.new()
SAA = ApproverPrivate.new()
PEM = SAA.public.to_pem().decode()
NEW = hashlib.sha256(b"new firmware").digest()


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Place]:
    """An installation bound to PCR 7, with a recovery key and no approver."""
    with installation(model, "sha256:7", OURS) as made:
        yield made


class Tenant:
    """A group with an approver."""

    def __init__(self, running: RunningDaemon, name: str) -> None:
        self.running, self.name = running, name

    @classmethod
    async def of(cls, running: RunningDaemon, name: str = "acme", **options: Any) -> "Tenant":
        await running.ask("group-add", name=name, saa=PEM, **options)
        return cls(running, name)

    async def shown(self) -> dict[str, Any]:
        return (await self.running.ask("group-show", group=self.name))[0]

    async def target(self) -> Target:
        return Target.from_json(json.loads(json.dumps(await self.shown())), "it")

    async def approval(self, sequence: int, value: bytes = bytes(32), **changes: Any) -> Approval:
        return approve(SAA, await self.target(), {7: value}, sequence, **changes)

    async def install(self, approval: Approval, **options: Any) -> dict[str, Any]:
        text = approval.armoured()
        return (await self.running.ask("group-update", group=self.name, approval=text, **options))[0]

    def seal(self) -> GroupSeal:
        rows = {row.name: row.uuid for row in self.running.registry.catalogue.groups()}
        return GroupSeal.unpack(self.running.opened.store.groups()[rows[self.name]].blob)


async def refused(awaitable: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await awaitable
    return caught.value


def slots(model: ModelTpm) -> list[int]:
    ((_, held),) = model.revocations.indices.values()
    assert held is not None
    return held


async def test_a_group_with_an_approver_is_closed_after_a_start_until_one_is_installed(
    model: ModelTpm, place: Place
) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        shown = await tenant.shown()
        assert (shown["state"], shown["revocation_slot"], shown["sequence"], shown["approvals"]) == ("open", 1, 0, 0)
        assert (await (await Tenant.of(running, "beta")).shown())["revocation_slot"] == 2
        (default,) = await running.ask("group-show", group="default")
        assert default["revocation_slot"] is default["approval_kind"] is None
    async with running_daemon(model, place) as running:
        tenant = Tenant(running, "acme")
        assert "there is no approval yet" in (await tenant.shown())["reason"]
        done = await tenant.install(await tenant.approval(1))
        assert (done["installed"], done["holds"], done["state"]) == (1, True, "closed")
        (opened,) = await running.ask("group-open", group="acme")
        assert opened["state"] == "open"
        assert (await Tenant(running, "beta").shown())["state"] == "closed"
    async with running_daemon(model, place) as running:
        assert (await Tenant(running, "acme").shown())["state"] == "open"


async def test_what_came_up_revokes_what_is_older(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        for sequence, value in ((3, bytes(32)), (4, NEW)):
            await tenant.install(await tenant.approval(sequence, value))
        assert slots(model)[1] == 0, "to install revokes nothing"
    async with running_daemon(model, place) as running:  # the old configuration again: 3 is in use
        assert slots(model)[1] == 3
        assert len(approvals_in(Tenant(running, "acme").seal())) == 2
    model.pcrs[7] = NEW
    async with running_daemon_of_new_firmware(model, place) as running:
        seal = Tenant(running, "acme").seal()
        assert slots(model)[1] == seal.least == 4
        assert [one.sequence for one in approvals_in(seal)] == [4]
        assert (await Tenant(running, "acme").shown())["state"] == "open"
    writes = model.revocations.writes
    async with running_daemon(model, place):
        assert model.revocations.writes == writes, "an index is written when something changes"


def running_daemon_of_new_firmware(model: ModelTpm, place: Place) -> Any:
    """The installation itself is sealed to PCR 7 and would be closed: seal it to what is now, as `reseal` would."""
    for handle, (secret, policy) in model.sealed.items():
        if policy.approver_point is None:
            model.sealed[handle] = secret, SealPolicy.build()
    return running_daemon(model, place)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_before_the_index_is_written_is_made_up_for(model: ModelTpm, place: Place, when: str) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        await tenant.install(await tenant.approval(3))
    model.fail["revocations.raise_to"] = when, lost_answer()
    with pytest.raises(BaseException) as failed:
        async with running_daemon(model, place):
            await trio.sleep(5)
    assert failed.group_contains(TpmTransport) or isinstance(failed.value, TpmTransport)
    assert slots(model)[1] == (0 if when == "before" else 3)
    async with running_daemon(model, place) as running:
        assert slots(model)[1] == Tenant(running, "acme").seal().least == 3
        assert (await Tenant(running, "acme").shown())["state"] == "open"


async def test_an_index_that_was_taken_away_closes_its_groups_and_no_other(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        await tenant.install(await tenant.approval(3))
        (index,) = model.revocations.indices
        del model.revocations.indices[index]
    async with running_daemon(model, place) as running:
        assert "revocation index" in (await Tenant(running, "acme").shown())["reason"]
        assert (await running.ask("group-show", group="default"))[0]["state"] == "open"
        (vtpm,) = await running.ask("add", name="v")
        assert vtpm["state"] == "added"


@pytest.mark.parametrize("call", ["revocations.define", "revocations.ensure", "revocations.place", "anchor_write"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_failure_while_the_index_is_made_leaves_one_that_the_next_group_finds(
    model: ModelTpm, place: Place, call: str, when: str
) -> None:
    async with running_daemon(model, place) as running:
        model.fail[call] = when, lost_answer()
        assert (await refused(running.ask("group-add", name="acme", saa=PEM))).exit_code is ExitCode.TPM_UNAVAILABLE
        tenant = await Tenant.of(running, "beta")
        assert (await tenant.shown())["revocation_slot"] == 1
        assert len(model.revocations.indices) == 1
        await tenant.install(await tenant.approval(1))
    async with running_daemon(model, place) as running:
        assert (await Tenant(running, "beta").shown())["state"] == "open"


async def test_an_approval_that_is_not_durable_revokes_nothing(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        await tenant.install(await tenant.approval(1))
        model.fail["anchor_write"] = "before", lost_answer()
        await refused(tenant.install(await tenant.approval(2), revoke_older=True))
        assert slots(model)[1] == 0
        await tenant.install(await tenant.approval(2), revoke_older=True)
        assert slots(model)[1] == 2
        assert [one.sequence for one in approvals_in(tenant.seal())] == [2]
        wrong = await refused(tenant.install(await tenant.approval(1)))
        assert wrong.exit_code is ExitCode.CONFLICT
        assert "takes 2 and above" in str(wrong)


async def test_revoking_what_holds_is_asked_for_twice(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        await tenant.install(await tenant.approval(1))
        future = await tenant.approval(2, NEW)
        wrong = await refused(tenant.install(future, revoke_older=True))
        assert wrong.exit_code is ExitCode.CONFLICT
        assert "would be closed at the next start" in str(wrong)
        assert [one.sequence for one in approvals_in(tenant.seal())] == [1]
        done = await tenant.install(future, revoke_older=True, yes=True)
        assert done["holds"] is False
        assert slots(model)[1] == 2


async def test_what_is_not_for_here_is_not_installed(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant, other = await Tenant.of(running), await Tenant.of(running, "beta")
        good = await tenant.approval(1)
        evil = ApproverPrivate.new()
        told = await tenant.target()
        forged = approve(evil, told, {7: bytes(32)}, 1, approver=evil.public.fingerprint)
        expired = await tenant.approval(1, issued=1_792_900_000, not_after=1_792_900_001)
        strange = await tenant.approval(1, group=UUID(int=7))
        for approval, code in (
            (await other.approval(1), ExitCode.CONFLICT),
            (forged, ExitCode.INTEGRITY),
            (expired, ExitCode.DENIED),
            (await tenant.approval(1, nv_name=bytes(34)), ExitCode.CONFLICT),
            (await tenant.approval(1, slot=9), ExitCode.CONFLICT),
        ):
            assert (await refused(tenant.install(approval))).exit_code is code
        assert (await refused(running.ask("approve", approval=strange.armoured()))).exit_code is ExitCode.CONFLICT
        assert (await refused(running.ask("approve", approval="nonsense"))).exit_code is ExitCode.INTEGRITY
        mixed = running.ask("group-update", group="acme", approval=good.armoured(), name="x")
        assert (await refused(mixed)).exit_code is ExitCode.USAGE
        alone = running.ask("group-update", group="acme", revoke_older=True)
        assert (await refused(alone)).exit_code is ExitCode.USAGE
        plain = running.ask("group-update", group="default", approval=good.armoured())
        assert (await refused(plain)).exit_code is ExitCode.CONFLICT
        assert tenant.seal().approvals == ()
        (done,) = await running.ask("approve", approval=good.armoured())
        assert (done["name"], done["sequence"], done["holds"]) == ("acme", 1, True)
        (same,) = await running.ask("approve", approval=good.armoured())
        assert (same, len(tenant.seal().approvals)) == (done, 1)


async def test_one_that_is_not_valid_yet_is_kept_and_not_used(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        done = await tenant.install(await tenant.approval(1, not_before=4_000_000_000))
        assert done["holds"] is False
        (row,) = await running.ask("group-predict", group="acme")
        assert (row["opens"], row["same"]) == (False, True)
        assert row["reason"].startswith("it is valid from 2096")
    async with running_daemon(model, place) as running:
        assert "it is valid from 2096" in (await Tenant(running, "acme").shown())["reason"]


async def test_a_prediction_tells_which_approvals_would_open(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        (only,) = await running.ask("group-predict", group="acme")
        assert (only["by"], only["pcr"], only["present"], only["approved"]) == ("present", 7, "00" * 32, None)
        await tenant.install(await tenant.approval(1))
        await tenant.install(await tenant.approval(2, NEW, comment="next"))
        rows = await running.ask("group-predict", group="acme")
        assert [(row["sequence"], row["opens"], row["same"]) for row in rows] == [(2, False, False), (1, True, True)]
        assert (rows[0]["approved"], rows[0]["present"], rows[0]["comment"]) == (NEW.hex(), "00" * 32, "next")
        rows = await running.ask("group-predict", group="acme", pcr=(f"7={NEW.hex()}",))
        assert [(row["sequence"], row["opens"]) for row in rows] == [(2, True), (1, False)]
        (sealed,) = await running.ask("group-predict", group="default")
        assert (sealed["by"], sealed["opens"], sealed["pcr"]) == ("seal", True, 7)
        (platform,) = await running.ask("group-predict", group="platform", pcr=(f"7={NEW.hex()}",))
        assert (platform["by"], platform["opens"]) == ("seal", False)
        for bad in ("7=00", "x", "99=" + "00" * 32, "16=" + "00" * 32):
            assert (await refused(running.ask("group-predict", group="acme", pcr=(bad,)))).exit_code is ExitCode.USAGE
        assert (await refused(running.ask("group-predict", group="nobody"))).exit_code is ExitCode.NOT_FOUND
        wrong = await refused(running.ask("group-add", name="platform"))
        assert "stands for the store key's own object" in str(wrong)


async def test_an_approval_survives_a_change_of_the_group_meanwhile(model: ModelTpm, place: Place) -> None:
    """Both read the record, and write it back."""
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        approvals = [await tenant.approval(number) for number in (1, 2)]
        async with trio.open_nursery() as nursery:
            for approval in approvals:
                nursery.start_soon(tenant.install, approval)
                nursery.start_soon(lambda: running.ask("group-update", group="acme", quota=5))
                nursery.start_soon(lambda: running.ask("group-update", group="acme", pcrs="sha256:0,7"))
        assert {one.sequence for one in approvals_in(tenant.seal())} == {1, 2}
        assert (tenant.seal().quota, tenant.seal().pcrs) == (5, "sha256:0,7")


async def test_another_approver_ends_what_the_former_one_approved(model: ModelTpm, place: Place) -> None:
    other = ApproverPrivate.new()
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        former = await tenant.approval(9)
        await tenant.install(former, revoke_older=True)
        await running.ask("group-update", group="acme", saa=other.public.to_pem().decode())
        shown = await tenant.shown()
        assert (shown["approvals"], shown["revocation_slot"], shown["sequence"]) == (0, 1, 9)
        assert (await refused(tenant.install(former))).exit_code is ExitCode.INTEGRITY
        his = approve(other, await tenant.target(), {7: bytes(32)}, 9)
        await tenant.install(his)
    async with running_daemon(model, place) as running:
        assert (await Tenant(running, "acme").shown())["state"] == "open"


async def test_too_many_approvals_are_refused_and_the_rest_kept(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        tenant = await Tenant.of(running)
        kept = 0
        with pytest.raises(RemoteError) as full:  # noqa: PT012 - how many fit is not a promise
            for number in range(1, 40):
                values = {pcr: hashlib.sha256(bytes([number, pcr])).digest() for pcr in (0, 1, 2, 3, 4, 5, 7)}
                await tenant.install(approve(SAA, await tenant.target(), values, number))
                kept = number
        assert full.value.exit_code is ExitCode.CONFLICT
        assert "--revoke-older" in str(full.value)
        assert kept >= 3, "the present one, a predicted one, and one to go back to"
        assert len(tenant.seal().approvals) == kept
        await tenant.install(await tenant.approval(40), revoke_older=True)
        assert len(tenant.seal().approvals) == 1


def test_a_slot_is_given_to_one_group_and_never_used_ones_first() -> None:
    taken = [_seal(slot) for slot in (1, 2, 4)]
    held = [0] * SLOTS
    held[3] = 7  # a group that was removed had it
    assert free_slot(taken, tuple(held)) == (5, 0)
    most = [_seal(slot) for slot in range(1, SLOTS) if slot != 3]
    assert free_slot(most, tuple(held)) == (3, 7)
    with pytest.raises(ApprovalRoom, match="63 places"):
        free_slot([*most, _seal(3)], tuple(held))


def _seal(slot: int, least: int = 0) -> GroupSeal:
    return GroupSeal("g", SealedBlob(b"", b"", SealPolicy.build()), b"", slot=slot, least=least)


def test_what_is_revoked_is_never_less_than_it_was() -> None:
    assert with_least(_seal(1, 5), 3).least == 5
    assert with_least(_seal(1, 5), 6).least == 6
    boot = _boot(9)
    assert leasts(boot, [_seal(1, 5), _seal(2)]) == {0: 9, 1: 5, 2: 0}


def _boot(least: int) -> BootArea:
    return BootArea(SealedBlob(b"", b"", SealPolicy.build()), AnchorInfo(1, bytes(34)), b"", "", least=least)
