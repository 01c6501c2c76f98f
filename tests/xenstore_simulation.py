"""xenstored as far as devices need it: nodes, owners, permissions, watches, transactions. In memory, for one thread.

As C xenstored does: a watch fires once when it is set, and for the node, everything below it, and what is removed
above it; a transaction sees what was there when it began, and its commit fails if what it read or wrote changed since.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from frontend_backend.xs_wire import XenstoreError

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One node. `readers`: domains beside its owner (and domain 0) that may read it; `writers`: and write it."""

    value: bytes
    owner: int
    readers: frozenset[int] = frozenset()
    writers: frozenset[int] = frozenset()
    version: int = 0


@dataclass(eq=False)
class SimulatedWatch:
    """A watch of one connection; `events` are the changed paths not looked at yet."""

    path: str
    events: deque[str] = field(default_factory=deque)
    wake: Callable[[], None] | None = None

    def fire(self, path: str) -> None:
        self.events.append(path)
        if self.wake:
            self.wake()


class SimulatedXenstored:
    """The store."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {"": Node(b"", 0)}
        self.watches: list[SimulatedWatch] = []
        self._version = 0

    def connect(self, domain: int) -> "StoreConnection":
        return StoreConnection(self, domain)

    def put(self, nodes: dict[str, Node], path: str, value: bytes, domain: int) -> list[str]:
        """Write one node in `nodes`, making its parents; returns the changed paths."""
        self._version += 1
        there = nodes.get(path)
        if there:
            nodes[path] = replace(there, value=value, version=self._version)
            return [path]
        parent = path.rpartition("/")[0]
        made = self.put(nodes, parent, b"", domain) if parent not in nodes else []
        above = nodes[parent]
        owner = above.owner if domain == 0 else domain
        nodes[path] = replace(above, value=value, owner=owner, version=self._version)
        return [*made, path]

    def fire(self, changed: str) -> None:
        for watch in self.watches:
            if changed == watch.path or changed.startswith(watch.path + "/"):
                watch.fire(changed)

    def fire_removed(self, removed: str, below: list[str]) -> None:
        self.fire(removed)
        for watch in self.watches:
            if watch.path in below:
                watch.fire(watch.path)


class Transaction:
    """What one transaction sees and did."""

    def __init__(self, store: SimulatedXenstored) -> None:
        self.nodes = dict(store.nodes)
        self.seen: dict[str, int | None] = {}  # versions when it began, of all it touched
        self.changes: list[Callable[[], None]] = []

    def touch(self, path: str) -> None:
        if path not in self.seen:
            node = self.nodes.get(path)
            self.seen[path] = node.version if node else None


class StoreConnection:
    """What one domain's process does."""

    def __init__(self, store: SimulatedXenstored, domain: int) -> None:
        self.store, self.domain = store, domain
        self.watches: list[SimulatedWatch] = []

    def _path(self, path: str) -> str:
        return path if path.startswith("/") else f"/local/domain/{self.domain}/{path}"

    def _may(self, node: Node, *, write: bool) -> bool:
        allowed = node.writers if write else node.readers | node.writers
        return self.domain in (0, node.owner) or self.domain in allowed

    def _nearest(self, nodes: dict[str, Node], path: str) -> Node:
        while path not in nodes:
            path = path.rpartition("/")[0]
        return nodes[path]

    def _check(self, nodes: dict[str, Node], path: str, operation: str, *, write: bool) -> None:
        if not self._may(self._nearest(nodes, path), write=write):
            raise XenstoreError("EACCES", operation, path)

    def read(self, path: str, tx: Transaction | None = None) -> bytes | None:
        path = self._path(path)
        nodes = self._view(path, tx)
        self._check(nodes, path, "read", write=False)
        node = nodes.get(path)
        return node.value if node else None

    def list(self, path: str, tx: Transaction | None = None) -> list[str] | None:
        path = self._path(path)
        nodes = self._view(path, tx)
        self._check(nodes, path, "list", write=False)
        if path not in nodes:
            return None
        return [name.rpartition("/")[2] for name in nodes if name.rpartition("/")[0] == path and name]

    def _view(self, path: str, tx: Transaction | None) -> dict[str, Node]:
        if tx is None:
            return self.store.nodes
        tx.touch(path)
        return tx.nodes

    def write(self, path: str, value: bytes | str, tx: Transaction | None = None) -> None:
        path, raw = self._path(path), value.encode() if isinstance(value, str) else value
        nodes = self._view(path, tx)
        self._check(nodes, path, "write", write=True)
        changed = self.store.put(nodes, path, raw, self.domain)
        if tx is not None:
            tx.changes.append(lambda: self.write(path, raw))
            return
        for one in changed:
            self.store.fire(one)

    def remove(self, path: str, tx: Transaction | None = None) -> None:
        path = self._path(path)
        nodes = self._view(path, tx)
        if path not in nodes:
            return
        self._check(nodes, path, "remove", write=True)
        below = [name for name in nodes if name.startswith(path + "/")]
        for name in (path, *below):
            if tx is not None:
                tx.touch(name)
            del nodes[name]
        if tx is not None:
            tx.changes.append(lambda: self.remove(path))
            return
        self.store.fire_removed(path, below)

    def grant(self, path: str, owner: int, readers: set[int]) -> None:
        """Set owner and readers, as a toolstack does."""
        path = self._path(path)
        node = self.store.nodes[path]
        self.store.nodes[path] = replace(node, owner=owner, readers=frozenset(readers), writers=frozenset())

    def watch(self, path: str) -> SimulatedWatch:
        watch = SimulatedWatch(self._path(path))
        self.watches.append(watch)
        self.store.watches.append(watch)
        watch.fire(watch.path)
        return watch

    def unwatch(self, watch: SimulatedWatch) -> None:
        if watch in self.watches:
            self.watches.remove(watch)
            self.store.watches.remove(watch)

    def close(self) -> None:
        for watch in list(self.watches):
            self.unwatch(watch)

    def begin(self) -> Transaction:
        return Transaction(self.store)

    def commit(self, tx: Transaction) -> bool:
        """Carry a transaction out, all at once; False if something it touched has changed meanwhile."""
        for path, version in tx.seen.items():
            node = self.store.nodes.get(path)
            if (node.version if node else None) != version:
                return False
        for change in tx.changes:
            change()
        return True

    @contextmanager
    def at_once(self) -> Iterator[Transaction]:
        """Run a transaction that nobody can get in between."""
        tx = self.begin()
        yield tx
        assert self.commit(tx)
