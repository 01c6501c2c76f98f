"""What bad input gets: a clear message, the documented exit code, and every byte kept."""

import hashlib
import os
import signal
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, Guest, Installation, installation, wait_for
from fixtures_tpm import running_swtpm

pytestmark = pytest.mark.e2e
INDEX = 0x1500016


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, *offsets: int) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))


def stored_vtpm(vtpms: Installation, name: str = "web") -> Path:
    """A detached vTPM with something in it; returns its state image."""
    vtpms.add(name)
    guest = Guest(vtpms.attach(name)["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"precious")
    guest.close()
    shown = vtpms.command("vtpm-detach", name, "--json").json
    return Path(shown["state_image"])


def attach_refused(vtpms: Installation, code: int, name: str = "web") -> str:
    answer = vtpms.command("vtpm-attach", name, "guest", "--json", check=False)
    assert answer.code == code, answer.err
    assert answer.json["error"]["code"] == code
    return answer.err


def still_precious(vtpms: Installation, name: str = "web") -> None:
    guest = Guest(vtpms.attach(name)["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()


# --- verbs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ["vtpm-add", "--name", "has space"]),
        (2, ["vtpm-add", "--name", "12345678-1234-1234-1234-123456789012"]),
        (2, ["vtpm-add", "--uuid", "no-uuid"]),
        (2, ["vtpm-add", "--tpm", "3.0"]),
        (2, ["vtpm-add", "--colour", "red"]),
        (3, ["vtpm-add", "--group", "nowhere"]),
        (3, ["vtpm-show", "nobody"]),
        (3, ["vtpm-attach", "nobody", "guest"]),
        (3, ["vtpm-detach", "nobody"]),
        (2, ["vtpm-attach", "web"]),
        (2, ["vtpm-attach", "web", "a guest"]),
        (2, ["vtpm-attach", "web", "guest", "--owner", "no-such-user-here"]),
        (2, ["vtpm-attach", "web", "guest", "--mode", "9"]),
        (4, ["vtpm-detach", "web"]),
        (4, ["vtpm-reset-platform", "web"]),
        (2, ["vtpm-remove", "web"]),
        (2, ["vtpm-reset", "web"]),
        (4, ["vtpm-add", "--name", "web"]),
        (2, ["vtpm", "no-such-verb"]),
    ],
)
def test_each_verb_says_what_is_wrong_and_exits_by_the_table(module: Installation, code: int, words: list[str]) -> None:
    answer = module.command(*words, check=False)
    assert (answer.code, answer.out) == (code, ""), answer.err
    assert answer.err.strip()
    assert "Traceback" not in answer.err


@pytest.fixture(scope="module")
def module() -> object:
    from e2e_rig import installation

    with installation() as made:
        made.init()
        made.start()
        made.add("web")
        yield made


def test_a_vtpm_is_attached_once(vtpms: Installation) -> None:
    vtpms.add("web")
    vtpms.attach("web", "guest-1")
    assert "attached to guest guest-1 already" in attach_refused(vtpms, 4)
    assert vtpms.command("vtpm-remove", "web", "--yes", check=False).code == 4
    assert vtpms.show("web")["guest"] == "guest-1"


def test_no_manager_is_not_found(bare: Installation) -> None:
    answer = bare.command("vtpm-list", check=False)
    assert answer.code == 3
    assert "vtpm-manager run" in answer.err


def test_malformed_admin_messages_are_answered_and_the_next_is_served(vtpms: Installation) -> None:
    for data in (b"\x00", os.urandom(200), b"\x93\x01\xacAdminRequest\x80", b"\x93\x02\xa1x\x80"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as admin:
            admin.settimeout(10)
            admin.connect(str(vtpms.runtime / "admin.sock"))
            admin.send(data)
            assert b"malformed" in admin.recv(4096)
    assert vtpms.command("vtpm-list", "--json").json == []


def test_others_may_not_administer(vtpms: Installation) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    (vtpms.runtime / "admin.sock").chmod(0o666)
    vtpms.base.chmod(0o755)
    script = (
        "import socket,sys; from frontend_backend.messages_admin import *; s=socket.socket(1,5);"
        f"s.connect({str(vtpms.runtime / 'admin.sock')!r}); s.send(encode_admin(AdminRequest('list')));"
        "print(decode_admin(s.recv(65536)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "/usr/bin/python3",
            "-c",
            script,
        ],
        env={"PYTHONPATH": f"{root}:{root}/.venv/lib/python3.11/site-packages"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("the checkout is not readable by others")
    assert "DENIED" in done.stdout, done.stdout + done.stderr


# --- state images ---------------------------------------------------------------------------------


def test_a_damaged_state_is_refused_kept_and_never_replaced(vtpms: Installation) -> None:
    image = stored_vtpm(vtpms)
    good = image.read_bytes()
    flip(image, 4096 + 700, 4096 + 16384 + 700)
    damaged = fingerprint(image)
    message = attach_refused(vtpms, 6)
    assert "quarantined" in message
    assert "kept" in message
    assert fingerprint(image) == damaged, "not a byte was changed"
    assert vtpms.show("web")["state"] == "quarantined"
    vtpms.restart()
    assert vtpms.show("web")["state"] == "quarantined"
    image.write_bytes(good)
    still_precious(vtpms)


def test_an_old_state_image_is_refused(vtpms: Installation) -> None:
    image = stored_vtpm(vtpms)
    old = image.read_bytes()
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.write(INDEX, b"newer!!!")
    guest.write(INDEX, b"precious")
    guest.close()
    vtpms.command("vtpm-detach", "web")
    newest = image.read_bytes()
    image.write_bytes(old)
    attach_refused(vtpms, 6)
    assert image.read_bytes() == old
    image.write_bytes(newest)
    still_precious(vtpms)


def test_the_state_images_of_two_vtpms_cannot_be_swapped(vtpms: Installation) -> None:
    one, two = stored_vtpm(vtpms, "one"), stored_vtpm(vtpms, "two")
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_bytes)
    two.write_bytes(one_bytes)
    attach_refused(vtpms, 6, "one")
    attach_refused(vtpms, 6, "two")
    one.write_bytes(one_bytes)
    two.write_bytes(two_bytes)
    still_precious(vtpms, "one")
    still_precious(vtpms, "two")


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "foreign"])
def test_a_state_image_that_is_not_there_is_not_a_new_tpm(vtpms: Installation, how: str) -> None:
    image = stored_vtpm(vtpms)
    good = image.read_bytes()
    if how == "missing":
        image.unlink()
    else:
        image.write_bytes({"empty": b"", "truncated": good[:5000], "foreign": os.urandom(40000)}[how])
    attach_refused(vtpms, 6)
    assert image.exists() == (how != "missing"), "nothing is made in its place"
    image.write_bytes(good)
    still_precious(vtpms)


def test_reset_is_the_only_way_to_a_fresh_tpm(vtpms: Installation) -> None:
    image = stored_vtpm(vtpms)
    flip(image, 4096 + 700, 4096 + 16384 + 700)
    attach_refused(vtpms, 6)
    vtpms.command("vtpm-reset", "web", "--yes")
    guest = Guest(vtpms.attach("web")["endpoint"])
    assert guest.code(tpm.nv_read(INDEX, 8)) != 0
    guest.define(INDEX, 8)
    guest.write(INDEX, b"precious")
    guest.close()
    vtpms.command("vtpm-detach", "web")
    still_precious(vtpms)


def test_remove_takes_record_key_and_image(vtpms: Installation) -> None:
    image = stored_vtpm(vtpms)
    vtpms.command("vtpm-remove", "web", "--yes")
    assert not image.exists()
    assert vtpms.command("vtpm-show", "web", check=False).code == 3
    vtpms.restart()
    assert vtpms.command("vtpm-list", "--json").json == []


def test_a_named_state_image_is_used_and_not_shared(vtpms: Installation) -> None:
    image = vtpms.base / "disk.img"
    vtpms.add("web", "--state-image", str(image))
    assert vtpms.attach("web")["state_image"] == str(image)
    assert image.stat().st_size > 4096
    answer = vtpms.command("vtpm-add", "--name", "thief", "--state-image", str(image), check=False)
    assert answer.code == 4
    vtpms.command("vtpm-detach", "web")
    vtpms.command("vtpm-remove", "web", "--yes")
    assert image.stat().st_size == 0


def test_a_file_that_never_was_a_state_image_outlives_the_vtpm_it_was_named_for(vtpms: Installation) -> None:
    thesis = vtpms.base / "thesis.txt"
    content = b"the administrator named the wrong file" * 500
    thesis.write_bytes(content)
    good = fingerprint(thesis)
    assert vtpms.command("vtpm-add", "--name", "web", "--state-image", str(thesis), check=False).code == 4
    thesis.write_bytes(b"")
    vtpms.add("web", "--state-image", str(thesis))
    thesis.write_bytes(content)
    attach_refused(vtpms, 4)
    vtpms.command("vtpm-reset", "web", "--yes")
    vtpms.command("vtpm-remove", "web", "--yes")
    assert fingerprint(thesis) == good


@pytest.mark.parametrize("name", ["/dev/null", "/"])
def test_a_state_image_is_a_file_or_a_block_device(module: Installation, name: str) -> None:
    answer = module.command("vtpm-add", "--name", "odd", "--state-image", name, check=False)
    assert answer.code in (1, 2), answer.err
    assert module.command("vtpm-show", "odd", check=False).code == 3


def test_a_store_that_is_too_small_is_a_usage_error(bare: Installation) -> None:
    assert bare.init("--store-size", "100", check=False).code == 2
    assert not (bare.state / "store.img").exists()
    bare.init()


def test_a_full_disk_is_met_before_the_command_and_loses_nothing(vtpms: Installation) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    small = vtpms.base / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], check=True)
    try:
        vtpms.add("web", "--state-image", str(small / "web.img"))
        guest = Guest(vtpms.attach("web")["endpoint"])
        kept, code = 0, 0
        for index in range(0x1500100, 0x1500140):
            code = guest.code(tpm.nv_define(index, 1500))
            if code:
                break
            guest.write(index, index.to_bytes(4, "big"))
            kept = index
        assert code == 0x923, f"NV unavailable, not a failure: {code:#x}"
        assert guest.code(tpm.get_random(8)) == 0, "what needs no room goes on"
        guest.close()
        vtpms.command("vtpm-detach", "web")
        guest = Guest(vtpms.attach("web")["endpoint"])
        assert guest.read(kept, 4) == kept.to_bytes(4, "big")
        guest.close()
        vtpms.command("vtpm-detach", "web")
    finally:
        vtpms.stop()
        subprocess.run(["umount", str(small)], check=True)


# --- the store and the hardware TPM ---------------------------------------------------------------


def test_an_old_store_is_refused(vtpms: Installation) -> None:
    stored_vtpm(vtpms)
    vtpms.stop()
    old = (vtpms.state / "store.img").read_bytes()
    vtpms.start()
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.write(INDEX, b"newer!!!")
    guest.close()
    vtpms.stop()
    newest = (vtpms.state / "store.img").read_bytes()
    (vtpms.state / "store.img").write_bytes(old)
    assert vtpms.try_start() == 6
    assert "older copy" in vtpms.refusal
    assert (vtpms.state / "store.img").read_bytes() == old
    (vtpms.state / "store.img").write_bytes(newest)
    vtpms.start()
    assert vtpms.show("web")["state"] == "running"


def test_an_old_store_is_refused_after_a_crash_too(vtpms: Installation) -> None:
    stored_vtpm(vtpms)
    old = (vtpms.state / "store.img").read_bytes()
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.write(INDEX, b"newer!!!")
    guest.close()
    vtpms.kill()
    for pid in vtpms.processes():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not vtpms.processes(), "everything to end")
    newest = (vtpms.state / "store.img").read_bytes()
    vtpms.start()
    vtpms.command("vtpm-reset-platform", "web")
    vtpms.stop()
    (vtpms.state / "store.img").write_bytes(old)
    assert vtpms.try_start() == 6
    (vtpms.state / "store.img").write_bytes(newest)
    assert vtpms.try_start() == 6, "also the newest of the time before the last open"


@pytest.mark.parametrize("how", ["flipped", "truncated", "foreign", "missing"])
def test_a_store_that_cannot_be_read_is_not_a_new_store(vtpms: Installation, how: str) -> None:
    stored_vtpm(vtpms)
    vtpms.stop()
    store = vtpms.state / "store.img"
    good = store.read_bytes()
    if how == "missing":
        store.unlink()
    elif how == "flipped":
        flip(store, 3 * 4096 + 100, 5 * 4096 + 100)
    else:
        store.write_bytes(good[:9000] if how == "truncated" else os.urandom(65536))
    bad = fingerprint(store) if store.exists() else None
    assert vtpms.try_start() == (3 if how == "missing" else 6), vtpms.refusal
    assert (fingerprint(store) if store.exists() else None) == bad
    assert vtpms.init(check=False).code == 4, "init does not make another one over it"
    store.write_bytes(good)
    vtpms.start()
    still_precious(vtpms)


def test_an_edited_catalogue_row_is_refused(vtpms: Installation) -> None:
    stored_vtpm(vtpms)
    vtpms.attach("web", "guest-1")
    vtpms.stop()
    with sqlite3.connect(vtpms.state / "catalogue.sqlite") as database:
        database.execute("update attachments set guest = 'thief'")
    database.close()
    assert vtpms.try_start() == 6, vtpms.refusal
    assert "attachments" in vtpms.refusal or "attachment" in vtpms.refusal


def test_a_missing_or_cleared_hardware_tpm_is_told_apart(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        bare.init(tcti=chip.tcti)
        bare.start()
        stored_vtpm(bare)
        bare.stop()
        chip.stop()
        assert bare.try_start() == 7
        assert "not available" in bare.refusal
        chip.start()
        bare.start()
        still_precious(bare)
        bare.stop()
        chip.tool("tpm2_clear")
        assert bare.try_start() == 6, bare.refusal
        assert "clear" in bare.refusal.lower()
        assert bare.vtpm_manager("recover", "--key", f"{bare.recovery}.pub", check=False).code != 0
        bare.vtpm_manager("recover", "--key", str(bare.recovery))
        bare.start()
        assert bare.show("web")["state"] == "running"
        bare.command("vtpm-detach", "web")
        still_precious(bare)
        bare.stop()
        assert bare.vtpm_manager("recover", "--key", str(bare.recovery), check=False).code == 4, "not while it works"


def test_an_operator_who_lost_the_newest_store_can_go_back_on_purpose(vtpms: Installation) -> None:
    image = stored_vtpm(vtpms)
    vtpms.stop()
    old = {path: path.read_bytes() for path in (vtpms.state / "store.img", image)}
    vtpms.start()
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.write(INDEX, b"newer!!!")
    guest.close()
    vtpms.command("vtpm-detach", "web")
    vtpms.stop()
    for path, content in old.items():
        path.write_bytes(content)
    assert vtpms.try_start() == 6
    refused = vtpms.vtpm_manager("recover", "--key", str(vtpms.recovery), check=False)
    assert refused.code == 4
    assert "accept-rollback" in refused.err
    shown = vtpms.vtpm_manager("accept-rollback", check=False)
    assert shown.code == 5
    assert "--key" in shown.err
    shown = vtpms.vtpm_manager("accept-rollback", "--json", check=False)
    assert (shown.code, shown.json["done"], shown.json["vtpms"]) == (5, None, 1)
    assert (shown.json["error"]["code"], "--key" in shown.err) == (5, True)
    assert vtpms.try_start() == 6
    done = vtpms.vtpm_manager("accept-rollback", "--key", str(vtpms.recovery), "--json").json
    assert done["recovery_key"]
    assert done["vtpms"] == 1
    assert vtpms.vtpm_manager("accept-rollback", "--key", str(vtpms.recovery), check=False).code == 4
    vtpms.start()
    still_precious(vtpms)
    (event,) = [row for row in vtpms.command("vtpm-events", "--json").json if row["kind"] == "rollback-accepted"]
    assert f"back to sequence {done['sequence']}" in event["text"]


def test_an_anchor_that_the_tpms_owner_took_away_is_noticed_and_recovered(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        bare.init(tcti=chip.tcti)
        bare.start()
        stored_vtpm(bare)
        bare.stop()
        index = chip.tool("tpm2_getcap", "handles-nv-index").split()[-1]
        chip.tool("tpm2_nvundefine", index, "-C", "o")
        assert bare.try_start() == 6, bare.refusal
        assert "vtpm-manager recover" in bare.refusal
        bare.vtpm_manager("recover", "--key", str(bare.recovery))
        bare.start()
        still_precious(bare)


def test_a_configuration_elsewhere_is_the_one_that_is_kept_up_to_date(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        bare.init(tcti=chip.tcti)
        config = bare.base / "elsewhere.toml"
        (bare.state / "config.toml").rename(config)
        config.with_suffix(".old").write_text(config.read_text())
        bare.vtpm_manager("reseal", "--config", str(config), "--pcrs", "sha256:1,3")
        assert 'pcrs = "sha256:1,3"' in config.read_text()
        verified = bare.command("vtpm-verify", "--state-dir", str(bare.state), "--config", str(config))
        assert verified.code == 0, "the catalogue says to which PCRs the group is sealed"
        assert not (bare.state / "config.toml").exists()
        chip.tool("tpm2_clear")
        bare.vtpm_manager("recover", "--config", str(config), "--key", str(bare.recovery))
        check = bare.vtpm_manager("check", "--config", str(config), "--json", check=False).json
        assert {row["verdict"] for row in check if row["check"].startswith("seals")} == {"ok"}


def test_changed_pcrs_lock_and_the_recovery_key_reseals(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        bare.init(tcti=chip.tcti)
        bare.start()
        stored_vtpm(bare)
        bare.stop()
        chip.tool("tpm2_pcrextend", "7:sha256=" + "77" * 32)
        assert bare.try_start() == 5, bare.refusal
        assert "7" in bare.refusal
        assert bare.vtpm_manager("reseal", check=False).code == 5, "not without the key"
        bare.vtpm_manager("reseal", "--recovery-key", str(bare.recovery))
        bare.start()
        still_precious(bare)
        bare.stop()
        # and beforehand, with the value that the next firmware will give
        present = bytes.fromhex(chip.tool("tpm2_pcrread", "sha256:7").split("0x")[1].strip())
        predicted = hashlib.sha256(present + b"\x99" * 32).hexdigest()
        bare.vtpm_manager("reseal", "--predict", f"7={predicted}")
        bare.start()
        bare.stop()
        chip.tool("tpm2_pcrextend", "7:sha256=" + "99" * 32)
        bare.start()
        assert bare.show("web")["state"] == "running"


def test_keys_can_be_bound_to_every_pcr_and_to_predicted_ones_too(bare: Installation, tmp_path: Path) -> None:
    every = ",".join(str(pcr) for pcr in range(24) if pcr not in (16, 20, 22, 23))
    with running_swtpm(tmp_path) as chip:
        bare.init("--pcrs", f"sha256:{every}", tcti=chip.tcti)
        predicted = [word for pcr in (0, 7) for word in ("--predict", f"{pcr}={os.urandom(32).hex()}")]
        bare.vtpm_manager("reseal", *predicted)
        bare.start()
        stored_vtpm(bare)
        bare.stop()
        chip.tool("tpm2_pcrextend", "15:sha256=" + "15" * 32)
        assert bare.try_start() == 5
        assert "15" in bare.refusal
        bare.vtpm_manager("reseal", "--recovery-key", str(bare.recovery), *predicted)
        bare.start()
        still_precious(bare)


def test_init_refuses_a_binding_that_nobody_could_undo(bare: Installation) -> None:
    assert bare.init("--no-recovery", check=False).code == 2
    assert not (bare.state / "store.img").exists()
    bare.init("--no-recovery", "--pcrs", "none")
    assert "no recovery key" in bare.vtpm_manager("check", check=False).out
    assert bare.vtpm_manager("check", check=False).code != 0, "weak settings fail"


def test_an_unknown_configuration_key_is_an_error_and_so_is_a_place_where_nobody_can_listen(
    vtpms: Installation,
) -> None:
    vtpms.stop()
    config = vtpms.state / "config.toml"
    good = config.read_text()
    config.write_text(good.replace("locality = 2", "localty = 2"))
    assert vtpms.try_start() == 2
    assert "localty" in vtpms.refusal
    config.write_text(good)
    vtpms.configure("listen", "unix:/no/such/directory/migrate.sock")
    assert vtpms.try_start() == 2
    assert "vtpm-manager run: [migration] listen: cannot listen at unix:/no/such/directory/" in vtpms.refusal
    assert "Traceback" not in vtpms.refusal
    config.write_text(good)
    start_without_standard_descriptors(vtpms)


def start_without_standard_descriptors(vtpms: Installation) -> None:
    """See that no store takes their place: tpm2-tss writes messages to descriptor 2, and wrote them into its image."""
    places = f"--state-dir {vtpms.state} --runtime-dir {vtpms.runtime}"
    command = ["bash", "-c", f"exec {BIN / 'vtpm-manager'} run {places} 0<&- >&- 2>&-"]
    vtpms.manager = subprocess.Popen(command)
    wait_for(vtpms._ready, "the manager")
    links = [os.readlink(f"/proc/{vtpms.manager.pid}/fd/{number}") for number in range(3)]
    assert links == ["/dev/null"] * 3


def test_a_runtime_directory_with_too_long_a_name_is_refused(bare: Installation) -> None:
    bare.init()
    bare.runtime = bare.base / ("r" * 60)
    assert bare.try_start() == 2
    assert "--runtime-dir" in bare.refusal


def test_a_manager_of_another_store_in_the_same_runtime_directory_takes_nothing_from_the_one_there() -> None:
    """It has the lock of its own store, so only the keepers tell that somebody is there already."""
    with installation() as made, installation() as other:
        made.init()
        made.start()
        made.add("web")
        shown = made.attach("web")
        other.init()
        other.runtime = made.runtime
        assert other.try_start() == 8, other.refusal
        assert "serves another manager" in other.refusal
        assert made.show("web")["pid"] == shown["pid"], "its administrators still reach the first"
        assert made.stop() == 0
