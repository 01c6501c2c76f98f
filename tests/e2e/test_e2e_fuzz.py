"""Short, seeded runs of `./dev fuzz instance` and `./dev fuzz kill`, and proof that both find what they look for."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, Installation, installation, wait_for

sys.path.append(str(Path(__file__).parent.parent / "fuzz"))

import commands_tpm12
import commands_tpm20
from fuzz_instance import BATCH, Fuzz, replay
from fuzz_kill import DECK, Massacre
from leftovers import Inventory, roles
from victims import WrongAnswerError
from vtpm_instance_commands import command12
from writers import PromiseBrokenError, Writer

from frontend_backend.tpmhdr import command
from storage.catalogue_database import SQLITE_CONNECTIONS_MOST

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    """One installation under fire for all tests that are about hostile commands; the order of the tests matters."""
    with installation() as made:
        made.init()
        made.start()
        one = Fuzz(made, 20261121)
        one.files = tmp_path_factory.mktemp("replays")
        yield one
        one.close()


def test_hostile_commands_in_real_instances_end_nothing_and_change_nothing_for_others(fuzz: Fuzz) -> None:
    fuzz.run(seconds=300.0, batches=120)
    assert not fuzz.found
    assert fuzz.events() == 0
    for victim in fuzz.victims:
        assert victim.codes[0] > 20, "some of it is obeyed"
        assert len(victim.codes) > 20, "and refused for many reasons"
    assert fuzz.victims[0].commands > 10 * BATCH


def test_every_command_that_libtpms_has_is_known_to_the_fuzzer(fuzz: Fuzz) -> None:
    answer = fuzz.victims[0].transmit(command(0x17A, b"\0\0\0\2" + bytes(4) + b"\0\0\1\0"))
    codes = {int.from_bytes(answer[at + 2 : at + 4]) for at in range(19, len(answer), 4)}
    assert len(codes) > 100
    assert codes <= {code & 0xFFFF for code in commands_tpm20.LAYOUTS}
    old = fuzz.victims[1]
    supported = set()
    for ordinal in range(0x100):  # TPM_CAP_ORD
        answer = old.transmit(command12(0x65, (1).to_bytes(4) + (4).to_bytes(4) + ordinal.to_bytes(4)))
        if answer[6:10] == bytes(4) and answer[-1]:
            supported.add(ordinal)
    assert len(supported) > 80
    assert supported <= commands_tpm12.LAYOUTS.keys()


def test_an_instance_that_ends_under_fire_is_found_told_counted_and_comes_back(fuzz: Fuzz) -> None:
    fuzz.sabotage = 100
    pid = fuzz.victims[0].pid
    fuzz.run(seconds=300.0, batches=4)
    assert fuzz.crashes == 1
    (found,) = fuzz.found
    assert f"instance {pid} ended" in found
    assert fuzz.events() == 1
    (file,) = fuzz.files.glob("*.jsonl")
    head, *steps = file.read_text().splitlines()
    assert json.loads(head)["family"] == "2.0"
    assert len(steps) > 90
    assert str(file) in found


def test_a_replay_plays_the_steps_again_and_finds_nothing_in_harmless_ones(vtpms: Installation, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    steps = [["command", tpm.get_random(8).hex()], ["stream", "00"], ["control", "00000001"], ["command", "80" * 20]]
    head = {"family": "2.0", "frontend": "socket", "why": "a test"}
    file.write_text("\n".join(map(json.dumps, [head, *steps])) + "\n")
    assert replay(vtpms, file) == 0


def test_a_changed_neighbour_and_a_lost_state_are_found(fuzz: Fuzz) -> None:
    fuzz.check_others(None)
    fuzz._neighbour.write(0x1500016, b"ROBBED!!")
    with pytest.raises(WrongAnswerError, match="neighbour"):
        fuzz.check_others(None)
    victim = fuzz.victims[0]
    victim.sentinel = victim.sentinel[:-1] + bytes((victim.sentinel[-1] ^ 1,))
    with pytest.raises(WrongAnswerError, match="its state is"):
        fuzz._settle(victim)


def test_kill_9_of_anything_in_any_order_loses_nothing_and_leaves_nothing(vtpms: Installation) -> None:
    """With two keepers at least: the other one's vTPMs must not notice."""
    vtpms.configure("per_keeper", 2)
    vtpms.restart()
    massacre = Massacre(vtpms, seed=20261121, vtpms=4)
    assert massacre.before.processes["keeper"] == 2
    massacre.run(seconds=400.0, kills=len(DECK))
    assert set(massacre.killed) == set(DECK), "one whole deck"
    massacre.finish()
    assert sum(writer.acknowledged for writer in massacre.writers) > 100
    assert sum(writer.resets for writer in massacre.writers) > 0


def test_a_lost_write_a_repeated_one_and_a_forged_pcr_are_found(vtpms: Installation) -> None:
    writer = Writer(vtpms, "web")
    writer.recover()
    for field in ("_number", "_count"):
        setattr(writer, field, getattr(writer, field) + 1)  # acknowledged, and not there
        with pytest.raises(PromiseBrokenError, match="was acknowledged"):
            writer.recover()
        setattr(writer, field, getattr(writer, field) - 1)
    writer._guest.good(writer._increment)  # executed once more than anybody knows
    with pytest.raises(PromiseBrokenError, match="count"):
        writer.recover()
    writer._count += 1
    writer._guest.extend(4, bytes(32))
    with pytest.raises(PromiseBrokenError, match="PCR 4"):
        writer.recover()
    writer.close()


def keeper_with_more_than_its_own(vtpms: Installation) -> None:
    """What one of several keepers forgot to close is seen in that one, however many vTPMs each has."""
    extra = os.open("/dev/zero", os.O_RDONLY)
    words = [str(BIN / "python"), "-m", "vtpm_instance.keeper", "--socket", str(vtpms.runtime / "keeper-9.sock")]
    with subprocess.Popen(words, pass_fds=[extra], stderr=subprocess.DEVNULL) as keeper:
        os.close(extra)
        wait_for((vtpms.runtime / "keeper-9.sock").exists, "the keeper")
        held = [dict(kinds) for role, kinds in Inventory.of(vtpms).descriptors if role == "keeper"]
        keeper.terminate()
    assert sorted(kinds.get("/dev/zero", 0) for kinds in held) == [0, 1]


def test_whatever_is_left_over_is_found(vtpms: Installation) -> None:
    vtpms.add("web")
    vtpms.attach("web")
    before = Inventory.at_rest(vtpms)
    assert before.processes == {"manager": 1, "keeper": 1, "spawner": 1, "standby": 1, "tpm": 1, "instance": 1}
    before.compare(lambda: Inventory.of(vtpms))
    image = vtpms.state / "state" / f"{vtpms.show('web')['uuid']}.img"
    assert before.locks[str(image.relative_to(vtpms.state))] == 1

    def differs() -> str:
        return "\n".join(before.differences(Inventory.of(vtpms)))

    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(vtpms.runtime / "left.sock"))
        left.listen()
        assert "sockets" in differs()
    with (vtpms.state / "left").open("wb") as left_file:
        fcntl.flock(left_file, fcntl.LOCK_EX)
        assert {"locks", "files"} <= {line.split(":")[0] for line in differs().splitlines()}
    (vtpms.state / "left").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:  # one descriptor more in the manager
        client.connect(str(vtpms.runtime / "admin.sock"))
        wait_for(lambda: "descriptors" in differs(), "a descriptor to be seen")
    wait_for(lambda: not differs(), "it to be gone")
    keeper_with_more_than_its_own(vtpms)
    crowded = replace(before, connections=SQLITE_CONNECTIONS_MOST + 1)
    assert "connections" in "\n".join(before.differences(crowded))
    (instance,) = (pid for role, pid in roles(vtpms) if role == "instance")
    os.kill(instance, signal.SIGSTOP)
    os.kill(instance, signal.SIGKILL)
    wait_for(lambda: instance not in [pid for _, pid in roles(vtpms)], "the end of the instance")
