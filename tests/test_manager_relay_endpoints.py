"""Places of vTPMs that stay, addresses, and who may reach what: what files and command lines may say."""

import json
import os
import socket
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from manager.errors import ConfigurationError, UsageError
from manager.relay_access import Access
from manager.relay_addresses import Address
from manager.relay_clients import Clients
from manager.relay_endpoints import Assignments, Endpoint, Ports
from manager.relay_holder import Held
from manager.relay_near import Near
from manager.relay_tls import CERTIFICATE_FILE, fingerprint, make_identity, read_certificate
from manager.relay_vtpms import NamedVtpms, check_name
from manager.sockets import Owner

NAMES = st.text("abcdefgh0123.-_", min_size=1, max_size=8).filter(check_name)


@given(st.lists(st.lists(NAMES, max_size=4), max_size=5))
def test_a_place_once_given_stays_and_is_nobody_elses(
    tmp_path_factory: pytest.TempPathFactory, waves: list[list[str]]
) -> None:
    path = tmp_path_factory.mktemp("places") / "assignments.json"
    seen: dict[str, int] = {}
    for names in waves:
        made = Assignments(path)  # each wave is a restart
        made.add(names)
        assert made.places | seen == made.places
        assert len(set(made.places.values())) == len(made.places)
        assert set(names) <= set(made.places)
        seen = dict(made.places)


def test_a_file_that_is_no_socket_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "clients.toml"
    path.write_text("mine")
    with pytest.raises(ConfigurationError):
        Address.parse(f"unix:{path}").listen()
    with pytest.raises(OSError, match="not a socket"):
        Held.reach(path)
    assert path.read_text() == "mine"


def test_a_vtpm_called_as_the_file_does_not_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "assignments.json"
    assert Assignments(path).add(["assignments.json", "assignments.new", "web"]) == ["web"]


async def test_an_endpoint_that_cannot_be_made_costs_no_other_one(tmp_path: Path) -> None:
    async def nobody() -> trio.abc.Stream:
        raise OSError

    names, ready = ["a", "b"], trio.Event()
    owner = Owner(os.geteuid(), os.getegid())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        near, ports = Near(nobody, 1.0, lambda _names: None), Ports(taken.getsockname()[1])
        clients = Clients(near, Assignments(tmp_path / "file"), tmp_path, ports, owner, 0o600)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients.run, ready.set)
            await ready.wait()
            clients.add(names)
            assert (tmp_path / "b/swtpm.sock.ctrl").is_socket()
            nursery.cancel_scope.cancel()


def test_a_directory_in_a_sockets_place_keeps_nobody_from_it(tmp_path: Path) -> None:
    endpoint, owner = Endpoint("web", tmp_path / "web", None), Owner(os.geteuid(), os.getegid())
    (endpoint.data / "deep" / "deeper").mkdir(parents=True)  # the folder is its owner's
    for sock, _ in endpoint.listen(owner, 0o600):
        sock.close()
    assert endpoint.data.is_socket()


def test_a_place_that_is_free_again_is_the_next_ones(tmp_path: Path) -> None:
    path = tmp_path / "assignments.json"
    Assignments(path).add(["b", "a", "c"])
    assert json.loads(path.read_text()) == {"a": 0, "b": 1, "c": 2}
    path.write_text('{"a": 0, "c": 2}')
    made = Assignments(path)
    assert made.add(["aa"]) == ["aa"]
    assert made.places == {"a": 0, "c": 2, "aa": 1}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": -1}', '{"a": 0, "b": 0}', '{"../x": 0}', '{"a": "0"}', '{"a": 5000}']
)
def test_a_damaged_file_is_never_a_new_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "assignments.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"assignments\.json"):
        Assignments(path)
    assert path.read_text() == text


def test_names_from_the_far_side_are_no_paths(tmp_path: Path) -> None:
    made = Assignments(tmp_path / "assignments.json")
    assert made.add(["../evil", "/etc", ".", "..", "a/b", "", "x" * 65, "good"]) == ["good"]


def test_ports_go_up_in_steps_and_end(tmp_path: Path) -> None:
    ports = Ports.parse("9100")
    assert [ports.of(place) for place in range(3)] == [9100, 9110, 9120]
    assert Ports.parse("9100:2").of(5) == 9110
    with pytest.raises(ConfigurationError, match="no port"):
        Ports.parse("65000:100").of(6)
    for text in ("", "0", "9100:1", "65536", "x:10", "9100:x", "-1"):
        with pytest.raises(UsageError):
            Ports.parse(text)
    assert Endpoint("web", tmp_path / "web", 9100).describe()["control_port"] == 9101


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("unix:/run/x", "/run/x"),
        ("tls:far.example:9443", ("far.example", 9443)),
        ("tls:[2001:db8::1]:1", ("2001:db8::1", 1)),
        ("vsock:3:9443", (3, 9443)),
        ("vsock:any:9443", (0xFFFFFFFF, 9443)),
    ],
)
def test_addresses_are_read(text: str, place: object) -> None:
    assert Address.parse(text).place == place


@pytest.mark.parametrize(
    "text", ["", "unix:", "tcp:a:1", "tls:a", "tls::1", "tls:a:65536", "tls:a:-1", "vsock:a:1", "vsock:1:", "x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        Address.parse(text)


def test_who_may_reach_what(tmp_path: Path) -> None:
    make_identity(tmp_path, "host-a")
    path = tmp_path / "clients.toml"
    path.write_text(
        f'[[client]]\nname = "a"\ncertificate = "{CERTIFICATE_FILE}"\nvtpms = ["web-*", "db"]\n'
        '[[client]]\nname = "b"\nuid = 1000\nvtpms = []\n'
    )
    access = Access.read(path)
    seen = fingerprint(read_certificate(tmp_path / CERTIFICATE_FILE))
    found, local = access.by_certificate(seen), access.by_uid(1000)
    assert found is not None
    assert local is not None
    assert [found.may_reach(name) for name in ("web-1", "db", "dbx", "WEB-1", "web")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not local.may_reach("db")
    assert access.by_uid(0) is None
    assert access.by_certificate("0" * 64) is None
    assert access.by_identity("uid 1000") == local
    assert access.by_identity(seen) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "client = 3",
        "[[client]]\nname = 'a'\nvtpms = []",
        "[[client]]\nname = 'a'\nuid = 1\ncertificate = 'x'\nvtpms = []",
        "[[client]]\nname = 'a'\nuid = -1\nvtpms = []",
        "[[client]]\nname = 'a'\nuid = true\nvtpms = []",
        "[[client]]\nname = 'a'\nuid = 1\nvtpms = '*'",
        "[[client]]\nuid = 1\nvtpms = []",
        "[[client]]\nname = 'a'\nuid = 1\nvtpms = []\nmore = 1",
        "[[client]]\nname = 'a'\ncertificate = 'missing.crt'\nvtpms = []",
        "[[client]]\nname = 'a'\nuid = 1\nvtpms = []\n[[client]]\nname = 'b'\nuid = 1\nvtpms = []",
        "more = 1\n[[client]]\nname = 'a'\nuid = 1\nvtpms = []",
        "x",
    ],
)
def test_a_file_that_says_something_else_lets_nobody_in(tmp_path: Path, text: str) -> None:
    path = tmp_path / "clients.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError):
        Access.read(path)


def test_vtpms_without_a_manager_are_named_once() -> None:
    NamedVtpms.parse(["a=/run/ctrl", "b=/run/ctrl,/run/data"])
    for texts in (["a"], ["a="], ["a=/x", "a=/y"], ["../a=/x"], ["=x"]):
        with pytest.raises(UsageError):
            NamedVtpms.parse(texts)
