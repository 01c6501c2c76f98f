"""`vtpm-xen check`: what of Xen, xenstore, the manager and the hardware TPM this domain can reach."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from frontend_backend.messages_admin import ExitCode
from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrantOffers, DeviceGrants
from frontend_backend.xen_kernel import XenDeniedError, XenError, XenMissingError
from frontend_backend.xen_terms import Place
from frontend_backend.xs_trio import Xenstore, XenstoreError, open_xenstore
from manager import hwtpm_tis_probe
from manager.hwtpm_tis_place import DEFAULT_BASE, LOCALITIES, PAGE_BYTES
from manager.xen_backend_bindings import connect, reason

_MEMORY: Final = Path("/dev/mem")
_PROBE_SECONDS: Final = 30.0  # one Python, also in a domain that boots
_ANSWER_SECONDS: Final = 5.0
_PROBE_KEY: Final = "vtpm-xen-check"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `needed`: without it guests are not served; `code` is then the command's exit code."""

    what: str
    ok: bool
    text: str
    needed: bool = True
    code: ExitCode = ExitCode.FAILURE

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "MISSING" if self.needed else "no"
        return f"{self.what:<22} {verdict:<8} {self.text}"

    def describe(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"what": self.what, "ok": self.ok, "text": self.text, "needed": self.needed}


class _Closeable(Protocol):
    def close(self) -> None: ...


async def look_around(manager: Path, xenstore: str | None) -> list[Finding]:
    """Return what was found; `manager` is its socket, `xenstore` a path or None for the usual ones."""
    found = [
        _device("event channels", DeviceEventChannels.open, "guests can be heard"),
        _device("grants", DeviceGrants.open, "guests' pages can be mapped"),
        _device("grant offers", DeviceGrantOffers.open, "an instance domain needs them", needed=False),
    ]
    try:
        async with open_xenstore(xenstore) as xs:
            found += await _xenstore(xs)
    except XenError as error:
        found.append(Finding("xenstore", ok=False, text=str(error), code=_code_of(error)))
    found.append(await _manager(manager))
    found.append(await trio.to_thread.run_sync(_localities))
    return found


def _code_of(error: XenError) -> ExitCode:
    match error:
        case XenMissingError():
            return ExitCode.NOT_FOUND
        case XenDeniedError():
            return ExitCode.DENIED
    return ExitCode.FAILURE


def _device(what: str, opens: Callable[[], _Closeable], text: str, *, needed: bool = True) -> Finding:
    try:
        opens().close()
    except XenError as error:
        return Finding(what, ok=False, text=str(error), needed=needed, code=_code_of(error))
    return Finding(what, ok=True, text=text, needed=needed)


async def _xenstore(xs: Xenstore) -> list[Finding]:
    own = await xs.own_domain()
    root = Place(own, 0, 0).root
    found = [Finding("xenstore", ok=True, text=f"{xs.name}, domain {own}")]
    try:
        # a key that nobody else looks at; a back end that cannot write its state serves nobody
        await xs.write(f"/local/domain/{own}/data/{_PROBE_KEY}", "1")
        await xs.remove(f"/local/domain/{own}/data/{_PROBE_KEY}")
        found.append(Finding("own nodes", ok=True, text=f"/local/domain/{own} may be written"))
    except XenstoreError as error:
        found.append(Finding("own nodes", ok=False, text=str(error), code=ExitCode.DENIED))
    try:
        domains = await xs.list(root) or []
        devices = [f"{domain}/{device}" for domain in domains for device in await xs.list(f"{root}/{domain}") or []]
        text = f"{len(devices)} in {root}" + (f": {' '.join(devices[:20])}" if devices else "")
        found.append(Finding("devices", ok=True, text=text))
    except XenstoreError as error:
        found.append(Finding("devices", ok=False, text=str(error), code=ExitCode.DENIED))
    return [*found, await _names(xs, own)]


async def _names(xs: Xenstore, own: int) -> Finding:
    """Look whether guests' names can be read here, which attachments that name a domain need."""
    if own == 0:
        return Finding("names of domains", ok=True, text="dom0 reads them", needed=False)
    try:
        await xs.list("/local/domain")
    except XenstoreError:
        text = "not to be read here, as in any driver domain: attach with --domain any, or see docs/xen.md"
        return Finding("names of domains", ok=False, text=text, needed=False)
    return Finding("names of domains", ok=True, text="can be listed here", needed=False)


async def _manager(path: Path) -> Finding:
    try:
        with trio.fail_after(_ANSWER_SECONDS):
            (await connect(path)).close()
    except (OSError, trio.TooSlowError) as error:
        text = f"{path}: {reason(error)}; guests wait until it runs"
        return Finding("manager", ok=False, text=text, needed=False)
    return Finding("manager", ok=True, text=f"listens at {path}", needed=False)


def _localities() -> Finding:
    """Try which localities' pages of a TPM may be touched: reading one byte of ACCESS changes nothing."""
    what = "TPM localities"
    try:
        with _MEMORY.open("rb", buffering=0) as memory:
            may = [locality for locality in LOCALITIES if _touches(memory.fileno(), locality)]
    except OSError as error:
        return Finding(what, ok=False, text=f"{_MEMORY}: {error.strerror}", needed=False)
    if not may:
        return Finding(what, ok=False, text="none of the pages at 0xfed40000 may be touched here", needed=False)
    listed = ", ".join(str(locality) for locality in may)
    return Finding(what, ok=True, text=f"the pages of {listed} may be touched here", needed=False)


def _touches(descriptor: int, locality: int) -> bool:
    address = DEFAULT_BASE + locality * PAGE_BYTES
    command = [sys.executable, "-I", "-S", hwtpm_tis_probe.__file__, str(descriptor), str(address)]
    try:
        done = subprocess.run(
            command, pass_fds=(descriptor,), stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=_PROBE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
