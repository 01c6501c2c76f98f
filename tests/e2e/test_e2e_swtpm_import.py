"""A TPM moves from swtpm into the manager and out again, by the commands."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import swtpm_rig as rig
from e2e_rig import Answer, Guest, Installation, wait_for
from swtpm_rig import OURS, SWTPM, get_secret, put_secret, running
from vtpm_instance_commands import command12, rc

pytestmark = pytest.mark.e2e
SECRET = b"kept in NV of swtpm's"


def swtpm_state(place: Path, *more: str) -> dict[str, bytes]:
    place.mkdir()
    with running(SWTPM, "--tpm2", "--tpmstate", f"dir={place}", *more) as one:
        put_secret(one, SECRET)
        assert one.stop() == 0
    return files_in(place)


def files_in(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_state_of_swtpms_is_adopted_and_left_as_it_is(vtpms: Installation, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0x" + "ab" * 32)
    source = tmp_path / "source"
    before = swtpm_state(source, "--key", f"file={tmp_path}/key,mode=aes-256-cbc")
    words = ["--from-swtpm", str(source), "--key", str(tmp_path / "key"), "--key-mode", "aes-256-cbc"]
    uuid = vtpms.command("vtpm-import", *words, "--name", "adopted").out.strip()
    assert files_in(source) == before
    shown = vtpms.show("adopted")
    assert (shown["uuid"], shown["tpm"], shown["state"]) == (uuid, "2.0", "detached")
    assert not any(SECRET in path.read_bytes() for path in vtpms.state.rglob("*") if path.is_file())
    vtpms.restart()  # it is durable and anchored
    guest = Guest(vtpms.attach("adopted")["endpoint"])
    assert guest.read(rig.INDEX, len(SECRET)) == SECRET
    guest.define(0x1500099, 4)
    guest.close()
    vtpms.restart()
    events = [event["text"] for event in vtpms.command("vtpm-events", "adopted", "--json").json]
    assert any("swtpm" in text for text in events)


def test_what_cannot_be_adopted_is_refused_and_nothing_is_made(vtpms: Installation, tmp_path: Path) -> None:
    source = tmp_path / "source"
    swtpm_state(source)
    (tmp_path / "key").write_text("ab" * 16)
    (tmp_path / "empty").mkdir()
    (tmp_path / "letter").write_text("not a state at all, but long enough to be looked at" * 9)

    def imported(*words: str) -> int:
        return vtpms.command("vtpm-import", *words, "--name", "x", check=False).code

    with running(SWTPM, "--tpm2", "--tpmstate", f"dir={source}") as one:
        assert imported("--from-swtpm", str(source)) == 4  # it is in use
        assert one.stop() == 0
    assert imported("--from-swtpm", str(tmp_path / "nowhere")) == 3
    assert not (tmp_path / "nowhere").exists()
    assert imported("--from-swtpm", str(tmp_path / "empty")) == 3
    assert imported("--from-swtpm", str(tmp_path / "letter")) == 6
    assert imported("--from-swtpm", str(source), "--key", str(tmp_path / "key")) == 6
    assert imported("--from-swtpm", str(source), "--key", str(tmp_path / "letter")) == 2
    assert imported("--from-swtpm", str(source), "--tpm", "1.2") == 3
    permanent = source / "tpm2-00.permall"
    good = permanent.read_bytes()
    permanent.write_bytes(good[:-1])
    assert imported("--from-swtpm", str(source)) == 6
    assert permanent.read_bytes() == good[:-1]
    assert vtpms.command("vtpm-list", "--json").json == []
    assert vtpms.images() == [vtpms.state / "store.img"]
    permanent.write_bytes(good[:16] + bytes(len(good) - 16))  # not even its first bytes are a TPM 2.0's
    assert imported("--from-swtpm", str(source)) == 6
    permanent.write_bytes(good[:16] + good[16:22] + bytes(len(good) - 22))  # only libtpms can tell
    assert imported("--from-swtpm", str(source)) == 0
    assert vtpms.command("vtpm-attach", "x", "guest", check=False).code == 6
    assert vtpms.show("x")["state"] == "quarantined"
    vtpms.command("vtpm-group-update", "default", "--allow-export", "yes")
    out = ["--to-swtpm", str(tmp_path / "out"), "--yes"]
    assert vtpms.command("vtpm-export", "x", *out, check=False).code in (4, 6)
    assert list((tmp_path / "out").glob("tpm*")) == []
    assert imported("--from-swtpm", str(source)) == 4  # the name is taken
    assert imported("--from-swtpm", str(source), "--group", "nosuch") == 3
    assert len(vtpms.images()) == 2


def test_an_import_that_is_cut_short_loses_nothing_and_is_found(vtpms: Installation, tmp_path: Path) -> None:
    source = tmp_path / "source"
    before = swtpm_state(source)
    words = ["vtpm-import", "--from-swtpm", str(source), "--name"]
    seen = vtpms.images()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(vtpms.command, *words, "cut", check=False)
        wait_for(lambda: vtpms.images() != seen, "the image")
        vtpms.kill()
        assert answer.result().code in (0, 8)
    assert files_in(source) == before
    vtpms.start()
    listed = [each["name"] for each in vtpms.command("vtpm-list", "--json").json]
    found = vtpms.command("vtpm-verify", "--all", check=False)
    assert listed == ["cut"] or "without a record" in found.out or "no name in the catalogue" in found.out
    vtpms.command(*words, "again")
    guest = Guest(vtpms.attach("again")["endpoint"])
    assert guest.read(rig.INDEX, len(SECRET)) == SECRET
    guest.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads other users' states")
def test_a_lock_file_that_an_import_makes_is_its_directory_s_owner_s(vtpms: Installation, tmp_path: Path) -> None:
    source = tmp_path / "source"
    before = swtpm_state(source)
    (source / ".lock").unlink()
    os.chown(source, 65534, 65534)
    vtpms.command("vtpm-import", "--from-swtpm", str(source), "--name", "adopted")
    assert files_in(source) == before
    status = (source / ".lock").stat()
    assert (status.st_uid, status.st_gid) == (65534, 65534)


def test_a_tpm_1_2_is_adopted_with_its_saved_state(vtpms: Installation, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with running(SWTPM, "--tpmstate", f"dir={source}") as one:
        public = rig.make_endorsement_key(one)
        assert rc(one.tpm(command12(0x98))[0]) == 0
        assert one.stop() == 0
    assert (source / "tpm-00.savestate").exists()
    vtpms.command("vtpm-import", "--from-swtpm", str(source), "--name", "old")
    assert vtpms.show("old")["tpm"] == "1.2"
    guest = Guest(vtpms.attach("old")["endpoint"])
    assert guest.transmit(command12(0x7C, bytes(20)))[10:-20] == public
    guest.close()


def test_the_way_out_is_closed_unless_the_group_opens_it(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(rig.INDEX, len(SECRET))
    guest.write(rig.INDEX, SECRET)
    guest.close()
    (tmp_path / "key").write_text("cd" * 16)
    key, target = ["--key", str(tmp_path / "key")], tmp_path / "out"

    def exported(*more: str) -> Answer:
        return vtpms.command("vtpm-export", "web", "--to-swtpm", str(target), *more, check=False)

    assert exported("--yes").code == 5
    vtpms.command("vtpm-group-update", "default", "--allow-export", "yes")
    assert vtpms.command("vtpm-group-show", "default", "--json").json["export"] is True
    assert exported("--yes").code == 4  # attached
    vtpms.command("vtpm-hibernate", "web")
    assert exported("--yes").code == 4
    vtpms.command("vtpm-detach", "web")
    assert exported().code == 2
    assert list(target.glob("tpm2*")) == []
    for words in ([], key):
        target = tmp_path / f"out-{len(words)}"
        done = exported("--yes", *words)
        assert done.code == 0
        assert "not sealed" in done.err
        assert ("in clear" in done.err) == (not words)
        assert (SECRET in (target / "tpm2-00.permall").read_bytes()) == (not words)
        assert exported("--yes").code == 4  # something is there
        for command in (SWTPM, OURS):
            more = ["--key", f"file={tmp_path}/key"] if words else []
            with running(command, "--tpm2", "--tpmstate", f"dir={target}", *more) as one:
                assert get_secret(one, len(SECRET)) == SECRET
                assert one.stop() == 0
    assert any(event["kind"] == "exported" for event in vtpms.command("vtpm-events", "web", "--json").json)
    vtpms.command("vtpm-group-update", "default", "--allow-export", "no")
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "tpm2-00.permall.bak").write_bytes(b"of another TPM")
    assert exported("--yes").code == 4
    (target / "tpm2-00.permall.bak").unlink()
    assert exported("--yes").code == 5
    assert files_in(target).keys() == {".lock"}
