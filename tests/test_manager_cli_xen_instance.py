"""vtpm-xen-instance: what it is told, and what it says where there is no Xen."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from frontend_backend.xen_terms import BindRefusedError, Place
from manager.cli_xen_instance import Settings, read_settings
from manager.errors import ConfigurationError
from manager.xen_backend_identity import Identity
from manager.xen_instance_guest import GuestBinder


def test_the_command_line_counts_more_than_the_file(tmp_path: Path) -> None:
    vtpm, file = uuid4(), tmp_path / "instance.toml"
    file.write_text(f'image = "/dev/xvdb"\nguest = "web1"\nuuid = "{vtpm}"\nruntime-dir = "/run/x"\nuid = 1234\n')
    told = read_settings(["--config", str(file), "--guest", "7", "--device", "2"])
    assert told == Settings(Path("/dev/xvdb"), "7", vtpm, 2, 1234, Path("/run/x"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--image PATH is needed"),
        ('image = "/i"\nimagee = 1', "unknown word 'imagee'"),
        ('image = "/i"\nuuid = "web1"', "mean nothing"),
        ('image = ""', "it is empty"),
        ('image = "/i"\nguest = " "', "names no domain"),
        ('image = "/i"\nuid = -1', "uid is a number"),
        ('image = "/i"\ndevice = true', "device is a number"),
        ('image = "/i"\nlog_level = "loud"', "log_level is one of"),
        (f'image = "/i"\nruntime_dir = "/{"r" * 100}"', "longer than"),
        ("image = ", "cannot be read"),
    ],
)
def test_a_file_that_means_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "instance.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        read_settings(["--config", str(file)])


def test_without_xen_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "manager.cli_xen_instance", "--image", str(tmp_path / "i"), "--runtime-dir"]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "/dev/xen/" in done.stderr
    assert not (tmp_path / "i").exists()


async def test_a_domain_whose_name_cannot_be_read_is_not_the_one_without_a_name(tmp_path: Path) -> None:
    """`guest` was taken as "" where a variable was not set, and what is not known of a domain is "" too."""

    async def unreadable(_domain: int) -> Identity:
        return Identity()

    nothing = cast(Any, None)  # a refusal comes before anything of these is looked at
    binder = GuestBinder(nothing, "", tmp_path, unreadable, nothing)
    with pytest.raises(BindRefusedError, match="whose name this domain may not read"):
        await binder.bind(Place(7, 0, 3), bytes(16))
