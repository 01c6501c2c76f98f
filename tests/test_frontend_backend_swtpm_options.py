import subprocess
from collections.abc import Mapping
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend_backend.swtpm_getopt import getopt_long
from frontend_backend.swtpm_options import LONG, SHORT, Interface, SwtpmOptions, parse
from frontend_backend.swtpm_records import (
    Endpoint,
    Flags,
    KeySource,
    Kind,
    LogTarget,
    Manager,
    PcapTarget,
    PidTarget,
    ProfileSource,
    StatePlace,
)
from frontend_backend.swtpm_suboptions import OptionError


def parsed(
    text: str, environment: Mapping[str, str] | None = None, interface: Interface = Interface.SOCKET
) -> SwtpmOptions:
    return parse(interface, text.split(), environment or {})


def test_nothing_is_a_tpm_1_2_that_serves_nobody() -> None:
    options = parsed("")
    assert (options.tpm2, options.state, options.server, options.control) == (False, None, None, None)
    assert options.seccomp == "kill"
    assert options.flags == Flags(need_init=True, startup=None, auto_shutdown=True)


def test_the_command_line_that_libvirt_uses() -> None:
    options = parsed(
        "--ctrl type=unixio,path=/run/c.sock,mode=0600 --tpmstate dir=/var/lib/tpm,mode=0600 --log file=/l,level=20 "
        "--terminate --tpm2 --pid file=/run/p --daemon --key pwdfd=25,mode=aes-256-cbc "
        "--migration-key pwdfd=26,mode=aes-256-cbc --migration release-lock-outgoing,incoming"
    )
    assert options.control == Endpoint(Kind.UNIX, path="/run/c.sock", mode=0o600)
    assert options.state == StatePlace("/var/lib/tpm", is_directory=True, mode=0o600)
    assert options.log == LogTarget(file="/l", level=20)
    assert options.key == KeySource(None, 25, password=True, size=32)
    assert options.migration_key == KeySource(None, 26, password=True, size=32)
    assert options.pid == PidTarget("/run/p", None)
    assert (options.terminate, options.daemon, options.incoming, options.release_lock_outgoing) == (True,) * 4


def test_the_command_line_that_swtpm_setup_uses() -> None:
    options = parsed(
        "--flags not-need-init,startup-clear --tpmstate backend-uri=dir:///t,lock --pid file=/p --tpm2 "
        "--server type=tcp,fd=5 --ctrl type=unixio,clientfd=7"
    )
    assert options.server == Endpoint(Kind.TCP, connected=5)
    assert options.control == Endpoint(Kind.UNIX, connected=7)
    assert options.flags == Flags(need_init=False, startup="clear")
    assert options.state == StatePlace("/t", is_directory=True, lock=True)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("-p 77", "server", Endpoint(Kind.TCP, port=77, disconnect=True)),
        ("-p0x4d", "server", Endpoint(Kind.TCP, port=77, disconnect=True)),
        ("-p 77 --server type=tcp", "server", Endpoint(Kind.TCP, port=77)),
        ("--server port=77 -p 78", "server", Endpoint(Kind.TCP, port=78, disconnect=True)),
        ("--server port=5,bindaddr=::1,ifname=lo", "server", Endpoint(Kind.TCP,
            port=5, address="::1", interface="lo")),
        ("--server type=unixio,path=/s,mode=0666,uid=7,gid=staff", "server", Endpoint(Kind.UNIX,
            path="/s", mode=0o666, uid=7, gid="staff")),
        ("--server type=unixio,fd=4,path=/s", "server", Endpoint(Kind.UNIX, descriptor=4)),
        ("--ctrl type=tcp,port=9,terminate", "control", Endpoint(Kind.TCP, port=9, terminate=True)),
        ("--ctrl type=tcp,fd=9", "control", Endpoint(Kind.TCP, descriptor=9)),
        ("--ctrl type=unixio,fd=9,clientfd=8", "control", Endpoint(Kind.UNIX, descriptor=9)),
        ("--ctrl type=unixio,path=/c,terminate=false", "control", Endpoint(Kind.UNIX, path="/c")),
        ("--fd 5", "terminate", True),
        ("-t", "terminate", True),
        ("--tpmstate backend-uri=file://rel", "state", StatePlace("rel", is_directory=False)),
        ("--tpmstate dir=/d,lock=false,backup,fsync=false", "state", StatePlace("/d", is_directory=True, lock=False,
            backup=True, fsync=False)),
        ("--key file=/k,format=binary,mode=aes-cbc,remove", "key", KeySource("/k", None, password=False, size=16,
            format="binary", remove=True)),
        ("--key pwdfile=/k,kdf=sha512", "key", KeySource("/k", None, password=True, size=16, kdf="sha512")),
        ("--key file=/k,pwdfile=/p", "key", KeySource("/k", None, password=False, size=16)),
        ("--flags startup-none", "flags", Flags(need_init=True, startup="none")),
        ("--flags startup-state,startup-clear", "flags", Flags(need_init=False, startup="clear")),
        ("--flags not-need-init,,", "flags", Flags(need_init=False)),
        ("--flags disable-auto-shutdown", "flags", Flags(auto_shutdown=False)),
        ("--flags startup-deactivated", "flags", Flags(need_init=False, startup="deactivated")),
        ("--locality reject-locality-4", "reject_locality_4", True),
        ("--locality allow-set-locality=1", "allow_set_locality", True),
        ("--log level=5", "log", LogTarget(level=5)),
        ("--log fd=7,prefix=x,truncate,level=0", "log", LogTarget(descriptor=7, prefix="x", truncate=True)),
        ("--pid fd=9", "pid", PidTarget(None, 9)),
        ("--seccomp action=log", "seccomp", "log"),
        ("--print-info 0x21", "print_info", 0x21),
        ("--print-info 010", "print_info", 8),
        ('--profile profile={"Name":"custom","x":{"y":1}},remove-disabled=check', "profile", ProfileSource(
            '{"Name":"custom","x":{"y":1}}', None, None, "check")),
        ("--profile name=null", "profile", ProfileSource('{"Name":"null"}', None, None, None)),
        ("--pcap file=/p,truncate,mode=0600", "pcap", PcapTarget("/p", None, 0o600, True, False)),
        ("--runas tss --chroot /jail", "chroot", "/jail"),
        ("-rtss", "run_as", "tss"),
        ("--manager --guest web", "manager", Manager(None, None, "web")),
        ("--manager=/a.sock --vtpm v", "manager", Manager("/a.sock", "v", None)),
        ("--term", "terminate", True),
        ("--tpmstate dir=/a,dir=/b", "state", StatePlace("/a", is_directory=True)),
        ("--tpmstate dir=/a --tpmstate dir=/b", "state", StatePlace("/b", is_directory=True)),
        ("-h", "help", True),
    ],
)  # fmt: skip
def test_what_options_mean(text: str, field: str, value: object) -> None:
    assert getattr(parsed(text), field) == value


def test_the_environment_says_what_the_command_line_does_not() -> None:
    environment = {"TPM_PATH": "/e", "TPM_PORT": "99"}
    assert parsed("", environment).state == StatePlace("/e", is_directory=True)
    assert parsed("--tpmstate dir=/d", environment).state == StatePlace("/d", is_directory=True)
    assert parsed("--server type=tcp", environment).server == Endpoint(Kind.TCP, port=99)
    assert parsed("--server port=1", environment).server == Endpoint(Kind.TCP, port=1)
    assert parsed("", environment).server is None
    assert environment == {"TPM_PATH": "/e", "TPM_PORT": "99"}


def test_a_character_device_has_its_own_options() -> None:
    assert parsed("-c /dev/x", interface=Interface.CHARDEV).device == "/dev/x"
    proxy = parsed("--vtpm-proxy --tpm2", interface=Interface.CHARDEV)
    assert proxy.vtpm_proxy
    assert proxy.flags == Flags(need_init=False, startup="clear")
    assert parsed("--vtpm-proxy --flags startup-state", interface=Interface.CHARDEV).flags.startup == "state"
    for text in ("", "--tpm2", "--server port=1", "-p 4", "-t"):
        with pytest.raises(OptionError):
            parsed(text, interface=Interface.CHARDEV)


SAME_AS_SWTPM = [
    "stray",
    "--ctrl path=x",
    "--ctrl type=unixio",
    "--ctrl type=tcp",
    "--server fd=x",
    "--server port=70000",
    "--server type=tcp,port=1,nothing",
    "--key mode=aes-cbc",
    "--key file=/etc/passwd,mode=foo",
    "--key file=/etc/passwd,format=foo",
    "--key pwdfile=/etc/passwd,kdf=foo",
    "--pid foo",
    "--pid level=3",
    "--locality foo",
    "--flags foo",
    "--seccomp action=foo",
    "--tpmstate mode=0640",
    "--tpmstate dir=d,mode=01000",
    "--tpmstate dir=d,mode=9",
    "--tpmstate dir=",
    "--log level=x",
    "-p x",
    "-p 99999999",
    "--fd x",
    "--fd -1",
    "--print-states",
]


@pytest.mark.parametrize("text", SAME_AS_SWTPM)
def test_errors_read_as_swtpms_own(text: str) -> None:
    words = ["swtpm", "socket", "--tpm2", *text.split()]
    theirs = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert theirs.returncode == 1
    with pytest.raises(OptionError) as caught:
        parsed(text)
    assert not caught.value.usage
    assert theirs.stderr.strip() == f"swtpm: {caught.value}"


@pytest.mark.parametrize("text", ["--bogus", "--server", "-x", "-p", "--tpm2=1", "-dx"])
def test_unknown_options_are_answered_with_the_usage_as_swtpm_does(text: str) -> None:
    theirs = subprocess.run(["swtpm", "socket", text], capture_output=True, text=True, timeout=20, check=False)
    assert theirs.returncode == 1
    with pytest.raises(OptionError) as caught:
        parsed(text)
    assert caught.value.usage
    assert theirs.stderr.splitlines()[0] == str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "--tpmstate backend-uri=iscsi://x",
        "--profile file=a,name=b",
        "--profile remove-disabled=check",
        "--profile name=null,remove-disabled=no",
        "--profile profile={x",
        "--profile profile={x}y",
        "--pcap truncate",
        "--fd 2",
        "--print-info 08",
        "--flags startup-deactivated --tpm2",
        "--vtpm v",
        "--guest g",
        "--manager --tpmstate dir=/d",
        "--manager --key file=/k",
        "--manager --migration incoming",
        "--log fd=99999999999",
        "--p",
    ],
)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parsed(text)


WORDS = st.one_of(
    st.sampled_from(["--" + name for names in LONG.values() for name in names] + ["-" + x for x in "cdfhprtR"]),
    st.sampled_from(
        ["type=tcp", "port=1", "dir=/x", "=", ",", "fd=3", "mode=0600", "file=/x", "-", "--", "=x", "a={b"]
    ),
    st.text(alphabet="abfdmo=,{}-0189/ \t\n\u0661", max_size=20),
)


@given(st.sampled_from(list(Interface)), st.lists(WORDS, max_size=8), st.dictionaries(st.just("TPM_PORT"), WORDS))
@settings(max_examples=500)
def test_any_words_are_options_or_one_error(
    interface: Interface, words: list[str], environment: dict[str, str]
) -> None:
    with suppress(OptionError):
        assert parse(interface, words, environment).words == tuple(words)


NAMES = st.text(alphabet="abcxyz/._0", min_size=1, max_size=12)
STATES = st.builds(
    StatePlace,
    path=NAMES,
    is_directory=st.booleans(),
    mode=st.none() | st.integers(0, 0o777),
    lock=st.none() | st.booleans(),
    backup=st.booleans(),
    fsync=st.booleans(),
)


@given(STATES)
def test_a_state_place_survives_the_command_line(place: StatePlace) -> None:
    words = [f"backend-uri={'dir' if place.is_directory else 'file'}://{place.path}"]
    words += [] if place.mode is None else [f"mode=0{place.mode:o}"]
    words += [] if place.lock is None else [f"lock={str(place.lock).lower()}"]
    words += ["backup"] if place.backup else []
    words += [] if place.fsync else ["fsync=false"]
    assert parse(Interface.SOCKET, ["--tpmstate", ",".join(words)], {}).state == place


@given(st.lists(st.tuples(st.sampled_from(sorted(LONG[Interface.SOCKET])), NAMES), max_size=6))
def test_options_come_out_in_order_however_they_are_written(pairs: list[tuple[str, str]]) -> None:
    long = LONG[Interface.SOCKET]
    letters = {name: letter for letter, name in SHORT[Interface.SOCKET].items()}
    words, expected = [], []
    for position, (name, value) in enumerate(pairs):
        needed = long[name] == "needed"
        expected.append((name, value if needed else None))
        if name in letters:
            words += [f"-{letters[name]}{value}"] if needed else [f"-{letters[name]}"]
        elif needed:
            words += [f"--{name}={value}"] if position % 2 else [f"--{name}", value]
        else:
            words.append(f"--{name}")
    assert getopt_long([*words, "last"], "socket", long, SHORT[Interface.SOCKET]) == (expected, ["last"])
