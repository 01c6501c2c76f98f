"""What the keeper does when the manager asks: instances made, found and forgotten, hibernated vTPMs watched and woken.

What lives here: one method a request. What must not: connections of managers, and the loop (`keeper_service`).
"""

import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from frontend_backend.descriptors import close_all
from frontend_backend.messages_keeper import (
    VERSION,
    Arm,
    Armed,
    Confinement,
    ConfinementReply,
    Describe,
    Description,
    Fetch,
    Fetched,
    Forget,
    Forgotten,
    Hello,
    HelloReply,
    KeeperReply,
    KeeperRequest,
    List,
    ListReply,
    Park,
    Parked,
    Spawn,
    Spawned,
    Stop,
    Stopping,
    Wake,
    Watch,
    Watching,
)
from frontend_backend.release import RELEASE
from vtpm_instance.errors import (
    BadRequestError,
    KeeperStoppingError,
    SpawnerLostError,
    StillRunningError,
    WrongDescriptorsError,
)
from vtpm_instance.kept import Keeping, KeptInstance
from vtpm_instance.order import InstanceOrder, named_listeners, order_of, uuid_of
from vtpm_instance.parking import Parking
from vtpm_instance.spawner_link import Spawner

_WITHOUT_LISTENERS: Final = 4  # descriptors of a Wake: page, two doorbells, image
_MANAGERS_DOORBELL: Final = 2  # place among the descriptors of a Spawn: page, instance's doorbell, this, image
_BRING_DESCRIPTORS: Final = (Spawn, Arm, Wake, Watch)


class Requests:
    """Answers requests from what is kept. `stopping` is set when nothing may be started any more."""

    def __init__(
        self,
        keeping: Keeping,
        parking: Parking,
        spawner: Spawner,
        began: Callable[[KeptInstance], None],
        look_at: Callable[[KeptInstance], None],
    ) -> None:
        """Work on `keeping`; `began` is told of each new process, `look_at` sees whether one has ended."""
        self._keeping, self._parking, self._spawner = keeping, parking, spawner
        self._began, self._look_at = began, look_at
        self.stopping = False
        self._table: dict[type, Callable[[Any, list[int], list[int]], KeeperReply]] = {
            Hello: self._hello,
            Spawn: self._spawn,
            List: self._list,
            Fetch: self._fetch,
            Forget: self._forget,
            Stop: self._stop,
            Confinement: self._confinement,
            Describe: self._describe,
            Park: self._park,
            Arm: self._arm,
            Wake: self._wake,
            Watch: self._watch,
        }

    def do(self, request: KeeperRequest | KeeperReply, descriptors: list[int], handed_out: list[int]) -> KeeperReply:
        """Answer one request; what it hands out is added to `handed_out`, and stays ours.

        Raises:
            InstanceError, OSError: it was not done; the request's descriptors are the caller's to close.

        """
        serve = self._table.get(type(request))
        if serve is None:
            raise BadRequestError(f"{type(request).__name__} is no request")
        if descriptors and not isinstance(request, _BRING_DESCRIPTORS):
            raise WrongDescriptorsError(0, len(descriptors))
        return serve(request, descriptors, handed_out)

    def _hello(self, request: Hello, _descriptors: list[int], _handed_out: list[int]) -> HelloReply:
        if request.version != VERSION:
            raise BadRequestError(f"the manager speaks version {request.version}, this keeper {VERSION}")
        return HelloReply(VERSION, os.getpid())

    def _list(self, request: List, _descriptors: list[int], _handed_out: list[int]) -> ListReply:
        return self._keeping.listed_from(request.offset)

    def _fetch(self, request: Fetch, _descriptors: list[int], handed_out: list[int]) -> Fetched:
        kept = self._keeping.get(uuid_of(request.vtpm), request.lease)
        if not kept.asleep:
            handed_out.extend(kept.descriptors)
        elif "proxy" in kept.listeners:
            handed_out.extend(kept.listeners.values())
        else:
            raise BadRequestError(f"vTPM {kept.vtpm} is hibernated: it has no process and no ring")
        return Fetched(kept.describe())

    def _forget(self, request: Forget, _descriptors: list[int], _handed_out: list[int]) -> Forgotten:
        vtpm = uuid_of(request.vtpm)
        kept = self._keeping.get(vtpm, request.lease)
        if kept.alive:
            self._look_at(kept)  # the manager watches the pidfd too and may have seen the end before our loop did
        self._parking.leave(kept)
        return Forgotten(self._keeping.forget(vtpm, request.lease))

    def _stop(self, _request: Stop, _descriptors: list[int], _handed_out: list[int]) -> Stopping:
        return Stopping()

    def _confinement(self, _request: Confinement, _descriptors: list[int], _handed_out: list[int]) -> ConfinementReply:
        return self._spawner.wait_ready()

    def _describe(self, _request: Describe, _descriptors: list[int], _handed_out: list[int]) -> Description:
        return Description(RELEASE, resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(self._keeping))

    # making instances

    def _spawn(self, request: Spawn, descriptors: list[int], handed_out: list[int]) -> Spawned:
        if len(descriptors) <= _MANAGERS_DOORBELL:
            raise WrongDescriptorsError(_MANAGERS_DOORBELL + 2 + len(request.listeners), len(descriptors))
        for_instance = descriptors[:_MANAGERS_DOORBELL] + descriptors[_MANAGERS_DOORBELL + 1 :]
        order = order_of(request, for_instance)
        self._keeping.refuse_second(order.vtpm, order.lease)
        pid, pidfd = self._make(order)
        doorbell = descriptors[_MANAGERS_DOORBELL]
        kept = KeptInstance(
            order.vtpm, order.lease, pid, pidfd, request.frontend, order.page, doorbell, dict(order.listeners)
        )
        self._begin(kept, pid, pidfd)
        # The instance's own ends: a copy here would keep its lock and its doorbell alive after its death.
        close_all((order.image, order.doorbell))
        self._keeping.add(kept)
        handed_out.append(pidfd)
        return Spawned(pid)

    def _make(self, order: InstanceOrder) -> tuple[int, int]:
        """Have an instance made; returns its pid and pidfd."""
        if self.stopping:
            raise KeeperStoppingError
        if order.uid not in (0, os.geteuid()) and os.geteuid() != 0:
            raise BadRequestError(f"only root can start an instance as user {order.uid}")
        try:
            return self._spawner.spawn(order)
        except SpawnerLostError:
            self._keeping.end_strays(self._spawner.pids)
            raise

    def _begin(self, kept: KeptInstance, pid: int, pidfd: int) -> None:
        """Have a new process watched; one that cannot be is ended, for its end would never be noticed."""
        kept.pid, kept.pidfd = pid, pidfd
        try:
            self._began(kept)
        except OSError:
            kept.pid, kept.pidfd = 0, -1
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
            raise

    # hibernation

    def _park(self, request: Park, _descriptors: list[int], _handed_out: list[int]) -> Parked:
        kept = self._keeping.get(uuid_of(request.vtpm), request.lease)
        if kept.alive:
            self._look_at(kept)
        if kept.alive:
            raise StillRunningError(kept.vtpm, kept.pid)
        if not kept.asleep:
            self._parking.fall_asleep(kept)
        return Parked(kept.status, len(kept.connections))

    def _arm(self, request: Arm, descriptors: list[int], _handed_out: list[int]) -> Armed:
        vtpm = uuid_of(request.vtpm)
        if not request.listeners and not descriptors:
            self._parking.watch(self._keeping.asleep(vtpm, request.lease))
            return Armed()
        listeners = named_listeners(request.listeners, descriptors)
        self._keeping.refuse_second(vtpm, request.lease)
        kept = KeptInstance(vtpm, request.lease, 0, -1, request.frontend, -1, -1, listeners, status=0, asleep=True)
        self._keeping.add(kept)
        self._parking.watch(kept)
        return Armed()

    def _wake(self, request: Wake, descriptors: list[int], handed_out: list[int]) -> Spawned:
        if len(descriptors) != _WITHOUT_LISTENERS:
            raise WrongDescriptorsError(_WITHOUT_LISTENERS, len(descriptors))
        kept = self._keeping.asleep(uuid_of(request.spawn.vtpm), request.spawn.lease)
        page, doorbell, ours, image = descriptors
        spawn = replace(request.spawn, frontend=kept.frontend, listeners=tuple(kept.listeners))
        order = order_of(spawn, [page, doorbell, image, *kept.listeners.values()])
        order.connections = kept.connections
        self._parking.leave(kept)
        pid, pidfd = self._make(order)
        self._begin(kept, pid, pidfd)
        close_all((image, doorbell, *(descriptor for each in kept.connections for descriptor in each.descriptors)))
        kept.page, kept.doorbell = page, ours
        kept.status, kept.asleep, kept.connections = None, False, []
        handed_out.append(pidfd)
        return Spawned(pid)

    def _watch(self, _request: Watch, descriptors: list[int], _handed_out: list[int]) -> Watching:
        if len(descriptors) != 1:
            raise WrongDescriptorsError(1, len(descriptors))
        asleep = [kept for kept in self._keeping if kept.asleep]
        self._parking.tell(socket.socket(fileno=descriptors[0]), asleep)
        return Watching(len(asleep))
