"""What somebody with every key can read in a store image, in sectors and frames that nothing leads to, too."""

from collections.abc import Iterator
from contextlib import suppress
from uuid import UUID

from cryptography.exceptions import InvalidTag
from storage_histories import KEY, SECTOR, STORE, group_key

from storage import store_format as fmt
from storage.secrets import Secret
from storage.store_crypto import Purpose, sector_context, unseal, unseal_part

ROW = fmt.VtpmRow.size()


def keys_left(image: bytes, groups: list[UUID], last: int) -> dict[bytes, list[str]]:
    """Find every vTPM key that the groups' keys give, and where; `last`: the highest sequence ever used."""
    found: dict[bytes, list[str]] = {}
    for row, where in (*_in_leaves(image, groups, last), *_in_parts(image, groups, last)):
        _, key, _, _, flags = fmt.VtpmRow.codec().unpack(row)
        if any(key) or not flags & 16:
            found.setdefault(key, []).append(where)
    return found


def _opened(image: bytes, key: Secret, purpose: Purpose, last: int) -> Iterator[tuple[int, bytes]]:
    for location in range(fmt.POOL_FIRST, len(image) // SECTOR):
        raw = image[location * SECTOR : (location + 1) * SECTOR]
        for sequence in range(last + 2):
            with suppress(InvalidTag):
                yield location, unseal(key, purpose, raw, sector_context(STORE, location, sequence))
                break


def _in_leaves(image: bytes, groups: list[UUID], last: int) -> Iterator[tuple[bytes, str]]:
    for group in groups:
        for location, leaf in _opened(image, group_key(group), Purpose.LEAF, last):
            for row in range(fmt.ROWS_PER_LEAF):
                content = leaf[row * ROW : (row + 1) * ROW]
                if any(content):
                    yield content, f"leaf at {location}"


def _in_parts(image: bytes, groups: list[UUID], last: int) -> Iterator[tuple[bytes, str]]:
    for group, sequence, sealed, where in (*_frames(image), *_carried(image, groups, last)):
        with suppress(InvalidTag):
            part = unseal_part(group_key(group), STORE, group, sequence, sealed)
            position = 0
            while position < len(part):
                operation = part[position]
                if operation == fmt.Operation.PUT:
                    yield part[position + 1 : position + 1 + ROW], where
                position += 1 + (ROW if operation == fmt.Operation.PUT else 16)


def _frames(image: bytes) -> Iterator[tuple[UUID, int, bytes, str]]:
    for start in range(fmt.POOL_FIRST * SECTOR, len(image) - fmt.FrameHeader.size(), fmt.UNIT):
        if image[start : start + 4] != fmt.FRAME_MAGIC:
            continue
        header = fmt.FrameHeader.unpack(image, start)
        position = start + header.size() + header.envelope_bytes + fmt.TAG_BYTES
        end = position + header.parts_bytes
        while position + fmt.PartHead.size() <= min(end, len(image)):
            head = fmt.PartHead.unpack(image, position)
            position += head.size()
            yield head.group, header.sequence, image[position : position + head.length], f"frame {header.sequence}"
            position += head.length


def _carried(image: bytes, groups: list[UUID], last: int) -> Iterator[tuple[UUID, int, bytes, str]]:
    """Parts that lie whole in one carried sector, which is enough for small ones."""
    for location, payload in _opened(image, KEY, Purpose.CARRY, last):
        head = fmt.CarryHead.unpack(payload)
        stream = payload[head.size() : head.size() + head.length]
        position = 0
        while position + fmt.CarriedPart.size() <= len(stream):
            part = fmt.CarriedPart.unpack(stream, position)
            position += part.size()
            for group in groups:
                yield group, part.sequence, stream[position : position + part.length], f"carried at {location}"
            position += part.length
