"""A restore into PostgreSQL that fails at its last step: database and state directory are both there, or neither."""

from pathlib import Path

import pytest
from postgresql_rig import server

from manager import restoring
from manager.durable import sync_directory
from manager.restore_catalogue import catalogue_in_place
from storage.catalogue import Catalogue

KEY = bytes(32)


@pytest.mark.parametrize("at", [1, 2], ids=["before-the-rename", "after-it"])
def test_the_database_is_emptied_only_if_the_store_is_not_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls = 0

    def failing(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(5, "Input/output error")
        sync_directory(path)

    with Catalogue.create(tmp_path / "catalogue.sqlite", KEY) as catalogue:
        catalogue.log("tick", None, "kept")
    with server() as database:
        url = database.new_database()
        (tmp_path / "config.toml").write_text(f'[catalogue]\nurl = "{url}"\n')
        (tmp_path / restoring.UNFINISHED).write_bytes(b"")
        monkeypatch.setattr(restoring, "sync_directory", failing)
        with pytest.raises(OSError, match="Input/output"), catalogue_in_place(tmp_path, None):
            restoring.finish(tmp_path)
        assert restoring.is_unfinished(tmp_path) == (at == 1)
        if at == 1:
            assert Catalogue.whose(url) is None
            Catalogue.create(url, KEY).close()  # nothing is in its way
            return
        with Catalogue.open(url, KEY) as catalogue:
            assert [event.text for event in catalogue.events()] == ["kept"]
