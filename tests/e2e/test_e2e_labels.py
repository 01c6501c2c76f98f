"""Labels and events by the real commands."""

import json
from collections.abc import Iterator

import pytest
from e2e_rig import Installation, installation, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def shared() -> Iterator[Installation]:
    """One running installation for tests that change nothing, or only attach and detach."""
    with installation() as made:
        made.init()
        made.start()
        made.add("web", "--label", "env=prod")
        yield made


def test_labels_are_put_shown_asked_for_and_taken_away(vtpms: Installation) -> None:
    vtpms.add("web", "--label", "env=prod", "--label", "tier=front end")
    vtpms.command("vtpm-add", "--count", "3", "--name", "db-{}", "--label", "tier=db", "--label", "env=prod")
    vtpms.add("bare")
    assert vtpms.show("web")["labels"] == "env=prod,tier=front end"
    assert vtpms.show("bare")["labels"] is None

    def named(*words: str) -> list[str]:
        return [row["name"] for row in vtpms.command("vtpm-list", "--json", *words).json]

    assert named("--label", "env=prod") == ["db-1", "db-2", "db-3", "web"]
    assert named("--label", "env", "--label", "tier=db") == ["db-1", "db-2", "db-3"]
    assert named("--label", "tier=front end") == ["web"]
    assert named("--label", "nobody") == []
    changed = vtpms.command("vtpm-label", "db-2", "env=test", "note=a=b", "--remove", "tier", "--json").json
    assert changed["labels"] == "env=test,note=a=b"
    assert named("--label", "tier=db") == ["db-1", "db-3"]
    assert "env=test" in vtpms.command("vtpm-label", "db-2").out, "without a change it shows them"
    vtpms.restart()
    assert named("--label", "note=a=b") == ["db-2"]
    vtpms.command("vtpm-remove", "db-2", "--yes")
    assert named("--label", "note") == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ["vtpm-label", "web", "nothing"]),
        (2, ["vtpm-label", "web", "=x"]),
        (2, ["vtpm-label", "web", "a=x,y"]),
        (2, ["vtpm-label", "web", "a=\u00e9"]),
        (2, ["vtpm-label", "web", "a=1", "a=2"]),
        (2, ["vtpm-label", "web", "a=1", "--remove", "a"]),
        (2, ["vtpm-label", "web", f"a={'x' * 101}"]),
        (2, ["vtpm-label", "web", f"{'k' * 64}=x"]),
        (2, ["vtpm-label", "web", *(f"k{number}=x" for number in range(33))]),
        (2, ["vtpm-list", "--label", ""]),
        (2, ["vtpm-add", "--label", "x"]),
        (2, ["vtpm-events", "--since", "yesterday"]),
        (2, ["vtpm-events", "--limit", "0"]),
        (3, ["vtpm-label", "nobody", "a=1"]),
        (3, ["vtpm-events", "nobody"]),
    ],
)
def test_what_is_no_label_is_refused_and_changes_nothing(shared: Installation, code: int, words: list[str]) -> None:
    answer = shared.command(*words, check=False)
    assert answer.code == code, answer.err
    assert shared.show("web")["labels"] == "env=prod"
    assert len(shared.command("vtpm-list", "--json").json) == 1


def test_events_tell_what_happened_and_can_be_chosen(shared: Installation) -> None:
    web = shared.show("web")["uuid"]
    shared.attach("web", "guest-1")
    shared.command("vtpm-detach", "web")
    everything = shared.command("vtpm-events", "--json").json
    assert [row["kind"] for row in everything[:2]] == ["initialised", "added"]
    assert everything[0]["vtpm"] is None
    mine = shared.command("vtpm-events", "web", "--json").json
    assert [row["kind"] for row in mine] == ["added", "attached", "detached"]
    assert {row["vtpm"] for row in mine} == {web}
    last = shared.command("vtpm-events", web, "--limit", "1", "--jsonl").out.splitlines()
    assert json.loads(last[0]) == mine[-1]
    assert len(last) == 1
    since = everything[0]["time"]
    assert shared.command("vtpm-events", "--since", since, "--json").json == everything
    assert shared.command("vtpm-events", "--since", "2999-01-01", "--json").json == []
    assert "detached" in shared.command("vtpm-events").out


def test_old_events_are_dropped_when_the_manager_starts(vtpms: Installation) -> None:
    for turn in range(3):
        vtpms.add(f"vm-{turn}")
    assert vtpms.stop() == 0
    config = vtpms.state / "config.toml"
    config.write_text(config.read_text().replace("events_kept = 100000", "events_kept = 2"))
    vtpms.start()

    def texts() -> list[str]:
        return [row["text"].split(",")[0] for row in vtpms.command("vtpm-events", "--json").json]

    wait_for(lambda: len(texts()) == 2, "the old events to go")
    assert texts() == ["vm-1", "vm-2"]
