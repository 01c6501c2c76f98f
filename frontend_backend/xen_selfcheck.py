"""Tries everything this project needs of Xen within one domain: `python3 -m frontend_backend.xen_selfcheck`.

A domain may grant pages and offer event channels to itself, so one domain is enough to see a page from both ends. Each
line says what was tried and what came; the exit code is 1 where something is not as it must be.
"""

import os
import select
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Final

import trio

from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrantOffers, DeviceGrants
from frontend_backend.xen_hypercalls import Hypervisor
from frontend_backend.xen_kernel import GRANT_PAGE_SIZE, ChannelRefusedError, GrantRefusedError, XenError
from frontend_backend.xs_trio import Transaction, Xenstore, XenstoreError, open_xenstore

_EVENT_SECONDS: Final = 10.0  # microseconds, but for a machine that is emulated
_PAGES: Final = 3
_CHILDREN: Final = 200  # of 20 bytes and more: a directory that needs several messages
_CHILDREN_OF_OTHERS: Final = 60  # xenstored allows domains other than dom0 2 KiB a node
_NOBODY: Final = 0x7FE0  # a domain number no host comes to


class UnexpectedError(XenError):
    """Something was not as it must be."""


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _must(true: bool, what: str) -> None:
    if not true:
        raise UnexpectedError(what)


def _refused(action: Callable[[], object], kind: type[XenError], what: str) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    raise UnexpectedError(f"not refused: {what}")


async def _xenstore(store: Xenstore) -> str:
    """Nodes, permissions, a transaction that another change disturbs, watches."""
    own = await store.own_domain()
    place = f"/local/domain/{own}/data/vtpm-selfcheck-{os.getpid()}"
    runs = 0

    async def count(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        value = int(await store.read(f"{place}/count", tx) or b"0")
        if runs == 1:
            await store.write(f"{place}/count", "41")
        await store.write(f"{place}/count", str(value + 1), tx)

    try:
        watch = await store.watch(place)
        with trio.fail_after(_EVENT_SECONDS):
            _must(await anext(watch) == place, "a watch's first event is the watched path")
            await store.write(f"{place}/value", b"\0raw\xff")
            _must(await anext(watch) == f"{place}/value", "a watch tells what changed")
        _must(await store.read(f"{place}/value") == b"\0raw\xff", "what is written is read")
        await store.transaction(count)
        _must(await store.read(f"{place}/count") == b"42", "a disturbed transaction is run again")
        children = _CHILDREN if own == 0 else _CHILDREN_OF_OTHERS
        for number in range(children):
            await store.write(f"{place}/many/{'n' * 20}{number}", "")
        names = await store.list(f"{place}/many")
        _must(names is not None and len(set(names)) == children, "a directory is listed whole")
        owner = (await store.permissions(place) or ())[0].domain
        await watch.aclose()
    finally:
        await store.remove(place)
    _must(await store.read(place) is None, "what is removed is gone")
    try:
        _must(await store.is_introduced(own) and not await store.is_introduced(_NOBODY), "who is there is known")
    except XenstoreError as error:
        _must(own != 0 and error.name == "EACCES", "only dom0 is told who is there")
    return f"{store.name}: domain {own}, {place} was domain {owner}'s, {runs} runs of a transaction"


def _next(channels: DeviceEventChannels) -> list[int]:
    select.select([channels], [], [], _EVENT_SECONDS)
    return channels.pending()


def _event_channels(own: int) -> str:
    """Both ends of a channel, masked ports, ports that are not ours."""
    with closing(DeviceEventChannels.open()) as ours, closing(DeviceEventChannels.open()) as theirs:
        offered = ours.bind_unbound(own)
        _must(ours.pending() == [], "nothing is pending before anybody bound")
        bound = theirs.bind_interdomain(own, offered)
        _must(_next(theirs) == [bound], "a channel is pending as soon as it is bound")
        theirs.unmask(bound)
        for _ in range(3):
            theirs.notify(bound)
        _must(_next(ours) == [offered], "events reach the other end")
        theirs.notify(bound)
        _must(ours.pending() == [], "a port that was read stays silent until it is unmasked")
        ours.unmask(offered)
        _must(_next(ours) == [offered], "unmasking shows what came meanwhile")
        _refused(lambda: theirs.bind_interdomain(own, offered), ChannelRefusedError, "a channel bound twice")
        _refused(lambda: ours.notify(bound), ChannelRefusedError, "another device's port")
        theirs.close()
        ours.notify(offered)  # to nobody: no error, no event
        with closing(DeviceEventChannels.open()) as again:
            _must(again.bind_interdomain(own, offered) > 0, "an end that was closed can be bound again")
        ours.unbind(offered)
        ours.unbind(offered)
        why = _refused(lambda: ours.bind_interdomain(_NOBODY, 1), ChannelRefusedError, "a channel of nobody's")
    return f"ports {offered} and {bound}; {why}"


def _grants(own: int) -> str:
    """Pages seen from both ends, in order; what is not granted; what is left behind."""
    with closing(DeviceGrantOffers.open()) as offers, closing(DeviceGrants.open()) as grants:
        offered = offers.offer(own, _PAGES)
        _must(len(offered.page) == _PAGES * GRANT_PAGE_SIZE and not any(offered.page), "new pages hold zeros")
        mapped = grants.map(own, offered.references)
        view = mapped.page[GRANT_PAGE_SIZE : GRANT_PAGE_SIZE + 8]
        offered.page[GRANT_PAGE_SIZE : GRANT_PAGE_SIZE + 8] = b"from us."
        _must(bytes(view) == b"from us.", "what one end writes the other reads")
        mapped.page[-4:] = b"back"
        _must(bytes(offered.page[-4:]) == b"back", "the other way too")
        turned = grants.map(own, offered.references[::-1])
        _must(bytes(turned.page[GRANT_PAGE_SIZE - 4 : GRANT_PAGE_SIZE]) == b"back", "pages come in the order asked for")
        turned.unmap()
        mapped.unmap()
        mapped.unmap()
        _must(bytes(view) == bytes(8), "a forgotten view of what was unmapped reads zeros")
        view[:4] = b"lost"
        _must(bytes(offered.page[GRANT_PAGE_SIZE : GRANT_PAGE_SIZE + 8]) == b"from us.", "and writes to nobody")
        one = offered.references[0]
        why = _refused(lambda: grants.map(own, (one, one + 100_000)), GrantRefusedError, "a page that is not granted")
        _refused(lambda: grants.map(_NOBODY, (one,)), GrantRefusedError, "a page of nobody's")
        last = grants.map(own, offered.references)
        offered.withdraw()
        offered.withdraw()
        _must(bytes(last.page[-4:]) == b"back", "a page that was withdrawn lives until it is unmapped")
        grants.close()
        _refused(lambda: offers.offer(own, 0), GrantRefusedError, "no pages")
        for _ in range(50):  # more than the limit of 1,024 pages, if they were not given back
            offers.offer(own, 32).withdraw()
    return f"{_PAGES} pages, references {offered.references}; {why}"


def _hypervisor(own: int) -> str:
    """Ask Xen about this domain, where it answers."""
    hypervisor = Hypervisor.open_if_allowed()
    if hypervisor is None:
        return "not available in this domain: what Xen knows of others stays unknown"
    with closing(hypervisor):
        info = hypervisor.info(own)
        if info is None:
            raise UnexpectedError("Xen does not know this domain")
        _must(info.has_run and not info.dying and info.shutdown_code is None, "this domain runs")
        _must(hypervisor.info(_NOBODY) is None, "a domain that is not there is unknown")
        label = hypervisor.label(info.ssidref)
        return f"{info}; label: {label or 'none, Xen runs without XSM'}"


async def check() -> int:
    """Run all of it; returns the exit code."""
    own, failed = 0, 0
    try:
        async with open_xenstore() as store:
            own = await store.own_domain()
            _say(f"ok   xenstore: {await _xenstore(store)}")
            bad = f"/local/domain/{own}/a b"
            try:
                await store.write(bad, "")
            except XenstoreError as error:
                _say(f"ok   xenstore: {error}")
    except XenError as error:
        _say(f"FAIL xenstore: {error}")
        failed = 1
    for name, part in (("event channels", _event_channels), ("grants", _grants), ("hypervisor", _hypervisor)):
        try:
            _say(f"ok   {name}: {part(own)}")
        except XenError as error:
            _say(f"FAIL {name}: {error}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(trio.run(check))
