from dataclasses import replace

import pytest

from manager.hwtpm_errors import BadSetting
from manager.hwtpm_setting import TctiKind, TctiSetting


def test_embedded_is_read() -> None:
    assert TctiSetting.parse("embedded").kind is TctiKind.EMBEDDED


def test_a_socket_path_is_read() -> None:
    setting = TctiSetting.parse("swtpm:path=/run/tpm/sock")
    assert (setting.kind, setting.path) == (TctiKind.SWTPM_PATH, "/run/tpm/sock")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("swtpm", "127.0.0.1", 2321),
        ("swtpm:host=tpm.example,port=4000", "tpm.example", 4000),
        ("swtpm:port=4000", "127.0.0.1", 4000),
        ("swtpm:host=10.0.0.1", "10.0.0.1", 2321),
    ],
)
def test_a_host_and_a_port_are_read(text: str, host: str, port: int) -> None:
    setting = TctiSetting.parse(text)
    assert (setting.kind, setting.host, setting.port) == (TctiKind.SWTPM_TCP, host, port)


def test_a_device_is_read() -> None:
    setting = TctiSetting.parse("device:/dev/tpmrm0")
    assert (setting.kind, setting.path) == (TctiKind.DEVICE, "/dev/tpmrm0")


@pytest.mark.parametrize("name", ["tis", "crb"])
def test_registers_are_at_their_usual_place_and_locality_two(name: str) -> None:
    setting = TctiSetting.parse(name)
    assert (setting.kind, setting.base, setting.locality, setting.path) == (TctiKind(name), 0xFED40000, 2, "/dev/mem")
    assert setting == replace(TctiSetting.parse(f"{name}:"), text=name)


def test_each_option_of_registers_is_read() -> None:
    setting = TctiSetting.parse("tis:base=0x80000000,locality=0,path=/tmp/x y")
    assert (setting.base, setting.locality, setting.path) == (0x80000000, 0, "/tmp/x y")


@pytest.mark.parametrize(
    "text",
    [
        "tis:base=0xfed40001",
        "tis:base=4096",  # memory: what is written there would be somebody's
        "tis:base=-0xfed40000",
        "tis:base=0xffffffffff000",
        "tis:base=x",
        "tis:locality=5",
        "tis:locality=-1",
        "tis:locality=²",
        "crb:locality=02",
        "tis:locality=2,locality=2",
        "tis:speed=1",
        "tis:path=",
        "crb:,",
    ],
)
def test_registers_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(BadSetting, match=r"tis:locality=2|0 to 4|multiple of 0x1000") as refused:
        TctiSetting.parse(text)
    assert refused.value.code == 2


@pytest.mark.parametrize("text", ["mssim:host=localhost", "tabrmd", "tabrmd:bus_name=x"])
def test_other_settings_are_for_the_loader_as_written(text: str) -> None:
    setting = TctiSetting.parse(text)
    assert (setting.kind, setting.text) == (TctiKind.LOADER, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "embedded:x",
        "device",
        "device:",
        "swtpm:path=",
        "swtpm:path=a,port=1",
        "swtpm:path=a,path=b",
        "swtpm:port=0",
        "swtpm:port=65535",
        "swtpm:port=x",
        "swtpm:port=²",
        "swtpm:speed=9",
        "swtpm:path",
        "swtpm:,",
        " mssim",
        "mssim\n",
    ],
)
def test_settings_that_name_no_tpm_are_refused_with_examples(text: str) -> None:
    with pytest.raises(BadSetting, match=r"swtpm:path=SOCKET|1 to 65534") as refused:
        TctiSetting.parse(text)
    assert refused.value.code == 2


def test_a_path_that_no_socket_can_have_is_refused_in_bytes() -> None:
    longest = "/" + "s" * (107 - len("/.ctrl"))
    assert TctiSetting.parse(f"swtpm:path={longest}").path == longest
    with pytest.raises(BadSetting, match="108 bytes, 107 are possible"):
        TctiSetting.parse(f"swtpm:path={longest}s")
    with pytest.raises(BadSetting, match="shorter"):
        TctiSetting.parse("swtpm:path=/" + "ü" * 60)
