"""A log that takes nothing."""

import subprocess
import sys
from pathlib import Path

_BROKEN_INSTANCE = """
import os
from uuid import UUID
from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.confine import confinement
from vtpm_instance.control import FrontEnd
from vtpm_instance.order import InstanceOrder
from vtpm_instance.spawn import fork_instance

def fail(_order):
    raise ZeroDivisionError

order = InstanceOrder(UUID(int=1), 1, TpmFamily.TPM_2_0, FrontEnd.SOCKET, 0, 0, 0, 0, 0, {})
told, tell = os.pipe()
spawner = os.fork()
if spawner == 0:
    me = os.getpid()
    pid = fork_instance(lambda: order, confinement(None, None, "evil"), fail, ())
    assert os.getpid() == me, "the child came back"
    os.write(tell, str(pid).encode())
    os._exit(0)
assert os.waitpid(spawner, 0)[1] == 0
pid = int(os.read(told, 20))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run_with_a_full_log(script: str) -> str:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, check=True, text=True
        )
    return done.stdout


def test_a_note_that_cannot_be_written_ends_nothing() -> None:
    script = "from vtpm_instance.journal import note; note('one'); note('two'); print('on')"
    assert run_with_a_full_log(script) == "on\n"


def test_an_instance_that_meets_a_bug_ends_without_returning_into_the_spawner_even_when_the_log_is_full() -> None:
    assert run_with_a_full_log(_BROKEN_INSTANCE) == "70\n"
