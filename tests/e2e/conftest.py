"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator

import pytest
from e2e_rig import Installation, installation


@pytest.fixture
def vtpms() -> Iterator[Installation]:
    """A running installation on an embedded TPM."""
    with installation() as made:
        made.init()
        made.start()
        yield made


@pytest.fixture
def bare() -> Iterator[Installation]:
    """An installation that nobody initialised."""
    with installation() as made:
        yield made
