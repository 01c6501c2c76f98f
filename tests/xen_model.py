"""Xen devices under hypothesis: rules choose who takes the next step and what goes wrong; promises are checked after.

`ConformingModel`: every interleaving of back ends, front ends, toolstack and manager that keep the protocol, with
deaths and restarts. `HostileModel`: one guest writes to its page, its nodes and its channel what it likes, between any
two steps; the other guest must not notice.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from xen_back_party import BackParty
from xen_front_party import OwnFront
from xen_parties import Instance, LinuxFront, Manager, MiniosFront, Place, Steps, Toolstack, World, scribble
from xen_simulation import SimulatedOffer

from frontend_backend.tpmif import PAGE_SIZE, RingState, SharedPage
from frontend_backend.xen_kernel import XenError
from frontend_backend.xenbus_table import XenbusState, parse_state
from frontend_backend.xs_wire import XenstoreError

MOST_STEPS: Final = 4000  # until nothing more happens; a device that opens and closes takes about 100
DRIVER_DOMAIN: Final = 2
LONG: Final = 6000  # bytes
FRONTS: Final = [LinuxFront, MiniosFront, OwnFront]


class Device:
    """One guest with one vTPM: all parties around it."""

    def __init__(self, world: World, toolstack: Toolstack, place: Place, front: type[LinuxFront]) -> None:
        self.world, self.toolstack = world, toolstack
        self.make_front = front
        self.instance = Instance(place.vtpm)
        self.manager = Manager()
        self.answers: list[tuple[bytes, bytes | None]] = []
        self.number = 0  # of commands so far
        self.troubled = False  # something happened that may cost a command its answer
        self.parting = False  # what may make a driver give its device up
        self.instance_steps = self.instance.run()
        self.begin(place)

    def begin(self, place: Place) -> None:
        """Have a new domain with the device."""
        self.place = place
        self.toolstack.create(place.domain)
        self.toolstack.attach(place)
        self.attached, self.detaching, self.alive = True, False, True
        self.back = BackParty(self.world, place, self.manager, self.instance)
        self.back_steps = self.back.run()
        self.begin_front()

    def begin_front(self) -> None:
        self.front = self.make_front(self.world, self.place)
        self.front.answers = self.answers
        self.front_steps: Steps | None = self.front.run()

    def parties(self) -> list[Callable[[], bool]]:
        return [self.step_back, self.step_front, self.step_instance, self.step_others]

    def step_back(self) -> bool:
        return next(self.back_steps)

    def step_front(self) -> bool:
        return next(self.front_steps) if self.front_steps else False

    def step_instance(self) -> bool:
        return next(self.instance_steps)

    def step_others(self) -> bool:
        """Have the manager answer, and the toolstack go on with what it waits for."""
        if self.manager.asked:
            self.manager.answers()
            return True
        if self.detaching and self.toolstack.may_remove(self.place):
            self.toolstack.remove(self.place)
            self.detaching = self.attached = False
            return True
        return False

    def wants(self) -> None:
        self.number += 1
        size = LONG if self.number % 3 == 0 else 0  # which takes an extra page
        self.front.wanted.append((b"command %d of %d" % (self.number, self.place.domain)).ljust(size, b"."))

    def detach(self) -> None:
        self.troubled = self.parting = True
        self.toolstack.start_detach(self.place)
        self.detaching = True

    def stop_front(self) -> None:
        if self.front_steps:
            self.front_steps.close()
        self.front_steps = None

    def destroy(self) -> None:
        self.stop_front()
        self.toolstack.destroy(self.place.domain)
        self.alive = False
        self.detach()

    def restart_back(self) -> None:
        self.back_steps.close()
        self.manager.unbind()  # its connection closes with it
        self.back_steps = self.back.run()

    def start_anew(self, new_place: Callable[[int, str], Place]) -> None:
        """Have another domain in place of one whose device is gone."""
        self.stop_front()
        self.back_steps.close()
        if self.alive:
            self.toolstack.destroy(self.place.domain)
        self.manager.unbind()
        self.manager.willing = True
        self.parting = False
        self.begin(new_place(self.place.own, self.place.vtpm))

    def check_books(self) -> None:
        """Nothing twice, and nobody else's answer."""
        assert max(self.instance.executed.values(), default=0) <= 1, self.instance.executed
        for command, answer in self.answers:
            assert answer is None or answer == self.instance.answer(command), (command, answer)
            assert answer is not None or self.troubled, f"{command!r} was given back for no reason"

    def check_served(self) -> None:
        """Once nothing more happens a device that is attached works, and every command has had its answer."""
        if not self.attached or not self.alive or not self.manager.willing or self.detaching:
            return
        if self.front.gone:
            # A driver bound anew before it ever connected ends its grant before it says 6: we complain, say 6 too, and
            # if it is back before it heard us say 2 again, it gives up.
            assert self.parting or self.back.complaints, "the driver gave up for no reason"
            return
        assert self.back.state is XenbusState.CONNECTED, self.back.state
        front_state = parse_state(self.world.store.connect(0).read(f"{self.place.front}/state"))
        assert front_state is XenbusState.CONNECTED, front_state
        assert self.front.waiting is None, f"{self.front.waiting!r} has had no answer"
        assert not self.front.wanted


class Model:
    """Some devices, and what is promised of them."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.xen.domains.add(DRIVER_DOMAIN)
        self.toolstack = Toolstack(self.world)
        self.toolstack.create(DRIVER_DOMAIN)
        self.devices: list[Device] = []
        self.next_domain = 5

    def add_device(self, own: int, vtpm: str, front: type[LinuxFront]) -> None:
        self.devices.append(Device(self.world, self.toolstack, self.new_place(own, vtpm), front))

    def new_place(self, own: int, vtpm: str) -> Place:
        self.next_domain += 1
        return Place(own, self.next_domain, vtpm)

    def check_books(self) -> None:
        for device in self.devices:
            device.check_books()

    def settle(self) -> None:
        """Let everybody go on until nobody has anything to do."""
        parties = [party for device in self.devices for party in device.parties()]
        steps = 0
        while sum(party() for party in parties):  # each has its turn
            steps += 1
            assert steps < MOST_STEPS, "it never comes to rest"

    def open_all(self) -> None:
        """Have everything go well so far, and a command sent that nobody has looked at."""
        self.settle()
        for device in self.devices:
            device.check_served()
            device.wants()
            device.step_front()

    def finish(self) -> None:
        """Take all devices away; nothing may be left."""
        for device in self.devices:
            if device.attached and not device.detaching:
                device.detach()
        self.settle()
        for device in self.devices:
            assert not device.attached, f"{device.place.back} is at {device.back.state}: the toolstack waits"
        for own in {device.place.own for device in self.devices}:
            assert not self.world.xen.leaks(own), self.world.xen.leaks(own)
        left = [name for name in self.world.store.nodes if "/backend/vtpm/" in name and name.endswith("state")]
        assert not left, f"made anew after their removal: {left}"

    def teardown(self) -> None:
        if not self.devices:
            return
        try:
            self.settle()
            self.check_books()
            for device in self.devices:
                device.check_served()
            self.finish()
        finally:
            for device in self.devices:
                device.stop_front()
                device.back_steps.close()


which = st.integers(0, 1)


class ConformingModel(Model, RuleBasedStateMachine):
    """Everybody keeps the protocol; anything may happen at any time."""

    @initialize(own=st.sampled_from([0, DRIVER_DOMAIN]), front=st.sampled_from(FRONTS), opened=st.booleans())
    def begin(self, own: int, front: type[LinuxFront], opened: bool) -> None:
        self.add_device(own, "first", front)
        self.add_device(own, "second", LinuxFront)
        if opened:
            self.open_all()

    @rule()
    def all_come_to_rest(self) -> None:
        self.settle()
        self.check_books()
        for device in self.devices:
            device.check_served()

    @rule(which=which, party=st.integers(0, 3), times=st.integers(1, 12))
    def somebody_goes_on(self, which: int, party: int, times: int) -> None:
        step = self.devices[which].parties()[party]
        for _ in range(times):
            if not step():
                break
        self.check_books()

    @rule(which=which)
    def a_guest_wants_something(self, which: int) -> None:
        self.devices[which].wants()

    @rule(which=which)
    def a_guest_cancels(self, which: int) -> None:
        if self.devices[which].alive:
            self.devices[which].troubled = True
            self.devices[which].front.cancel()

    @rule(which=which, how=st.sampled_from(["rebind", "resume", "kexec"]))
    def a_guest_starts_its_driver_anew(self, which: int, how: str) -> None:
        device = self.devices[which]
        device.troubled = True
        # Linux that finds our 5 or 6 on its way back gives up: kexec goes that way, and has no driver then
        device.parting |= how == "kexec"
        device.front.reopen(how)

    @rule(which=which)
    def a_back_end_dies(self, which: int) -> None:
        self.devices[which].troubled = True
        self.devices[which].restart_back()

    @rule(which=which)
    def an_instance_dies(self, which: int) -> None:
        self.devices[which].troubled = True
        self.devices[which].back.lose_instance()

    @rule(which=which, willing=st.booleans())
    def the_manager_asks_for_questions(self, which: int, willing: bool) -> None:
        """Its end of the binding closes; the answer to the next question may be another."""
        device = self.devices[which]
        device.manager.ends()
        device.manager.willing = willing
        device.troubled |= not willing
        device.parting |= not willing

    @precondition(lambda self: any(device.attached and not device.detaching for device in self.devices))
    @rule(which=which, destroy=st.booleans())
    def a_device_goes(self, which: int, destroy: bool) -> None:
        device = self.devices[which]
        if not device.attached or device.detaching:
            return
        if destroy:
            device.destroy()
        else:
            device.detach()

    @rule(which=which)
    def a_domain_starts_anew(self, which: int) -> None:
        """`xl create` of the same guest, once the device of its last life is gone."""
        device = self.devices[which]
        if device.attached:
            return
        device.start_anew(self.new_place)


states = st.sampled_from([*(str(number).encode() for number in range(10)), b"", b"x", b"-1", b"9" * 40, b"\xff"])
numbers = st.sampled_from(
    [b"0", b"1", b"8", b"9", b"10", b"4294967295", b"4294967296", b"", b"-3", b"1e3", b"9" * 4000]
)
heads = st.builds(
    lambda length, state, locality, extra: SharedPage(length, state, locality, extra).pack(),
    st.sampled_from([0, 1, 10, 4084, 4088, 4089, 8180, 8181, 2**31, 2**32 - 1]),
    st.sampled_from(RingState),
    st.integers(0, 255),
    st.sampled_from([0, 0, 1, 2, 255]),
)


class HostileModel(Model, RuleBasedStateMachine):
    """The first guest does what it likes; the second must not notice."""

    @initialize(own=st.sampled_from([0, DRIVER_DOMAIN]))
    def begin(self, own: int) -> None:
        self.add_device(own, "hostile", LinuxFront)
        self.add_device(own, "honest", LinuxFront)
        self.evil, self.good = self.devices
        self.evil.troubled = self.evil.parting = True
        self.offers: list[SimulatedOffer] = []
        self.ports: list[int] = []
        self.evil.stop_front()
        domain = self.evil.place.domain
        self.xs = self.world.store.connect(domain)
        self.channels, self.grants = self.world.xen.channels(domain), self.world.xen.offers(domain)

    def check_books(self) -> None:
        self.good.check_books()

    @rule(which=which, party=st.integers(0, 3), times=st.integers(1, 12))
    def somebody_goes_on(self, which: int, party: int, times: int) -> None:
        step = self.devices[which].parties()[party]
        for _ in range(times):
            if not step():
                break
        self.check_books()

    @rule()
    def the_honest_guest_wants_something(self) -> None:
        self.good.wants()

    @rule(which=which)
    def a_back_end_dies(self, which: int) -> None:
        self.devices[which].troubled = True
        self.devices[which].restart_back()

    def write(self, key: str, value: bytes) -> None:
        with suppress(XenstoreError):  # what is not its own it may not write
            self.xs.write(f"{self.evil.place.front}/{key}", value)

    @rule(value=states)
    def writes_a_state(self, value: bytes) -> None:
        self.write("state", value)

    @rule(key=st.sampled_from(["ring-ref", "event-channel", "feature-protocol-v2", "backend"]), value=numbers)
    def writes_a_number(self, key: str, value: bytes) -> None:
        self.write(key, value)

    @rule(key=st.sampled_from(["state", "ring-ref", "event-channel", "feature-protocol-v2", ""]))
    def removes(self, key: str) -> None:
        with suppress(XenstoreError):
            self.xs.remove(f"{self.evil.place.front}/{key}".rstrip("/"))

    @rule(path=st.sampled_from(["state", "online", "uuid", "feature-protocol-v2", ""]), other=st.booleans())
    def tries_what_is_not_its_own(self, path: str, other: bool) -> None:
        place = (self.good if other else self.evil).place
        with suppress(XenstoreError):
            self.xs.write(f"{place.back}/{path}".rstrip("/"), b"6")
            raise AssertionError("xenstored let it")

    @rule(state=st.sampled_from([b"3", b"4"]), extra=st.booleans())
    def offers_like_an_honest_one(self, state: bytes, extra: bool) -> None:
        offer = self.grants.offer(self.evil.place.own, 2)
        self.offers.append(offer)
        self.ports.append(self.channels.bind_unbound(self.evil.place.own))
        if extra:
            scribble(offer.page, SharedPage.SIZE, offer.references[1].to_bytes(4, "little"))
        for key, value in (("ring-ref", offer.references[0]), ("event-channel", self.ports[-1])):
            self.write(key, str(value).encode())
        self.write("feature-protocol-v2", b"1")
        self.write("state", state)

    @precondition(lambda self: self.offers)
    @rule(head=heads)
    def writes_a_head(self, head: bytes) -> None:
        scribble(self.offers[-1].page, 0, head)

    @precondition(lambda self: self.offers)
    @rule(offset=st.integers(0, 2 * PAGE_SIZE), data=st.binary(max_size=16))
    def scribbles(self, offset: int, data: bytes) -> None:
        scribble(self.offers[-1].page, offset, data)

    @precondition(lambda self: self.ports)
    @rule()
    def rings(self) -> None:
        with suppress(XenError):
            self.channels.notify(self.ports[-1])

    @precondition(lambda self: self.ports)
    @rule()
    def closes_its_channel(self) -> None:
        self.channels.unbind(self.ports.pop())

    @precondition(lambda self: self.offers)
    @rule()
    def withdraws_its_page(self) -> None:
        self.offers.pop().withdraw()

    def teardown(self) -> None:
        if not self.devices:
            return
        self.settle()
        self.good.check_served()
        self.evil.manager.willing = False  # that it is served is not promised
        super().teardown()
        self.evil.toolstack.destroy(self.evil.place.domain)
        self.xs.close()


class QuietModel(Model):
    """One device, and nothing that happens by itself."""

    def __init__(self, own: int, front: type[LinuxFront]) -> None:
        super().__init__()
        self.add_device(own, "only", front)
