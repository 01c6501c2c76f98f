"""Where a TPM's registers are: interface, address, locality. Pure."""

from dataclasses import dataclass
from typing import Final

# PTP 6.3: each locality has a page of registers of its own, one after the other.
PAGE_BYTES: Final = 0x1000
LOCALITIES: Final = range(5)
DEFAULT_BASE: Final = 0xFED40000


@dataclass(frozen=True, slots=True)
class Place:
    """Which registers: the interface (`tis` or `crb`), physical address of locality 0's page, the locality."""

    interface: str
    base: int
    locality: int

    @property
    def address(self) -> int:
        """Physical address of this locality's page."""
        return self.base + self.locality * PAGE_BYTES

    def __str__(self) -> str:
        return f"0x{self.address:x} (locality {self.locality})"
