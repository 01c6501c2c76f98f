"""The mark of a request in hand outlives its maker, and is about one page of one device."""

import os
import signal
from pathlib import Path

import pytest

from frontend_backend.xen_ledger import Connection, Ledgers

HERE = Connection(domain=5, device=0, ring_ref=8, event_channel=17)


def test_a_mark_outlives_a_killed_process(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        Ledgers(tmp_path).open(HERE).take()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with Ledgers(tmp_path).open(HERE) as found:
        assert found.found
        found.settle()
    with Ledgers(tmp_path).open(HERE) as again:
        assert not again.found


@pytest.mark.parametrize("other", [Connection(5, 0, 9, 17), Connection(5, 0, 8, 18)])
def test_a_mark_about_another_page_of_the_device_does_not_count(tmp_path: Path, other: Connection) -> None:
    with Ledgers(tmp_path).open(HERE) as ledger:
        ledger.take()
    with Ledgers(tmp_path).open(other) as found:
        assert not found.found
    with Ledgers(tmp_path).open(HERE) as found:
        assert not found.found, "and is gone for good: its page was given up"


def test_what_stands_in_the_directory_is_not_believed(tmp_path: Path) -> None:
    target = tmp_path / "victim"
    target.write_bytes(b"keep")
    (tmp_path / "5-0").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        Ledgers(tmp_path).open(HERE)
    assert target.read_bytes() == b"keep"
    (tmp_path / "6-0").write_bytes(b"\xff" * 4096)
    with Ledgers(tmp_path).open(Connection(6, 0, 8, 17)) as garbage:
        assert not garbage.found


def test_marks_of_devices_that_are_gone_are_found_and_forgotten(tmp_path: Path) -> None:
    ledgers = Ledgers(tmp_path)
    ledgers.open(HERE).close()
    (tmp_path / "lock").touch()
    (tmp_path / "5-0.met").touch()
    assert ledgers.known() == [(5, 0)]
    ledgers.forget(5, 0)
    ledgers.forget(5, 0)
    assert ledgers.known() == []
    ledgers.open(HERE).discard()
    assert ledgers.known() == []
