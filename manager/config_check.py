"""What the configuration's words must be able to mean on this machine; asked before anything is opened or started."""

from collections.abc import Callable, Iterator

from manager.admin_server import access_of
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import ConfigurationError, ManagerError, UsageError
from manager.migration_wire import parse_address


def problems(layout: Layout, config: Config) -> Iterator[tuple[str, ManagerError]]:
    """Yield what each setting that cannot be used is called, and why."""

    def listening() -> None:
        if config.migration.listen:
            parse_address(config.migration.listen)

    checks: dict[str, Callable[[], object]] = {
        "[admin]": lambda: access_of(config.admin),
        "[migration] listen": listening,
        "[catalogue] url": lambda: place_of(layout, config),
    }
    for what, check in checks.items():
        try:
            check()
        except (UsageError, ConfigurationError) as error:
            yield what, error


def refuse_unusable(layout: Layout, config: Config) -> None:
    """Raise the first of `problems` as a ConfigurationError that names the setting; nothing was started then."""
    for what, error in problems(layout, config):
        text = str(error) if str(error).startswith("[") else f"{what}: {error}"
        raise ConfigurationError(f"{text}; nothing was started") from error
