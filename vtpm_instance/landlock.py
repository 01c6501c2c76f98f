"""Landlock: no path of the file system, no TCP port, no signal and no abstract socket outside of this process.

One ruleset without rules, made once by the spawner; each instance enters a domain of its own with it.
Source: landlock(7), linux/landlock.h. The numbers of its system calls are the same on every architecture.
"""

from typing import Final

from vtpm_instance._libtpms import ffi
from vtpm_instance.syscalls import address_of, call

_CREATE_RULESET: Final = 444
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1  # LANDLOCK_CREATE_RULESET_VERSION
_ATTRIBUTE_WORDS: Final = 3  # handled_access_fs, handled_access_net, scoped
# Rights that each version of the interface knows: file system (bits), network, scopes.
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_SINCE: Final = 4
_SCOPES_SINCE: Final = 6


def version() -> int:
    """Return the version of the kernel's interface.

    Raises:
        OSError: the kernel has none (ENOSYS), or it is switched off (EOPNOTSUPP).

    """
    return call("landlock", _CREATE_RULESET, 0, 0, _VERSION)


def ruleset() -> int:
    """Return the descriptor of a ruleset that allows nothing of what this kernel can forbid.

    Raises:
        OSError: see `version`.

    """
    known = version()
    files = (1 << _FILE_RIGHTS[min(known, max(_FILE_RIGHTS))]) - 1
    words = [files]
    if known >= _NETWORK_SINCE:
        words.append(0b11)  # bind and connect of TCP
    if known >= _SCOPES_SINCE:
        words.append(0b11)  # abstract Unix sockets and signals
    attribute = ffi.new("uint64_t[]", _ATTRIBUTE_WORDS)
    attribute[0 : len(words)] = words
    return call("landlock", _CREATE_RULESET, address_of(attribute), 8 * len(words), 0)


def call_to_enter(descriptor: int) -> tuple[int, ...]:
    """Return the system call that puts a process under the ruleset, for good. It needs no new privileges set."""
    return (_RESTRICT_SELF, descriptor, 0)
