"""Who may reach which vTPMs through a relay: a file of the far side's, in TOML.

A table [[client]] for each: `name` (for the log); `certificate` (a PEM file beside this one; over TCP and vsock) or
`uid` (over a Unix socket); `vtpms`, a list of shell patterns of vTPMs' names. docs/relay.md has an example.
"""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Self

from manager.errors import ConfigurationError
from manager.relay_tls import fingerprint, read_certificate

_KEYS: Final = {"name", "certificate", "uid", "vtpms"}


@dataclass(frozen=True, slots=True)
class Client:
    """One client: known by its certificate or by its user id, never by what it says."""

    name: str
    vtpms: tuple[str, ...]
    certificate: bytes | None = None  # DER
    uid: int | None = None

    def may_reach(self, vtpm: str) -> bool:
        """Tell whether it may use the vTPM of this name."""
        return any(fnmatchcase(vtpm, pattern) for pattern in self.vtpms)


@dataclass(frozen=True, slots=True)
class Access:
    """All clients."""

    clients: tuple[Client, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            ConfigurationError: it cannot be read, says something unknown, or names a client twice.

        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} is not TOML: {error}") from error
        entries = document.pop("client", [])
        if document or not isinstance(entries, list) or not entries:
            raise ConfigurationError(f"{path} has [[client]] tables and nothing else; at least one")
        clients = tuple(_client(path, entry) for entry in entries)
        for known in ([c.certificate for c in clients if c.certificate], [c.uid for c in clients if c.uid is not None]):
            if len(set(known)) != len(known):
                raise ConfigurationError(f"{path} names the same certificate or user twice")
        return cls(clients)

    @property
    def certificates(self) -> list[bytes]:
        """The pinned certificates, DER."""
        return [client.certificate for client in self.clients if client.certificate is not None]

    def by_identity(self, identity: str) -> Client | None:
        """Return the client that `Welcomer` knew by this: "uid N", or a certificate's fingerprint."""
        kind, _, number = identity.partition(" ")
        return self.by_uid(int(number)) if kind == "uid" else self.by_certificate(identity)

    def by_certificate(self, seen: str) -> Client | None:
        """Return the client with the certificate of this fingerprint."""
        return next((c for c in self.clients if c.certificate and fingerprint(c.certificate) == seen), None)

    def by_uid(self, uid: int) -> Client | None:
        """Return the client that this user is."""
        return next((client for client in self.clients if client.uid == uid), None)


def _client(path: Path, entry: Any) -> Client:
    if not isinstance(entry, dict) or not _KEYS.issuperset(entry):
        raise ConfigurationError(f"{path}: a client has {', '.join(sorted(_KEYS))} and nothing else")
    name, vtpms, uid, certificate = (entry.get(key) for key in ("name", "vtpms", "uid", "certificate"))
    if not isinstance(name, str) or not name.isprintable():
        raise ConfigurationError(f"{path}: a client needs a name")
    if not isinstance(vtpms, list) or not all(isinstance(pattern, str) for pattern in vtpms):
        raise ConfigurationError(f"{path}: vtpms of client {name} is a list of patterns of names")
    if (uid is None) == (certificate is None):
        raise ConfigurationError(f"{path}: client {name} is known by its certificate or by its uid: one of the two")
    if uid is not None:
        if isinstance(uid, bool) or not isinstance(uid, int) or uid < 0:
            raise ConfigurationError(f"{path}: uid of client {name} is the number of a user")
        return Client(name, tuple(vtpms), uid=uid)
    if not isinstance(certificate, str):
        raise ConfigurationError(f"{path}: certificate of client {name} is the name of a file")
    return Client(name, tuple(vtpms), certificate=read_certificate(path.parent / certificate))
