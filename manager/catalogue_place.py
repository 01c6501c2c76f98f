"""Where an installation's catalogue lies: a SQLite file in the state directory, or a PostgreSQL database."""

from dataclasses import replace

from manager.config import Config, Layout
from manager.errors import UsageError
from storage.catalogue import Place, shown, without_secrets
from storage.errors import BadCatalogueUrl


def catalogue_place(layout: Layout, url: str) -> Place:
    """Return where the catalogue lies: the database of `url`, or the file where that is empty.

    Raises:
        UsageError: it is no URL of a database that can hold a catalogue.

    """
    if not url:
        return layout.catalogue
    try:
        without_secrets(url)
    except BadCatalogueUrl as error:
        raise UsageError(str(error)) from error
    return url


def place_of(layout: Layout, config: Config) -> Place:
    """Return where the catalogue of a configuration lies. Raises UsageError."""
    return catalogue_place(layout, config.catalogue.url)


def shown_place(layout: Layout, config: Config) -> str:
    """Return it as a message or document names it, without a password."""
    return shown(place_of(layout, config))


def without_password(config: Config) -> Config:
    """Return the configuration as a backup has it: a password of the catalogue's database stays here."""
    if not config.catalogue.url:
        return config
    return replace(config, catalogue=replace(config.catalogue, url=without_secrets(config.catalogue.url)))
