"""What can go wrong between us and a TPM's registers, from the file to the last byte of a response."""

from manager.hwtpm_errors import KEPT_ALL, TpmBusy, TpmTransport, TpmUnavailable, WrongLocality
from manager.hwtpm_tis_place import Place

_OTHER_TRANSPORT = "use Linux's driver with `device:/dev/tpmrm0` and `--allow-locality 0`, the weaker mode"


class PathMissing(TpmUnavailable):
    """The file that maps physical memory is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"there is no {path} to reach its registers with",
            "The kernel needs CONFIG_DEVMEM, and a container or a unit must be given the device "
            "(systemd: DeviceAllow=/dev/mem rw).",
        )


class MemoryDenied(TpmUnavailable):
    """We may not open the file that maps physical memory."""

    def __init__(self, path: str, why: str, *, root: bool) -> None:
        super().__init__(
            f"{path} may not be opened ({why})",
            "The kernel is locked down (Secure Boot): " + _OTHER_TRANSPORT + "."
            if root
            else "Run as root, with CAP_SYS_RAWIO (systemd: CapabilityBoundingSet=, DeviceAllow=/dev/mem rw).",
        )


class PageRefused(TpmUnavailable):
    """The kernel, or Xen, does not let us map the locality's page."""

    def __init__(self, place: Place, path: str, why: str, todo: str) -> None:
        super().__init__(f"the page at {place} of {path} cannot be mapped: {why}", todo)


class DriverBound(PageRefused):
    """The kernel's own driver has the page, and CONFIG_IO_STRICT_DEVMEM keeps it from us."""

    def __init__(self, place: Place, path: str, driver: str, device: str) -> None:
        super().__init__(
            place,
            path,
            f"the kernel's driver {driver} holds the registers for the device {device} (CONFIG_IO_STRICT_DEVMEM)",
            f"Take the driver away (`echo {device} > /sys/bus/platform/drivers/{driver}/unbind`, or boot with "
            f"`initcall_blacklist=init_tis`), or {_OTHER_TRANSPORT}.",
        )


class NoTpmAtPage(TpmUnavailable):
    """Nobody answers at this address: every bit reads as one."""

    def __init__(self, place: Place) -> None:
        super().__init__(
            f"no TPM answers at {place}: every bit there reads as one",
            "Check `base=` and `locality=`; the chipset may keep this locality for itself (without TXT some pass on "
            "locality 0 only). `vtpm-manager check` shows what answers.",
        )


class RegistersInvalid(TpmUnavailable):
    """Something answers, but never says that its registers are valid."""

    def __init__(self, place: Place, value: int, seconds: float) -> None:
        super().__init__(
            f"the registers at {place} do not become valid in {seconds:g} s (0x{value:02x})",
            "Check `base=` and `locality=`: nothing may be there, or a TPM without this locality, or one that is "
            "switched off in the firmware set-up. Nothing was written to it.",
        )


class WrongInterface(TpmUnavailable):
    """The page has the other one of the two interfaces."""

    def __init__(self, place: Place, kind: int, other: str) -> None:
        super().__init__(
            f"the TPM at {place} does not have the interface `{place.interface}:` (it says type {kind})",
            f"Use `{other}:` with the same options.",
        )


class LocalityHeld(TpmBusy):
    """Another locality has the TPM and does not give it up."""

    def __init__(self, place: Place, seconds: float, holder: str) -> None:
        super().__init__(f"get locality {place.locality}", seconds, f"{holder} holds the TPM and does not give it back")


class LocalityRefused(WrongLocality):
    """The TPM has no such locality, or does not grant it."""

    def __init__(self, place: Place, detail: str) -> None:
        super().__init__(place.locality, f"{detail} at {place}")


class LocalityLost(TpmTransport):
    """Another locality seized the TPM in the middle of our command."""

    def __init__(self, place: Place, doing: str) -> None:
        super().__init__(doing, f"locality {place.locality} was taken from us by a higher one")


class TpmStuck(TpmTransport):
    """The TPM does not get on: not ready, no room in its FIFO, no data, status never valid."""


class CommandRefused(TpmTransport):
    """The TPM does not take the command: it stops before the end, wants more, or has too small a buffer."""


class ResponseCut(TpmTransport):
    """The response ends before the length that its header tells, also when asked for again."""


class ResponseTooLong(TpmTransport):
    """The response is longer than its header tells, or than any response may be."""


class CommandCancelled(TpmBusy):
    """The command took too long, was cancelled, and the TPM confirmed that."""

    def __init__(self, seconds: float) -> None:
        super().__init__("run a command", seconds, "it was cancelled, and the TPM has not carried it out", KEPT_ALL)
