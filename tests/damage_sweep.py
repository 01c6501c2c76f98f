"""Every byte of a store that means anything, changed one at a time: what must be found, and where.

Leaves and carried parts are independent, so one opening judges one byte in each of them. Everything else is judged
byte by byte. `stride` leaves bytes out for a quick run; `./dev bench crash --damage` takes all of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from storage_disks import MemoryDisk
from storage_histories import KEY, SECTOR, content, group_key, new_store, record_of, reopen, uuid_of

from storage import store_format as fmt
from storage.errors import GroupClosed, NotAStore, StorageError, StoreDamaged
from storage.store import PutVtpm, Store

A, B, C = uuid_of(1), uuid_of(2), uuid_of(3)
BITS = (0x01, 0x80, 0xFF)  # one after the other, so that high, low and all bits get their turn


class DamageError(AssertionError):
    """A changed byte was not found, was found elsewhere, or took more with it than was in its sector."""


def whole_image() -> bytes:
    """Three groups, leaves, both boot copies and both roots written, carried parts of closed groups, frames."""
    disk = MemoryDisk()
    with new_store(disk, [A, B, C], 60 * SECTOR) as store:
        store.write_boot_area(b"boot area, second" * 10)
        store.commit([PutVtpm(record_of(uuid_of(100 + n), (A, B, C)[n % 3])) for n in range(200)])
        store.checkpoint()
        store.commit([PutVtpm(record_of(uuid_of(100 + n), (A, B, C)[n % 3], 1)) for n in range(30)])
    with Store.open(disk, KEY) as store:
        store.unlock_group(A, group_key(A))
        store.checkpoint()
        for generation in range(2, 5):
            store.commit([PutVtpm(record_of(uuid_of(100), A, generation))])
    return bytes(disk.content)


@dataclass(frozen=True)
class Sector:
    location: int
    entry: int
    kind: fmt.Kind
    group: UUID | None


@dataclass
class Sweep:
    """One image, what is in it, and the bytes that were judged, by what they belong to."""

    image: bytes
    stride: int = 1
    first: int = 0
    judged: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        with reopen(MemoryDisk(self.image)) as store:
            assert not store.damage
            self.rows = content(store)[1]
            state = store._state
            self.digest = store.digest()
            self.slot = state.root.slot
            self.maps = [ref.location for ref in state.tree.maps]
            numbers = {group.number: uuid for uuid, group in state.groups.items()}
            self.sectors = [
                Sector(ref.location, entry, kind, numbers.get(number))
                for entry, ref in enumerate(state.tree.entries)
                if ref is not None
                for kind, number in [fmt.kind_and_group(ref.owner)]
            ]
            self.held = {
                sector.entry: frozenset(
                    UUID(bytes=uuid)
                    for group in state.groups.values()
                    if group.table is not None
                    for uuid in group.table.uuids()
                    if group.table._index[uuid] // fmt.ROWS_PER_LEAF == sector.entry
                )
                for sector in self.sectors
                if sector.kind is fmt.Kind.LEAF
            }
            self.boot = fmt.BOOT_SECTORS[store._boot.place]
            self.frames = list(frames(store, self.image))

    def offsets(self, length: int = SECTOR) -> Iterable[int]:
        return range(self.first % self.stride, length, self.stride)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Everything that is judged, by name."""
        return {
            "header": lambda: self._refused("header", 0, SECTOR, "header", (NotAStore, StoreDamaged)),
            "boot area": lambda: self._refused("boot area", self.boot * SECTOR, SECTOR, "boot area"),
            "map": self._maps,
            "group records": self._group_records,
            "roots": self._roots,
            "leaves": self._leaves,
            "carried parts": self._carried,
            "log": self._log,
        }

    def run(self) -> None:
        for part in self.parts().values():
            part()

    # what keeps the store from opening

    def _refused(
        self, part: str, start: int, length: int, where: str, kinds: tuple[type[StorageError], ...] = (StoreDamaged,)
    ) -> None:
        for offset in self.offsets(length):
            image = self._changed([start + offset])
            try:
                Store.open(MemoryDisk(image), KEY).close()
            except kinds as error:
                if where not in str(error) and not isinstance(error, NotAStore):
                    raise DamageError(f"byte {offset} of {part}: found elsewhere: {error}") from error
            else:
                raise DamageError(f"byte {offset} of {part} ({where}) was not found")
            self.judged[part] += 1

    def _maps(self) -> None:
        for number, location in enumerate(self.maps):
            self._refused("map", location * SECTOR, SECTOR, f"map sector {number} at sector {location}")

    def _group_records(self) -> None:
        for sector in self._of(fmt.Kind.GROUP):
            self._refused("group records", sector.location * SECTOR, SECTOR, f"group record (entry {sector.entry})")

    def _log(self) -> None:
        """All frames but the last; a damaged last one cannot be told from a torn one, but shows in the digest."""
        *before, (last, size) = self.frames
        for start, length in before:
            self._refused("log", start, length, "log")
        for offset in self.offsets(size):
            self._other_digest("last frame", last + offset)

    def _roots(self) -> None:
        """The newest root: the one before it and the log serve, and the digest shows it. Both: refused."""
        mine, other = (fmt.ROOT_SECTORS[slot] * SECTOR for slot in (self.slot, 1 - self.slot))
        for offset in self.offsets(fmt.ROOT_BYTES):
            try:
                self._other_digest("root", mine + offset)
            except StoreDamaged:
                self.judged["root"] += 1
            try:
                Store.open(MemoryDisk(self._changed([mine + offset, other + offset])), KEY).close()
            except StoreDamaged as error:
                if "root A" not in str(error):
                    raise DamageError(f"byte {offset} of both roots: {error}") from error
                self.judged["both roots"] += 1
            else:
                raise DamageError(f"byte {offset} of both roots was not found")

    def _other_digest(self, part: str, position: int) -> None:
        with Store.open(MemoryDisk(self._changed([position])), KEY) as store:
            if store.digest() == self.digest:
                raise DamageError(f"byte {position} of the {part} was not found")
        self.judged[part] += 1

    # what does not

    def _leaves(self) -> None:
        """Change the same byte of every second leaf: only those are named, and only their vTPMs are lost."""
        leaves = self._of(fmt.Kind.LEAF)
        for chosen in (leaves[::2], leaves[1::2]):
            lost = frozenset[UUID]().union(*(self.held[sector.entry] for sector in chosen))
            for number, offset in enumerate(self.offsets()):
                image = self._changed(sector.location * SECTOR + offset for sector in chosen)
                self._named(image, chosen, f"byte {offset} of leaves")
                if number % 64 == 0:
                    self._others_work(image, lost)
                self.judged["leaves"] += len(chosen)

    def _carried(self) -> None:
        """A damaged carried part closes its group, and that one only."""
        for sector in self._of(fmt.Kind.CARRY):
            for number, offset in enumerate(self.offsets()):
                image = self._changed([sector.location * SECTOR + offset])
                self._named(image, [sector], f"byte {offset} of carried parts")
                if number % 64 == 0:
                    self._only_closed(image, sector)
                self.judged["carried parts"] += 1

    def _named(self, image: bytes, sectors: list[Sector], what: str) -> None:
        wanted = {f"{sector.kind.name.lower()} (entry {sector.entry}) of group {sector.group}" for sector in sectors}
        with Store.open(MemoryDisk(image), KEY) as store:
            named = {damage.where for damage in store.damage}
        if named != wanted:
            raise DamageError(f"{what}: found {sorted(named)}, changed {sorted(wanted)}")

    def _others_work(self, image: bytes, lost: frozenset[UUID]) -> None:
        disk = MemoryDisk(image)
        with reopen(disk) as store:
            there = content(store)[1]
            # a record that the log or a carried part holds is newer than the leaf, and there all the same
            if not there.items() <= self.rows.items() or self.rows.keys() - there.keys() - lost:
                raise DamageError("vTPMs of other leaves are lost")
            for uuid in self.rows.keys() - there.keys():
                self._fails_closed(store, uuid)
            survivor = min(there)
            store.commit([PutVtpm(record_of(survivor, there[survivor][0], 900))])
            store.checkpoint()
        with reopen(disk) as again:
            assert again.get(survivor).generation == 900
            assert len(content(again)[1]) == len(there)

    def _fails_closed(self, store: Store, uuid: UUID) -> None:
        try:
            store.get(uuid)
        except StoreDamaged:
            return
        raise DamageError(f"vTPM {uuid} of a damaged leaf is answered for")

    def _only_closed(self, image: bytes, sector: Sector) -> None:
        with Store.open(MemoryDisk(image), KEY) as store:
            for group in store.groups():
                try:
                    store.unlock_group(group, group_key(group))
                except StoreDamaged:
                    if group != sector.group:
                        raise
            assert sector.group is not None
            if store.is_open(sector.group):
                raise DamageError("a group with damaged carried parts is open")
            mine = {uuid for uuid, row in self.rows.items() if row[0] == sector.group}
            if content(store)[1].keys() != self.rows.keys() - mine:
                raise DamageError("another group is not whole")
            try:
                store.get(min(mine))
            except GroupClosed:
                return
            raise DamageError("a vTPM of a closed group is answered for")

    def _of(self, kind: fmt.Kind) -> list[Sector]:
        return [sector for sector in self.sectors if sector.kind is kind]

    def _changed(self, positions: Iterable[int]) -> bytes:
        image = bytearray(self.image)
        for position in positions:
            image[position] ^= BITS[position % len(BITS)]
        return bytes(image)


def frames(store: Store, image: bytes) -> Iterator[tuple[int, int]]:
    """Byte offset and length of each frame that a replay takes, oldest first."""
    state = store._state
    unit, end = state.root.body.log_unit, state.log.next
    while unit != end:
        offset = state.log.first * SECTOR + unit * fmt.UNIT
        head = fmt.FrameHeader.unpack(image, offset)
        length = head.size() + head.envelope_bytes + fmt.TAG_BYTES + head.parts_bytes
        yield offset, length
        unit += fmt.units(length)
