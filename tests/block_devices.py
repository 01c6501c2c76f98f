"""Loop devices for tests that need a real block device."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(backing: Path, size: int) -> Iterator[Path]:
    """Yield a block device of `size` bytes, all zero, with its content in the new file `backing`."""
    with backing.open("wb") as file:
        file.truncate(size)
    made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip("a loop device needs privileges")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)
