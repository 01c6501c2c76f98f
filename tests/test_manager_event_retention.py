"""How long events are kept, by the configuration."""

from pathlib import Path

import pytest

from manager.config import CatalogueConfig
from manager.event_retention import prune
from storage.catalogue import Catalogue


@pytest.mark.parametrize("config", [CatalogueConfig(events_days=800_000), CatalogueConfig(events_days=10**12)])
async def test_more_days_than_there_are_mean_for_ever(tmp_path: Path, config: CatalogueConfig) -> None:
    with Catalogue.create(tmp_path / "catalogue.sqlite", bytes(32)) as catalogue:
        catalogue.log("tick", None, "kept")
        assert await prune(catalogue, config) == 0
        assert [event.text for event in catalogue.events()] == ["kept"]


async def test_more_events_than_there_can_be_mean_all(tmp_path: Path) -> None:
    with Catalogue.create(tmp_path / "catalogue.sqlite", bytes(32)) as catalogue:
        catalogue.log("tick", None, "kept")
        assert await prune(catalogue, CatalogueConfig(events_kept=2**70)) == 0
        assert await prune(catalogue, CatalogueConfig(events_kept=1)) == 0
        catalogue.log("tick", None, "newer")
        assert await prune(catalogue, CatalogueConfig(events_kept=1)) == 1
        assert [event.text for event in catalogue.events()] == ["newer"]
