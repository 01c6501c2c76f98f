"""The main job, as the issue words it: tpm2-tools to the hardware TPM and back, over a restart of everything."""

import os
import signal
import socket
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, alive, wait_for

pytestmark = pytest.mark.e2e
INDEX = "0x1500016"


def test_a_guests_secrets_survive_a_restart_of_everything(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("web")
    tcti = vtpms.attach("web", "guest-1")["tcti"]

    def tool(*words: str) -> str:
        return vtpms.tool(tcti, *words, cwd=tmp_path).out

    tool("tpm2_createprimary", "-Q", "-C", "o", "-c", "primary.ctx")
    tool("tpm2_evictcontrol", "-C", "o", "-c", "primary.ctx", "0x81010001")
    tool("tpm2_flushcontext", "-t")
    (tmp_path / "secret").write_bytes(b"BitLocker volume key")
    tool("tpm2_nvdefine", "-Q", INDEX, "-C", "o", "-s", "20", "-a", "ownerread|ownerwrite")
    tool("tpm2_nvwrite", "-Q", INDEX, "-C", "o", "-i", "secret")
    (tmp_path / "sealed").write_bytes(b"LUKS passphrase")
    tool("tpm2_create", "-Q", "-C", "0x81010001", "-i", "sealed", "-u", "seal.pub", "-r", "seal.priv")
    digest = "11" * 32
    tool("tpm2_pcrextend", f"16:sha256={digest}")
    before = tool("tpm2_pcrread", "sha256:16")
    assert tpm.extended(bytes.fromhex(digest)).hex() in before.lower()
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
    tool(
        "tpm2_create",
        "-Q",
        "-C",
        "0x81010001",
        "-G",
        "ecc:ecdsa-sha256:null",
        "-u",
        "ak.pub",
        "-r",
        "ak.priv",
        "-a",
        attributes,
    )
    tool("tpm2_load", "-Q", "-C", "0x81010001", "-u", "ak.pub", "-r", "ak.priv", "-c", "ak.ctx")
    tool("tpm2_readpublic", "-Q", "-c", "ak.ctx", "-f", "pem", "-o", "ak.pem")
    tool("tpm2_quote", "-Q", "-c", "ak.ctx", "-l", "sha256:16", "-q", "abcd", "-m", "m", "-s", "s", "-o", "p")
    tool("tpm2_checkquote", "-u", "ak.pem", "-m", "m", "-s", "s", "-f", "p", "-q", "abcd")

    vtpms.restart()
    assert vtpms.show("web")["state"] == "running"
    assert vtpms.show("web")["tcti"] == tcti
    tool("tpm2_nvread", "-C", "o", INDEX, "-o", "again")
    assert (tmp_path / "again").read_bytes() == b"BitLocker volume key"
    tool("tpm2_load", "-Q", "-C", "0x81010001", "-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
    tool("tpm2_unseal", "-Q", "-c", "seal.ctx", "-o", "unsealed")
    assert (tmp_path / "unsealed").read_bytes() == b"LUKS passphrase"


def test_nothing_of_a_guests_secret_lies_in_clear_in_any_image(vtpms: Installation) -> None:
    secret = os.urandom(32)
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(0x1500016, 32)
    guest.write(0x1500016, secret)
    guest.close()
    vtpms.stop()
    for path in [path for path in vtpms.state.rglob("*") if path.is_file()]:
        assert secret not in path.read_bytes(), path
    (vtpms.state / "control").write_bytes(b"before" + secret)
    assert any(secret in path.read_bytes() for path in vtpms.state.rglob("*") if path.is_file()), "the test sees one"


def test_two_vtpms_do_not_see_each_others_secrets(vtpms: Installation) -> None:
    for name in ("one", "two"):
        vtpms.add(name)
    one, two = (Guest(vtpms.attach(name, f"guest-{name}")["endpoint"]) for name in ("one", "two"))
    one.define(0x1500016, 16)
    one.write(0x1500016, b"only one may rea")
    assert two.code(tpm.nv_read(0x1500016, 16)) != 0
    two.define(0x1500016, 16)
    two.write(0x1500016, b"two has its own!")
    assert one.read(0x1500016, 16) == b"only one may rea"
    assert one.transmit(tpm.get_random(32)) != two.transmit(tpm.get_random(32))
    uids = {Path(f"/proc/{vtpms.show(name)['pid']}").stat().st_uid for name in ("one", "two")}
    statuses = [Path(f"/proc/{vtpms.show(name)['pid']}/status").read_text() for name in ("one", "two")]
    real = {line.split()[1] for text in statuses for line in text.splitlines() if line.startswith("Uid:")}
    if os.geteuid() == 0:
        assert len(real) == 2, f"each instance has a user of its own ({real}, {uids})"
    one.close()
    two.close()


def test_a_tpm_12_starts_up_and_reads_its_pcrs(vtpms: Installation) -> None:
    vtpms.add("old", "--tpm", "1.2")
    shown = vtpms.attach("old", "guest", "--startup", "none")
    assert shown["tpm"] == "1.2"
    guest = Guest(shown["endpoint"])
    startup_clear = bytes.fromhex("00c10000000c000000990001")
    assert guest.code(startup_clear) == 0
    answer = guest.transmit(bytes.fromhex("00c10000000e0000001500000000"))
    assert answer[6:10] == bytes(4)
    assert len(answer) == 30
    guest.close()
    vtpms.restart()
    guest = Guest(vtpms.show("old")["endpoint"])
    assert guest.transmit(bytes.fromhex("00c10000000e0000001500000000"))[:2] == b"\x00\xc4"
    guest.close()


def test_a_clean_stop_leaves_no_process_and_keeps_pcrs(vtpms: Installation) -> None:
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.extend(7, b"\x22" * 32)
    value = guest.pcr(7)
    guest.close()
    assert vtpms.stop() == 0
    assert vtpms.processes() == []
    vtpms.start()
    assert guest.pcr(7) == value, "the guest's platform was not reset, so its PCRs stand"
    guest.close()
    vtpms.command("vtpm-detach", "web")
    guest = Guest(vtpms.attach("web", "another")["endpoint"])
    assert guest.pcr(7) == bytes(32), "a new attach is a new platform"
    guest.close()


def test_a_manager_that_steps_down_leaves_its_instances_to_the_next(vtpms: Installation) -> None:
    vtpms.add("web")
    shown = vtpms.attach("web")
    guest = Guest(shown["endpoint"])
    guest.define(0x1500016, 8)
    assert vtpms.stop(signal.SIGHUP) == 0
    assert alive(shown["pid"])
    assert len(guest.good(tpm.get_random(8))) == 20, "reading needs no manager"
    vtpms.start()
    assert vtpms.show("web")["pid"] == shown["pid"]
    guest.write(0x1500016, b"all well")
    assert guest.read(0x1500016, 8) == b"all well"
    guest.close()


def test_the_control_channel_answers_what_tpm2_tss_asks(vtpms: Installation) -> None:
    vtpms.add("web")
    shown = vtpms.attach("web")
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(shown["control"])
        control.sendall(bytes.fromhex("00000005") + b"\x00")
        assert control.recv(4) == bytes(4)
        control.sendall(bytes.fromhex("00000005") + b"\x03")
        assert control.recv(4) == bytes.fromhex("0000003d"), "a guest may not choose locality 3"


def test_a_platform_reset_clears_pcrs_and_keeps_nv(vtpms: Installation) -> None:
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(0x1500016, 8)
    guest.write(0x1500016, b"stays on")
    guest.extend(0, b"\x33" * 32)
    vtpms.command("vtpm-reset-platform", "web")
    assert guest.pcr(0) == bytes(32)
    assert guest.read(0x1500016, 8) == b"stays on"
    guest.close()


def test_detach_and_attach_again_with_another_front_end(vtpms: Installation) -> None:
    from frontend_backend.front import RingFrontEnd

    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(0x1500016, 8)
    guest.write(0x1500016, b"by ring!")
    guest.close()
    shown = vtpms.command("vtpm-detach", "web", "--json").json
    assert (shown["state"], shown["endpoint"], shown["pid"]) == ("detached", None, None)
    shown = vtpms.attach("web", "guest", "--frontend", "ring")
    wait_for(lambda: Path(shown["endpoint"]).exists(), "the ring's socket")
    with RingFrontEnd.connect(shown["endpoint"]) as front:
        assert tpm.nv_content(front.transact(tpm.nv_read(0x1500016, 8), timeout=10)) == b"by ring!"
