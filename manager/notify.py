"""Tells systemd how we are (sd_notify(3)): one datagram to $NOTIFY_SOCKET, nothing where there is none."""

import os
import socket


def notify(state: str) -> None:
    """Send `state`, as "READY=1" or "STOPPING=1". Raises OSError when systemd's socket does not take it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
