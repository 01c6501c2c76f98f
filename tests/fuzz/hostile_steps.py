"""What hostile front ends send next: steps of one kind and of bytes, drawn from one seed.

A step is (kind, bytes). `command`: one TPM command, one answer. `stream`: bytes on a data connection of their own.
`hold`: the same, but the connection stays open. `control`: bytes on a control connection. `cancel`: a TPM command that
is cancelled on its way. `page`: what is written to the page of a new ring, piece by piece, with a ring of the bell
after each. `flood`: a bell rung until it is full.
"""

import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import commands_tpm12
import commands_tpm20
from hostile_bytes import damaged, lying, with_true_size
from vtpm_instance_commands import command12, create_primary_rsa

Step = tuple[str, bytes]
_TRAFFIC: Final = Path(__file__).parent.parent / "vectors" / "tpm20_traffic.txt"
_PIECE: Final = struct.Struct(">HH")  # of a `page` step: offset, length


def corpus() -> list[bytes]:
    """Return what tpm2-tools were heard to send (tests/vectors), in that order."""
    return [bytes.fromhex(line) for line in _TRAFFIC.read_text().splitlines() if line and line[0] != "#"]


def pieces_of(page: bytes) -> Iterator[tuple[int, bytes]]:
    """Return what a `page` step writes where."""
    while len(page) >= _PIECE.size:
        offset, size = _PIECE.unpack_from(page)
        yield offset % 4096, page[4 : 4 + size][: 4096 - offset % 4096]
        page = page[4 + size :]


class Steps:
    """Draws steps for one vTPM; `generator` learns from its answers."""

    def __init__(self, family: str, frontend: str, seed: str) -> None:
        """Draw for a TPM of `family` behind `frontend`."""
        self.family, self.frontend = family, frontend
        self._chance = random.Random(seed)
        kind = commands_tpm20.Generator if family == "2.0" else commands_tpm12.Generator
        self.generator: commands_tpm20.Generator | commands_tpm12.Generator = kind(self._chance)
        self._others: Sequence[bytes] = corpus() if family == "2.0" else [command12(0x46, bytes(4))]

    def next(self) -> Step:
        """Return another step."""
        chance, dice = self._chance, self._chance.random()
        if self.frontend == "ring" and dice < 0.15:
            return self._hostile_page()
        if self.frontend == "socket" and dice < 0.03:
            return chance.choice(("stream", "stream", "hold")), lying(self._packet(), chance)
        if self.frontend == "socket" and dice < 0.05:
            return "control", self._hostile_control()
        if self.frontend == "socket" and dice < 0.0505:
            return "cancel", create_primary_rsa(2048) if self.family == "2.0" else command12(0x50)
        return "command", self._packet()

    def _packet(self) -> bytes:
        chance = self._chance
        packet = self.generator.command() if chance.random() < 0.85 else chance.choice(self._others)
        return damaged(packet, self._others, chance) if chance.random() < 0.45 else with_true_size(packet)

    def _hostile_control(self) -> bytes:
        """Control commands with payloads that fit or do not; one in fifty resets the platform."""
        chance, stream = self._chance, b""
        for _ in range(chance.randint(1, 4)):
            number = chance.choice((*range(20), 0xFFFFFFFF, chance.randrange(2**32)))
            if number == 2 and chance.random() < 0.6:
                number = 1
            length = chance.choice((0, 0, 1, 4, 4, 12, 16, 20, 300))
            stream += struct.pack(">I", number) + chance.choice((bytes(length), chance.randbytes(length)))
        if b"\0\0\0\x02" in stream:
            self.generator.forget()
        return stream

    def _hostile_page(self) -> Step:
        chance = self._chance
        if chance.random() < 0.05:
            return "flood", b""
        pieces = b""
        for _ in range(chance.randint(1, 5)):
            packet = self._packet()
            length = chance.choice((len(packet), len(packet), 0, 1, 9, 10, 4088, 4089, 2**31, 2**32 - 1))
            state = chance.choice((1, 1, 1, 0, 2, 3, chance.randrange(256)))
            head = struct.pack(
                "<IBBBB", length, state, chance.choice((0, 0, 1, 4, 255)), 0, chance.choice((0, 0, 0, 1, 255))
            )
            offset = chance.choice((0, 0, 0, 4, 8, chance.randrange(4096)))
            content = (head + packet)[: 4096 - offset]
            pieces += _PIECE.pack(offset, len(content)) + content
        return "page", pieces
