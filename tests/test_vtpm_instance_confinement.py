"""An instance that was taken over gets nowhere; what shuts it in is there, and is told when it is not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from evil_attempts import ATTEMPTS, FILTER_ALONE
from generated_docs import check_generated
from own_root import needs_own_root
from vtpm_instance_commands import get_random, rc
from vtpm_instance_rig import Bench, KeeperProcess, running_keeper, short_directory

from frontend_backend.messages_keeper import FEATURES

pytestmark = needs_own_root

NAMES = [name for group in ATTEMPTS.values() for name in group]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="an instance gets a user of its own from root only")


def outcomes(kind: str) -> dict[str, str]:
    with short_directory() as directory:
        program = Path(__file__).parent / "evil_instance.py"
        command = [sys.executable, str(program), str(directory), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def filtered() -> dict[str, str]:
    return outcomes("filtered")


@pytest.fixture(scope="module")
def unfiltered() -> dict[str, str]:
    return outcomes("unfiltered")


def refused(outcome: str) -> bool:
    return outcome == "killed" or outcome.startswith("refused: ")


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_whatever_an_evil_instance_tries_is_refused(filtered: dict[str, str], name: str) -> None:
    assert refused(filtered[name]), filtered[name]


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_without_the_filter_the_rest_still_holds_and_the_attempts_are_real(
    unfiltered: dict[str, str], name: str
) -> None:
    assert unfiltered[name] == "done" if name in FILTER_ALONE else refused(unfiltered[name]), unfiltered[name]


@needs_root
def test_the_neighbour_of_an_evil_instance_lives_on(filtered: dict[str, str], unfiltered: dict[str, str]) -> None:
    assert filtered["the neighbour lives"] == unfiltered["the neighbour lives"] == "yes"


@needs_root
def test_the_list_of_attempts_stands_in_the_threat_model(filtered: dict[str, str]) -> None:
    words = {"killed": "the instance is ended"}
    lines = ["| an instance that was taken over tries to | what happens | without the filter |\n|---|---|---|\n"]
    for group, attempts in ATTEMPTS.items():
        for name in attempts:
            second = "nothing else is in the way" if name in FILTER_ALONE else "refused too"
            lines.append(f"| {group}: {name} | {words.get(filtered[name], 'refused')} | {second} |\n")
    check_generated("threat-model.md", "evil attempts", "".join(lines))


def check(*options: str, uid: int | None = None) -> dict[str, object]:
    command = [sys.executable, "-m", "vtpm_instance.keeper", "--check", *options]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, user=uid, group=uid)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def inactive(found: dict[str, object]) -> dict[str, str]:
    features = found["features"]
    assert isinstance(features, list)
    assert [each["name"] for each in features] == list(FEATURES)
    return {each["name"]: each["why"] for each in features if not each["active"]}


@needs_root
@pytest.mark.parametrize("mode", ["fork", "exec"])
def test_everything_is_active_where_the_kernel_has_it(mode: str) -> None:
    found = check("--spawn", mode)
    assert (found["mode"], found["on_violation"], inactive(found)) == (mode, "kill", {})


def test_a_filter_that_only_logs_is_not_called_active() -> None:
    assert "only logs" in inactive(check("--seccomp", "log"))["seccomp"]


@needs_root
def test_without_root_instances_have_the_rest_by_a_user_namespace_and_the_missing_is_named(tmp_path: Path) -> None:
    if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
        pytest.skip("this kernel has no user namespaces")
    try:
        subprocess.run([sys.executable, "-c", ""], user=4321, check=True)
    except PermissionError:
        pytest.skip("other users may not enter the directory of this clone")
    assert inactive(check(uid=4321)) == {"user": "only root can give each instance a user of its own"}


@pytest.fixture(scope="module", params=["fork", "exec"])
def keeper(request: pytest.FixtureRequest) -> Iterator[KeeperProcess]:
    with running_keeper(options=("--spawn", request.param)) as process:
        yield process


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@needs_root
def test_a_running_instance_is_what_the_features_say(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.uid = 1_879_048_192
    bench.spawn()
    assert rc(bench.run(get_random())) == 0
    status = status_of(bench.pid)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == [str(bench.uid)] * 4
    for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
        assert int(status[f"Cap{kind}"], 16) == 0, kind
    spaces = {kind: os.readlink(f"/proc/{bench.pid}/ns/{kind}") for kind in ("net", "mnt", "ipc")}
    assert not set(spaces.values()) & {os.readlink(f"/proc/self/ns/{kind}") for kind in spaces}
    assert os.listdir(f"/proc/{bench.pid}/root") == []
    assert len(Path(f"/proc/{bench.pid}/mounts").read_text().splitlines()) == 1
    mappings = [line.split()[1] for line in Path(f"/proc/{bench.pid}/maps").read_text().splitlines()]
    assert not [rights for rights in mappings if "w" in rights and "x" in rights]
    assert bench.kill(signal.SIGTERM) == 0


def library_address(pid: int) -> str:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.split("-")[0] for line in lines if "libtpms" in line)


@needs_root
def test_forked_instances_share_their_layout_and_executed_ones_do_not(keeper: KeeperProcess) -> None:
    benches = [Bench(keeper) for _ in range(2)]
    for bench in benches:
        bench.spawn()
    starts = {library_address(bench.pid) for bench in benches}
    executed = "--spawn exec" in " ".join(Path(f"/proc/{keeper.process.pid}/cmdline").read_text().split("\0"))
    assert len(starts) == (2 if executed else 1)
    for bench in benches:
        bench.close()


@needs_root
def test_an_instance_ended_by_its_filter_is_reported_with_the_reason() -> None:
    with running_keeper() as keeper:
        bench = Bench(keeper)
        bench.spawn()
        # SIGSYS is how the kernel ends what makes a system call that its filter does not know (seccomp(2))
        assert bench.kill(signal.SIGSYS) == -signal.SIGSYS
        assert "a system call that it must not make" in keeper.log.read_text()


@needs_root
def test_without_user_namespace_and_setpcap_an_instance_still_gives_up_every_capability() -> None:
    """What a unit without namespaces leaves: only a user namespace would bring CAP_SETPCAP."""
    become = (
        "import os; from vtpm_instance import confine; confine.gain_nothing(); confine.keep_spawner_capabilities(); "
        "calls = confine.confinement(None, None, 'x'); assert confine.shut_in(calls, (), os.getppid()); "
        "assert confine.lock_down(calls, 12345, 12345, (), os.getppid()); "
        "print(os.getuid(), confine.capabilities())"
    )
    held = ["setpriv", "--bounding-set=-all,+setuid,+setgid", "--inh-caps=-all", sys.executable, "-c", become]
    root = Path(__file__).parent.parent
    done = subprocess.run(held, capture_output=True, text=True, check=False, cwd=root, timeout=60)
    assert (done.returncode, done.stdout) == (0, "12345 0\n"), done.stderr
