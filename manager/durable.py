"""What makes file names survive a power cut."""

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (fsync(2): a file's own flush does not cover its name)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
