"""What the spawner gives up once for all it forks, and what each instance gives up before it starts its TPM.

Order matters: descriptors first (they keep locks and ends of file alive in the wrong process), then Landlock while
its descriptor is open, then the user, after that what a change of user resets (the parent-death signal and the
dumpable flag), and the system calls last, because everything before needs some that an instance must not make.
What is the same for all comes before the order is there (`shut_in`), the rest when it has come (`lock_down`).
What can be inherited is given up in the spawner: in each instance it would cost memory and time.
Source: prctl(2), setresuid(2), close_range(2), capabilities(7).
"""

import os
import resource
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from vtpm_instance import landlock, seccomp, syscalls
from vtpm_instance._libtpms import ffi

_PRIO_PROCESS: Final = 0  # linux/resource.h
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_NAME_BYTES: Final = 15  # of a process's name (PR_SET_NAME)
_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP = 6, 7, 8  # linux/capability.h
_SPAWNERS: Final = frozenset({_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP})  # to give each instance its user, and no more
_CAPABILITIES: Final = 64  # bits of a set; the kernel knows fewer and says so
_CAPABILITY_VERSION: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3

STANDBY_NAME: Final = "vtpm-standby"  # what ps(1) shows of a process that will be an instance
NICE: Final = 5  # a third of the weight of nice 0; what it does is in docs/architecture.md, "Processors"
MAX_DESCRIPTORS: Final = 64  # an instance has 3 standard ones, 3 of its state, 2 listeners and at most 16 connections
MAX_PROCESSES: Final = 4  # of its own user: its threads
MAX_FILE_BYTES: Final = 16 * 1024 * 1024  # no state image is larger than 1 MiB, no ring than a page
MAX_MEMORY_BYTES: Final = 1 << 30  # address space beyond what the spawner has; libtpms needs a few MiB
_STANDARD: Final = 3
_ALL_DESCRIPTORS: Final = 1 << 30  # the kernel's own limit where there is no other (fs.nr_open)


Calls = tuple[tuple[int, ...], ...]  # system calls to be made: number and arguments each


@dataclass(frozen=True, slots=True)
class Confinement:
    """What is left to do in each instance, prepared so that an instance only walks through it: see `confinement`.

    `hints` have memory copied that an instance will write to (`footprint`): what the kernel does not do of it, it does
    later. `filter_taking` is the filter of those whose front end passes them a descriptor. `kept` holds what the calls
    point to, and `landlock` the descriptor they use, None where there is none.
    """

    landlock: int | None
    first: Calls
    after_user: Calls
    filter: Calls
    filter_taking: Calls
    kept: tuple[Any, ...]
    hints: Calls = ()


def confinement(
    landlock_rules: int | None, programs: tuple[Any, Any] | None, name: str, *, yields: bool = True
) -> Confinement:
    """Prepare the calls; `landlock_rules` and `programs` are None where they are not to be had.

    `name`: of the process once it is an instance; until then it is STANDBY_NAME.

    `programs`: the filters of those that take no descriptors, and of those that do.

    `yields`: it gives way to manager, keeper and guests (`call_to_yield`).
    """
    number = syscalls.number_of
    prctl, capset = number("prctl"), number("capset")
    header, sets = _capability_words(0)
    short, waiting = (ffi.new("char[]", word.encode("ascii")[:_NAME_BYTES]) for word in (name, STANDBY_NAME))
    first: list[tuple[int, ...]] = [
        (prctl, _PR_SET_PDEATHSIG, signal.SIGKILL),
        (prctl, _PR_SET_NAME, syscalls.address_of(waiting)),
    ]
    if yields:
        first.append(call_to_yield())
    if landlock_rules is not None:
        first.append(landlock.call_to_enter(landlock_rules))
    if os.geteuid() == 0 and capabilities() >> _CAP_SETPCAP & 1:  # without it an empty permitted set has to do
        first += [(prctl, _PR_CAPBSET_DROP, capability) for capability in sorted(_SPAWNERS)]
    after = (
        (capset, syscalls.address_of(header), syscalls.address_of(sets)),
        (prctl, _PR_SET_PDEATHSIG, signal.SIGTERM),
        (prctl, _PR_SET_DUMPABLE, 0),
        (prctl, _PR_SET_NAME, syscalls.address_of(short)),
    )
    last, last_taking = ((), ()) if programs is None else ((seccomp.call_to_load(each),) for each in programs)
    return Confinement(landlock_rules, tuple(first), after, last, last_taking, (header, sets, short, waiting, programs))


def call_to_yield() -> tuple[int, ...]:
    """Return the call that lowers a process's share of the processors for good (setpriority(2), nice(2)).

    Who floods its instance is then outweighed by the manager, which all others wait for.
    """
    return syscalls.number_of("setpriority"), _PRIO_PROCESS, 0, NICE


def limit() -> None:
    """Set the resource limits that children inherit: no core dumps, few descriptors, small files, bounded memory.

    Root alone can limit the number of processes of users it is about to become; the kernel exempts root itself.
    """
    limits: dict[int, int] = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_AS: _address_space() + MAX_MEMORY_BYTES,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if os.geteuid() == 0:
        limits[resource.RLIMIT_NPROC] = MAX_PROCESSES
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (value, value))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def gain_nothing() -> None:
    """Never gain rights by executing something, and show no memory to others."""
    syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    syscalls.prctl(_PR_SET_DUMPABLE, 0)


def keep_spawner_capabilities() -> None:
    """Give up every capability but the three that give an instance its user.

    Raises:
        OSError: the kernel refuses.

    """
    held = capabilities()
    if held >> _CAP_SETPCAP & 1:
        for capability in range(_CAPABILITIES):
            if capability not in _SPAWNERS and not _out_of_bounding_set(capability):
                break
    set_capabilities(held & sum(1 << capability for capability in _SPAWNERS))


def _out_of_bounding_set(capability: int) -> bool:
    """Drop one; returns False when the kernel does not know it."""
    try:
        syscalls.prctl(_PR_CAPBSET_DROP, capability)
    except OSError:
        return False
    return True


def capabilities() -> int:
    """Return the permitted set of this process, a bit each."""
    header, sets = _capability_words(0)
    syscalls.call("capget", syscalls.number_of("capget"), syscalls.address_of(header), syscalls.address_of(sets))
    permitted: int = sets[1] | sets[4] << 32
    return permitted


def set_capabilities(bits: int) -> None:
    """Hold these capabilities and no more; none is inherited.

    Raises:
        OSError: the kernel refuses.

    """
    header, sets = _capability_words(bits)
    syscalls.call("capset", syscalls.number_of("capset"), syscalls.address_of(header), syscalls.address_of(sets))


def _capability_words(bits: int) -> tuple[Any, Any]:
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = ffi.new("uint32_t[2]", [_CAPABILITY_VERSION, 0])
    return header, ffi.new("uint32_t[6]", [low, low, 0, high, high, 0])  # effective, permitted, inheritable, twice


def shut_in(confinement: Confinement, keep: Iterable[int], parent: int) -> bool:
    """Give up what does not depend on the order that is waited for; what brings it is among `keep`.

    The process is killed when `parent` ends; returns False when it has ended already.

    Raises:
        OSError: the kernel refuses.

    """
    os.setsid()
    _close_all_but(keep, confinement.landlock)
    syscalls.make(confinement.first)
    if confinement.landlock is not None:
        os.close(confinement.landlock)
    syscalls.advise(confinement.hints)
    return os.getppid() == parent


def lock_down(
    confinement: Confinement, uid: int, gid: int, keep: Iterable[int], parent: int, *, takes_descriptors: bool = False
) -> bool:
    """Become an instance: everything it must not have is gone on return. Returns False when `parent` is gone already.

    Raises:
        OSError: the kernel refuses.

    """
    _close_all_but(keep, None)
    if uid != 0 and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    syscalls.make(confinement.after_user)
    if os.getppid() != parent:
        return False
    syscalls.make(confinement.filter_taking if takes_descriptors else confinement.filter)
    return True


def _close_all_but(keep: Iterable[int], landlock_rules: int | None) -> None:
    """Close every descriptor but the standard three, those in `keep`, and the one that is still needed here."""
    low = _STANDARD
    kept = set(keep)
    if landlock_rules is not None:
        kept.add(landlock_rules)
    for descriptor in sorted(kept):
        if descriptor >= _STANDARD:
            os.closerange(low, descriptor)
            low = descriptor + 1
    os.closerange(low, _ALL_DESCRIPTORS)


def die_with_parent(parent: int) -> bool:
    """Have this process killed when its parent ends. Returns False when `parent` has ended already."""
    syscalls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
