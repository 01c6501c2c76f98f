"""All keepers of this manager, as one: each question goes to the keeper that it is about.

A keeper's descriptors suffice for some thousand vTPMs, so there are as many keepers as that takes, each with a
spawner and a socket of its own: keeper.sock, keeper-1.sock, ... An instance begins in the keeper of this release that
has the fewest; where all are full the next is started. One of another release (after an upgrade in place) gets no new
instances, and ends with its last one. A keeper that dies takes its own instances with it, and nobody else's.
What lives here: which keeper. What must not: what is said to it (`keeper_client`), what is asked (`instances`).
"""

import logging
from collections.abc import Callable
from typing import Final

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.release import RELEASE
from manager import confinement
from manager.capacity import KEEPERS_MOST, room_of_keeper
from manager.config import InstanceConfig, Layout
from manager.errors import BusyError, KeeperError, KeeperFullError, KeeperRefusedError
from manager.keeper_client import Keeper
from manager.keeper_places import Name, Places
from manager.keeper_sockets import nobody_listens, numbers_found, socket_of

_log = logging.getLogger("vtpm.keeper")
_SPARE: Final = 4  # a keeper without instances goes when the others have room for a quarter of one left

Answer = tuple[k.KeeperReply, list[int]]  # with the descriptors that came with it


def _nothing() -> None:
    pass


def _nobody_told(_keeper: Keeper) -> None:
    pass


class Keepers:
    """Every keeper that this manager works with; there is always at least one. `on_new` is told of each that comes."""

    def __init__(self, layout: Layout, config: InstanceConfig) -> None:
        """Connect to nothing yet: see `connect`."""
        self._layout, self._config = layout, config
        self._all: dict[int, Keeper] = {}
        self._pids: dict[Keeper, int] = {}  # those that the places are about
        self._places = Places()
        self._silent: set[Keeper] = set()  # gave no answer the last time: others come first
        self._choosing = trio.Lock()
        self.on_new: Callable[[Keeper], None] = _nobody_told
        self.confinement: k.ConfinementReply | None = None

    @classmethod
    async def connect(cls, layout: Layout, config: InstanceConfig) -> "Keepers":
        """Connect to every keeper that is there, starting one where there is none.

        Raises:
            DeniedError, KeeperError, BusyError, ConfigurationError: see `confinement.connect`.

        """
        made = cls(layout, config)
        try:
            for number in numbers_found(layout):
                if nobody_listens(path := socket_of(layout, number)):
                    path.unlink(missing_ok=True)  # its keeper has died, and its instances with it
                else:
                    await made._reach(number)
            if not made._all:
                await made._reach(0)
        except BaseException:
            made.close()
            raise
        return made

    async def _reach(self, number: int) -> Keeper:
        """Connect to a keeper, starting it where there is none; one that is not as configured is replaced if empty."""
        keeper, found = await confinement.connect(socket_of(self._layout, number), self._config)
        self._all[number], self._pids[keeper] = keeper, keeper.pid
        if self.confinement is None or keeper.release == RELEASE:
            self.confinement = found
        return keeper

    # questions

    async def ask(
        self, message: k.KeeperRequest, descriptors: tuple[int, ...] = (), meanwhile: Callable[[], None] = _nothing
    ) -> Answer:
        """Ask the keeper that `message` is about; see `Keeper.ask`. A stop is for all of them.

        Raises:
            KeeperError: it refused, or cannot be had. BusyError: there are as many keepers as there may be.

        """
        name = _named(message)
        match message:
            case k.Spawn(vtpm=vtpm, lease=lease):
                return await self._place((vtpm, lease), message, descriptors, meanwhile)
            case k.Arm(vtpm=vtpm, lease=lease) if descriptors:  # a hibernated vTPM that no keeper has any more
                return await self._place((vtpm, lease), message, descriptors, meanwhile)
            case k.Stop():
                return await self._stop_all()
            case _:
                keeper = self._home_of(name)
                reply, received = await self._ask(keeper, message, descriptors, meanwhile)
                if isinstance(reply, k.Forgotten) and name is not None:
                    self._places.leave(name)
                    await self._release(keeper)
                return reply, received

    async def _ask(
        self, keeper: Keeper, message: k.KeeperRequest, descriptors: tuple[int, ...], meanwhile: Callable[[], None]
    ) -> Answer:
        try:
            answer = await keeper.ask(message, descriptors, meanwhile)
        except KeeperRefusedError:
            self._silent.discard(keeper)
            raise
        except KeeperError:
            self._silent.add(keeper)
            raise
        else:
            self._silent.discard(keeper)
            return answer
        finally:
            if keeper.pid != self._pids.get(keeper, keeper.pid):
                self._pids[keeper] = keeper.pid
                self._places.is_empty_again(keeper)

    def _home_of(self, name: Name | None) -> Keeper:
        home = None if name is None else self._places.home_of(name)
        return self.first if home is None else home

    @property
    def first(self) -> Keeper:
        """The keeper with the lowest number."""
        return self._all[min(self._all)]

    @property
    def all(self) -> list[Keeper]:
        """Every keeper, by number."""
        return [self._all[number] for number in sorted(self._all)]

    async def list(self) -> list[k.Kept]:
        """Return every instance that any keeper has, ended ones included, and remember where they are."""
        kept: list[k.Kept] = []
        for keeper in self.all:
            theirs = await keeper.list()
            for one in theirs:
                self._places.settle((one.vtpm, one.lease), keeper)
            kept += theirs
        for keeper in self.all:
            await self._release(keeper)
        return kept

    # instances and their places

    async def _place(
        self, name: Name, message: k.KeeperRequest, descriptors: tuple[int, ...], meanwhile: Callable[[], None]
    ) -> Answer:
        """Ask the keeper with the fewest instances to take one more, and the next one if that is full."""
        while True:
            keeper = await self._with_room()
            self._places.begin(name, keeper)
            try:
                reply, received = await self._ask(keeper, message, descriptors, meanwhile)
            except KeeperFullError as error:
                self._places.give_up(name)
                _log.warning("the keeper at %s is full: %s", keeper.path, error)
                if not self._places.is_full(keeper):
                    raise BusyError(f"an empty keeper has no room for it ({error}); nothing was started") from error
            except KeeperRefusedError:
                self._places.give_up(name)
                raise  # after any other error whether there is an instance is asked later (Endings.end_stray)
            else:
                self._places.settle(name, keeper)
                return reply, received
            finally:
                self._places.unreserve(keeper)

    def room_of(self, keeper: Keeper) -> int:
        """Return how many vTPMs a keeper may have; one of another release gets no more."""
        if keeper.release != RELEASE:
            return 0
        room = room_of_keeper(keeper.descriptors_most, self._config.per_keeper)
        return self._places.cap_of(keeper, room)

    async def _with_room(self) -> Keeper:
        """Return the keeper with the fewest instances, counting one that is made; starts one where all are full."""
        async with self._choosing:
            while True:
                fit = [keeper for keeper in self.all if self.load_of(keeper) < self.room_of(keeper)]
                if fit:
                    keeper = min(fit, key=lambda one: (one in self._silent, self.load_of(one)))
                    self._places.reserve(keeper)
                    return keeper
                await self._start_next()

    async def _start_next(self) -> None:
        free = next((number for number in range(KEEPERS_MOST) if number not in self._all), None)
        if free is None:
            raise BusyError(f"all {KEEPERS_MOST} keepers are full; nothing was started. Detach a vTPM first")
        keeper = await self._reach(free)
        self.on_new(keeper)
        _log.info("started keeper %d at %s, for %d vTPMs", keeper.pid, keeper.path, self.room_of(keeper))
        if not self.room_of(keeper):
            raise BusyError(
                f"a keeper may have {keeper.descriptors_most} file descriptors, which is too few for one vTPM; nothing "
                f"was started. Raise LimitNOFILE of the manager's unit"
            )

    async def _release(self, keeper: Keeper) -> None:
        """End a keeper without instances that is of another release, or that nobody needs."""
        async with self._choosing:
            if self.load_of(keeper) or len(self._all) == 1 or not self._is_surplus(keeper):
                return
            number = next((number for number, one in self._all.items() if one is keeper), None)
            if number is None:
                return
            del self._all[number]
            del self._pids[keeper]
            self._silent.discard(keeper)
            try:
                await confinement.end(keeper)
            except KeeperError as error:
                _log.warning("the keeper at %s was not ended: %s", keeper.path, error)
            finally:
                keeper.close()
            _log.info("ended keeper %d at %s, which had no instances left", keeper.pid, keeper.path)

    def _is_surplus(self, keeper: Keeper) -> bool:
        if keeper.release != RELEASE:
            return True
        others = [one for one in self.all if one is not keeper]
        left = sum(max(0, self.room_of(one) - self.load_of(one)) for one in others)
        return left * _SPARE > self.room_of(keeper)

    async def _stop_all(self) -> Answer:
        for keeper in self.all:
            try:
                await keeper.ask(k.Stop())
            except KeeperError as error:
                _log.warning("the keeper at %s was not told to stop: %s", keeper.path, error)
        return k.Stopping(), []

    async def watch(self, keeper: Keeper, told: int) -> None:
        """Have a keeper tell of hibernated vTPMs that are wanted on the socket `told`; one that died is replaced.

        Raises:
            KeeperError: it cannot be had, or is of before there was hibernation.

        """
        await self._ask(keeper, k.Watch(), (told,), _nothing)

    def has(self, vtpm: bytes, lease: int) -> bool:
        """Tell whether a keeper has this one, running or hibernated."""
        return self._places.has((vtpm, lease))

    # what is shown

    def release_of(self, vtpm: bytes, lease: int) -> str | None:
        """Return the release of the code that an instance runs, None where its keeper does not tell."""
        return self._home_of((vtpm, lease)).release

    def load_of(self, keeper: Keeper) -> int:
        """Return how many instances a keeper has or is making; see `Places`."""
        return self._places.load_of(keeper)

    def describe(self) -> str:
        """Return in words what `status` shows of them."""
        return "; ".join(self._describe(keeper) for keeper in self.all)

    def _describe(self, keeper: Keeper) -> str:
        has = f"{keeper.path.name}: process {keeper.pid}, {self.load_of(keeper)}"
        if keeper.release == RELEASE:
            return f"{has} of {self.room_of(keeper)} vTPMs"
        return f"{has} vTPMs, of release {keeper.release or 'before 0.2'}: ends with the last of them"

    def close(self) -> None:
        """Leave the keepers to themselves."""
        for keeper in self._all.values():
            keeper.close()


def _named(message: k.KeeperRequest) -> Name | None:
    """Return which instance a question is about, None where it is about none."""
    if isinstance(message, k.Wake):
        message = message.spawn
    vtpm, lease = getattr(message, "vtpm", None), getattr(message, "lease", None)
    return None if vtpm is None or lease is None else (vtpm, lease)
