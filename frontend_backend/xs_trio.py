"""Xenstore for trio tasks, over xenstored's socket or the kernel's /dev/xen/xenbus.

Any task may call any operation at any time. A cancelled operation may or may not have been done; what it would have
left behind (a transaction, a watch) is ended. Once the connection is lost every operation and every watch raises
XenstoreGoneError: connect anew, and look at everything anew.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeAlias, TypeVar

import trio

from frontend_backend.xs_connection_trio import Connection, Watch
from frontend_backend.xs_link_trio import connect, default_path
from frontend_backend.xs_replies import (
    Listing,
    Permission,
    decode_number,
    decode_permissions,
    encode_permissions,
)
from frontend_backend.xs_session import Answer
from frontend_backend.xs_wire import (
    NO_TRANSACTION,
    Message,
    Operation,
    XenstoreError,
    XenstoreGoneError,
    decode_strings,
    encode_path,
    encode_strings,
)

__all__ = ["Permission", "Transaction", "Watch", "Xenstore", "XenstoreError", "XenstoreGoneError", "open_xenstore"]

MAX_TRIES: Final = 100
"""Runs of one transaction. Of those that collide one always gets through, so this is far beyond any crowd of ours."""

ANSWER_SECONDS: Final = 60.0
"""How long the first answer is waited for: also a machine that boots has one then, and systemd waits 90 s for us."""

MAX_TRANSACTIONS: Final = 4
"""Transactions of one connection at once: xenstored allows a domain 10 (quota-transaction), its kernel's included."""

MAX_PARTS: Final = 1000
"""Parts of one large directory, those read again after a change included."""

T = TypeVar("T")
Names: TypeAlias = list[str]


class Transaction:
    """A handle given to the body of `Xenstore.transaction`: pass it as `tx`. Void once the body has ended."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._ended = False

    @property
    def number(self) -> int:
        """Its number on the wire.

        Raises:
            RuntimeError: it has ended; xenstored would answer as if nothing existed.

        """
        if self._ended:
            raise RuntimeError("a xenstore transaction is used after its end")
        return self._number

    def end(self) -> None:
        """Make it void."""
        self._ended = True


class Xenstore:
    """One connection; see the module."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._transactions = trio.Semaphore(MAX_TRANSACTIONS)

    @property
    def name(self) -> str:
        """The socket or device this is connected to."""
        return self._connection.link.name

    async def read(self, path: str, tx: Transaction | None = None) -> bytes | None:
        """Return the node's value, or None where there is no such node."""
        return await self._look(Operation.READ, path, tx)

    async def write(self, path: str, value: bytes | str, tx: Transaction | None = None) -> None:
        """Write the node; it and its parents are made as needed.

        Raises:
            XenstoreError: EACCES, ENOSPC; E2BIG: path and value are together longer than 4095 bytes (4079 through
                the kernel's device).

        """
        raw = value.encode() if isinstance(value, str) else bytes(value)
        await self._do(Operation.WRITE, path, raw, tx)

    async def list(self, path: str, tx: Transaction | None = None) -> Names | None:
        """Return the names of the node's children, or None where there is no such node."""
        try:
            payload = await self._look(Operation.DIRECTORY, path, tx)
        except XenstoreError as error:
            if error.name != "E2BIG":
                raise
            return await self._list_in_parts(path, tx)
        return None if payload is None else decode_strings(payload)

    async def remove(self, path: str, tx: Transaction | None = None) -> None:
        """Remove the node and everything below it; none there is no error."""
        await self._look(Operation.RM, path, tx)

    async def make(self, path: str, tx: Transaction | None = None) -> None:
        """Make an empty node, and its parents, if there is none."""
        await self._do(Operation.MKDIR, path, b"", tx)

    async def permissions(self, path: str, tx: Transaction | None = None) -> tuple[Permission, ...] | None:
        """Return the node's permissions, the owner's first, or None where there is no such node."""
        payload = await self._look(Operation.GET_PERMS, path, tx)
        return None if payload is None else decode_permissions(payload)

    async def set_permissions(
        self, path: str, permissions: Sequence[Permission], tx: Transaction | None = None
    ) -> None:
        """Replace the node's permissions; the first one names the owner and what all the others may do."""
        await self._do(Operation.SET_PERMS, path, encode_permissions(permissions), tx)

    async def own_domain(self) -> int:
        """Return the number of the domain this runs in.

        Who begins asks this first: so it does not wait for ever for a xenstore that takes connections and does not
        answer.

        Raises:
            XenstoreGoneError: it gave no answer within ANSWER_SECONDS.

        """
        with trio.move_on_after(ANSWER_SECONDS) as limit:
            value = await self.read("domid")
        if limit.cancelled_caught:
            raise XenstoreGoneError(
                f"xenstore at {self.name} takes connections, but gave no answer within {ANSWER_SECONDS:g} s. Nothing "
                f"was served: look whether xenstored runs"
            )
        if value is None:
            if not self._connection.link.refuses_single_requests:
                return 0  # before xen-init-dom0 wrote it; xenstored takes its socket's users for domain 0
            raise XenstoreError("ENOENT", "read", "domid")
        return decode_number(value.rstrip(b"\0") + b"\0")

    async def is_introduced(self, domain: int) -> bool:
        """Return whether xenstored serves the domain: the toolstack introduced it, and it is not destroyed.

        Raises:
            XenstoreError: EACCES, xenstored tells this to dom0 only.

        """
        payload = await self._connection.ask(
            Operation.IS_DOMAIN_INTRODUCED, encode_strings(str(domain)), f"domain {domain}"
        )
        return payload.startswith(b"T")

    async def watch(self, path: str) -> Watch:
        """Watch the node and everything below it, whether or not it exists.

        Raises:
            XenstoreError: ENOSPC: this domain's quota of watches (128 by default) is used up; EINVAL.

        """
        where = encode_path(path)
        watch = Watch(path, self._unwatch)
        watch.token = self._connection.session.open_watch(watch)
        try:
            await self._connection.ask(Operation.WATCH, where + encode_strings(watch.token), path)
        except XenstoreError:
            self._connection.session.close_watch(watch.token)
            raise
        except BaseException:
            await watch.aclose()  # cancelled: the request may be on its way; the order of both is kept
            raise
        return watch

    async def transaction(self, body: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `body` in a transaction and commit; run it again where another change came between. Do not nest.

        Any other end of `body` aborts the transaction: an exception, or a cancellation. A cancellation while the
        commit is on its way leaves open whether it was done.

        Raises:
            XenstoreError: EAGAIN, another change came between MAX_TRIES times.

        """
        for _ in range(MAX_TRIES):
            async with self._transactions:  # anew for each run: one that never gets through holds nobody up
                tx = await self._begin()
                try:
                    result = await body(tx)
                except XenstoreError as error:
                    self._abort(tx)
                    if error.name != "EAGAIN":
                        raise
                    continue
                except BaseException:
                    self._abort(tx)
                    raise
                if await self._commit(tx):
                    return result
        raise XenstoreError("EAGAIN", f"commit, {MAX_TRIES} times over,", "a transaction")

    async def _begin(self) -> Transaction:
        def late(answer: Answer) -> None:  # the caller gave up, and xenstored began it: end it
            if isinstance(answer, Message) and answer.operation == Operation.TRANSACTION_START:
                self._abort(Transaction(decode_number(answer.payload)))

        payload = await self._connection.ask(Operation.TRANSACTION_START, b"\0", "a transaction", late=late)
        return Transaction(decode_number(payload))

    async def _commit(self, tx: Transaction) -> bool:
        number = tx.number
        tx.end()
        try:
            await self._connection.ask(Operation.TRANSACTION_END, b"T\0", "a transaction", number)
        except XenstoreError as error:
            if error.name != "EAGAIN":
                raise
            return False
        return True

    def _abort(self, tx: Transaction) -> None:
        number = tx.number
        tx.end()
        self._connection.post(Operation.TRANSACTION_END, b"F\0", number)

    def _unwatch(self, watch: Watch) -> None:
        if self._connection.session.close_watch(watch.token):
            self._connection.post(Operation.UNWATCH, encode_path(watch.path) + encode_strings(watch.token))

    async def _list_in_parts(self, path: str, tx: Transaction | None) -> Names | None:
        listing = Listing()
        for _ in range(MAX_PARTS):
            payload = await self._look(Operation.DIRECTORY_PART, path, tx, encode_strings(str(listing.offset)))
            if payload is None:
                return None
            names = listing.add(payload)
            if names is not None:
                return names
        raise XenstoreError("EAGAIN", "list", path)

    async def _look(self, operation: Operation, path: str, tx: Transaction | None, rest: bytes = b"") -> bytes | None:
        try:
            return await self._do(operation, path, rest, tx)
        except XenstoreError as error:
            if error.name == "ENOENT":
                return None
            raise

    async def _do(self, operation: Operation, path: str, rest: bytes, tx: Transaction | None) -> bytes:
        number = NO_TRANSACTION if tx is None else tx.number
        return await self._connection.ask(operation, encode_path(path) + rest, path, number)


@asynccontextmanager
async def open_xenstore(path: str | None = None) -> AsyncGenerator[Xenstore, None]:
    """Connect to xenstore; the connection ends with the block.

    Args:
        path: a socket or character device. None: XENSTORED_PATH, else xenstored's socket, else /dev/xen/xenbus.

    Raises:
        XenMissingError, XenDeniedError: it cannot be reached; says what to start or load.
        XenstoreGoneError: from operations, once the connection is lost.

    """
    link = await connect(path or default_path())
    connection, failure = Connection(link), None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_requests)
            nursery.start_soon(connection.hand_out_answers)
            try:
                yield Xenstore(connection)
            except Exception as error:  # noqa: BLE001 - raised below: here the nursery would wrap it in a group
                failure = error
            finally:
                connection.close()
                nursery.cancel_scope.cancel()
    finally:
        await link.aclose()
    if failure is not None:
        raise failure
