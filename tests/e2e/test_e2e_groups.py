"""Tenants: groups with keys and recovery keys of their own, on a real swtpm, driven by the installed commands."""

import contextlib
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, Guest, Installation, wait_for
from fixtures_tpm import SwtpmProcess, running_swtpm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
EXTEND = "1:sha256=" + "11" * 32


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as made:
        yield made


def group(vtpms: Installation, verb: str, *words: str, code: int = 0) -> Any:
    answer = vtpms.command(f"vtpm-group-{verb}", *words, "--json", check=False)
    assert answer.code == code, f"{verb} {words}: {answer.code} {answer.out} {answer.err}"
    return answer.json


def used(vtpms: Installation, name: str, tenant: str, content: bytes = b"precious") -> Guest:
    vtpms.add(name, "--group", tenant)
    guest = Guest(vtpms.attach(name, f"guest-{name}")["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, content)
    return guest


def two_tenants(vtpms: Installation, swtpm: SwtpmProcess) -> Path:
    """Group `bound` is bound to PCR 1 and has a recovery key of its own, which is returned; `free` is bound to none."""
    own = vtpms.base / "tenant.pem"
    vtpms.command("vtpm-recovery-key", "new", str(own))
    vtpms.init("--pcrs", "none", tcti=swtpm.tcti)
    vtpms.start()
    made = group(vtpms, "add", "bound", "--pcrs", "sha256:1", "--recovery", f"{own}.pub")
    assert (made["pcrs"], made["state"], made["own_recovery"]) == ("sha256:1", "open", True)
    group(vtpms, "add", "free", "--pcrs", "none")
    used(vtpms, "one", "bound", b"of bound").close()
    used(vtpms, "two", "free", b"of free!").close()
    return own


def test_a_tenant_whose_platform_changed_is_closed_and_the_others_go_on(
    bare: Installation, swtpm: SwtpmProcess
) -> None:
    own = two_tenants(bare, swtpm)
    assert bare.stop() == 0
    swtpm.tool("tpm2_pcrextend", EXTEND)
    bare.start()
    shown = {row["name"]: row for row in group(bare, "list")}
    assert {name: row["state"] for name, row in shown.items()} == {"bound": "closed", "default": "open", "free": "open"}
    assert "PCR 1" in shown["bound"]["reason"]
    rows = {row["name"]: row for row in bare.command("vtpm-list", "--json").json}
    assert (rows["one"]["state"], rows["two"]["state"]) == ("closed", "running")
    assert [row["name"] for row in bare.command("vtpm-list", "--group", "bound", "--json").json] == ["one"]
    bare.command("vtpm-detach", "one")
    refused = bare.command("vtpm-attach", "one", "guest", check=False)
    assert refused.code == 5
    assert "group bound is closed" in refused.err
    assert "vtpm-group-open bound" in refused.err
    group(bare, "open", "bound", code=5)
    guest = Guest(bare.show("two")["endpoint"])
    assert guest.read(INDEX, 8) == b"of free!"
    guest.write(INDEX, b"goes on!")
    guest.close()
    bare.add("three", "--group", "free")
    verdicts = {row["verdict"] for row in bare.command("vtpm-verify", "--all", "--json", check=False).json}
    assert verdicts == {"ok", "unchecked"}
    assert bare.vtpm_manager("status", "--json").json["closed_groups"] == "bound"
    assert bare.stop() == 0
    checked = bare.vtpm_manager("check", check=False)
    assert checked.code == 5
    assert "group bound: closed" in checked.out

    wrong = bare.vtpm_manager("recover", "--group", "bound", "--key", str(bare.recovery), check=False)
    assert wrong.code != 0
    bare.vtpm_manager("recover", "--group", "bound", "--key", str(own))
    bare.start()
    assert group(bare, "show", "bound")["state"] == "open"
    guest = Guest(bare.attach("one", "guest")["endpoint"])
    assert guest.read(INDEX, 8) == b"of bound"
    guest.close()


def test_a_group_that_was_closed_opens_without_a_restart_once_its_pcrs_are_back(
    bare: Installation, swtpm: SwtpmProcess
) -> None:
    two_tenants(bare, swtpm)
    assert bare.stop() == 0
    swtpm.tool("tpm2_pcrextend", EXTEND)
    bare.start()
    assert bare.show("one")["state"] == "closed"
    swtpm.stop()  # a reset of the TPM, as by a reboot of the machine that the manager did not see
    swtpm.start()
    # the connection is lost with the TPM, and made anew at the next command
    wait_for(lambda: bare.command("vtpm-group-open", "bound", check=False).code == 0, "the group")
    assert group(bare, "show", "bound")["state"] == "open"
    assert bare.show("one")["state"] == "running", "it was attached, so it is started"
    guest = Guest(bare.show("one")["endpoint"])
    assert guest.read(INDEX, 8) == b"of bound"
    guest.close()


def test_one_that_sleeps_keeps_its_connection_while_its_group_is_closed(
    bare: Installation, swtpm: SwtpmProcess
) -> None:
    two_tenants(bare, swtpm)
    guest = Guest(bare.show("one")["endpoint"])
    guest.extend(5, b"\x55" * 32)
    value = guest.pcr(5)
    bare.command("vtpm-hibernate", "one")
    bare.kill()
    swtpm.tool("tpm2_pcrextend", EXTEND)
    bare.start()
    assert bare.show("one")["state"] == "closed"
    assert guest.sock is not None
    guest.sock.sendall(tpm.pcr_read(5))
    time.sleep(0.5)
    assert bare.show("one")["state"] == "closed"
    swtpm.stop()
    swtpm.start()
    wait_for(lambda: bare.command("vtpm-group-open", "bound", check=False).code == 0, "the group")
    assert tpm.receive_response(guest.sock)[-32:] == value, "it was sent while the group was closed"
    guest.close()


def test_backup_and_rebuild_do_not_stop_at_a_closed_group(
    bare: Installation, swtpm: SwtpmProcess, tmp_path: Path
) -> None:
    own = two_tenants(bare, swtpm)
    assert bare.stop() == 0
    swtpm.tool("tpm2_pcrextend", EXTEND)
    bare.start()
    backup = bare.vtpm_manager("backup", str(tmp_path / "all.vtpm"), "--json")
    assert (backup.json["state_images"], backup.json["missing"]) == (2, 0)
    assert "1 vTPMs are in closed groups" in backup.err
    assert bare.stop() == 0

    done = bare.vtpm_manager("rebuild-catalogue", "--json")
    assert (done.json["names_kept"], done.json["names_made"], done.json["attachments_kept"]) == (2, 0, 2)
    assert "group bound is closed" in done.out
    bare.start()
    assert (bare.show("one")["state"], bare.show("two")["state"]) == ("closed", "running")
    assert bare.stop() == 0

    bare.vtpm_manager("recover", "--group", "bound", "--key", str(own))
    images = {path: path.read_bytes() for path in (bare.state / "state").glob("*.img")}
    bare.start()
    guest = Guest(bare.show("one")["endpoint"])
    assert guest.read(INDEX, 8) == b"of bound"
    guest.close()
    assert bare.command("vtpm-verify", "--all", check=False).code == 0
    with tarfile.open(tmp_path / "all.vtpm") as tar:
        kept = {name: tar.extractfile(name) for name in tar.getnames() if name.endswith(".img")}
        content = {name.rsplit("/", 1)[-1]: file.read() for name, file in kept.items() if file is not None}
    uuid = bare.show("one")["uuid"]
    assert content[f"{uuid}.img"] == images[bare.state / "state" / f"{uuid}.img"], "copied as it was"


@pytest.mark.parametrize("cleared", [False, True], ids=["another board", "a cleared TPM"])
def test_on_another_tpm_each_tenant_comes_back_by_its_own_key(
    bare: Installation, swtpm: SwtpmProcess, cleared: bool
) -> None:
    own = two_tenants(bare, swtpm)
    assert bare.stop() == 0
    with contextlib.ExitStack() as open_now:
        other = swtpm if cleared else open_now.enter_context(running_swtpm())
        if cleared:
            swtpm.tool("tpm2_clear", "-c", "l")
            assert bare.try_start() != 0
        done = bare.vtpm_manager("recover", "--key", str(bare.recovery), "--tcti", other.tcti, check=False)
        assert done.code == 5, f"{done.out} {done.err}"
        assert "recovered store" in done.out
        assert "group bound stays closed" in done.err
        bare.start()
        assert bare.show("one")["state"] == "closed"
        guest = Guest(bare.show("two")["endpoint"])
        assert guest.read(INDEX, 8) == b"of free!"
        guest.close()
        assert bare.stop() == 0
        bare.vtpm_manager("recover", "--group", "bound", "--key", str(own))
        bare.start()
        guest = Guest(bare.show("one")["endpoint"])
        assert guest.read(INDEX, 8) == b"of bound"
        guest.close()
        kinds = [event["kind"] for event in bare.command("vtpm-events", "--json").json]
        assert {"recovered", "group-recovered"} <= set(kinds)
        assert bare.command("vtpm-verify", "--all", check=False).code == 0


class Saver(threading.Thread):
    """A guest that saves all the time; `written` is what was acknowledged last."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(daemon=True)
        self.guest, self.ended, self.written, self.failure = guest, threading.Event(), 0, ""

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.guest.write(INDEX, (self.written + 1).to_bytes(8))
            except (OSError, AssertionError) as error:
                self.failure = str(error)
                return
            self.written += 1


def test_a_rotation_under_load_that_is_killed_anywhere_leaves_one_key_and_every_save(bare: Installation) -> None:
    bare.init("--pcrs", "none")
    bare.start()
    group(bare, "add", "tenant")
    bare.command("vtpm-add", "--group", "tenant", "--count", "2000", "--quiet")
    savers = [Saver(used(bare, f"busy-{number}", "tenant", bytes(8))) for number in range(2)]
    for saver in savers:
        saver.start()
    group(bare, "rotate", "tenant")
    wait_for(lambda: all(saver.written > 20 for saver in savers), "saves after the rotation")
    cut_short = 0
    for delay in (0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12):  # sealing takes about 50 ms here, the store's part 10
        begun = bare.log.read_text().count("group-rotate")
        rotation = subprocess.Popen(
            [str(BIN / "vtpm-group-rotate"), "tenant", "--socket", str(bare.runtime / "admin.sock")],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda begun=begun: bare.log.read_text().count("group-rotate") > begun, "the rotation to begin")
        time.sleep(delay)
        bare.kill()
        cut_short += rotation.wait(60) != 0
        bare.start()
        assert group(bare, "show", "tenant")["state"] == "open"
        before = [saver.written for saver in savers]
        wait_for(
            lambda before=before: all(s.written > b or s.failure for s, b in zip(savers, before, strict=True)),
            "saves after the next start",
        )
        assert not any(saver.failure for saver in savers), [saver.failure for saver in savers]
    assert cut_short, "the manager went away in the middle"
    for saver in savers:
        saver.ended.set()
        saver.join(30)
    assert bare.command("vtpm-verify", "--all", check=False).code == 0
    bare.restart()
    for number, saver in enumerate(savers):
        saver.guest.close()
        guest = Guest(bare.show(f"busy-{number}")["endpoint"])
        assert int.from_bytes(guest.read(INDEX, 8)) == saver.written
        guest.close()
    assert group(bare, "show", "tenant")["vtpms"] == 2002


def test_a_store_from_before_a_rotation_is_refused(bare: Installation, swtpm: SwtpmProcess) -> None:
    two_tenants(bare, swtpm)
    bare.kill()
    old = (bare.state / "store.img").read_bytes()
    bare.start()
    group(bare, "rotate", "free")
    bare.kill()
    new = (bare.state / "store.img").read_bytes()
    (bare.state / "store.img").write_bytes(old)
    for pid in bare.processes():
        os.kill(pid, signal.SIGKILL)
    swtpm.stop()  # only the durable anchor is left
    swtpm.start()
    assert bare.try_start() == 6
    (bare.state / "store.img").write_bytes(new)
    bare.start()
    assert group(bare, "show", "free")["state"] == "open"
