"""How a vTPM is attached, who may be at the other end, and what each front end's platform is like. Declarations only.

Source: design section 2; reference/swtpm-libtpms-qemu.md 1.3, 1.7, 2.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Role(Enum):
    """Who is at the other end of a control connection."""

    OWNER = "owner"  # root, the manager's user, or the user that owns the socket
    OTHER = "other"


class FrontEnd(Enum):
    """How a vTPM is attached; the value is what Spawn carries."""

    SOCKET = "socket"
    QEMU = "qemu"
    RING = "ring"
    PROXY = "proxy"
    XEN = "xen"
    SWTPM = "swtpm"  # the command in swtpm's place, without a manager
    MSSIM = "mssim"  # the TCG simulator's command and platform ports


@dataclass(frozen=True, slots=True)
class Rules:
    """What a platform may do to its vTPM.

    `powered`: INIT and STOP switch the TPM on and off, and it begins switched off. `takes_descriptors`: SET_DATAFD
    passes one. `tcg_prefix`: a data connection may put the TCG's head before a command, with a locality.
    `auto_shutdown`: power off saves what the guest did not. `like_swtpm`: it is the swtpm command's, whose TPM nobody
    else has: SHUTDOWN ends the process, a stored volatile state stays until an INIT deletes it, and what would be a
    failure is one. Below that are options of that command: `driver_sets_locality` (0x20001000 on the data channel does;
    Linux' vTPM proxy), what ends the process, and whether a data connection takes but one command.
    """

    highest_locality: int = 0
    powered: bool = False
    takes_descriptors: bool = False
    tcg_prefix: bool = False
    auto_shutdown: bool = True
    like_swtpm: bool = False
    driver_sets_locality: bool = False
    ends_with_control: bool = False
    ends_with_data: bool = False
    one_command: bool = False


# QEMU's TIS writes nothing at locality 4, which is the hardware's own: HASH_START implies it.
RULES: Final = {
    FrontEnd.SOCKET: Rules(tcg_prefix=True),
    FrontEnd.QEMU: Rules(highest_locality=3, powered=True, takes_descriptors=True, tcg_prefix=True),
    FrontEnd.RING: Rules(),
    FrontEnd.PROXY: Rules(highest_locality=4),
    FrontEnd.XEN: Rules(),
    FrontEnd.SWTPM: Rules(highest_locality=4, powered=True, takes_descriptors=True, tcg_prefix=True, like_swtpm=True),
    FrontEnd.MSSIM: Rules(highest_locality=4),
}
