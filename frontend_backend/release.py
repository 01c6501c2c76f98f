"""Which release this code is. Running processes of different releases meet after an upgrade in place."""

from typing import Final

RELEASE: Final = "0.3.0"  # as in pyproject.toml, which a running process cannot read
