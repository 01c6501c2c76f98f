"""Which hierarchy passwords an installation sets and keeps, and how they survive an `init` that is cut anywhere.

Whoever owns the owner hierarchy can take the anchor's index away, and whoever has an empty lockout password at hand
can clear the TPM: neither tells a secret, both stop the manager. So `init --set-hierarchy-auth` sets all three. They
are durable in the escrow before the first is set. What a running manager needs (owner, endorsement) is sealed with
the platform secret as well; the lockout password is in the escrow only, and is set last, when the store is in place.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from manager import escrow
from manager.errors import DeniedError, IntegrityError, UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.hwtpm import HardwareTpm
from manager.hwtpm_hierarchies import MAX_AUTH_BYTES, Hierarchy, without_tail
from manager.hwtpm_records import TpmProperties
from manager.keys import PlatformSecret
from manager.recovery_key import RecoveryPrivate, RecoveryPublic
from storage.secrets import Secret

_FIELD: Final = 1 + MAX_AUTH_BYTES  # length, password, zeros
_ORDER: Final = (Hierarchy.OWNER, Hierarchy.ENDORSEMENT, Hierarchy.LOCKOUT)


class HierarchyAuths(Secret):
    """The three passwords, as the escrow holds them: each a length and 32 bytes."""

    size = _FIELD * len(_ORDER)
    __slots__ = ()

    @classmethod
    def of(cls, auths: Mapping[Hierarchy, bytes]) -> "HierarchyAuths":
        """Pack passwords; one that is missing is empty."""
        found = [auths.get(name, b"") for name in _ORDER]
        return cls(b"".join(bytes([len(auth)]) + auth.ljust(MAX_AUTH_BYTES, b"\0") for auth in found))

    def auth(self, hierarchy: Hierarchy) -> bytes:
        """Return one password; empty: none is kept. Raises IntegrityError for an impossible length."""
        packed = self.view[_ORDER.index(hierarchy) * _FIELD :][:_FIELD]
        if packed[0] > MAX_AUTH_BYTES:
            raise IntegrityError("the escrow of the hierarchy passwords cannot be read. Nothing was changed")
        return bytes(packed[1 : 1 + packed[0]])


@dataclass(frozen=True, slots=True)
class Plan:
    """What `init` does with the passwords. `given` are there already; `made` are ours to set."""

    given: Mapping[Hierarchy, bytes] = field(default_factory=dict, repr=False)
    made: Mapping[Hierarchy, bytes] = field(default_factory=dict, repr=False)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to keep."""
        return not self.given and not self.made

    @property
    def before_finish(self) -> Mapping[Hierarchy, bytes]:
        """Those that an `init` which is cut short can take away again, since it can unseal them."""
        return {name: auth for name, auth in self.made.items() if name is not Hierarchy.LOCKOUT}

    def kept(self, recovery: RecoveryPublic, store: UUID) -> bytes:
        """Return what the boot area keeps: which passwords we make (a byte in clear), then the escrow of all."""
        if self.empty:
            return b""
        flags = sum(1 << _ORDER.index(name) for name in self.made)
        auths = HierarchyAuths.of({**self.given, **self.made})
        return bytes([flags]) + escrow.wrap(auths.reveal(), recovery, _place(store))

    def with_auths(self, secret: PlatformSecret) -> PlatformSecret:
        """Return the platform secret with what a running manager needs of the passwords."""
        if self.empty:
            return secret
        auths = {**self.given, **self.made}
        return secret.with_auths(auths.get(Hierarchy.OWNER, b""), auths.get(Hierarchy.ENDORSEMENT, b""))


def plan(properties: TpmProperties, given: Mapping[Hierarchy, bytes], *, set_empty: bool, recovery: bool) -> Plan:
    """Decide what to do with the hierarchies of this TPM.

    Raises:
        DeniedError: one has a password that was not given. UsageError: there is no recovery key to keep them for.

    """
    if (given or set_empty) and not recovery:
        raise UsageError(
            "hierarchy passwords are kept in the escrow, which takes a recovery key: give --recovery PUB.pem. Nothing "
            "was changed"
        )
    present = {
        Hierarchy.OWNER: properties.owner_auth_set,
        Hierarchy.ENDORSEMENT: properties.endorsement_auth_set,
        Hierarchy.LOCKOUT: properties.lockout_auth_set,
    }
    for name, is_set in present.items():
        if is_set and name not in given and (set_empty or name is Hierarchy.OWNER):
            raise DeniedError(
                f"the hardware TPM's {name} hierarchy has a password already: give it with --{name}-auth-file FILE, or "
                f"take it away with 'tpm2_changeauth -c {name[0]} -p PASSWORD'. Nothing was changed"
            )
        if name in given and not is_set:
            raise UsageError(
                f"the hardware TPM's {name} hierarchy has no password, and --{name}-auth-file gives one: do without "
                "it. Nothing was changed"
            )
    made = {name: os.urandom(MAX_AUTH_BYTES) for name, is_set in present.items() if set_empty and not is_set}
    return Plan(dict(given), {name: without_tail(auth) for name, auth in made.items()})


def read_auth(path: str) -> bytes:
    """Return a password from a file: all its bytes but one line end. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            auth = file.read(MAX_AUTH_BYTES + 2)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Nothing was changed") from error
    auth = without_tail(auth.removesuffix(b"\n"))
    if not 1 <= len(auth) <= MAX_AUTH_BYTES:
        raise UsageError(f"{path} does not hold a password of 1 to {MAX_AUTH_BYTES} bytes. Nothing was changed")
    return auth


def use(tpm: HardwareTpm, secret: PlatformSecret) -> None:
    """Use the sealed passwords where this TPM has one, and none where it has none.

    It may have been cleared since, or, where `init` was given them, its owner took his away.
    """
    if not secret.owner_auth and not secret.endorsement_auth:
        return
    found = tpm.properties()
    tpm.use_hierarchy_auths(
        secret.owner_auth if found.owner_auth_set else b"",
        secret.endorsement_auth if found.endorsement_auth_set else b"",
    )


def prove(tpm: HardwareTpm, given: Mapping[Hierarchy, bytes]) -> None:
    """Try out the endorsement password that `init` was given: only a quote would use it, much later.

    It is changed to itself. The owner's is used by `init` as it is, and a wrong lockout password would lock.

    Raises:
        HierarchyAuthRefused: it is another one.

    """
    if auth := given.get(Hierarchy.ENDORSEMENT):
        tpm.change_hierarchy_auth(Hierarchy.ENDORSEMENT, auth, auth)


def set_made(tpm: HardwareTpm, auths: Mapping[Hierarchy, bytes]) -> list[Hierarchy]:
    """Set those of these passwords whose hierarchy has none; returns which. Lockout comes last."""
    found = tpm.properties()
    present = {
        Hierarchy.OWNER: found.owner_auth_set,
        Hierarchy.ENDORSEMENT: found.endorsement_auth_set,
        Hierarchy.LOCKOUT: found.lockout_auth_set,
    }
    changed = [name for name in _ORDER if auths.get(name) and not present[name]]
    for name in changed:
        tpm.change_hierarchy_auth(name, b"", auths[name])
    return changed


def set_again(tpm: HardwareTpm, kept: bytes, key: RecoveryPrivate, store: UUID) -> None:
    """Set what `init` made, after a recovery on a TPM whose hierarchies have no password; nothing without any kept."""
    if made := made_of(kept):
        auths = open_escrow(kept, key, store)
        set_made(tpm, {name: auths[name] for name in made})


def take_back(tpm: HardwareTpm, kept: bytes, secret: PlatformSecret) -> None:
    """Take away what an `init` that was cut short has set; `secret` opened its unfinished store."""
    made, found = made_of(kept), tpm.properties()
    for name, auth, is_set in (
        (Hierarchy.ENDORSEMENT, secret.endorsement_auth, found.endorsement_auth_set),
        (Hierarchy.OWNER, secret.owner_auth, found.owner_auth_set),
    ):
        if name in made and is_set:
            tpm.change_hierarchy_auth(name, auth, b"")


def any_of_ours_set(tpm: HardwareTpm, kept: bytes) -> bool:
    """Tell whether a hierarchy that an unfinished store made a password for has one."""
    made, found = made_of(kept), tpm.properties()
    return (Hierarchy.OWNER in made and found.owner_auth_set) or (
        Hierarchy.ENDORSEMENT in made and found.endorsement_auth_set
    )


def made_of(kept: bytes) -> tuple[Hierarchy, ...]:
    """Return whose passwords we made, by the boot area."""
    return tuple(name for index, name in enumerate(_ORDER) if kept and kept[0] >> index & 1)


def open_escrow(kept: bytes, key: RecoveryPrivate, store: UUID) -> dict[Hierarchy, bytes]:
    """Return the passwords that are kept. Raises UsageError where none are, EscrowError."""
    if not kept:
        raise UsageError(
            "this installation keeps no hierarchy passwords: it was made without --set-hierarchy-auth. Nothing was done"
        )
    auths = HierarchyAuths(escrow.unwrap(kept[1:], key, _place(store)))
    return {name: auth for name in _ORDER if (auth := auths.auth(name))}


def _place(store: UUID) -> EscrowPlace:
    return EscrowPlace(store, EscrowPurpose.HIERARCHIES)
