"""The life of one instance: load, start up, serve, stop. Runs in a process of the spawner's, already confined.

What lives here: the order of things and the exit status. What must not: imports that the spawner has not made before
(a late import costs each instance a megabyte, reference/performance.md 2b).
"""

import fcntl
import os
import re
import signal
import socket
from typing import Final

from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import AWAKE, IDLE, RESTORE_REFUSED, InstanceState, Report
from storage.errors import StorageError
from storage.state_image import Emulator
from vtpm_instance.blobs import ManagedBlobs
from vtpm_instance.condition import Condition
from vtpm_instance.errors import (
    CommitUnansweredError,
    ImageBusyError,
    InstanceError,
    ManagerError,
    ManagerGoneError,
    ManagerSilentError,
)
from vtpm_instance.front_ends import RULES, FrontEnd
from vtpm_instance.guest_ring import GuestTerms
from vtpm_instance.handover import Handed, pack
from vtpm_instance.journal import note, speak_as
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.metered import Limits, MeteredVtpm
from vtpm_instance.order import InstanceOrder
from vtpm_instance.quoting import Quoter
from vtpm_instance.rest import take_up
from vtpm_instance.server import Calls, Server
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import Startup
from vtpm_instance.vtpm import Vtpm

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1  # the last state could not be saved; the last acknowledged one counts
EXIT_INTEGRITY: Final = 6  # could not load; nothing was changed (design section 9)
EXIT_BUSY: Final = 8  # the manager did not answer the first Load

_REPORT_TIMEOUT: Final = 5.0  # seconds for a last word to a manager that may be away
_TEXT_LIMIT: Final = 1000  # characters of a report's text; a message has one page

_STATES: Final = {
    Condition.OFF: InstanceState.READY,  # loaded and verified; its guest's machine switches it on
    Condition.RUNNING: InstanceState.READY,
    Condition.FAILED: InstanceState.NEEDS_RESET,
    Condition.STOPPED: InstanceState.STOPPED,
}
# Front ends whose guest has firmware that sends TPM2_Startup after a platform reset.
_FIRMWARE: Final = frozenset({FrontEnd.QEMU})


def reason_of(error: BaseException) -> str:
    """Return an error's class as a word for programs: `NoMatchingSlot` is "no-matching-slot"."""
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    return "-".join(word.lower() for word in words)


def explain(error: BaseException) -> str:
    """Return an error's message together with those of its causes."""
    parts = [str(error)]
    while (cause := error.__cause__) is not None:
        parts.append(str(cause))
        error = cause
    return "; because: ".join(parts)


def report_on(condition: Condition, cause: Exception | None) -> Report:
    """Return the report of a condition."""
    if cause is None:
        return Report(_STATES[condition], quotes=True)
    return Report(_STATES[condition], reason_of(cause), explain(cause)[:_TEXT_LIMIT], quotes=True)


def heed_sigterm() -> None:
    """Have SIGTERM end waits instead of the process; done once in the spawner, inherited by every instance."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)


def _claim_image(order: InstanceOrder) -> None:
    """Hold the lock on the state image: the manager has taken it on this very open file, or nobody has.

    Raises:
        ImageBusyError: another open file has it.

    """
    try:
        fcntl.flock(order.image, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ImageBusyError(order.vtpm) from None


def run(order: InstanceOrder) -> int:
    """Run the instance to its end and return the process's exit status.

    Expected failures are reported to the manager and noted; anything else is raised.
    """
    speak_as(f"vtpm {order.vtpm}")
    wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake)  # `wakeup` becomes readable with SIGTERM, whatever else goes on
    try:
        ring = LocalRing.adopt(order.page, order.doorbell)
        ring.forget_page_descriptor()
        link = ManagerLink(ring)
        link.watch_for_stop(wakeup)
        try:
            return _live(order, link, wakeup)
        finally:
            link.close()
    finally:
        signal.set_wakeup_fd(-1)
        os.close(wake)
        os.close(wakeup)


def _live(order: InstanceOrder, link: ManagerLink, wakeup: int) -> int:
    emulator = the_tpm()
    version = Emulator("libtpms", ".".join(map(str, emulator.version())))
    keeper = StateKeeper(order.vtpm, order.lease, order.image, link, version)
    after_reset = Startup.NONE if order.front_end in _FIRMWARE else Startup.CLEAR
    was = Condition.OFF

    def announce(condition: Condition, cause: Exception | None) -> None:
        nonlocal was
        if cause is not None:
            note(f"{condition.name.lower()}: {explain(cause)}")
        switched_off = (was, condition) == (Condition.RUNNING, Condition.OFF)  # ready as before
        if condition is not Condition.STOPPED and not switched_off:
            link.report(report_on(condition, cause))
        was = condition

    limits = Limits(order.commands_per_second, order.saves_per_second, order.nv_bytes)
    if limits:
        vtpm: Vtpm = MeteredVtpm(emulator, keeper, order.family, after_reset, announce, limits)
    else:
        vtpm = Vtpm(emulator, keeper, order.family, after_reset, announce)
    try:
        _claim_image(order)
        vtpm.start(power=not RULES[order.front_end].powered)
    except (InstanceError, StorageError) as error:
        return _give_up(link, error)
    owners = frozenset({0, order.manager_uid, order.owner_uid})

    def on_asked() -> None:
        report = report_on(vtpm.condition, vtpm.cause)
        idle = server.activity.was_idle() and vtpm.condition is Condition.RUNNING
        link.report(Report(report.state, IDLE, quotes=True) if idle else report)

    quoter = Quoter(vtpm, link, str(version))

    def on_awake(why: str) -> None:
        link.report(Report(_STATES[vtpm.condition], AWAKE, why[:_TEXT_LIMIT], quotes=True))

    def on_refused(why: str) -> None:
        link.report(Report(_STATES[vtpm.condition], RESTORE_REFUSED, why[:_TEXT_LIMIT], quotes=True))

    vtpm.state_blobs = ManagedBlobs(emulator, keeper, link, order.family, on_refused)
    server = Server(vtpm, link, order.front_end, owners, wakeup, Calls(on_asked, on_awake, quoter.serve))
    try:
        _open_ports(server, order)
        take_up(server, order.connections)
        server.run()
        if server.asleep is not None:
            return _sleep(link, server.asleep)
        return _stop(vtpm, link)
    except ManagerGoneError as error:
        note(str(error))
        return EXIT_FAILURE
    finally:
        server.close()


def _open_ports(server: Server, order: InstanceOrder) -> None:
    add = {"data": server.add_data_port, "control": server.add_control_port, "ring": server.add_ring_port}
    for name, descriptor in order.listeners.items():
        if name == "proxy":
            server.add_proxy_port(descriptor)
        elif name == "ring" and order.front_end is FrontEnd.XEN:
            terms = GuestTerms(order.localities, order.maintenance, order.trace)
            server.add_ring_port(socket.socket(fileno=descriptor), terms)
        else:
            add[name](socket.socket(fileno=descriptor))


def _sleep(link: ManagerLink, connections: list[Handed]) -> int:
    """Leave the connections with the keeper; the state is committed, so they are all that could get lost now."""
    if connections:
        try:
            link.hand_over(*pack(connections))
        except OSError as error:
            note(f"{len(connections)} connections of the guest end, as they cannot be handed over: {error}")
    return EXIT_OK


def _give_up(link: ManagerLink, error: Exception) -> int:
    """Report that the vTPM cannot be loaded."""
    note(f"cannot start: {explain(error)}")
    _last_word(link, Report(InstanceState.FAILED, reason_of(error), explain(error)[:_TEXT_LIMIT]))
    return EXIT_BUSY if isinstance(error, ManagerSilentError | ManagerGoneError) else EXIT_INTEGRITY


def _stop(vtpm: Vtpm, link: ManagerLink) -> int:
    try:
        clean = vtpm.stop()
    except (InstanceError, StorageError) as error:
        note(f"the last state could not be saved: {explain(error)}")
        if not isinstance(error, CommitUnansweredError):  # a manager that is away takes no report either
            _last_word(link, report_on(Condition.STOPPED, error))
        return EXIT_FAILURE
    _last_word(link, Report(InstanceState.STOPPED, "clean" if clean else "not-clean"))
    return EXIT_OK


def _last_word(link: ManagerLink, report: Report) -> None:
    try:
        link.ask(report, _REPORT_TIMEOUT)
    except ManagerError as error:
        note(f"nobody takes the last report: {error}")
