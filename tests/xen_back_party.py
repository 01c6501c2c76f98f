"""A back end over `xen_back` and `bridge`, as a generator: each read, each write and each hypercall is a step."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from xen_parties import BUSY, IDLE, Instance, LocalEnd, Manager, Place, Steps, World, refuse
from xen_simulation import SimulatedEventChannels, SimulatedGrants, SimulatedMapping

from frontend_backend.bridge import Bridge, Wake
from frontend_backend.errors import PageError
from frontend_backend.ring import BackRing
from frontend_backend.ring_extent import ExtraPages
from frontend_backend.xen_back import (
    Action,
    BackDevice,
    Bind,
    Complain,
    Connect,
    Disconnect,
    PublishFeatures,
    RemoveNode,
    Seen,
    SetState,
    Unbind,
)
from frontend_backend.xen_kernel import GrantRefusedError, XenError
from frontend_backend.xenbus_table import XenbusState, parse_number, parse_state
from frontend_backend.xs_wire import XenstoreError

MOST_ACTIONS: Final = 8  # of one step, whatever was seen


@dataclass
class _Link:
    channels: SimulatedEventChannels
    grants: SimulatedGrants
    pages: SimulatedMapping
    port: int
    back: BackRing
    bridge: Bridge
    local: LocalEnd | None


class BackParty:
    """One device's back end in domain `place.own`. `run` may be closed at any yield, which is its process' death."""

    def __init__(self, world: World, place: Place, manager: Manager, instance: Instance) -> None:
        self._world, self.place, self._manager, self._instance = world, place, manager, instance
        self.complaints: list[str] = []
        self.link: _Link | None = None
        self.machine = BackDevice(removes_own_node=place.own != 0)
        self._looked_at: object = None
        self._bound = False

    def run(self) -> Steps:
        """Serve until closed."""
        self.machine = BackDevice(removes_own_node=self.place.own != 0)
        self._looked_at = None
        xs = self._xs = self._world.store.connect(self.place.own)
        watches = [xs.watch(self.place.back), xs.watch(f"{self.place.front}/state")]
        try:
            while True:
                news = [watch for watch in watches if watch.events]
                for watch in news:
                    watch.events.clear()
                if news or self._others_changed():
                    yield from self._look()
                elif not self._pump():
                    yield IDLE
                    continue
                yield BUSY
        finally:
            xs.close()
            if self.link:
                self._close(self.link)
                self.link = None

    def _others_changed(self) -> bool:
        manager, domains = self._manager, self._world.xen.domains
        now = (manager.granted, manager.refusal, manager.willing, self.place.domain in domains)
        changed, self._looked_at = now != self._looked_at, now
        return changed

    def _look(self) -> Steps:
        if self._manager.refusal:
            self._manager.refusal = ""
            yield from self._act(self.machine.bind_refused("the manager said no"))
        if self._manager.willing:
            yield from self._act(self.machine.bind_again())
        again = True
        while again:
            seen = yield from self._see()
            actions = self.machine.step(seen)
            assert len(actions) <= MOST_ACTIONS, actions
            again = yield from self._act(actions)

    def _see(self) -> Generator[bool, None, Seen]:
        back, front = self.place.back, self.place.front
        values = {}
        for path in (f"{back}/state", f"{back}/online", f"{back}/uuid", f"{front}/state", f"{front}/ring-ref",
                     f"{front}/event-channel", f"{front}/feature-protocol-v2"):  # fmt: skip
            try:
                values[path] = self._xs.read(path)
            except XenstoreError:
                values[path] = None
            yield BUSY
        self._bound = self._manager.granted
        return Seen(
            back_state=parse_state(values[f"{back}/state"]),
            online=values[f"{back}/online"] != b"0",
            front_state=parse_state(values[f"{front}/state"]),
            ring_ref=parse_number(values[f"{front}/ring-ref"]),
            event_channel=parse_number(values[f"{front}/event-channel"]),
            feature=values[f"{front}/feature-protocol-v2"],
            bound=self._bound,
            domain_alive=self.place.own != 0 or self.place.domain in self._world.xen.domains,
            identity=(values[f"{back}/uuid"] or b"").decode(),
        )

    def _act(self, actions: list[Action]) -> Generator[bool, None, bool]:
        """Carry actions out; returns whether the machine wants to look again at once."""
        again = False
        while actions:
            action = actions.pop(0)
            match action:
                case PublishFeatures():
                    self._write({"feature-protocol-v2": "1", "feature-extra-pages": "1", "ready": "1"})
                case SetState(state):
                    self._write({"state": str(int(state))})
                case Connect(ring_ref, event_channel):
                    assert not actions, "Connect is the last"
                    assert not self.link, "what was mapped is unmapped before"
                    assert self._bound, "nothing is mapped before the manager agrees"
                    more, again = self._connect(ring_ref, event_channel)
                    actions += more
                case Disconnect():
                    assert self.link, "something is mapped"
                    self._wake(self.link, self.link.bridge.close())
                    self._world.marks.pop(self._mark, None)
                    self._close(self.link)
                    self.link = None
                case RemoveNode():
                    self._xs.remove(self.place.back)
                case Bind():
                    self._manager.ask()
                case Unbind():
                    self._manager.unbind()
                case Complain(text):
                    self.complaints.append(text)
            yield BUSY
        return again

    def _write(self, values: dict[str, str]) -> None:
        with self._xs.at_once() as tx:
            if self._xs.read(f"{self.place.back}/state", tx) is not None:
                for key, value in values.items():
                    self._xs.write(f"{self.place.back}/{key}", value, tx)

    def _connect(self, ring_ref: int, event_channel: int) -> tuple[list[Action], bool]:
        xen, place = self._world.xen, self.place
        channels, grants = xen.channels(place.own), xen.grants_of(place.own)
        try:
            pages = grants.map(place.domain, [ring_ref])
            port = channels.bind_interdomain(place.domain, event_channel)
        except XenError as error:
            grants.close()
            channels.close()
            return self.machine.connect_failed(str(error)), True

        def map_extra(references: tuple[int, ...]) -> ExtraPages:
            try:
                return grants.map(place.domain, references)
            except GrantRefusedError as error:
                raise PageError(str(error)) from error

        self._mark = (place.domain, place.device, ring_ref, event_channel)
        back = BackRing(pages.page, refuse, map_extra=map_extra, extra_pages=1)
        bridge = Bridge(
            back, None, before_submit=lambda: self._set_mark(True), after_answer=lambda: self._set_mark(False)
        )
        self.link = _Link(channels, grants, pages, port, back, bridge, None)
        self._wake(self.link, bridge.start(in_hand=self._world.marks.get(self._mark, False)))
        self._reach_instance(self.link)
        return self.machine.connected(), False

    def _set_mark(self, in_hand: bool) -> None:
        self._world.marks[self._mark] = in_hand

    def _reach_instance(self, link: _Link) -> None:
        link.local = self._instance.connect()
        self._wake(link, link.bridge.replace_front(link.local.front))

    def lose_instance(self) -> None:
        """Have the instance's process die and be replaced; it may have executed what was in flight."""
        link = self.link
        if link and link.local:
            link.local.close()
            self._wake(link, link.bridge.lose_front())
            link.local = None
            self._reach_instance(link)

    def _pump(self) -> bool:
        link = self.link
        if not link:
            return False
        for port in link.channels.pending():
            link.channels.unmask(port)
            self._wake(link, link.bridge.on_back())
            return True
        if link.local and link.local.answered:
            link.local.answered -= 1
            self._wake(link, link.bridge.on_front())
            return True
        return False

    def _wake(self, link: _Link, wake: Wake) -> None:
        if wake & Wake.BACK:
            link.channels.notify(link.port)
        if wake & Wake.FRONT and link.local:
            link.local.rung = True

    def _close(self, link: _Link) -> None:
        """Unmap and unbind; the page stays as it is."""
        if link.local:
            link.local.close()
        link.back.release()
        link.grants.close()
        link.channels.close()

    @property
    def state(self) -> XenbusState | None:
        """What xenstore says of this end."""
        return parse_state(self._world.store.connect(0).read(f"{self.place.back}/state"))
