"""Which hardware PCRs a vTPM gets at its start: the words of `vtpm-attach --hwinitpcrs`, and the bits in messages."""

from collections.abc import Sequence
from typing import Final

from manager.errors import UsageError

PCR_COUNT: Final = 24  # PC Client profile


def parse_hw_pcrs(text: str | None) -> str:
    """Read `all`, `none`, or numbers and ranges as `0,2,4-7`; returns them one by one: "0,2,4,5,6,7", or "".

    Raises:
        UsageError: it is none of these.

    """
    if text is None or text == "none":
        return ""
    chosen: set[int] = set()
    for part in text.split(","):
        low, dash, high = ("0", "-", str(PCR_COUNT - 1)) if part == "all" else part.strip().partition("-")
        last = high if dash else low
        if not all(word.isascii() and word.isdecimal() and len(word) <= 2 for word in (low, last)):
            raise UsageError(f"'{text[:80]}' names no PCRs: write for example 0,2,4-7, all, or none. Nothing was done")
        if int(low) > int(last) or int(last) >= PCR_COUNT:
            raise UsageError(f"PCR {part.strip()[:20]} does not exist: they are 0 to {PCR_COUNT - 1}. Nothing was done")
        chosen.update(range(int(low), int(last) + 1))
    return ",".join(map(str, sorted(chosen)))


def bit_map(kept: str) -> int:
    """Return what `parse_hw_pcrs` returned as bits, PCR 0 the lowest."""
    return sum(1 << int(pcr) for pcr in kept.split(",")) if kept else 0


def may_read(given: int, bank: str, untrusted: Sequence[int]) -> bool:
    """Tell whether an instance that was given the PCRs of a bit map may be told these."""
    few = 0 < len(untrusted) <= PCR_COUNT
    return bank == "sha256" and few and all(0 <= pcr < PCR_COUNT and given >> pcr & 1 for pcr in untrusted)
