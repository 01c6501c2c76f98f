"""Random histories of a store and its two anchors, with an adversary who keeps every image ever written.

What is real: the store, the committer, the anchoring, the rule. What the world adds: power cuts at every call of the
TPM and every write of the disk, TPM resets, and the truth about which states may still be accepted.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

import trio
from manager_rig import FIRST_INDEX, ModelTpm, PowerCutError, SnapshotDisk, hardware, lost_answer
from storage_histories import new_store, reopen, uuid_of

from manager import anchor
from manager.anchor import PCR22_AFTER_RESET, StorePosition, clean_stop, extended
from manager.anchoring import Anchoring, note_present, position_of
from manager.committer import Committer
from manager.errors import RolledBackError
from manager.hwtpm_errors import TpmError
from storage.secrets import StateKey
from storage.store import GroupRecord, PutGroup, PutVtpm, RecordFlags, VtpmRecord

GROUP, VTPM = UUID(int=7), uuid_of(1)
AUTH = bytes(range(32))
Judge = Callable[[StorePosition, bytes, bytes | None], object]
Opening = Callable[[Anchoring], Awaitable[None]]
RESET_BEFORE = ("pcr22_read", "pcr22_extend", "pcr22_extend", "anchor_write")  # calls just before which a TPM is reset


@dataclass(eq=False)
class Node:
    """One state of the store as it was on the disk at a flush or when the power went."""

    image: bytes
    parent: "Node | None"
    depth: int = field(init=False)
    saves: bytes = field(init=False)  # digest in the vTPM's record: random, so it names one save
    position: StorePosition = field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1
        with reopen(SnapshotDisk(self.image)) as store:
            self.position, self.saves = position_of(store), store.get(VTPM).digest


@dataclass
class Findings:
    """What went wrong, and what shows that the test looked."""

    accepted_old: list[str] = field(default_factory=list)
    locked_out: list[str] = field(default_factory=list)
    lost_saves: list[str] = field(default_factory=list)
    offered: int = 0
    refused: int = 0
    opens: int = 0
    older_opened: int = 0
    clean_stops: int = 0
    durable: int = 0
    extends: int = 0
    resets: int = 0


class World:
    """One installation: a disk, a TPM, and everything the adversary has seen."""

    def __init__(
        self,
        seed: int,
        *,
        strict: bool = False,
        judge: Judge = anchor.judge,
        opening: Opening = Anchoring.write_opening,
        tpm: ModelTpm | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.strict, self.judge, self.opening = strict, judge, opening
        self.findings = Findings()
        self.tpm = tpm or ModelTpm()
        self.info = self.tpm.anchor_define(FIRST_INDEX, AUTH)
        disk = SnapshotDisk()
        with new_store(disk, [GROUP]) as store:
            store.commit([PutVtpm(VtpmRecord(VTPM, GROUP, StateKey(bytes(32))))])
            store.checkpoint()
            digest = store.digest()
        self.tpm.anchor_write(self.info, AUTH, clean_stop(digest), first=True)
        self.nodes: list[Node] = []
        self.current = self._node(bytes(disk.content), None)
        self.tip = self.opened = self.current  # newest state of whoever served last; what was opened last
        self.served = False  # since the last open: before its anchors are written, an open has changed nothing
        self.floor = self.current  # the durable anchor's state
        self.volatile_floor: Node | None = None  # the state whose note the last extend of PCR 22 carried out
        self.acknowledged: Node = self.current
        self.tpm.after_write = self._anchored
        self.tpm.after_extend = self._extended

    def _node(self, image: bytes, parent: Node | None) -> Node:
        node = Node(image, parent)
        self.nodes.append(node)
        return node

    # what the anchors did, seen from inside the TPM

    def _anchored(self) -> None:
        self.floor = next(node for node in chain_of(self.current) if self._stands_for(node))
        if not self.served:
            self.acknowledged = self.opened
        self.served, self.tip = True, self.current
        self.findings.durable += 1

    def _stands_for(self, node: Node) -> bool:
        return self.durable() in (node.position.digest, clean_stop(node.position.digest))

    def _extended(self) -> None:
        now = self.tpm.pcr22_read()
        self.volatile_floor = [node for node in chain_of(self.current) if now in extends_of(node)][-1]
        self.findings.extends += 1

    # one run of a manager

    def flushed(self, image: bytes) -> None:
        if image == self.current.image:
            return
        self.current = self._node(image, self.current)
        if self.served:
            self.tip = self.current

    def _open(self, node: Node) -> SnapshotDisk:
        self.current = self.opened = node
        self.served = False
        disk = SnapshotDisk(node.image)
        disk.on_flush = self.flushed
        return disk

    async def run_manager(self, node: Node) -> None:
        """Open `node` (judged before) and live through random events, to a clean stop or to a power cut."""
        self.findings.opens += 1
        disk = self._open(node)
        store = reopen(disk)
        store.note_anchored(self.durable())
        committer = Committer(store, lambda: None)
        anchoring = Anchoring(committer, hardware(self.tpm), self.info, AUTH, volatile=True, strict=self.strict)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(committer.run)
                await self._live(disk, committer, anchoring)
                nursery.cancel_scope.cancel()
        except* PowerCutError:
            pass
        self.flushed(bytes(disk.content))  # the power may have gone between a write and its flush
        store.close()
        self.tpm.fail.clear()
        self.tpm.before_call.clear()

    async def _live(self, disk: SnapshotDisk, committer: Committer, anchoring: Anchoring) -> None:
        self._plan_cut(disk, chance=0.15)
        await self._guarded(self.opening, anchoring)
        for _ in range(self.rng.randrange(8)):
            self._plan_cut(disk, chance=0.12)
            match self.rng.randrange(11):
                case 0 | 1 | 2 | 3 | 4:
                    await self._save(committer)
                case 5 | 6:
                    await self._guarded(Anchoring.extend_volatile, anchoring)
                case 7:
                    await self._two_at_once(committer, anchoring)
                case 8:
                    async with committer.lock:
                        committer.store.checkpoint()
                case 9:
                    self.tpm.fail["anchor_write"] = self.rng.choice(["before", "after"]), lost_answer()
                    await self._guarded(Anchoring.write_durable, anchoring)
                case 10:
                    self.tpm.before_call[self.rng.choice(RESET_BEFORE)] = self.reset_tpm
        if self.rng.random() < 0.5:
            raise PowerCutError
        disk.cut = None
        self.tpm.fail.clear()
        await anchoring.write_final()
        last = self.current
        with trio.move_on_after(0.005) as waited:
            await self._save(committer)
        assert waited.cancelled_caught
        assert self.current is last, "nothing is committed after the final anchor"
        self.findings.clean_stops += 1

    def _plan_cut(self, disk: SnapshotDisk, chance: float) -> None:
        if self.rng.random() < chance:
            name = self.rng.choice(["anchor_write", "anchor_write", "pcr22_extend", "pcr22_extend", "disk"])
            if name == "disk":
                disk.cut = self.rng.randrange(1, 6)
            else:
                self.tpm.fail[name] = self.rng.choice(["before", "after"]), PowerCutError()

    async def _guarded(self, action: Opening, anchoring: Anchoring) -> None:
        try:
            await action(anchoring)
        except TpmError:  # the manager goes on with the old anchor, but it does not open without one
            if action == self.opening and action is not Anchoring.write_durable:
                raise

    async def _save(self, committer: Committer) -> None:
        """One save of the vTPM, acknowledged."""
        old = committer.store.get(VTPM)
        digest = self.rng.randbytes(32)
        record = VtpmRecord(VTPM, GROUP, StateKey(digest), digest, old.generation + 1, RecordFlags.NONE)
        try:
            await committer.commit(PutVtpm(record))
        except TpmError:
            return  # strict: not acknowledged
        assert self.current.saves == digest
        self.acknowledged = self.current

    async def _two_at_once(self, committer: Committer, anchoring: Anchoring) -> None:
        """A save between the note and the write of the durable anchor."""
        if self.strict:
            await self._guarded(Anchoring.write_durable, anchoring)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guarded, Anchoring.write_durable, anchoring)
            nursery.start_soon(self._save, committer)

    def reset_tpm(self) -> None:
        """A reset of the TPM, a manager running or not."""
        self.tpm.reset()
        self.volatile_floor = None
        self.findings.resets += 1

    def reseal(self) -> None:
        """What `vtpm-manager reseal` does to the store: group records, the boot area, a clean anchor; cut anywhere."""
        disk = self._open(self.current)
        store = reopen(disk)
        note_present(store, self.tpm.pcr22_read())
        try:
            store.note_anchored(self.durable())
            self._plan_cut(disk, chance=0.5)
            store.commit([PutGroup(GroupRecord(GROUP, 1, self.rng.randbytes(20)))])
            store.write_boot_area(self.rng.randbytes(20))
            self.tpm.anchor_write(self.info, AUTH, clean_stop(store.digest()))
        except PowerCutError:
            self.flushed(bytes(disk.content))
        finally:
            store.close()
            self.tpm.fail.clear()

    # the adversary

    def durable(self) -> bytes:
        return self.tpm.anchor_read(self.info, AUTH)

    def accepted(self, node: Node, anchors: tuple[bytes, bytes] | None = None) -> bool:
        durable, pcr22 = anchors or (self.durable(), self.tpm.pcr22_read())
        self.findings.offered += 1
        try:
            self.judge(node.position, durable, pcr22)
        except RolledBackError:
            self.findings.refused += 1
            return False
        return True

    def allowed_saves(self) -> set[bytes]:
        """The saves whose states may be accepted now: the newest, and those back to the younger of the two anchors."""
        chain, depth = chain_of(self.tip), self.floor.depth
        if self.volatile_floor is not None and self.volatile_floor in chain:
            depth = max(depth, self.volatile_floor.depth)
        return {self.current.saves, *(node.saves for node in chain if node.depth >= depth)}

    def offer_everything(self, when: str) -> list[Node]:
        """Offer every image ever written; returns the accepted ones."""
        allowed = self.allowed_saves()
        anchors = self.durable(), self.tpm.pcr22_read()
        accepted = [node for node in self.nodes if self.accepted(node, anchors)]
        for node in accepted:
            if node.saves not in allowed:
                self.findings.accepted_old.append(f"{when}: depth {node.depth}, now {self.current.depth}")
            elif self.strict and node.depth < self.acknowledged.depth and node.saves != self.acknowledged.saves:
                self.findings.lost_saves.append(f"{when}: depth {node.depth} of {self.acknowledged.depth}")
        if self.current not in accepted:
            self.findings.locked_out.append(when)
        return accepted

    async def history(self, runs: int) -> Findings:
        for run in range(runs):
            accepted = self.offer_everything(f"before run {run}")
            if self.rng.random() < 0.35:
                self.reset_tpm()
                accepted = self.offer_everything(f"after the TPM reset before run {run}")
            choice = self.current
            if accepted and self.rng.random() < 0.5:
                choice = self.rng.choice(accepted)
            if not self.accepted(choice):
                return self.findings
            if choice.depth < self.current.depth:
                self.findings.older_opened += 1
            self.current = choice
            if self.rng.random() < 0.2:
                self.reseal()
                accepted = self.offer_everything(f"after the reseal before run {run}")
                if not self.accepted(self.current):
                    return self.findings
            await self.run_manager(self.current)
        self.offer_everything("at the end")
        return self.findings


def extends_of(node: Node) -> list[bytes]:
    """What PCR 22 holds once the extend is done that a state's notes announce, whatever it was extended from."""
    notes = node.position.notes
    return [extended(value, notes.extending) for value in (notes.pcr_before, *PCR22_AFTER_RESET)]


def chain_of(node: Node | None) -> list[Node]:
    """A state and all it descends from, newest first."""
    chain: list[Node] = []
    while node is not None:
        chain.append(node)
        node = node.parent
    return chain
