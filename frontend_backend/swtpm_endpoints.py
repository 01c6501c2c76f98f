"""--ctrl and --server: where swtpm's two channels are served. Pure.

Source: swtpm's common.c; reference/swtpm-libtpms-qemu.md 1.1, 1.7, 3.1.
"""

from collections.abc import Mapping
from typing import Final

from frontend_backend.swtpm_records import LOOPBACK, SOCKET_MODE, Endpoint, Kind
from frontend_backend.swtpm_suboptions import Kinds, OptionError, Value, identity, sub_options, text_of, whole, yes

_PORTS: Final = 0x10000
_SERVER: Final[Kinds] = {
    **dict.fromkeys(("type", "path", "bindaddr", "ifname"), "str"),
    **dict.fromkeys(("port", "fd"), "int"),
    "disconnect": "bool",
    "mode": "mode",
    "uid": "id",
    "gid": "id",
}
_CONTROL: Final[Kinds] = {name: kind for name, kind in _SERVER.items() if name != "disconnect"} | {
    "clientfd": "int",
    "terminate": "bool",
}


def control(text: str | None) -> Endpoint | None:
    """Return --ctrl."""
    if text is None:
        return None
    values = sub_options(text, _CONTROL, "ctrl")
    kind = text_of(values, "type")
    if kind is None:
        raise OptionError("Missing type parameter for control channel")
    terminate = yes(values, "terminate")
    descriptor, connected = whole(values, "fd"), whole(values, "clientfd")
    if kind == Kind.UNIX:
        return _unix(values, "control channel", descriptor, connected, terminate=terminate)
    if kind != Kind.TCP:
        raise OptionError(f"Unsupported control channel type: {kind}")
    port = whole(values, "port")
    if descriptor is None and port is None:
        raise OptionError("Missing port and fd options for TCP control channel")
    if descriptor is None and port is not None and port >= _PORTS:
        raise OptionError("TCP control channel port outside valid range")
    return _tcp(values, port, descriptor=descriptor, terminate=terminate)


def server(text: str | None, environment: Mapping[str, str]) -> Endpoint | None:
    """Return --server; without a port TPM_PORT of the environment counts. A TCP `fd` has its client already."""
    if text is None:
        return None
    values = sub_options(text, _SERVER, "server")
    kind, descriptor = text_of(values, "type") or Kind.TCP, whole(values, "fd")
    disconnect = yes(values, "disconnect")
    if kind == Kind.UNIX:
        return _unix(values, "socket", descriptor, None, disconnect=disconnect)
    if kind != Kind.TCP:
        raise OptionError(f"Unsupported socket type: {kind}")
    if descriptor is not None:
        return _tcp(values, None, connected=descriptor, disconnect=disconnect)
    port = whole(values, "port")
    if port is None:
        port = _port_of_environment(environment)
    if port >= _PORTS:
        raise OptionError("TCP socket port outside valid range")
    return _tcp(values, port, disconnect=disconnect)


def _port_of_environment(environment: Mapping[str, str]) -> int:
    text = environment.get("TPM_PORT", "").strip()
    if not (text.isascii() and text.isdigit()):
        raise OptionError("TPM_PORT is not set or contains an invalid integer value.")
    return int(text)


def _unix(
    values: Mapping[str, Value],
    what: str,
    descriptor: int | None,
    connected: int | None,
    *,
    terminate: bool = False,
    disconnect: bool = False,
) -> Endpoint:
    path = text_of(values, "path")
    if descriptor is None and connected is None and path is None:
        raise OptionError(f"Missing path and fd options for UnixIO {what}")
    connected = connected if descriptor is None else None
    return Endpoint(
        kind=Kind.UNIX,
        path=path if descriptor is None and connected is None else None,
        descriptor=descriptor,
        connected=connected,
        mode=SOCKET_MODE if (mode := whole(values, "mode")) is None else mode,
        uid=identity(values, "uid"),
        gid=identity(values, "gid"),
        terminate=terminate,
        disconnect=disconnect,
    )


def _tcp(
    values: Mapping[str, Value],
    port: int | None,
    *,
    descriptor: int | None = None,
    connected: int | None = None,
    terminate: bool = False,
    disconnect: bool = False,
) -> Endpoint:
    return Endpoint(
        kind=Kind.TCP,
        port=port if descriptor is None and connected is None else None,
        descriptor=descriptor,
        connected=connected,
        address=text_of(values, "bindaddr") or LOOPBACK,
        interface=text_of(values, "ifname"),
        terminate=terminate,
        disconnect=disconnect,
    )
