"""Lives of a manager's anchors on a real TPM, cut between any two TPM commands, or with the TPM reset there.

What `rollback_world` does at the manager's calls, this does on the wire: a relay lets so many commands pass. Then the
adversary offers every image ever written, logs cut at every frame too, before and after a reset of the TPM.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fixtures_tpm import BusRelay, SwtpmProcess, recorded_bus, running_swtpm
from manager_rig import FIRST_INDEX, ModelTpm, PowerCutError, SnapshotDisk
from rollback_world import GROUP, Judge, World, chain_of, extends_of
from storage_histories import reopen, uuid_of

from manager.anchor import StorePosition, clean_stop
from manager.anchoring import Anchoring, position_of
from manager.committer import Committer
from manager.errors import RolledBackError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import AnchorMissing, TpmError, TpmUnavailable
from manager.hwtpm_records import AnchorInfo
from storage.errors import StorageError
from storage.secrets import StateKey
from storage.store import PutVtpm, VtpmRecord


class WiredTpm(ModelTpm):
    """A real swtpm behind a relay; a connection that the relay cut is a power cut."""

    def __init__(self, swtpm: SwtpmProcess, bus: BusRelay) -> None:
        super().__init__()
        self.swtpm, self.bus = swtpm, bus
        self.just_written: bytes | None = None
        self.chip = self._open()
        self.name = self.chip.provision_srk()

    def _open(self) -> HardwareTpm:
        return HardwareTpm.open(self.bus.setting)

    def _do(self, name: str, *arguments: Any, **named: Any) -> Any:
        self.calls.append(name)
        try:
            return getattr(self.chip, name)(*arguments, **named)
        except TpmUnavailable as error:
            if self.bus.was_cut:
                raise PowerCutError from error
            raise

    def begin(self) -> None:
        """As after a power cut of the machine that the manager runs on: connect anew, nothing planned."""
        self.chip.close()
        self.bus.cut_at = self.bus.reset_at = None
        self.bus.was_cut = self.bus.was_reset = False
        self.after_write = self.after_extend = lambda: None
        self.chip = self._open()
        self.chip.open_srk(self.name)

    def reset(self) -> None:
        self.chip.close()
        self.swtpm.kill()
        self.swtpm.start()
        self.chip = self._open()
        self.chip.open_srk(self.name)

    def anchor_define(self, index: int, auth: bytes) -> AnchorInfo:
        with suppress(AnchorMissing):  # the first life on this TPM
            self.chip.anchor_undefine(self.chip.anchor_plan(index))
        return self.chip.anchor_define(index, auth)

    def anchor_read(self, info: AnchorInfo, auth: bytes) -> bytes:
        found: bytes = self._do("anchor_read", info, auth)
        return found

    def anchor_write(self, info: AnchorInfo, auth: bytes, digest: bytes, *, first: bool = False) -> None:
        self._do("anchor_write", info, auth, digest, first=first)
        self.just_written = digest
        self.after_write()
        self.just_written = None

    def pcr22_read(self) -> bytes:
        found: bytes = self._do("pcr22_read")
        return found

    def pcr22_extend(self, digest: bytes) -> None:
        self._do("pcr22_extend", digest)
        self.after_extend()


@contextmanager
def wired_tpm() -> Iterator[WiredTpm]:
    with running_swtpm() as swtpm, recorded_bus(swtpm) as bus:
        wired = WiredTpm(swtpm, bus)
        try:
            yield wired
        finally:
            wired.chip.close()


@dataclass
class Cuts:
    """What was found in all lives."""

    lives: int = 0
    offered: int = 0
    refused: int = 0
    cut: int = 0
    resets: int = 0
    cut_logs: int = 0
    accepted_old: list[str] = field(default_factory=list)
    locked_out: list[str] = field(default_factory=list)
    lost_saves: list[str] = field(default_factory=list)


class CutWorld(World):
    """The same short life each time: open, saves, both anchors, a vTPM added, clean stop."""

    tpm: WiredTpm
    cut_logs = 0

    async def live_once(self, *, cut_at: int | None = None, executes: bool = False, reset_at: int | None = None) -> int:
        """One run of the manager; returns how many TPM commands it took."""
        bus = self.tpm.bus
        before = len(bus.commands)
        bus.cut_executes = executes
        bus.cut_at, bus.reset_at = cut_at, reset_at
        with suppress(PowerCutError, TpmError):  # already where an open reads the anchors
            await self.run_manager(self.current)
        count = len(bus.commands) - before
        if bus.was_reset:
            self.volatile_floor = None  # at the latest by the next reset, which follows
        return count

    async def _live(self, _disk: SnapshotDisk, committer: Committer, anchoring: Anchoring) -> None:
        steps = (
            (self.opening, anchoring),
            (CutWorld._save, self, committer),
            (Anchoring.extend_volatile, anchoring),
            (CutWorld._save, self, committer),
            (Anchoring.write_durable, anchoring),
            (CutWorld._add, self, committer, anchoring),
            (CutWorld._save, self, committer),
            (Anchoring.extend_volatile, anchoring),
            (Anchoring.write_final, anchoring),
        )
        for number, (step, *arguments) in enumerate(steps):
            try:
                await step(*arguments)
            except TpmError:
                if number in (0, len(steps) - 1):  # the manager ends with its error
                    raise PowerCutError from None

    async def _add(self, committer: Committer, anchoring: Anchoring) -> None:
        await committer.commit(PutVtpm(VtpmRecord(uuid_of(2 + self.findings.opens), GROUP, StateKey(bytes(32)))))
        await anchoring.write_durable()

    def durable(self) -> bytes:
        return self.tpm.just_written or super().durable()  # what the world asks is no command of the manager's

    def _extended(self) -> None:
        try:
            super()._extended()
        except IndexError:  # a reset just behind the extend
            self.volatile_floor = None

    def settle_anchors(self) -> None:
        """Find out what the TPM did with the command that nobody heard of: the truth lies in it, not in the manager."""
        durable = self.durable()
        marks = [(node, (node.position.digest, clean_stop(node.position.digest))) for node in chain_of(self.current)]
        self.floor = next((node for node, both in marks if durable in both), self.floor)
        now = self.tpm.pcr22_read()
        extended = [node for node in chain_of(self.current) if now in extends_of(node)]
        if extended:
            self.volatile_floor = extended[-1]

    def accepted_position(self, position: StorePosition) -> bool:
        try:
            self.judge(position, self.durable(), self.tpm.pcr22_read())
        except RolledBackError:
            return False
        return True

    def offer_cut_logs(self, when: str) -> None:
        """Offer the newest image with its log ended at every earlier frame: none may pass for a state of its own."""
        saves = self.allowed_saves()
        allowed = {node.position.digest for node in self.nodes if node.saves in saves}
        for node in self.nodes[-6:]:
            image, older = bytearray(self.current.image), node.image
            for start in range(0, len(image), 512):  # a sector that a power cut leaves whole
                if image[start : start + 512] != older[start : start + 512]:
                    image[start : start + 512] = bytes(512)
            try:
                with reopen(SnapshotDisk(bytes(image))) as store:
                    position = position_of(store)
            except StorageError:  # more than the log was cut: damage, which is refused
                continue
            self.cut_logs += 1
            if self.accepted_position(position) and position.digest not in allowed:
                self.findings.accepted_old.append(f"{when}: a cut log")


async def life(
    tpm: WiredTpm, seed: int, found: Cuts, *, strict: bool = False, counter: bool = False, **plan: Any
) -> None:
    """A clean first run, then one with the plan, then the adversary, then a run on what he may boot.

    counter: the control, a rule that only looks at how many states came before.
    """
    tpm.begin()
    world = CutWorld(seed, strict=strict, tpm=tpm)
    if counter:
        world.judge = count_of(world)
    assert world.info.index == FIRST_INDEX
    await world.live_once()
    await world.live_once(**plan)
    found.cut += tpm.bus.was_cut
    found.resets += tpm.bus.was_reset
    tpm.begin()
    world.settle_anchors()
    world.offer_everything(f"{plan}")
    world.offer_cut_logs(f"{plan}")
    if seed % 3 == 0:
        world.reset_tpm()
    accepted = world.offer_everything(f"{plan}, later")
    if accepted:
        world.current = world.rng.choice(accepted)
        await world.live_once()
        world.offer_everything(f"{plan}, at the end")
    found.lives += 1
    found.cut_logs += world.cut_logs
    for name in ("offered", "refused", "accepted_old", "locked_out", "lost_saves"):
        setattr(found, name, getattr(found, name) + getattr(world.findings, name))


def count_of(world: World) -> Judge:
    """Scheme C of the prototype: a number stands where the digest should; two branches count alike."""

    def judge(position: StorePosition, _durable: bytes, _pcr22: bytes | None) -> None:
        node = next(node for node in world.nodes if node.position.digest == position.digest)
        if node.depth < world.floor.depth:
            raise RolledBackError("an older number")

    return judge


async def commands_of_a_run(tpm: WiredTpm, *, strict: bool) -> int:
    """How many TPM commands the second run of a life takes: the places to cut."""
    tpm.begin()
    world = CutWorld(0, strict=strict, tpm=tpm)
    await world.live_once()
    return await world.live_once()


async def all_cuts(tpm: WiredTpm, found: Cuts, *, strict: bool, step: int = 1, first: int = 0, seed: int = 0) -> None:
    """A life for every place (every `step`-th from `first`): cut before it, cut behind it, TPM reset there."""
    places = await commands_of_a_run(tpm, strict=strict)
    for place in range(first, places, step):
        for number, plan in enumerate(({"cut_at": place}, {"cut_at": place, "executes": True}, {"reset_at": place})):
            await life(tpm, seed + 3 * place + number, found, strict=strict, **plan)
