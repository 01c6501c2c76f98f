"""Puts a restored catalogue where the configuration says: it stays a file, or goes into a PostgreSQL database."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from manager import restoring
from manager.backup import CATALOGUE, CONFIG
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import ConflictError, ManagerError
from manager.provision import write_config
from storage.catalogue import Catalogue
from storage.errors import CatalogueError, NameTaken

FILE: Final = "file"


@contextmanager
def catalogue_in_place(state_dir: Path, wanted: str | None) -> Iterator[None]:
    """Put the unpacked catalogue in place for the block that ends the restore; take it away again if that fails.

    `wanted`: URL of a database, FILE, or None for what the backup's configuration says.

    Raises:
        ConflictError: the database has a catalogue. UsageError: no URL. ManagerError: the database does not take it.

    """
    config = Config.load(state_dir / CONFIG)
    if wanted is not None:
        config = replace(config, catalogue=replace(config.catalogue, url="" if wanted == FILE else wanted))
    place = place_of(Layout(state_dir, state_dir), config)
    if wanted is not None:
        write_config(state_dir / CONFIG, config)
    if isinstance(place, Path):
        yield
        return
    try:
        Catalogue.load(place, state_dir / CATALOGUE)
    except NameTaken as error:
        raise ConflictError(
            f"{error}, and a restore replaces nothing. Nothing was changed: name an empty database with "
            f"--catalogue, or '--catalogue {FILE}'"
        ) from error
    except CatalogueError as error:
        raise ManagerError(f"not restored: {error}") from error
    try:
        (state_dir / CATALOGUE).unlink()
        yield
    except BaseException:
        if restoring.is_unfinished(state_dir):  # else all of it is in place, only not yet known to be durable
            Catalogue.drop(place)
        raise
