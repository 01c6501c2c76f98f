"""How much memory a process has for itself."""

from pathlib import Path
from typing import Final

_KIB: Final = 1024
_OWN: Final = ("Private_Clean:", "Private_Dirty:")


def private_bytes(pid: int) -> int | None:
    """Return the bytes that a process has for itself (proc(5), smaps_rollup), None where that may not be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * _KIB for line in lines if line.startswith(_OWN))
