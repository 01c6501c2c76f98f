"""Backup while everything runs, restore, and the rollback rule's word on it."""

import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from e2e_rig import Guest, Installation, installation

from manager.errors import IntegrityError
from manager.restore import restore

pytestmark = pytest.mark.e2e
INDEX = 0x1500016


@pytest.fixture
def other() -> Iterator[Installation]:
    with installation() as made:
        yield made


def used(made: Installation, name: str, content: bytes = b"precious") -> Guest:
    made.add(name)
    guest = Guest(made.attach(name)["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, content)
    return guest


def with_the_tpm_of(source: Installation, target: Installation) -> None:
    """Give an installation the (embedded) hardware TPM of another one, which is stopped."""
    shutil.copytree(
        source.state / "embedded-tpm",
        target.state / "embedded-tpm",
        ignore=shutil.ignore_patterns("*.sock", "*.ctrl", "lock"),
    )


def members(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            found[member.name] = content.read()
    return found


def rewrite(path: Path, changed: dict[str, bytes | None]) -> None:
    content = members(path) | changed
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_a_backup_of_a_busy_manager_is_restored_on_another_tpm(
    vtpms: Installation, other: Installation, tmp_path: Path
) -> None:
    used(vtpms, "web").close()
    vtpms.command("vtpm-detach", "web")
    vtpms.add("idle")
    guest = used(vtpms, "busy")
    stop, written = threading.Event(), 0

    def save() -> None:
        nonlocal written
        while not stop.is_set():
            guest.write(INDEX, (written + 1).to_bytes(8))
            written += 1

    saver = threading.Thread(target=save)
    saver.start()
    try:
        for turn in range(3):
            acknowledged = written
            document = vtpms.vtpm_manager("backup", str(tmp_path / f"{turn}.tar"), "--json").json
            assert (document["vtpms"], document["state_images"], document["missing"]) == (3, 2, 0)
            assert document["unmatched"] == 0
    finally:
        stop.set()
        saver.join()
        guest.close()
    other.vtpm_manager("restore", str(tmp_path / "2.tar"))
    assert other.try_start() != 0, "another TPM cannot open it"
    assert "recover" in other.refusal
    recovery = ("--key", str(vtpms.recovery))
    other.vtpm_manager("recover", *recovery)
    other.start()
    assert {row["verdict"] for row in other.command("vtpm", "verify", "--all", "--json").json} == {"ok"}
    guest = Guest(other.attach("web")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()
    guest = Guest(other.command("vtpm-reset-platform", "busy", "--json").json["endpoint"])
    assert acknowledged <= int.from_bytes(guest.read(INDEX, 8)) <= written
    guest.close()


def test_no_key_is_in_a_backup_in_clear(vtpms: Installation, tmp_path: Path) -> None:
    secret = os.urandom(8)
    used(vtpms, "web", secret).close()
    vtpms.vtpm_manager("backup", str(tmp_path / "b.tar"))
    content = members(tmp_path / "b.tar")
    assert secret not in b"".join(content.values())
    assert not any("tpm" in name.split("/")[0] for name in content), "the embedded TPM's keys stay where they are"
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    vtpms.stop()
    keys = vtpms_keys(vtpms)
    assert len(keys) >= 4
    assert not found_keys(keys, content)
    rewrite(tmp_path / "b.tar", {"state/control": b"before" + keys[-1], "control": keys[0].hex().encode()})
    assert found_keys(keys, members(tmp_path / "b.tar")) == {"state/control", "control"}, "the search can see one"


def found_keys(keys: list[bytes], content: dict[str, bytes]) -> set[str]:
    return {name for name, data in content.items() for key in keys if key in data or key.hex().encode() in data}


def vtpms_keys(made: Installation) -> list[bytes]:
    """Every key of a stopped installation, taken out as the manager does."""
    from manager.config import Config, Layout
    from manager.offline import opened_installation

    layout = Layout(made.state, made.runtime)
    with opened_installation(layout, Config.load(layout.config)) as opened:
        store = opened.store
        groups = [group.key.reveal() for group in store._state.groups.values() if group.key is not None]
        states = [record.key.reveal() for record in store.vtpms()]
        return [opened.secret.store_key.reveal(), opened.secret.anchor_auth, *groups, *states]


def test_the_newest_set_is_taken_back_and_an_older_one_is_refused(
    vtpms: Installation, other: Installation, tmp_path: Path
) -> None:
    used(vtpms, "web").close()
    vtpms.command("vtpm-detach", "web")
    vtpms.vtpm_manager("backup", str(tmp_path / "b.tar"))
    vtpms.kill()
    for pid in vtpms.processes():
        with suppress(ProcessLookupError):  # the keeper's own end is the end of others
            os.kill(pid, 15)
    deadline = time.monotonic() + 30
    while vtpms.processes():  # or its TPM writes what is copied
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other.vtpm_manager("restore", str(tmp_path / "b.tar"))
    with_the_tpm_of(vtpms, other)
    assert other.vtpm_manager("check", "--allow-weak").code == 0
    other.start()
    other.add("later")
    assert other.stop() == 0
    target = other.base / "older"
    other.state = target
    other.vtpm_manager("restore", str(tmp_path / "b.tar"))
    shutil.copytree(
        other.base / "state" / "embedded-tpm", target / "embedded-tpm", ignore=shutil.ignore_patterns("*.sock*", "lock")
    )
    assert other.try_start() == 6
    assert "docs/rollback.md" in other.refusal
    assert "Nothing was changed" in other.refusal
    other.vtpm_manager("accept-rollback", "--key", str(vtpms.recovery))
    other.start()
    assert [row["name"] for row in other.command("vtpm-list", "--json").json] == ["web"]


def test_partial_and_altered_sets_are_refused_and_leave_nothing(
    vtpms: Installation, other: Installation, tmp_path: Path
) -> None:
    used(vtpms, "web").close()
    whole = tmp_path / "whole.tar"
    vtpms.vtpm_manager("backup", str(whole))
    image = next(name for name in members(whole) if name.startswith("state/"))
    manifest = json.loads(members(whole)["manifest.json"])
    stray = {"/etc/passwd": b"x", "../up": b"x", "state/../../up.img": b"x", "extra": b"x"}
    harmed: list[dict[str, bytes | None]] = [
        {"store.img": None},
        {"catalogue.sqlite": None},
        {"config.toml": None},
        {image: None},
        {"manifest.json": None},
        {"manifest.json": b"{}"},
        {"manifest.json": b"no json"},
        {"manifest.json": json.dumps(manifest | {"format": "vtpm-backup/2"}).encode()},
        {"manifest.json": json.dumps(manifest | {"members": {}}).encode()},
        {image: members(whole)[image][:-1] + b"?"},
        *({name: content, "manifest.json": None} for name, content in stray.items()),
    ]
    for change in harmed:
        part = tmp_path / "part.tar"
        shutil.copyfile(whole, part)
        rewrite(part, change)
        with pytest.raises(IntegrityError, match="nothing was changed"):
            restore(part, other.state)
        assert not other.state.exists(), change.keys()
    size = whole.stat().st_size
    for cut in (0, 100, 5000, size // 2, size - 20_000):
        part.write_bytes(whole.read_bytes()[:cut])
        with pytest.raises(IntegrityError, match="nothing was changed"):
            restore(part, other.state)
        assert not other.state.exists()
    assert other.vtpm_manager("restore", str(part), check=False).code == 6
    assert not list(other.base.rglob("up*"))


def test_a_link_in_a_backup_is_refused(other: Installation, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        info = tarfile.TarInfo("store.img")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert other.vtpm_manager("restore", str(tmp_path / "l.tar"), check=False).code == 6


def test_wrong_places_are_refused(vtpms: Installation, other: Installation, tmp_path: Path) -> None:
    assert other.vtpm_manager("restore", str(tmp_path / "none.tar"), check=False).code == 3
    vtpms.vtpm_manager("backup", str(tmp_path / "b.tar"))
    again = vtpms.vtpm_manager("backup", str(tmp_path / "b.tar"), check=False)
    assert (again.code, "not empty" in again.err) == (4, True)
    assert len(members(tmp_path / "b.tar")) == 4, "it was left as it was"
    other.state.mkdir()
    (other.state / "something").write_text("mine")
    answer = other.vtpm_manager("restore", str(tmp_path / "b.tar"), check=False)
    assert answer.code == 4
    assert [path.name for path in other.state.iterdir()] == ["something"]
    assert vtpms.vtpm_manager("backup", "/dev/null", check=False).code == 2
    assert vtpms.vtpm_manager("backup", str(tmp_path / "no" / "b.tar"), check=False).code == 3


def test_a_full_disk_makes_no_backup(vtpms: Installation) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    small = vtpms.base / "small"
    small.mkdir()
    if vtpms.command("mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small), check=False).code != 0:
        pytest.skip("needs the right to mount")
    try:
        answer = vtpms.vtpm_manager("backup", str(small / "b.tar"), check=False)
        assert answer.code == 1
        assert "No space" in answer.err
        assert (small / "b.tar").stat().st_size == 0
    finally:
        vtpms.command("umount", str(small))
    vtpms.add("still")


def test_a_state_image_elsewhere_is_in_the_backup_and_its_place_is_said(
    vtpms: Installation, other: Installation, tmp_path: Path
) -> None:
    place = vtpms.base / "elsewhere.img"
    uuid = vtpms.add("far", "--state-image", str(place))
    vtpms.attach("far")
    vtpms.vtpm_manager("backup", str(tmp_path / "b.tar"))
    answer = other.vtpm_manager("restore", str(tmp_path / "b.tar"))
    assert f"put {other.state}/named/{uuid}.img to {place}" in answer.out
    assert (other.state / "named" / f"{uuid}.img").read_bytes()[:8] == b"VTPMSIMG"
