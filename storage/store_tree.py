"""The map: which sector holds which leaf, group record or carried part, and which sectors are free.

Copy on write: a sector goes only where the durable root and its map lead to nothing. What it replaces
becomes free when `settle` says that a root without it is durable.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag

from storage import store_format as fmt
from storage.disk import Device
from storage.errors import StoreDamaged
from storage.secrets import Secret, StoreKey
from storage.store_crypto import Purpose, seal, sector_context, sector_digest, unseal
from storage.store_room import Extent, Room

_UNWRITTEN: Final = 0  # sector 0 is the header, so no reference leads there
_REF: Final = fmt.SectorRef.size()
_NO_REF: Final = bytes(_REF)
_pack_ref: Final = fmt.SectorRef.codec().pack  # a checkpoint packs hundreds; WireRecord.pack takes longer
_WRITE_SECTORS: Final = 64  # sealed sectors that wait in memory for their neighbours, at most


class Tree:
    """Entries (index -> reference or None) and map sectors of an open store."""

    def __init__(self, device: Device, store: UUID, key: StoreKey, total: int, log: Extent) -> None:
        self._device = device
        self._store: Final = store
        self.key = key
        self.total = total
        self.entries: list[fmt.SectorRef | None] = []
        self.maps: list[fmt.SectorRef] = []
        self.room = Room(location for location in range(fmt.POOL_FIRST, total) if location not in log)
        self._free_entries: list[int] = []
        self._touched: set[int] = set()
        self._in_use = 0
        self._images: list[bytearray] = []  # plaintext of the map sectors, as of the references now
        self._sealed: dict[int, bytes] = {}  # sectors by location, sealed but not yet handed to the device

    # --- reading -----------------------------------------------------------------------------------

    def load(self, maps: Iterable[fmt.SectorRef]) -> None:
        """Read the map that a root names. Raises: StoreDamaged, DeviceError."""
        free = set(self.room.locations())
        for number, ref in enumerate(maps):
            where = f"map sector {number} at sector {ref.location}"
            plaintext = self._open(ref, self.key, Purpose.MAP, where)
            self._claim(free, ref, where)
            self.maps.append(ref)
            self._images.append(bytearray(plaintext))
            for fields in fmt.SectorRef.codec().iter_unpack(plaintext[: fmt.REFS_PER_MAP * _REF]):
                entry = fmt.SectorRef(*fields)
                if entry.location == _UNWRITTEN:
                    self.entries.append(None)
                    continue
                self._claim(free, entry, f"entry {len(self.entries)} of the map")
                if not fmt.known_kind(entry.owner):
                    raise StoreDamaged(f"entry {len(self.entries)} of the map", "authentic, but of no known kind")
                self.entries.append(entry)
                self._in_use += 1
        while self.entries and self.entries[-1] is None:
            self.entries.pop()
        self._free_entries = [index for index, entry in enumerate(self.entries) if entry is None]
        self.room = Room(free)

    def check(self) -> Iterator[tuple[int, str]]:
        """Yield (entry, problem) for every sector whose bytes are not those that the map names; needs no key."""
        for index, ref in enumerate(self.entries):
            if ref is not None and ref.location != _UNWRITTEN and sector_digest(self._read(ref)) != ref.digest:
                yield index, f"sector {ref.location} is not what the map names"

    def read(self, entry: int, key: Secret, purpose: Purpose) -> bytes:
        """Read and open the sector of an entry. Raises: StoreDamaged, DeviceError."""
        ref = self.entries[entry]
        if ref is None or ref.location == _UNWRITTEN:
            raise StoreDamaged(f"entry {entry}", "it leads to no sector")
        return self._open(ref, key, purpose, f"{purpose.name.lower()} (entry {entry}) at sector {ref.location}")

    def written_at(self, entry: int) -> int:
        """Return the sequence of the checkpoint that wrote an entry's sector."""
        ref = self.entries[entry]
        return 0 if ref is None else ref.sequence

    def by_owner(self) -> Iterator[tuple[int, fmt.Kind, int]]:
        """Yield (entry, kind, group number) of all entries."""
        for index, ref in enumerate(self.entries):
            if ref is not None:
                yield index, *fmt.kind_and_group(ref.owner)

    # --- room --------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Sectors that may be written now."""
        return len(self.room)

    def needed(self, more: int = 0) -> int:
        """Count the sectors that hold everything, with `more` further entries: entries and map sectors."""
        return self._in_use + more + self.map_count(more)

    def map_count(self, more: int = 0) -> int:
        """Count the map sectors for all entries and `more` further ones."""
        entries = max(len(self.entries), self._in_use + more)
        return max(len(self.maps), -(-entries // fmt.REFS_PER_MAP))

    def cost(self, entries: Iterable[int]) -> int:
        """Count the sectors that a round needs to write or drop these entries' map sectors, without their own."""
        touched = {entry // fmt.REFS_PER_MAP for entry in entries} | self._touched
        return len(touched.union(range(len(self.maps), self.map_count())))

    def is_touched(self, entry: int) -> bool:
        """Tell whether the next `write_maps` writes the entry's map sector anyway."""
        number = entry // fmt.REFS_PER_MAP
        return number in self._touched or number >= len(self.maps)

    def place(self, entry: int) -> int:
        """Return the sector that an entry leads to, 0 if it has none yet."""
        ref = self.entries[entry]
        return _UNWRITTEN if ref is None else ref.location

    def extend(self, total: int, log: Extent) -> None:
        """Take further sectors into use, but for those of `log`."""
        self.room.add(location for location in range(self.total, total) if location not in log)
        self.total = total

    def give_back(self, extent: Extent) -> None:
        """Free a run of sectors, formerly the log, with the next `settle`."""
        self.room.release(range(extent.first, extent.first + extent.sectors))

    # --- changing ----------------------------------------------------------------------------------

    def allocate(self, owner: int) -> int:
        """Reserve an entry for something yet to be written."""
        ref = fmt.SectorRef(_UNWRITTEN, owner, 0, b"")
        self._in_use += 1
        if self._free_entries:
            entry = heapq.heappop(self._free_entries)
            self.entries[entry] = ref
            return entry
        self.entries.append(ref)
        return len(self.entries) - 1

    def write(self, entry: int, payload: bytes | bytearray, key: Secret, purpose: Purpose, sequence: int) -> None:
        """Seal a payload for a free sector and lead the entry there; written by `write_out` at the latest.

        Raises DeviceError.
        """
        old = self.entries[entry]
        assert old is not None, "only allocated entries are written"
        self._lead(entry, self._seal(old.owner, payload, key, purpose, sequence))
        self._release(old)

    def is_lost(self, entry: int) -> bool:
        """Tell whether `mark_lost` was called for the entry."""
        ref = self.entries[entry]
        return ref is not None and fmt.kind_and_group(ref.owner)[0] is fmt.Kind.LOST

    def mark_lost(self, entry: int) -> None:
        """Keep an entry's sector for good, but have it never read as a leaf again."""
        old = self.entries[entry]
        assert old is not None, "only allocated entries are lost"
        _, group = fmt.kind_and_group(old.owner)
        self._lead(entry, replace(old, owner=fmt.owner(fmt.Kind.LOST, group)))

    def drop(self, entry: int) -> None:
        """Forget an entry; its sector becomes free with `settle`."""
        old = self.entries[entry]
        assert old is not None, "only allocated entries are dropped"
        self._release(old)
        self._lead(entry, None)
        heapq.heappush(self._free_entries, entry)
        self._in_use -= 1

    def write_maps(self, sequence: int) -> None:
        """Write the map sectors of all entries written or dropped since the last time. Raises DeviceError."""
        touched = self._touched.union(range(len(self.maps), self.map_count()))
        while len(self._images) < self.map_count():
            self._images.append(bytearray(fmt.PAYLOAD))
        for number in sorted(touched):
            ref = self._seal(fmt.owner(fmt.Kind.MAP), self._images[number], self.key, Purpose.MAP, sequence)
            if number < len(self.maps):
                self._release(self.maps[number])
                self.maps[number] = ref
            else:
                self.maps.append(ref)
        self._touched.clear()

    def write_out(self) -> None:
        """Hand all sealed sectors to the device, neighbours in one write; not yet durable. Raises DeviceError.

        A write of 16 sectors takes little longer than that of one.
        """
        locations = sorted(self._sealed)
        start = 0
        for index, location in enumerate(locations, 1):
            if index == len(locations) or locations[index] != location + 1:
                run = b"".join([self._sealed[place] for place in locations[start:index]])
                self._device.write(run, locations[start] * fmt.SECTOR)
                start = index
        self._sealed.clear()

    # --- compaction --------------------------------------------------------------------------------

    def touch_map(self, number: int) -> None:
        """Have the next `write_maps` write a map sector anew, elsewhere."""
        self._touched.add(number)

    def renumberings(self) -> dict[int, int]:
        """Say which entries have to move, and where to, so that those in use are the first ones."""
        holes = (index for index in range(self._in_use) if self.entries[index] is None)
        high = (index for index in range(self._in_use, len(self.entries)) if self.entries[index] is not None)
        return dict(zip(high, holes, strict=True))

    def renumber(self, moves: Mapping[int, int]) -> None:
        """Move entries as `renumberings` said, and let go of the map sectors that are not needed any more."""
        for old, new in moves.items():
            self._lead(new, self.entries[old])
            self._lead(old, None)
        del self.entries[self._in_use :]
        self._free_entries.clear()
        count = -(-self._in_use // fmt.REFS_PER_MAP)
        for ref in self.maps[count:]:
            self._release(ref)
        del self.maps[count:], self._images[count:]
        self._touched = {number for number in self._touched if number < count}

    # --- inside ------------------------------------------------------------------------------------

    def _lead(self, entry: int, ref: fmt.SectorRef | None) -> None:
        self.entries[entry] = ref
        number, index = divmod(entry, fmt.REFS_PER_MAP)
        self._touched.add(number)
        while len(self._images) <= number:
            self._images.append(bytearray(fmt.PAYLOAD))
        packed = _NO_REF if ref is None else _pack_ref(ref.location, ref.owner, ref.sequence, ref.digest)
        self._images[number][index * _REF : (index + 1) * _REF] = packed

    def _release(self, ref: fmt.SectorRef) -> None:
        if ref.location != _UNWRITTEN:
            self.room.release([ref.location])

    def _claim(self, free: set[int], ref: fmt.SectorRef, where: str) -> None:
        if ref.location not in free:
            raise StoreDamaged(where, f"sector {ref.location} is outside the pool or named twice")
        free.remove(ref.location)

    def _read(self, ref: fmt.SectorRef) -> bytes:
        return self._device.read(fmt.SECTOR, ref.location * fmt.SECTOR)

    def _open(self, ref: fmt.SectorRef, key: Secret, purpose: Purpose, where: str) -> bytes:
        raw = self._read(ref)
        if sector_digest(raw) != ref.digest:
            raise StoreDamaged(where, "it is not the sector that was written")
        context = sector_context(self._store, ref.location, ref.sequence)
        try:
            return unseal(key, purpose, raw, context)
        except InvalidTag:
            raise StoreDamaged(where, "it does not open under its key") from None

    def _seal(
        self, owner: int, payload: bytes | bytearray, key: Secret, purpose: Purpose, sequence: int
    ) -> fmt.SectorRef:
        location = self.room.take()
        raw = seal(key, purpose, payload, sector_context(self._store, location, sequence))
        assert len(raw) == fmt.SECTOR, "a sealed payload fills its sector"
        self._sealed[location] = raw
        if len(self._sealed) >= _WRITE_SECTORS:
            self.write_out()
        return fmt.SectorRef(location, owner, sequence, sector_digest(raw))
