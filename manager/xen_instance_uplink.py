"""The way from an instance in a domain of its own to its manager, which is behind a Xen ring and may come and go."""

import logging
from dataclasses import replace
from typing import Final

import trio

from frontend_backend import messages_instance as m
from frontend_backend.errors import MessageError, PageError, RingCancelledError, RingClosedError
from frontend_backend.orders import Orders
from frontend_backend.xen_front_trio import XenFront
from manager.errors import DeniedError, KeeperError

_log = logging.getLogger("vtpm.xen.instance")
_RETRY: Final = 0.25  # seconds before a request is sent again that was given back
_UNAVAILABLE: Final = 1.0  # seconds before a manager is asked again that could not serve it just now
_FOR_THE_NEXT: Final = Orders.RESET | Orders.QUOTE
_LATER: Final = frozenset({m.RefusalCode.UNAVAILABLE, m.RefusalCode.STORE_FAILED, m.RefusalCode.LIMIT})


class Uplink:
    """Asks the manager. Every request may be sent twice (docs/protocol.md): what nobody answered is sent again."""

    def __init__(self, front: XenFront) -> None:
        """Ask over `front`."""
        self._front = front
        self._malformed = 0
        self._orders = Orders.NONE

    @property
    def connected(self) -> bool:
        """Whether the manager's domain is there."""
        return self._front.connected

    def take_orders(self) -> Orders:
        """Return what came for the instance with the answer to our own Load; a stop comes again by itself."""
        orders, self._orders = self._orders, Orders.NONE
        return orders

    async def ask(self, packet: bytes) -> bytes:
        """Return the manager's answer to an instance's request, however long that takes."""
        while True:
            try:
                return await self._front.transact(packet)
            except RingClosedError:
                _log.info("the manager's end went before it answered; asking the next one")
            except RingCancelledError:
                await trio.sleep(_RETRY)
            except PageError as error:
                self._malformed += 1
                if self._malformed.bit_count() == 1:
                    _log.error("the manager's end of the ring is not in order: %s (time %d)", error, self._malformed)
                await trio.sleep(_UNAVAILABLE)

    async def load(self) -> m.LoadReply:
        """Ask what is known of this domain's vTPM, until the manager says it; the state's key is not for us.

        Raises:
            DeniedError: it refuses for good.
            KeeperError: what it answers makes no sense.

        """
        told = 0
        while True:
            try:
                reply, orders = m.decode_reply(await self.ask(m.encode_request(m.Load())))
            except MessageError as error:
                raise KeeperError(
                    f"the manager's answer to Load cannot be read: {error}; nothing was started"
                ) from error
            self._orders |= orders & _FOR_THE_NEXT
            if isinstance(reply, m.LoadReply):
                return replace(reply, key=b"", digest=b"")
            if not isinstance(reply, m.Refusal):
                raise KeeperError(f"the manager answered Load with {type(reply).__name__}; nothing was started")
            if reply.code not in _LATER:
                raise DeniedError(
                    f"the manager refuses this domain its vTPM ({reply.code.value}: {reply.text}). Nothing was started "
                    "or changed; attach it with 'vtpm-attach ... --frontend xen --instance-domain', then start again"
                )
            told += 1
            if told.bit_count() == 1:
                _log.warning("the manager does not hand the vTPM out yet (%s); asking again", reply.text)
            await trio.sleep(_UNAVAILABLE)
