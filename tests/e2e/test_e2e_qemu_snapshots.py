"""Snapshots (savevm, loadvm) and machines saved to a file: an older TPM comes back only where somebody allowed it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Installation, installation, wait_for
from guest_rig import Image, built_image
from qemu_guest import counter, define_counter, extend, increment, pcrs
from qemu_rig import Qemu
from qemu_tpms import SUBJECTS, Behind, Bench, Ours, Swtpm, place

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def image() -> Image:
    return built_image("client")


@pytest.fixture
def bench(image: Image) -> Iterator[Bench]:
    with place() as directory:
        made = Bench(directory, image)
        yield made
        made.close()


@pytest.fixture
def vtpms() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        yield made


def told(tpm: Ours, kind: str) -> list[str]:
    events = tpm.made.command("vtpm-events", tpm.name, "--json").json
    return [event["text"] for event in events if event["kind"] == kind]


def load(qemu: Qemu, name: str) -> str:
    """Go back to a snapshot; returns what QEMU says against it, and lets the machine run where it says nothing."""
    said = qemu.monitor.human(f"loadvm {name}")
    if not said:
        qemu.monitor.execute("cont")  # it stands still where another snapshot was refused before
    return said


def to_file(qemu: Qemu, saved: Path) -> None:
    """What `virsh save` does: the machine stands still, goes to a file, and QEMU ends."""
    qemu.monitor.execute("stop")
    qemu.migrate(f"exec:cat >{saved}")
    qemu.quit()


def from_file(bench: Bench, tpm: Behind, saved: Path) -> Qemu:
    """What `virsh restore` does."""
    qemu = bench.qemu(tpm, "second", incoming=f"exec:cat {saved}", disk=bench.directory / "disk")
    qemu.arrived()
    qemu.monitor.execute("cont")
    return qemu


@pytest.mark.parametrize("subject", SUBJECTS)
def test_snapshots_and_saved_machines(subject: str, bench: Bench, request: pytest.FixtureRequest) -> None:
    if subject == "swtpm":
        tpm: Behind = Swtpm(bench.directory)
        request.addfinalizer(tpm.close)
    else:
        tpm = Ours(request.getfixturevalue("vtpms"), "snap")
    qemu = bench.qemu(tpm, disk=bench.disk())
    qemu.boot()
    define_counter(qemu.guest)
    begun, then = counter(qemu.guest), extend(qemu.guest, 16, "then")
    qemu.monitor.execute("stop")  # the guest's kernel asks its TPM for random numbers when it likes
    if isinstance(tpm, Ours):
        tpm.hibernate()  # to be snapshot wakes it
    assert qemu.monitor.human("savevm one") == ""
    assert qemu.monitor.human("loadvm one") == ""  # nothing was used meanwhile: no older state
    qemu.monitor.execute("cont")
    assert (counter(qemu.guest), pcrs(qemu.guest, "16")[16]) == (begun, then)
    increment(qemu.guest)
    assert extend(qemu.guest, 16, "now") != then
    if isinstance(tpm, Ours):
        refused_until_allowed(tpm, qemu)
    else:
        assert load(qemu, "one") == ""
    assert (counter(qemu.guest), pcrs(qemu.guest, "16")[16]) == (begun, then)
    increment(qemu.guest)

    saved = bench.directory / "saved"
    to_file(qemu, saved)
    qemu = from_file(bench, tpm, saved)
    assert (counter(qemu.guest), pcrs(qemu.guest, "16")[16]) == (begun + 1, then)
    increment(qemu.guest)
    if isinstance(tpm, Ours):
        the_file_is_used_up(bench, tpm, qemu, saved)


def refused_until_allowed(tpm: Ours, qemu: Qemu) -> None:
    made = tpm.made
    for _ in range(2):  # and again where it was refused before
        assert "Error" in load(qemu, "one")
        assert not qemu.monitor.execute("query-status")["running"]
        shown = made.show(tpm.name)
        assert f"vtpm-allow-restore {tpm.name}" in shown["restore_refused"]
        assert shown["restore"] == "never"
    generation = shown["generation"]  # QEMU stopped the TPM, which saved what it had, before it came with the older one
    assert f"vtpm-allow-restore {tpm.name}" in told(tpm, "restore-refused")[0]
    before = told(tpm, "rolled-back")
    made.command("vtpm-allow-restore", tpm.name)
    assert "user 0" in told(tpm, "restore-allowed")[-1]
    assert load(qemu, "one") == ""
    shown = made.show(tpm.name)
    assert (shown["restore"], shown["restore_refused"], shown["generation"] > generation) == ("never", None, True)
    (text,) = wait_for(lambda: told(tpm, "rolled-back")[len(before) :], "the event")
    assert f"in place of generation {generation}, as generation {shown['generation']}" in text, text
    increment(qemu.guest)
    assert "Error" in load(qemu, "one")  # it was allowed once
    made.command("vtpm-allow-restore", tpm.name)
    assert load(qemu, "one") == ""


def the_file_is_used_up(bench: Bench, tpm: Ours, qemu: Qemu, saved: Path) -> None:
    qemu.kill()
    again = bench.qemu(tpm, "third", incoming=f"exec:cat {saved}", disk=bench.directory / "disk")
    assert again.process.wait(60) != 0
    assert f"vtpm-allow-restore {tpm.name}" in tpm.made.show(tpm.name)["restore_refused"]
