"""How an instance's process ends, and is forgotten: what the manager asks of the keeper, which has the pidfds."""

import logging
import os
import signal
from contextlib import suppress
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.descriptors import close_all
from manager.errors import KeeperError, KeeperRefusedError
from manager.keeper_client import Asks

_log = logging.getLogger("vtpm.instance")
_STRAY_PAUSES: Final = (
    0.2,
    1.0,
    0.0,
)  # seconds; a keeper first deals with what it was asked before, and with its answer
_REAPING: Final = 5.0  # seconds in which a keeper can see the end of a process that has ended
_LOOK_AGAIN: Final = 0.02
LAST_BREATH: Final = 1.0  # seconds between the end of an instance's ring and that of its process


class Endings:
    """Ends instances, named by vTPM and lease."""

    def __init__(self, keeper: Asks) -> None:
        """Ask `keeper`."""
        self._keeper = keeper

    async def fetch(self, vtpm: UUID, lease: int) -> tuple[int, int, int]:
        """Return (page, doorbell, pidfd) of an instance that the keeper has; they are the caller's.

        Raises:
            KeeperError: the keeper does not hand it over.

        """
        reply, received = await self._keeper.ask(k.Fetch(vtpm.bytes, lease))
        expected = 3 + (len(reply.kept.listeners) if isinstance(reply, k.Fetched) else 0)
        if not isinstance(reply, k.Fetched) or len(received) != expected:
            close_all(received)
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Fetch")
        page, doorbell, pidfd = received[:3]
        close_all(received[3:])
        return page, doorbell, pidfd

    async def end(self, vtpm: UUID, lease: int) -> None:
        """End an instance at once, unheard, and have the keeper forget it.

        Raises:
            KeeperError: the keeper does not hand it over.

        """
        pidfd = await self._pidfd(vtpm, lease)
        try:
            _kill(pidfd)
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        await self._forget_ended(vtpm, lease)

    async def end_stray(self, vtpm: UUID, lease: int) -> None:
        """End an instance that may have been made though nobody waited for it any more; there may be none."""
        with trio.CancelScope(shield=True):
            for pause in _STRAY_PAUSES:
                try:
                    await self.end(vtpm, lease)
                except KeeperRefusedError:
                    _log.debug("vTPM %s: no instance was made so far", vtpm)
                except KeeperError as error:
                    _log.warning("vTPM %s: an instance may have been left behind: %s", vtpm, error)
                else:
                    return
                await trio.sleep(pause)

    async def kill(self, vtpm: UUID, lease: int) -> bool:
        """End an instance at once (SIGKILL). Returns True when its process has ended, False when no keeper has it."""
        try:
            pidfd = await self._pidfd(vtpm, lease)
        except KeeperError as error:
            _log.warning("vTPM %s: %s", vtpm, error)
            return False
        try:
            _kill(pidfd)
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        return True

    async def after_hang_up(self, vtpm: UUID, lease: int) -> int | None:
        """Have an instance forgotten that has closed its ring: it has ended, or is made to. Returns its exit status.

        The status is that of os.waitstatus_to_exitcode, None where it is not known.
        """
        try:
            return await self._forget(vtpm, lease)
        except KeeperRefusedError:
            pass  # it lives: it is about to end, or it is not as it should be
        except KeeperError as error:
            _log.warning("vTPM %s: %s", vtpm, error)
            return None
        try:
            await self._ended(vtpm, lease)
        except KeeperError:
            return None  # a keeper that does not know it is a new one: the instance ended with the old one
        return await self._forget_ended(vtpm, lease)

    async def _ended(self, vtpm: UUID, lease: int) -> None:
        """Wait for the end of a process that is about to end; one that lives on is killed. Raises KeeperError."""
        pidfd = await self._pidfd(vtpm, lease)
        try:
            with trio.move_on_after(LAST_BREATH) as waiting:
                await trio.lowlevel.wait_readable(pidfd)
            if waiting.cancelled_caught:
                _log.error("vTPM %s: its instance closed its ring but lives; killing it", vtpm)
                _kill(pidfd)
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    async def park(self, vtpm: UUID, lease: int) -> bool:
        """Have the keeper watch for one that hibernated, once its process has ended; returns False when it cannot."""
        park = k.Park(vtpm.bytes, lease)
        try:
            try:
                reply, _ = await self._keeper.ask(park)
            except KeeperRefusedError:
                await self._ended(vtpm, lease)  # it is about to end
                reply = await self._ask_of_ended(park)
        except KeeperError as error:
            _log.warning("vTPM %s: its sockets are made anew, as its keeper does not have them: %s", vtpm, error)
            return False
        if isinstance(reply, k.Parked):
            _log.debug("vTPM %s: hibernated, with %d connections open", vtpm, reply.connections)
        return isinstance(reply, k.Parked)

    async def forget(self, vtpm: UUID, lease: int) -> int | None:
        """Let the keeper drop what it keeps of an ended instance; returns its exit status where known."""
        try:
            return await self._forget(vtpm, lease)
        except KeeperError as error:
            _log.warning("vTPM %s: %s", vtpm, error)
            return None

    async def _forget_ended(self, vtpm: UUID, lease: int) -> int | None:
        """Do as `forget` for a process that has ended."""
        try:
            reply = await self._ask_of_ended(k.Forget(vtpm.bytes, lease))
        except KeeperError as error:
            _log.warning("vTPM %s: %s", vtpm, error)
            return None
        return reply.status if isinstance(reply, k.Forgotten) else None

    async def _ask_of_ended(self, question: k.Forget | k.Park) -> k.KeeperReply:
        """Ask for what is refused while a process lives: where a debugger holds it, its keeper sees its end later."""
        with trio.move_on_after(_REAPING):
            while True:
                try:
                    return (await self._keeper.ask(question))[0]
                except KeeperRefusedError:
                    await trio.sleep(_LOOK_AGAIN)
        return (await self._keeper.ask(question))[0]

    async def _forget(self, vtpm: UUID, lease: int) -> int | None:
        reply, _ = await self._keeper.ask(k.Forget(vtpm.bytes, lease))
        return reply.status if isinstance(reply, k.Forgotten) else None

    async def _pidfd(self, vtpm: UUID, lease: int) -> int:
        page, doorbell, pidfd = await self.fetch(vtpm, lease)
        close_all((page, doorbell))
        return pidfd


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
