"""The `--tcti` setting: which hardware TPM, reached how. Pure parsing; nothing is opened here."""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from manager.hwtpm_errors import BadSetting
from manager.hwtpm_tis_place import DEFAULT_BASE, LOCALITIES, PAGE_BYTES

DEFAULT_SWTPM_HOST: Final = "127.0.0.1"
DEFAULT_SWTPM_PORT: Final = 2321
# sockaddr_un.sun_path holds 108 bytes with the closing zero (unix(7)); the control socket is PATH.ctrl.
UNIX_PATH_BYTES: Final = 107
DEFAULT_MEMORY: Final = "/dev/mem"
DEFAULT_LOCALITY: Final = 2
# The first mebibyte is memory and legacy devices, which /dev/mem lets through: a TPM is never there. x86 has 52 bits.
LOWEST_BASE: Final = 1 << 20
ADDRESS_LIMIT: Final = 1 << 52
_EXAMPLES: Final = (
    "Write `embedded`, `swtpm:path=SOCKET`, `swtpm:host=H,port=N`, `tis:locality=2`, `crb:locality=2` or "
    "`device:/dev/tpmrm0`."
)


class TctiKind(Enum):
    """How the TPM is reached."""

    EMBEDDED = "embedded"
    SWTPM_PATH = "swtpm-path"
    SWTPM_TCP = "swtpm-tcp"
    DEVICE = "device"
    TIS = "tis"
    CRB = "crb"
    LOADER = "loader"


@dataclass(frozen=True, slots=True)
class TctiSetting:
    """A parsed `--tcti`. `path`: socket, device or memory; `host`, `port`: swtpm over TCP; `text`: as it was written.

    `base`: physical address of the page of locality 0; `locality`: the one whose page is used (`tis:` and `crb:`).
    """

    kind: TctiKind
    text: str
    path: str = ""
    host: str = ""
    port: int = 0
    base: int = 0
    locality: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a setting of design section 9; what is unknown here goes to tss2's own loader, as written.

        Raises BadSetting: empty, options that do not exist, a port out of range, a path too long for a socket.
        """
        name, _, conf = text.partition(":")
        match name:
            case "embedded" if not conf:
                return cls(TctiKind.EMBEDDED, text)
            case "device" if conf:
                return cls(TctiKind.DEVICE, text, path=conf)
            case "swtpm":
                return cls._parse_swtpm(text, conf)
            case "tis" | "crb":
                return cls._parse_registers(text, TctiKind(name), conf)
            case "" | "embedded" | "device":
                raise BadSetting(f"{text!r} names no TPM", _EXAMPLES)
            case _ if text != text.strip() or not text.isprintable():
                raise BadSetting(f"{text!r} names no TPM", _EXAMPLES)
            case _:
                return cls(TctiKind.LOADER, text)

    @classmethod
    def _parse_swtpm(cls, text: str, conf: str) -> Self:
        options = _options(text, conf, {"path", "host", "port"})
        if path := options.pop("path", ""):
            if options:
                raise BadSetting(f"{text!r} has both a path and a host or port", _EXAMPLES)
            check_socket_path(path + ".ctrl")
            return cls(TctiKind.SWTPM_PATH, text, path=path)
        port = options.get("port", str(DEFAULT_SWTPM_PORT))
        # The control channel is port + 1 (tpm2-tss tcti-swtpm), so the last port cannot be used.
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 0xFFFF):
            raise BadSetting(f"{port!r} is not a port for swtpm", "Use 1 to 65534; control is the port after it.")
        return cls(TctiKind.SWTPM_TCP, text, host=options.get("host", DEFAULT_SWTPM_HOST), port=int(port))

    @classmethod
    def _parse_registers(cls, text: str, kind: TctiKind, conf: str) -> Self:
        options = _options(text, conf, {"base", "locality", "path"})
        base = _address(options.get("base", hex(DEFAULT_BASE)))
        locality = options.get("locality", str(DEFAULT_LOCALITY))
        if locality not in {str(number) for number in LOCALITIES}:
            raise BadSetting(f"{locality!r} is not a locality of a TPM", "Use 0 to 4; the manager needs 2.")
        return cls(kind, text, path=options.get("path", DEFAULT_MEMORY), base=base, locality=int(locality))


def _options(text: str, conf: str, known: set[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in conf.split(",") if conf else ():
        key, equals, value = part.partition("=")
        if key not in known or not equals or not value or key in options:
            raise BadSetting(f"{part!r} in {text!r} is no option of {text.partition(':')[0]}", _EXAMPLES)
        options[key] = value
    return options


def _address(text: str) -> int:
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if not LOWEST_BASE <= address <= ADDRESS_LIMIT - len(LOCALITIES) * PAGE_BYTES or address % PAGE_BYTES:
        raise BadSetting(
            f"{text!r} is not the address of a page", f"Use a multiple of 0x{PAGE_BYTES:x}, as 0xfed40000."
        )
    return address


def check_socket_path(path: str) -> None:
    """Raise BadSetting if a Unix socket cannot have this path (107 bytes at most)."""
    length = len(path.encode())
    if length > UNIX_PATH_BYTES:
        raise BadSetting(
            f"The socket path {path!r} has {length} bytes, {UNIX_PATH_BYTES} are possible",
            "Use a directory with a shorter path.",
        )
