"""docs/provisioning.md, run as a new user would type it."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from e2e_rig import BIN, Installation
from fixtures_tpm import running_swtpm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "provisioning.md"


def test_the_ceremony_works_as_it_is_written(bare: Installation) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 8
    script = bare.base / "ceremony.sh"
    script.write_text("set -eu\n" + "".join(blocks), encoding="utf-8")
    with running_swtpm() as swtpm:
        environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "WORK": str(bare.base),
            "TCTI": swtpm.tcti,
            "TSS2_LOG": "all+NONE",
        }
        with (bare.base / "said").open("wb") as said:
            done = subprocess.run(
                ["sh", "-x", str(script)], env=environment, stdout=said, stderr=said, timeout=180, check=False
            )
    text = (bare.base / "said").read_text(encoding="utf-8", errors="replace")
    log = bare.log.read_text() if bare.log.exists() else ""
    assert done.returncode == 0, f"{text[-3000:]}\n{log[-2000:]}"
    assert " closed " not in text, "every group opened again"
    assert (bare.base / "first.vtpm").stat().st_size > 0
