"""The parties around a Xen vTPM device, each a generator that yields between any two steps that others can see.

Whoever holds the generators chooses who goes on, so that a test reaches every interleaving; closing one is the death of
that process. The parties keep books (what was executed, what was answered) and raise when a rule of theirs is broken.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Final

from xen_simulation import SimulatedOffer, Xen
from xenstore_simulation import SimulatedXenstored

from frontend_backend.errors import RingCancelledError
from frontend_backend.ring import BackRing, FrontRing, Request
from frontend_backend.xenbus_table import XenbusState, parse_state
from frontend_backend.xs_wire import XenstoreError

Steps = Generator[bool, None, None]  # yields whether it did something
BUSY: Final = True
IDLE: Final = False
LOCAL_PAGES: Final = 2 * 4096


def refuse(reason: str) -> bytes:
    """Answer a malformed request."""
    return b"refused: " + reason.encode()


@dataclass
class Place:
    """Where a device stands."""

    own: int
    domain: int
    vtpm: str
    device: int = 0

    @property
    def back(self) -> str:
        return f"/local/domain/{self.own}/backend/vtpm/{self.domain}/{self.device}"

    @property
    def front(self) -> str:
        return f"/local/domain/{self.domain}/device/vtpm/{self.device}"


@dataclass
class Manager:
    """Who may have a vTPM. A question is answered when `answers`; what was granted ends with `ends`."""

    willing: bool = True
    asked: bool = False
    granted: bool = False
    refusal: str = ""

    def ask(self) -> None:
        self.asked = True

    def answers(self) -> None:
        if self.asked:
            self.asked, self.granted = False, self.willing
            self.refusal = "" if self.willing else "no"

    def ends(self) -> None:
        """Have the manager end it: it is asked anew; what was granted stays meanwhile."""
        self.asked = self.asked or self.granted

    def unbind(self) -> None:
        """Have the back end end it."""
        self.asked = self.granted = False
        self.refusal = ""


class Instance:
    """One vTPM: takes commands on any ring of its own, in two steps, and counts what it executed."""

    def __init__(self, vtpm: str) -> None:
        self.vtpm = vtpm
        self.executed: Counter[bytes] = Counter()
        self.rings: list[LocalEnd] = []

    def connect(self) -> "LocalEnd":
        end = LocalEnd(self)
        self.rings.append(end)
        return end

    def answer(self, command: bytes) -> bytes:
        return b"%s of %s" % (command, self.vtpm.encode())

    def run(self) -> Steps:
        while True:
            worked = False
            for end in list(self.rings):
                if not end.rung:
                    continue
                end.rung = False
                worked = True
                taken = end.back.take()
                yield BUSY
                if isinstance(taken, Request):
                    self.executed[taken.packet] += 1
                    yield BUSY
                    end.back.finish(self.answer(taken.packet)[: end.back.answer_room])
                end.answered += 1 if taken is not None else 0
            yield BUSY if worked else IDLE


class LocalEnd:
    """A ring to an instance: both ends, and the two doorbells as a flag and a count."""

    def __init__(self, instance: Instance) -> None:
        page = memoryview(bytearray(LOCAL_PAGES))
        self.front, self.back = FrontRing(page), BackRing(page, refuse)
        self.instance = instance
        self.rung = False
        self.answered = 0

    def close(self) -> None:
        self.instance.rings.remove(self)


@dataclass
class World:
    """What all parties share."""

    xen: Xen = field(default_factory=Xen)
    store: SimulatedXenstored = field(default_factory=SimulatedXenstored)
    marks: dict[tuple[int, int, int, int], bool] = field(default_factory=dict)  # the ledgers of the back ends' host


class Toolstack:
    """What libxl does, each a transaction, and what it waits for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._xs = world.store.connect(0)

    def create(self, domain: int) -> None:
        self._world.xen.domains.add(domain)
        self._xs.write(f"/local/domain/{domain}", b"")
        self._xs.grant(f"/local/domain/{domain}", domain, set())

    def attach(self, place: Place) -> None:
        front, back = place.front, place.back
        with self._xs.at_once() as tx:
            for path, values in (
                (front, {"backend": back, "backend-id": str(place.own), "state": "1", "handle": str(place.device)}),
                (back, {"frontend": front, "frontend-id": str(place.domain), "online": "1", "state": "1",
                        "handle": str(place.device), "uuid": place.vtpm}),
            ):  # fmt: skip
                for key, value in values.items():
                    self._xs.write(f"{path}/{key}", value, tx)
        nodes = self._world.store.nodes
        for path, owner, reader in ((front, place.domain, place.own), (back, place.own, place.domain)):
            for name in [name for name in nodes if name == path or name.startswith(path + "/")]:
                self._xs.grant(name, owner, {reader})

    def start_detach(self, place: Place) -> None:
        with self._xs.at_once() as tx:
            if self._xs.read(f"{place.back}/state", tx) is not None:
                self._xs.write(f"{place.back}/online", "0", tx)
                self._xs.write(f"{place.back}/state", "5", tx)

    def may_remove(self, place: Place) -> bool:
        state = parse_state(self._xs.read(f"{place.back}/state"))
        return state in (None, XenbusState.CLOSED)

    def remove(self, place: Place) -> None:
        with self._xs.at_once() as tx:
            self._xs.remove(place.front, tx)
            self._xs.remove(place.back, tx)

    def destroy(self, domain: int) -> None:
        """End the domain in Xen; its nodes stay until `start_detach` and `remove`, as with `xl destroy`."""
        self._world.xen.destroy(domain)

    def forget(self, domain: int) -> None:
        self._xs.remove(f"/local/domain/{domain}")


class LinuxFront:
    """xen-tpmfront: grants, publishes, 3, sends at once, and polls its page.

    `wanted`: commands it still has to send. `answers`: what came; None: cancelled (IDLE).
    """

    first_state = XenbusState.INITIALISED

    def __init__(self, world: World, place: Place) -> None:
        self.place, self._world = place, world
        self.wanted: list[bytes] = []
        self.answers: list[tuple[bytes, bytes | None]] = []
        self.waiting: bytes | None = None
        self.gone = False  # its driver was unregistered: xenbus saw the back end close
        self.ring: FrontRing | None = None
        self.offer: SimulatedOffer | None = None
        self._reopen = ""

    def reopen(self, how: str) -> None:
        """Have it probed anew: "rebind" closes first, "resume" does not, "kexec" resets first."""
        self._reopen = how

    def run(self) -> Steps:
        world, place = self._world, self.place
        self._xs = world.store.connect(place.domain)
        self._channels = world.xen.channels(place.domain)
        self._offers = world.xen.offers(place.domain)
        try:
            while True:
                yield from self._probe()
                yield from self._live()
                how, self._reopen = self._reopen, ""
                if how != "kexec":
                    self._free()
                    yield BUSY
                if how == "rebind":
                    self._xs.write(f"{place.front}/state", str(int(XenbusState.CLOSED)))
                elif how == "kexec":
                    yield from self._reset()
                yield BUSY
        finally:
            self._xs.close()
            if self.ring:
                self.ring.release()
            self._channels.close()

    def _probe(self) -> Steps:
        place, xs = self.place, self._xs
        self.gone = False
        self.offer = self._offers.offer(place.own, 2)
        self._port = self._channels.bind_unbound(place.own)
        self.ring = FrontRing(self.offer.page, self.offer.references[1:])
        yield BUSY
        keys = {"ring-ref": self.offer.references[0], "event-channel": self._port, "feature-protocol-v2": 1}
        with xs.at_once() as tx:
            for key, value in keys.items():
                if xs.read(f"{place.front}/state", tx) is not None:
                    xs.write(f"{place.front}/{key}", str(value), tx)
        yield BUSY
        self._set(self.first_state)
        self._watch = xs.watch(f"{place.back}/state")

    def _set(self, state: XenbusState) -> None:
        if self._xs.read(f"{self.place.front}/state") is not None:
            self._xs.write(f"{self.place.front}/state", str(int(state)))

    def _free(self) -> None:
        """End the grant and the channel; what was waited for is lost with the driver."""
        self.waiting = None
        if self.ring and self.offer:
            self.ring.release()
            self.offer.withdraw()
            self._channels.unbind(self._port)
        self.ring = self.offer = None
        self._xs.unwatch(self._watch)

    def _live(self) -> Steps:
        while not self._reopen:
            if self._watch.events:
                self._watch.events.clear()
                self._back_end_changed()
                yield BUSY
            elif not self.ring or self.gone:
                yield IDLE
            else:
                yield self._work(self.ring)

    def _back_end_changed(self) -> None:
        state = self._back_state()
        if self.gone or state is None:
            return
        if state in (XenbusState.INITIALISED, XenbusState.CONNECTED):
            feature = self._xs.read(f"{self.place.back}/feature-protocol-v2")
            assert feature == b"1", "the feature stands before the state"
            if parse_state(self._xs.read(f"{self.place.front}/state")) is not XenbusState.CONNECTED:
                self._set(XenbusState.CONNECTED)
        elif state in (XenbusState.CLOSING, XenbusState.CLOSED):
            self._free()
            self._watch = self._xs.watch(f"{self.place.back}/state")
            self.gone = True
            self._set(XenbusState.CLOSED)

    def _back_state(self) -> XenbusState | None:
        try:
            return parse_state(self._xs.read(f"{self.place.back}/state"))
        except XenstoreError:
            return None  # removed, and what is above it is not for us

    def _work(self, ring: FrontRing) -> bool:
        """Send, or look for the answer."""
        if self.waiting is None:
            if not self.wanted:
                return IDLE
            command = self.wanted.pop(0)
            ring.submit(command)
            self.waiting = command
            self._channels.notify(self._port)
            return BUSY
        try:
            answer = ring.poll()
        except RingCancelledError:
            answer = None
        else:
            if answer is None:
                return IDLE
        self.answers.append((self.waiting, answer))
        self.waiting = None
        return BUSY

    def cancel(self) -> None:
        """Give up waiting, as Linux does after the duration: CANCEL, and no more of it."""
        if self.ring and self.waiting is not None:
            self.ring.cancel()
            self._channels.notify(self._port)

    def _reset(self) -> Steps:
        """Linux's xenbus_reset_frontend: 5, 6, 1, each until the back end followed or 5 s passed (here: at once)."""
        for state in (XenbusState.CLOSING, XenbusState.CLOSED, XenbusState.INITIALISING):
            self._set(state)
            yield BUSY
        self._free()


class MiniosFront(LinuxFront):
    """mini-os' tpmfront: goes to 4 by itself and sends once the back end is at 4; closes by 5, then 6."""

    first_state = XenbusState.CONNECTED

    def _work(self, ring: FrontRing) -> bool:
        if self._back_state() is not XenbusState.CONNECTED and self.waiting is None:
            return IDLE
        return super()._work(ring)


def scribble(page: memoryview, offset: int, data: bytes) -> None:
    """Write to a page of one's own what one likes."""
    end = min(len(page), offset + len(data))
    page[offset:end] = data[: end - offset]
