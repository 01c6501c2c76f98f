"""What the manager and its keeper say: one SEQPACKET datagram a message, descriptors by SCM_RIGHTS.

The manager asks, the keeper answers, strictly in turn. The keeper learns no key: a state image's descriptor and a
ring's ends pass through its hands, what is in them does not.
"""

from dataclasses import dataclass
from typing import Final

from frontend_backend.messages import Protocol, later

VERSION: Final = 1
# what shuts an instance in; the names that reports, `instance.require` and `check` use (docs/threat-model.md)
FEATURES: Final = (
    "user",
    "network",
    "mounts",
    "ipc",
    "capabilities",
    "no-new-privileges",
    "not-dumpable",
    "limits",
    "landlock",
    "seccomp",
    "no-writable-code",
)


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on a connection."""

    version: int


@dataclass(frozen=True, slots=True)
class HelloReply:
    """The keeper's version and process id."""

    version: int
    pid: int


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start an instance. `vtpm` is the UUID's 16 bytes; `uid` 0 keeps the keeper's user; a quota of 0 is none.

    Of a guest of Xen: `localities` that it may claim, bit 0 for locality 0, and whether it may use TPM 1.2's
    `maintenance` commands.

    Descriptors, in this order: ring page, doorbell for the instance, doorbell for the manager, state image (locked),
    then one listening socket for each name in `listeners` ("data", "control", "ring").
    """

    vtpm: bytes
    lease: int
    family: str
    uid: int
    gid: int
    frontend: str
    owner_uid: int
    manager_uid: int
    listeners: tuple[str, ...]
    commands_per_second: int = 0
    saves_per_second: int = 0
    nv_bytes: int = 0
    localities: int = later(1)
    maintenance: bool = later(False)
    trace: bool = later(False)  # note each of the guest's commands, without its parameters


@dataclass(frozen=True, slots=True)
class Spawned:
    """The instance's process id; one descriptor: its pidfd."""

    pid: int


@dataclass(frozen=True, slots=True)
class List:
    """Ask which instances the keeper has, ended ones included until they are forgotten, from the `offset`th on."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """One instance as the keeper knows it; `status` is a wait status once it has ended (os.waitstatus_to_exitcode).

    `pid` is 0 for a hibernated vTPM, which has no process.
    """

    vtpm: bytes
    lease: int
    pid: int
    frontend: str
    listeners: tuple[str, ...]
    alive: bool
    status: int | None


@dataclass(frozen=True, slots=True)
class ListReply:
    """Answer to List: a part of `total` instances; ask again with a higher offset for the rest."""

    instances: tuple[Kept, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for the manager's ends of one instance; of a hibernated one only for the server's end of its device."""

    vtpm: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """Descriptors: ring page, manager's doorbell, pidfd (none of a hibernated one), then listeners as in `kept`."""

    kept: Kept


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop what is kept of an ended instance, its listening sockets included."""

    vtpm: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Its wait status."""

    status: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM to every instance, then the keeper ends."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The keeper is about to end."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """Ask what shuts instances in here."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One measure; `why` says why it is not active."""

    name: str
    active: bool
    why: str


@dataclass(frozen=True, slots=True)
class ConfinementReply:
    """Answer to Confinement, and the spawner's greeting to its keeper.

    `mode` is "fork" or "exec"; `on_violation` what a system call that is not allowed does: "kill", "errno", "log".
    """

    mode: str
    on_violation: str
    features: tuple[Feature, ...]


@dataclass(frozen=True, slots=True)
class Describe:
    """Ask what this keeper is. One of before several keepers refuses it."""


@dataclass(frozen=True, slots=True)
class Description:
    """Answer to Describe: its code's release, the descriptors it may have, and the instances it has."""

    release: str
    descriptors_most: int
    kept: int


@dataclass(frozen=True, slots=True)
class Park:
    """An instance has hibernated and ended: take in the connections it left, and watch its sockets."""

    vtpm: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class Parked:
    """It sleeps: `status` is its wait status, `connections` how many of them are open."""

    status: int | None
    connections: int


@dataclass(frozen=True, slots=True)
class Arm:
    """Watch the sockets of a hibernated vTPM.

    With listening sockets (descriptors, one for each name in `listeners`) when the keeper has nothing of it, without
    when it could not be woken.
    """

    vtpm: bytes
    lease: int
    frontend: str
    listeners: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Armed:
    """They are watched."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Start the next instance of a hibernated vTPM, under its lease, with the sockets and connections that are kept.

    `spawn` is as in Spawn, its `listeners` empty. Descriptors: ring page, doorbell for the instance, doorbell for the
    manager, state image (locked). The answer is Spawned; until then the vTPM goes on to sleep, unwatched.
    """

    spawn: Spawn


@dataclass(frozen=True, slots=True)
class Watch:
    """Tell of hibernated vTPMs that are wanted on the socket that comes with this, one Wanted a datagram."""


@dataclass(frozen=True, slots=True)
class Watching:
    """It is done; `asleep` vTPMs are hibernated here."""

    asleep: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A guest wants something of this hibernated vTPM. Not watched any more until Wake or Arm."""

    vtpm: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class KeeperRefusal:
    """The keeper did not do it."""

    text: str


@dataclass(frozen=True, slots=True)
class KeeperFull:
    """The keeper did not do it, because it has no descriptors left for it: another keeper may."""

    text: str


KeeperRequest = Hello | Spawn | List | Fetch | Forget | Stop | Confinement | Describe | Park | Arm | Wake | Watch
KeeperReply = (
    HelloReply
    | Spawned
    | ListReply
    | Fetched
    | Forgotten
    | Stopping
    | ConfinementReply
    | Description
    | Parked
    | Armed
    | Watching
    | Wanted
    | KeeperRefusal
    | KeeperFull
)

_PROTOCOL = Protocol(
    VERSION,
    (
        Hello,
        HelloReply,
        Spawn,
        Spawned,
        List,
        ListReply,
        Fetch,
        Fetched,
        Forget,
        Forgotten,
        Stop,
        Stopping,
        Confinement,
        ConfinementReply,
        Describe,
        Description,
        Park,
        Parked,
        Arm,
        Armed,
        Wake,
        Watch,
        Watching,
        Wanted,
        KeeperRefusal,
        KeeperFull,
    ),
)


def encode_keeper(message: KeeperRequest | KeeperReply) -> bytes:
    """Return the datagram of a message."""
    return _PROTOCOL.encode(message)


def decode_keeper(untrusted: bytes) -> KeeperRequest | KeeperReply:
    """Return the message in a datagram.

    Raises:
        MessageError: it is none.

    """
    message: KeeperRequest | KeeperReply = _PROTOCOL.decode(untrusted)
    return message
