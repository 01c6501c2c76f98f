"""Who a Xen domain is, as the toolstack wrote it to xenstore: name, UUID, what it was booted with.

Nothing is read from a node that the domain itself could have written: each node's owner and permissions are looked at
first. Where this domain may not read (a driver domain, as a rule), the answer is "" and the manager decides.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from frontend_backend.xs_trio import Permission, Xenstore, XenstoreError

_log = logging.getLogger("vtpm.xen")
_VM: Final = re.compile(r"/vm/([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})(?:-[0-9]+)?")
MOST_TEXT: Final = 4096  # bytes; no value of xenstore is longer (XENSTORE_PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Identity:
    """A domain, "" for what is not known. `uuid` in lower case with hyphens."""

    name: str = ""
    uuid: str = ""
    kernel: str = ""
    cmdline: str = ""
    initrd: str = ""


def may_write(permissions: Iterable[Permission], domain: int) -> bool:
    """Tell whether `domain` may write a node: its owner may; what the first entry allows, it allows to all others."""
    entries = list(permissions)
    if not entries or entries[0].domain == domain:
        return True
    named = [entry for entry in entries[1:] if entry.domain == domain]
    return any(entry.write for entry in named) if named else entries[0].write


async def identify(xs: Xenstore, domain: int) -> Identity:
    """Read who `domain` is.

    Raises:
        XenstoreGoneError: xenstored is gone.

    """
    name = await _read(xs, f"/local/domain/{domain}/name", domain)
    vm = _VM.fullmatch(await _read(xs, f"/local/domain/{domain}/vm", domain))
    if vm is None:
        return Identity(name)
    image = f"{vm.group(0)}/image"
    return Identity(
        name,
        vm.group(1).lower(),
        await _read(xs, f"{image}/kernel", domain),
        await _read(xs, f"{image}/cmdline", domain),
        await _read(xs, f"{image}/ramdisk", domain),
    )


async def _read(xs: Xenstore, path: str, domain: int) -> str:
    try:
        permissions = await xs.permissions(path)
        if permissions is None:
            return ""
        if may_write(permissions, domain):
            _log.error("%s may be written by the domain itself: not believed", path)
            return ""
        value = await xs.read(path)
    except XenstoreError as error:
        if error.name != "EACCES":
            _log.warning("%s", error)
        return ""
    try:
        return "" if value is None else value[:MOST_TEXT].decode()
    except UnicodeDecodeError:
        return ""
