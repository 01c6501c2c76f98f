"""Live migration from one QEMU and manager to another, while the guest writes to its TPM's NV all the time."""

from collections.abc import Iterator

import pytest
from e2e_rig import wait_for
from guest_rig import Image, built_image
from migration_rig import Host, hosts
from qemu_guest import COUNTER, counter, define_counter, extend, pcrs, start_counting, stop_counting
from qemu_rig import Qemu
from qemu_tpms import SUBJECTS, Behind, Bench, Ours, Swtpm, back_end, place

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
BEFORE, AFTER = 50, 50  # increments on each side


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
def pair() -> Iterator[list[Host]]:
    with hosts("north", "south") as made:
        yield made


def expected_at(destination: Host, tpm: Ours) -> Ours:
    """Both operators allow the move; returns the place that waits for it."""
    source, uuid = tpm.made, tpm.attached["uuid"]
    assert isinstance(source, Host)
    source.authorise(destination, "--leave", tpm.name)
    destination.authorise(source, "--come", uuid)
    destination.command("vtpm-migrate-expect", source.name, uuid, "--name", tpm.name)
    return Ours(destination, tpm.name, add=False)


def both(subject: str, bench: Bench, request: pytest.FixtureRequest) -> tuple[Behind, Behind]:
    """Where the TPM is, and where it will be."""
    if subject == "swtpm":
        ends = []
        for name in ("here", "there"):
            (bench.directory / name).mkdir()
            ends.append(Swtpm(bench.directory / name))
            request.addfinalizer(ends[-1].close)
        return ends[0], ends[1]
    north, south = request.getfixturevalue("pair")
    tpm = Ours(north, "mover")
    return tpm, expected_at(south, tpm)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_guest_that_writes_all_the_time_moves_and_nothing_is_lost_or_done_twice(
    subject: str, bench: Bench, request: pytest.FixtureRequest
) -> None:
    here, there = both(subject, bench, request)
    source = bench.qemu(here, "source")
    source.boot()
    define_counter(source.guest)
    mark = extend(source.guest, 16, "at home")
    first = counter(source.guest) + 1
    start_counting(source.guest)
    destination = bench.qemu(there, "destination", incoming=f"unix:{bench.directory}/move")
    wait_for(lambda: source.ticks.count > BEFORE, "increments at the source")

    source.migrate(f"unix:{bench.directory}/move")
    destination.arrived()
    wait_for(lambda: destination.ticks.count > AFTER, "increments at the destination")
    said = stop_counting(destination.guest)
    destination.ticks.follow(source.ticks)

    values = [value for _, value in source.ticks.seen + destination.ticks.seen]
    assert values == list(range(first, first + len(values)))
    assert said == f"{len(values)} increments"
    assert counter(destination.guest) == values[-1]
    assert pcrs(destination.guest, "16")[16] == mark
    if isinstance(here, Ours) and isinstance(there, Ours):
        the_source_is_over(here, source, values[-len(destination.ticks.seen)], bench)
        assert there.made.show(there.name)["state"] == "running"


def the_source_is_over(tpm: Ours, qemu: Qemu, moved: int, bench: Bench) -> None:
    """Neither the machine that was left behind, nor a new one, nor an operator starts it again.

    moved: what was read first at the destination. The machine left behind may have had this answer, too, and not yet
    have said so; of the TPM it gets nothing more.
    """
    made, uuid = tpm.made, tpm.attached["uuid"]
    assert isinstance(made, Host)
    wait_for(lambda: made.state_of(uuid) == "removed", "the source to know that the destination has it")
    counted = len(qemu.ticks.seen)
    qemu.monitor.execute("cont")
    code, said = qemu.guest.run(f"wait $counting; cat /tmp/counted; tpm2 nvread {COUNTER} -s 8")
    assert (code, "after" in said) != (0, False), said
    assert [value for _, value in qemu.ticks.seen[counted:]] in ([], [moved])
    assert made.command("vtpm-attach", uuid, "guest", "--frontend", "qemu", check=False).code == 3
    with pytest.raises(AssertionError, match="QEMU ended"):
        bench.qemu(back_end(tpm.control), "again")
