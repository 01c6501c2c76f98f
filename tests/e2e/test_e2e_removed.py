"""Removed vTPMs: what is left of them and for how long, and what scrub and compact do, by the commands of a user."""

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from e2e_rig import Guest, Installation, wait_for

pytestmark = pytest.mark.e2e
INDEX = 0x1500016


def set_key(made: Installation, key: str, value: str) -> None:
    """Change a key of the configuration, and restart the manager."""
    config = made.state / "config.toml"
    lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines) + "\n")
    made.restart()


def status(made: Installation) -> dict[str, Any]:
    return dict(made.vtpm_manager("status", "--json").json)


def used(made: Installation, name: str) -> str:
    """Add a vTPM and have it save something."""
    uuid = made.add(name)
    guest = Guest(made.attach(name)["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"precious")
    guest.close()
    made.command("vtpm-detach", name)
    return uuid


def removed(made: Installation, *options: str) -> list[dict[str, Any]]:
    return list(made.command("vtpm-list", "--removed", *options, "--json").json)


def test_a_removed_vtpm_is_remembered_and_its_uuid_refused_until_its_time_is_over(vtpms: Installation) -> None:
    uuid = used(vtpms, "web")
    vtpms.add("other", "--tpm", "1.2")
    said = vtpms.command("vtpm-remove", "web", "--yes", "--json").json
    assert (said["state"], said["name"], said["removed_by"]) == ("removed", "web", 0)
    assert not (vtpms.state / "state" / f"{uuid}.img").exists()
    (row,) = removed(vtpms)
    assert row == said == vtpms.show(uuid)
    assert row["uuid"] == uuid
    assert row["removed"] < row["kept_until"]
    assert set(row) == set(vtpms.show("other"))
    assert [row["name"] for row in vtpms.command("vtpm-list", "--json").json] == ["other"]
    assert "kept_until" in vtpms.command("vtpm-list", "--removed").out.lower()
    assert (status(vtpms)["vtpms"], status(vtpms)["store_tombstones"]) == (1, 1)
    again = vtpms.command("vtpm-add", "--name", "new", "--uuid", uuid, check=False)
    assert again.code == 4
    assert row["kept_until"] in again.err
    attach = vtpms.command("vtpm-attach", uuid, "guest", check=False)
    assert attach.code == 3
    assert "cannot be had back" in attach.err
    vtpms.add("web")  # the name is free
    assert vtpms.command("vtpm", "verify", "--all", check=False).code == 0
    vtpms.restart()
    assert removed(vtpms) == [row]
    assert removed(vtpms, "--tpm", "1.2") == []
    assert removed(vtpms, "--group", "default") == [row]
    assert vtpms.command("vtpm-list", "--removed", "--guest", "x", check=False).code == 2
    set_key(vtpms, "tombstone_days", "0.00001")
    wait_for(lambda: not removed(vtpms), "the tombstone to go")
    assert status(vtpms)["store_tombstones"] == 0
    assert vtpms.command("vtpm-show", uuid, check=False).code == 3
    assert vtpms.add("back", "--uuid", uuid) == uuid
    assert vtpms.show("back")["state"] == "added"


def test_tombstones_are_in_backups_and_outlive_the_catalogue(vtpms: Installation, tmp_path: Path) -> None:
    uuid = used(vtpms, "web")
    vtpms.add("kept")
    vtpms.command("vtpm-remove", "web", "--yes")
    (row,) = removed(vtpms)
    backup = tmp_path / "backup.tar"
    assert vtpms.vtpm_manager("backup", str(backup), "--json").json["vtpms"] == 1
    assert vtpms.stop() == 0
    assert vtpms.command("vtpm", "verify", "--state-dir", str(vtpms.state), check=False).code == 0
    assert vtpms.vtpm_manager("rebuild-catalogue", "--json").json["names_kept"] == 1
    vtpms.start()
    assert removed(vtpms) == [row | {"name": None, "removed_by": None}]  # nobody remembers the name
    assert vtpms.command("vtpm-add", "--uuid", uuid, check=False).code == 4
    assert [row["name"] for row in vtpms.command("vtpm-list", "--json").json] == ["kept"]
    restored = tmp_path / "restored"
    vtpms.command("vtpm-manager", "restore", str(backup), "--state-dir", str(restored))
    assert (restored / "store.img").stat().st_size == (vtpms.state / "store.img").stat().st_size


def test_scrub_while_a_vtpm_saves_loses_nothing_and_says_what_it_cannot_reach(vtpms: Installation) -> None:
    used(vtpms, "gone")
    vtpms.command("vtpm-remove", "gone", "--yes")
    used(vtpms, "idle")
    vtpms.add("busy")
    guest = Guest(vtpms.attach("busy")["endpoint"])
    guest.define(INDEX, 8)
    stop = threading.Event()
    turns = [0]

    def save() -> None:
        while not stop.is_set():
            guest.write(INDEX, turns[0].to_bytes(8))
            turns[0] += 1

    before = (vtpms.state / "store.img").read_bytes()
    saver = threading.Thread(target=save)
    saver.start()
    try:
        plain = vtpms.vtpm_manager("scrub", "--json").json
        both = vtpms.vtpm_manager("scrub", "--state-images", "--json").json
    finally:
        stop.set()
        saver.join()
    assert turns[0] > 0
    assert guest.read(INDEX, 8) == (turns[0] - 1).to_bytes(8)
    guest.close()
    assert (plain["closed_groups"], plain["damaged_leaves"], plain["state_images"]) == (None, 0, 0)
    assert plain["sectors"] > 400
    assert "backups" in plain["not_reached"]
    assert (both["state_images"], both["state_images_kept"]) == (1, 1)  # busy is in use, its next save overwrites it
    after = (vtpms.state / "store.img").read_bytes()
    assert sum(one != two for one, two in zip(before, after, strict=True)) > len(after) // 2
    assert vtpms.command("vtpm", "verify", "--all", check=False).code == 0
    vtpms.restart()
    guest = Guest(vtpms.attach("idle")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()


def test_an_image_from_before_a_scrub_is_refused(vtpms: Installation) -> None:
    used(vtpms, "web")
    assert vtpms.stop() == 0
    older = (vtpms.state / "store.img").read_bytes()
    vtpms.start()
    vtpms.vtpm_manager("scrub")
    vtpms.kill()
    (vtpms.state / "store.img").write_bytes(older)
    assert vtpms.try_start() == 6


def test_compact_takes_away_what_is_not_needed(vtpms: Installation) -> None:
    set_key(vtpms, "tombstone_days", "0")
    vtpms.command("vtpm-add", "--count", "3000", "--name", "many-{:04}")
    gone = vtpms.add("gone")
    vtpms.command("vtpm-remove", "gone", "--yes")
    assert removed(vtpms) == []  # without a retention time
    assert vtpms.add("gone", "--uuid", gone) == gone
    uuid = used(vtpms, "web")
    store = vtpms.state / "store.img"
    done = vtpms.vtpm_manager("compact", "--json").json
    assert (done["bytes"], done["bytes_before"], store.stat().st_size) == (
        2097152,
        2097152,
        2097152,
    )  # the size at init
    done = vtpms.vtpm_manager("compact", "--to-size", "0", "--json").json
    assert done["bytes"] == store.stat().st_size < 700_000
    assert (done["closed_groups"], done["sectors_not_moved"], done["tombstones"]) == (None, 0, 0)
    assert status(vtpms)["store_bytes"] == done["bytes"]
    assert vtpms.command("vtpm", "verify", "--all", check=False).code == 0
    assert vtpms.vtpm_manager("compact", "--to-size", "-1", check=False).code == 2
    vtpms.restart()
    assert vtpms.show("web")["uuid"] == uuid
    guest = Guest(vtpms.attach("web")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()
    vtpms.command("vtpm-add", "--count", "2000")
    kinds = [json.loads(line)["kind"] for line in vtpms.command("vtpm-events", "--jsonl").out.splitlines()]
    assert kinds.count("compacted") == 2


def test_kill_9_while_the_store_is_compacted_and_scrubbed_loses_nothing(vtpms: Installation) -> None:
    set_key(vtpms, "tombstone_days", "0")
    used(vtpms, "web")
    vtpms.command("vtpm-add", "--count", "2000", "--name", "many-{}")
    rng = random.Random(1)
    for _ in range(2):
        stop = threading.Event()

        def work(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                for words in (("compact", "--to-size", "0"), ("scrub",)):
                    vtpms.vtpm_manager(*words, check=False)

        worker = threading.Thread(target=work)
        worker.start()
        time.sleep(0.5 + rng.random() / 2)
        vtpms.kill()
        stop.set()
        worker.join()
        vtpms.start()
        assert vtpms.command("vtpm", "verify", "--all", check=False).code == 0
        assert status(vtpms)["vtpms"] == 2001
        vtpms.command("vtpm-remove", "many-1", "--yes")
        vtpms.command("vtpm-add", "--name", "many-1")
    guest = Guest(vtpms.attach("web")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()
