"""Attachments with TCP ports on the loopback interface, for clients that know nothing else: swtpm's and mssim's."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import vtpm_instance_commands as tpm
from e2e_rig import Installation, installation, wait_for
from qemu_client import GET_CAPABILITY, INIT, SUCCESS, ask, say

from frontend_backend.messages_admin import ExitCode
from manager.errors import UsageError
from manager.sockets import check_port

BAD_ORDINAL = bytes.fromhex("0000000a")
pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def host() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        yield made


def free_port() -> int:
    """Return a port that is free, as the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
        return port


def listening() -> list[tuple[str, int, str]]:
    """Address, port and inode of every listening TCP socket of this host (proc(5), /proc/net/tcp)."""
    found = []
    for family, file in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                address, port = words[1].split(":")
                raw = bytes.fromhex(address)[::-1] if family == socket.AF_INET else bytes.fromhex(address)
                found.append((socket.inet_ntop(family, raw), int(port, 16), words[9]))
    return found


def attached(host: Installation, name: str, frontend: str = "socket") -> tuple[int, dict[str, object]]:
    port = free_port()
    host.add(name)
    return port, host.attach(name, "guest", "--frontend", frontend, "--tcp", str(port))


def test_nothing_listens_on_tcp_unless_it_is_asked_for(host: Installation) -> None:
    host.add("quiet")
    pid = int(host.attach("quiet", "guest")["pid"])
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert any(link.startswith("socket:") for link in links)
    assert not {f"socket:[{inode}]" for _, _, inode in listening()} & set(links)
    port, shown = attached(host, "loud")
    mine = [(address, number) for address, number, _ in listening() if number in (port, port + 1)]
    assert sorted(mine) == [("127.0.0.1", port), ("127.0.0.1", port + 1)], "and not on another interface"
    assert not (host.runtime / "vtpm" / str(shown["uuid"])).exists(), "there is no Unix socket beside them"


def test_swtpms_clients_use_it_and_cannot_reset_the_platform(host: Installation) -> None:
    port, shown = attached(host, "by-swtpm")
    assert shown["tcti"] == f"swtpm:host=127.0.0.1,port={port}"
    assert (shown["endpoint"], shown["control"]) == (f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}")
    assert len(host.tool(str(shown["tcti"]), "tpm2_getrandom", "--hex", "8").out.strip()) == 16
    with socket.create_connection(("127.0.0.1", port + 1)) as control:
        assert ask(control, GET_CAPABILITY)[:4] == SUCCESS
        assert ask(control, INIT, bytes(4)) == BAD_ORDINAL, "nobody vouches for who is at the other end, be it root"


def test_mssims_clients_use_it(host: Installation) -> None:
    _, shown = attached(host, "by-mssim", "mssim")
    assert str(shown["tcti"]).startswith("mssim:host=127.0.0.1,port=")
    host.tool(str(shown["tcti"]), "tpm2_pcrextend", "10:sha256=" + "17" * 32)
    assert "10: 0x0000" not in host.tool(str(shown["tcti"]), "tpm2_pcrread", "sha256:10").out


def test_it_survives_hibernation_a_crash_and_a_restart(host: Installation) -> None:
    port, shown = attached(host, "lives-on")
    with socket.create_connection(("127.0.0.1", port)) as data:
        data.settimeout(60)
        assert tpm.rc(say(data, tpm.pcr_extend(10))) == 0
        before = say(data, tpm.pcr_read(10))
        host.command("vtpm-hibernate", "lives-on")
        assert say(data, tpm.pcr_read(10)) == before, "the connection stayed open"
    os.kill(host.show("lives-on")["pid"], 9)
    wait_for(lambda: host.show("lives-on")["state"] == "needs-reset", "the next instance")
    host.command("vtpm-reset-platform", "lives-on")
    host.restart()
    with socket.create_connection(("127.0.0.1", port)) as data:
        assert tpm.rc(say(data, tpm.get_random(8))) == 0
    assert host.show("lives-on")["tcti"] == shown["tcti"]
    host.command("vtpm-detach", "lives-on")
    with socket.socket() as data:
        assert data.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_somebody_has_is_not_taken(host: Installation) -> None:
    port = free_port()
    host.add("late")
    with socket.create_server(("127.0.0.1", port + 1)):
        refused = host.command("vtpm-attach", "late", "guest", "--tcp", str(port), check=False)
    assert refused.code == ExitCode.CONFLICT
    assert f"port {port + 1}" in refused.err
    assert host.show("late")["guest"] is None
    host.attach("late", "guest", "--tcp", str(port))  # the first of the two was let go


def test_the_ports_of_a_vtpm_that_is_down_stay_its_own(host: Installation) -> None:
    port, shown = attached(host, "down")
    for name in ("other", "beside"):
        host.add(name)
    image = host.state / "state" / f"{shown['uuid']}.img"
    image.rename(image.with_suffix(".away"))
    os.kill(int(str(shown["pid"])), 9)
    wait_for(lambda: host.show("down")["state"] == "down", "its state to be missing")
    with socket.socket() as data:
        assert data.connect_ex(("127.0.0.1", port)) != 0
    for name, wanted in (("other", port), ("other", port + 1), ("other", port - 1)):
        refused = host.command("vtpm-attach", name, "guest", "--tcp", str(wanted), check=False)
        assert refused.code == ExitCode.CONFLICT
        assert f"vTPM down is attached to guest guest with the ports {port} and {port + 1}" in refused.err
        assert host.show(name)["guest"] is None
    image.with_suffix(".away").rename(image)
    host.command("vtpm-reset-platform", "down")
    assert host.show("down")["state"] == "running"
    host.command("vtpm-detach", "down")
    host.attach("other", "guest", "--tcp", str(port + 1))


@pytest.mark.parametrize(
    ("frontend", "port"),
    [("qemu", 2321), ("ring", 2321), ("mssim", None), ("socket", 0), ("socket", -1), ("socket", 65_535)],
)
def test_ports_that_cannot_be_are_refused(frontend: str, port: int | None) -> None:
    with pytest.raises(UsageError):
        check_port(frontend, port)
