"""A front end over `xen_front`, as a generator: each read, each write and each hypercall is a step."""

from xen_parties import BUSY, IDLE, LinuxFront, Steps
from xenstore_simulation import SimulatedWatch

from frontend_backend.ring import FrontRing
from frontend_backend.xen_front import (
    FrontAction,
    FrontComplain,
    FrontDevice,
    FrontSeen,
    Offer,
    Publish,
    SetFrontState,
    Start,
    Unpublish,
    Withdraw,
)
from frontend_backend.xenbus_table import parse_number, parse_state
from frontend_backend.xs_wire import XenstoreError


class OwnFront(LinuxFront):
    """Our own front end, in place of a driver. "resume" is a clean end and a new start; the others are its death."""

    def run(self) -> Steps:
        """Be the front end until closed, through restarts."""
        while True:
            self._xs = self._world.store.connect(self.place.domain)
            self._channels = self._world.xen.channels(self.place.domain)
            self._offers = self._world.xen.offers(self.place.domain)
            self._machine = FrontDevice(extra_pages=1)
            self._started = False
            self._back_watch: tuple[str, SimulatedWatch] | None = None
            try:
                yield from self._serve()
                if self._reopen == "resume":
                    yield from self._act(self._machine.close())
            finally:
                self._die()
            self._reopen = ""
            yield BUSY

    def _die(self) -> None:
        self.waiting = None
        self._xs.close()
        if self.ring:
            self.ring.release()
        self.ring = None
        self._offers.close()
        self._channels.close()

    def _serve(self) -> Steps:
        own = self._xs.watch(self.place.front)
        while not self._reopen:
            back = self._back_watch[1] if self._back_watch else None
            if own.events or (back and back.events):
                own.events.clear()
                if back:
                    back.events.clear()
                seen = self._see()
                yield BUSY
                self._follow(seen.backend)
                yield from self._act(self._machine.step(seen))
                yield BUSY
            elif self.ring and self._started:
                yield self._work(self.ring)
            else:
                yield IDLE

    def _follow(self, backend: str | None) -> None:
        if self._back_watch and self._back_watch[0] == backend:
            return
        if self._back_watch:
            self._xs.unwatch(self._back_watch[1])
        self._back_watch = (backend, self._xs.watch(f"{backend}/state")) if backend else None

    def _read(self, path: str) -> bytes | None:
        try:
            return self._xs.read(path)
        except XenstoreError:
            return None

    def _see(self) -> FrontSeen:
        """Read everything at once, as in one transaction."""
        front = self.place.front
        values = {key: self._read(f"{front}/{key}") for key in ("state", "backend", "backend-id")}
        backend = (values["backend"] or b"").decode() or None
        for key in ("state", "feature-protocol-v2", "feature-extra-pages"):
            values[f"back {key}"] = self._read(f"{backend}/{key}") if backend else None
        return FrontSeen(
            front_state=parse_state(values["state"]),
            backend=backend,
            backend_id=parse_number(values["backend-id"]),
            back_state=parse_state(values["back state"]),
            feature=values["back feature-protocol-v2"],
            extra_pages=parse_number(values["back feature-extra-pages"]) or 0,
        )

    def _act(self, actions: list[FrontAction]) -> Steps:
        assert len(actions) <= 8, actions
        while actions:
            match actions.pop(0):
                case Offer(domain, extra_pages):
                    assert not actions, "Offer is the last"
                    assert not self.ring, "what was offered is withdrawn before"
                    self.offer = self._offers.offer(domain, 1 + extra_pages)
                    self._port = self._channels.bind_unbound(domain)
                    self.ring = FrontRing(self.offer.page, self.offer.references[1:])
                    actions += self._machine.offered()
                case Publish():
                    assert self.offer
                    keys = {"ring-ref": self.offer.references[0], "event-channel": self._port, "feature-protocol-v2": 1}
                    self._write({key: str(value) for key, value in keys.items()})
                case SetFrontState(state):
                    self._write({"state": str(int(state))})
                case Start():
                    self._started = True
                case Withdraw():
                    self._withdraw()
                case Unpublish():
                    for key in ("ring-ref", "event-channel"):
                        self._remove(key)
                case FrontComplain(text):
                    raise AssertionError(text)
            yield BUSY

    def _withdraw(self) -> None:
        self._started = False
        if self.waiting is not None:
            self.answers.append((self.waiting, None))
            self.waiting = None
        if self.ring and self.offer:
            self.ring.release()
            self.offer.withdraw()
            self._channels.unbind(self._port)
        self.ring = self.offer = None

    def _write(self, values: dict[str, str]) -> None:
        with self._xs.at_once() as tx:
            if self._xs.read(f"{self.place.front}/state", tx) is not None:
                for key, value in values.items():
                    self._xs.write(f"{self.place.front}/{key}", value, tx)

    def _remove(self, key: str) -> None:
        self._xs.remove(f"{self.place.front}/{key}")
