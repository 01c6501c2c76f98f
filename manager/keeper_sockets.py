"""Where keepers listen: keeper.sock, keeper-1.sock, keeper-2.sock, ...; which of them are there, and who answers."""

import re
import socket
from pathlib import Path
from typing import Final

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.errors import RingError
from frontend_backend.messages_keeper import Describe, Description, decode_keeper, encode_keeper
from manager.capacity import room_of_keeper
from manager.config import Layout

_NAME: Final = re.compile(r"keeper(?:-([1-9][0-9]?))?\.sock")
_ANSWER_SECONDS: Final = 10.0
_SERVING: Final = "it serves the manager that runs: see 'vtpm-manager status'"


def socket_of(layout: Layout, number: int) -> Path:
    """Return where the keeper with this number listens."""
    return layout.keeper_socket if number == 0 else layout.runtime_dir / f"keeper-{number}.sock"


def numbers_found(layout: Layout) -> list[int]:
    """Return the numbers of the keepers whose sockets are there, somebody behind them or not."""
    found = (_NAME.fullmatch(path.name) for path in layout.runtime_dir.iterdir())
    return sorted(int(match[1] or 0) for match in found if match is not None)


def nobody_listens(path: Path) -> bool:
    """Tell whether a socket was left behind by a keeper that died."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def describe_all(layout: Layout) -> list[tuple[Path, str]]:
    """Return each keeper's socket with who answers there, in words; asks those that no manager is connected to."""
    numbers = numbers_found(layout) if layout.runtime_dir.is_dir() else []
    return [(path, _describe(path)) for path in (socket_of(layout, number) for number in numbers)]


def _describe(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_ANSWER_SECONDS)
        try:
            sock.connect(str(path))
            send_message(sock, encode_keeper(Describe()))
            data, received = receive_message(sock)
            close_all(received)
            said = decode_keeper(data)
        except ConnectionRefusedError:
            return "nobody listens; the next manager takes the socket away"
        except (BrokenPipeError, ConnectionResetError):
            return _SERVING  # turned away before the question was there
        except (OSError, RingError) as error:
            return f"it does not answer: {error}"
    if not isinstance(said, Description):
        return _SERVING
    room = room_of_keeper(said.descriptors_most)
    return f"release {said.release}, {said.kept} vTPMs, descriptors for {room}; no manager is connected"
