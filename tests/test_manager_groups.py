"""Groups of a running manager on the model TPM; the keeper and the instances are real."""

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from approval_rig import approve
from manager_rig import ModelTpm, RunningDaemon, installation, lost_answer, running_daemon

from frontend_backend.messages_admin import ExitCode
from manager.approval_key import ApproverPrivate
from manager.approval_target import Target
from manager.client import RemoteError
from manager.config import Config, Layout
from manager.escrow import EscrowPlace, EscrowPurpose, unwrap
from manager.keys import GroupSeal
from manager.policy import AuthorizeBranch
from manager.recovery_errors import EscrowWrongKey
from manager.recovery_pair import RecoveryPrivate
from storage.store_records import GroupRecord

Place = tuple[Path, Layout, Config]
OURS, THEIRS = RecoveryPrivate.new(), RecoveryPrivate.new()


def pem(key: RecoveryPrivate) -> str:
    return key.public.to_pem().decode()


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Place]:
    """An installation bound to PCR 7, with a recovery key."""
    with installation(model, "sha256:7", OURS) as made:
        yield made


def record(running: RunningDaemon, uuid: str) -> tuple[GroupRecord, GroupSeal]:
    found = running.opened.store.groups()[UUID(uuid)]
    return found, GroupSeal.unpack(found.blob)


async def refused(running: RunningDaemon, verb: str, **arguments: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await running.ask(verb, **arguments)
    return caught.value


async def test_a_group_has_a_key_of_its_own_and_lasts(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        (made,) = await running.ask("group-add", name="tenant")
        assert (made["state"], made["pcrs"], made["vtpms"], made["own_recovery"]) == ("open", "sha256:7", 0, False)
        (vtpm,) = await running.ask("add", name="v", group="tenant")
        assert vtpm["group"] == "tenant"
        (other,) = await running.ask("add", name="w", group=made["uuid"])
        assert other["group"] == "tenant"
        groups = await running.ask("group-list")
        assert [(group["name"], group["vtpms"]) for group in groups] == [("default", 0), ("tenant", 2)]
        keys = {model.sealed[record(running, group["uuid"])[1].sealed.private][0] for group in groups}
        assert len(keys) == 2
    async with running_daemon(model, place) as running:
        assert (await running.ask("group-show", group="tenant"))[0]["vtpms"] == 2
        assert not running.opened.closed


async def test_each_group_is_sealed_and_escrowed_as_it_was_asked(model: ModelTpm, place: Place) -> None:
    saa = ApproverPrivate.new().public
    async with running_daemon(model, place) as running:
        (own,) = await running.ask("group-add", name="own", recovery=pem(THEIRS), pcrs="sha256:0,7")
        (free,) = await running.ask("group-add", name="free", pcrs="none", quota=1)
        (approved,) = await running.ask("group-add", name="approved", saa=saa.to_pem().decode())
        assert [made["pcrs"] for made in (own, free, approved)] == ["sha256:0,7", "none", "approved"]
        assert own["recovery"] == THEIRS.public.signing_fingerprint != free["recovery"]
        assert approved["saa"] == saa.fingerprint.hex()
        stored, seal = record(running, own["uuid"])
        where = EscrowPlace(running.opened.store.uuid, EscrowPurpose.GROUP_KEY, stored.uuid)
        assert unwrap(seal.escrow, THEIRS, where) == model.sealed[seal.sealed.private][0]
        with pytest.raises(EscrowWrongKey):
            unwrap(seal.escrow, OURS, where)
        branches = record(running, approved["uuid"])[1].sealed.policy.branches
        assert AuthorizeBranch(saa.point) in branches
        await running.ask("add", group="free")
        assert (await refused(running, "add", group="free")).exit_code is ExitCode.DENIED
        await running.ask("group-update", group="free", quota=2)
        await running.ask("add", group="free")


async def test_what_cannot_be_a_group_is_refused_and_nothing_is_made(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="tenant")
        before = dict(running.opened.store.groups())
        for arguments, code in (
            ({"name": "tenant"}, ExitCode.CONFLICT),
            ({"name": "default"}, ExitCode.CONFLICT),
            ({"name": "a b"}, ExitCode.USAGE),
            ({"name": "6ba7b810-9dad-11d1-80b4-00c04fd430c8"}, ExitCode.USAGE),
            ({"name": "x", "pcrs": "sha256:16"}, ExitCode.USAGE),
            ({"name": "x", "pcrs": "sha1:0"}, ExitCode.USAGE),
            ({"name": "x", "quota": -1}, ExitCode.USAGE),
            ({"name": "x", "recovery": "nonsense"}, ExitCode.INTEGRITY),
            ({"name": "x", "saa": "nonsense"}, ExitCode.INTEGRITY),
        ):
            assert (await refused(running, "group-add", **arguments)).exit_code is code, arguments
        assert (await refused(running, "group-show", group="nobody")).exit_code is ExitCode.NOT_FOUND
        assert (await refused(running, "group-update", group="tenant")).exit_code is ExitCode.USAGE
        assert (await refused(running, "group-update", group="default", name="x")).exit_code is ExitCode.CONFLICT
        assert (await refused(running, "group-update", group="tenant", name="default")).exit_code is ExitCode.CONFLICT
        assert dict(running.opened.store.groups()) == before


async def test_pcrs_without_a_recovery_key_are_refused(model: ModelTpm) -> None:
    with installation(model) as place:
        async with running_daemon(model, place) as running:
            for wish in ({"pcrs": "sha256:7"}, {"saa": ApproverPrivate.new().public.to_pem().decode()}):
                error = await refused(running, "group-add", name="x", **wish)
                assert (error.exit_code, "recovery key" in str(error)) == (ExitCode.USAGE, True)
            await running.ask("group-add", name="x", pcrs="sha256:7", recovery=pem(THEIRS))


async def test_a_group_with_vtpms_or_tombstones_and_the_default_one_stay(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="tenant")
        (vtpm,) = await running.ask("add", group="tenant")
        assert "1 vTPMs" in str(await refused(running, "group-remove", group="tenant", yes=True))
        await running.ask("remove", vtpm=vtpm["uuid"], yes=True)
        assert "1 tombstones" in str(await refused(running, "group-remove", group="tenant", yes=True))
        assert (await refused(running, "group-remove", group="default", yes=True)).exit_code is ExitCode.CONFLICT
        await running.ask("group-add", name="empty")
        assert (await refused(running, "group-remove", group="empty")).exit_code is ExitCode.USAGE
        (gone,) = await running.ask("group-remove", group="empty", yes=True)
        assert gone["state"] == "removed"
        assert [group["name"] for group in await running.ask("group-list")] == ["default", "tenant"]
    async with running_daemon(model, place) as running:
        assert len(running.opened.store.groups()) == 2


async def test_a_closed_group_is_shown_and_opened_later_without_a_restart(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        await running.ask("add", name="v", group="bound")
        await running.ask("attach", vtpm="v", guest="g")
        await running.ask("add", name="u", group="bound")
        await running.ask("add", name="w")
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running:
        (closed,) = await running.ask("group-show", group="bound")
        assert (closed["state"], closed["vtpms"], closed["tombstones"]) == ("closed", 2, None)
        assert "PCR 1 is 1111" in closed["reason"]
        (shown,) = await running.ask("show", vtpm="v")
        assert (shown["state"], shown["reason"]) == ("closed", closed["reason"])
        for verb, arguments in (
            ("reset-platform", {"vtpm": "v"}),
            ("remove", {"vtpm": "u", "yes": True}),
            ("reset", {"vtpm": "u", "yes": True}),
            ("add", {"group": "bound"}),
            ("add", {"group": "bound", "count": 3}),
            ("group-rotate", {"group": "bound"}),
            ("group-update", {"group": "bound", "pcrs": "none"}),
            ("group-remove", {"group": "bound", "yes": True}),
            ("group-open", {"group": "bound"}),
        ):
            error = await refused(running, verb, **arguments)
            assert (error.exit_code, verb) == (ExitCode.DENIED, verb), str(error)
            assert "PCR 1" in str(error), verb
        await running.ask("attach", vtpm="w", guest="h")
        (renamed,) = await running.ask("group-update", group="bound", name="bound2")
        assert renamed["state"] == "closed"
        model.pcrs[1] = bytes(32)
        (opened,) = await running.ask("group-open", group="bound2")
        assert opened["state"] == "open"
        (shown,) = await running.ask("show", vtpm="v")
        assert (shown["state"], shown["guest"]) == ("running", "g")
        assert (await running.ask("status"))[0]["closed_groups"] is None
        assert (await running.ask("group-open", group="bound2"))[0]["state"] == "open"


async def test_a_vtpm_of_a_closed_group_is_not_attached(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        await running.ask("add", name="v", group="bound")
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running:
        error = await refused(running, "attach", vtpm="v", guest="g")
        assert error.exit_code is ExitCode.DENIED
        assert "group bound is closed" in str(error)
        assert "vtpm-group-open bound" in str(error)


async def test_a_rotation_gives_another_key_and_escrow_and_keeps_every_vtpm(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        (made,) = await running.ask("group-add", name="tenant", recovery=pem(THEIRS))
        await running.ask("add", count=50, group="tenant", name="v{}")
        await running.ask("attach", vtpm="v7", guest="g")
        before = record(running, made["uuid"])[1]
        await running.ask("group-rotate", group="tenant")
        stored, after = record(running, made["uuid"])
        old, new = (model.sealed[seal.sealed.private][0] for seal in (before, after))
        assert old != new
        where = EscrowPlace(running.opened.store.uuid, EscrowPurpose.GROUP_KEY, stored.uuid)
        assert unwrap(after.escrow, THEIRS, where) == new
        await running.ask("detach", vtpm="v7")
        await running.ask("attach", vtpm="v7", guest="g")
    async with running_daemon(model, place) as running:
        assert not running.opened.closed
        (shown,) = await running.ask("group-show", group="tenant")
        assert shown["vtpms"] == 50
        assert (await running.ask("show", vtpm="v7"))[0]["state"] == "running"


async def test_a_resealed_group_opens_by_what_it_is_sealed_to_now(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        (made,) = await running.ask("group-add", name="tenant", pcrs="sha256:1")
        model.pcrs[1] = b"\x11" * 32  # it is open: its key does not have to be unsealed
        (updated,) = await running.ask("group-update", group="tenant", pcrs="sha256:1,2", recovery=pem(THEIRS))
        assert (updated["pcrs"], updated["own_recovery"]) == ("sha256:1,2", True)
        assert updated["uuid"] == made["uuid"]
    async with running_daemon(model, place) as running:
        assert not running.opened.closed
        assert (await running.ask("verify", all=True))[-1]["code"] == 0


@pytest.mark.parametrize("verb", ["group-add", "group-rotate", "group-update", "group-remove"])
@pytest.mark.parametrize("call", ["seal", "anchor_write"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_tpm_that_fails_in_the_middle_leaves_groups_that_open(
    model: ModelTpm, place: Place, verb: str, call: str, when: str
) -> None:
    arguments: dict[str, object] = {"name": "new"} if verb == "group-add" else {"group": "tenant"}
    arguments |= {"group-update": {"pcrs": "none"}, "group-remove": {"yes": True}}.get(verb, {})
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="tenant")
        if verb != "group-remove":
            await running.ask("add", count=5, group="tenant", name="v{}")
        if call == "seal" and verb == "group-remove":
            return
        model.fail[call] = when, lost_answer()
        await refused(running, verb, **arguments)
    async with running_daemon(model, place) as running:
        assert not running.opened.closed
        verdicts = {finding["verdict"] for finding in await running.ask("verify", all=True)}
        assert verdicts == {"ok"}
        if verb != "group-remove":
            assert (await running.ask("group-show", group="tenant"))[0]["vtpms"] == 5


async def test_an_add_and_a_removal_that_were_cut_short_are_ended_by_the_next_start(
    model: ModelTpm, place: Place
) -> None:
    async with running_daemon(model, place) as running:
        for name in ("kept", "lost"):
            await running.ask("group-add", name=name)
        rows = {row.name: row for row in running.registry.catalogue.groups()}
        running.registry.catalogue.remove_group(rows["kept"].uuid)  # as if its row had not been written yet
        from storage.store_records import RemoveGroup

        await running.daemon._committer.commit(RemoveGroup(rows["lost"].uuid))  # and that one's not removed yet
    async with running_daemon(model, place) as running:
        assert [group["name"] for group in await running.ask("group-list")] == ["default", "kept"]
        assert {finding["verdict"] for finding in await running.ask("verify", all=True)} == {"ok"}


async def test_a_rotated_group_opens_by_the_approval_it_had(model: ModelTpm, place: Place) -> None:
    """What is approved is a platform for a group, and not one of its keys."""
    approver = ApproverPrivate.new()
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="acme", saa=approver.public.to_pem().decode())
        (shown,) = await running.ask("group-show", group="acme")
        approval = approve(approver, Target.from_json(shown, "it"), {7: bytes(32)}, 1)
        await running.ask("group-update", group="acme", approval=approval.armoured())
        await running.ask("add", name="v", group="acme")
        before = record(running, shown["uuid"])[1]
        await running.ask("group-rotate", group="acme")
        after = record(running, shown["uuid"])[1]
        assert (after.slot, after.approvals, after.saa) == (before.slot, before.approvals, before.saa)
        assert after.sealed.policy == before.sealed.policy
        assert after.sealed.private != before.sealed.private
    async with running_daemon(model, place) as running:
        assert not running.opened.closed
        assert (await running.ask("attach", vtpm="v", guest="g"))[0]["state"] == "running"
