"""A whole installation on a TPM with registers, `crb:` at locality 2: in shared memory, with swtpm behind them."""

from collections.abc import Iterator

import pytest
from crb_device import CrbDevice, Quirks, crb_device
from e2e_rig import Installation
from fixtures_tpm import running_swtpm

pytestmark = pytest.mark.e2e
LOCALITIES = (0, 2)


@pytest.fixture
def device(bare: Installation) -> Iterator[CrbDevice]:
    """A TPM that grants the localities 0 and 2, and whose locality 0 the firmware has left active."""
    with running_swtpm() as swtpm, crb_device(bare.base, swtpm, Quirks(LOCALITIES, holder=0)) as made:
        yield made


def test_a_guest_is_served_and_check_says_which_localities_there_are(bare: Installation, device: CrbDevice) -> None:
    bare.init(tcti=device.setting(2).text)
    rows = bare.vtpm_manager("check", "--json", "--allow-weak", check=False).json
    found = {row["check"]: (row["verdict"], row["text"]) for row in rows if row["check"].startswith("locality ")}
    assert set(found) == {f"locality {number}" for number in range(5)}
    assert all(verdict == "ok" for verdict, _ in found.values())
    granted = {number for number in range(5) if "granted through crb:" in found[f"locality {number}"][1]}
    assert granted == set(LOCALITIES)
    assert "sees us at locality 2 " in found["locality 2"][1]
    bare.start()
    bare.add("web1")
    tcti = bare.attach("web1")["tcti"]
    assert len(bare.tool(tcti, "tpm2_getrandom", "--hex", "16").out) == 32
    bare.restart()
    assert len(bare.tool(tcti, "tpm2_getrandom", "--hex", "16").out) == 32


def test_a_locality_that_is_not_there_is_said_with_what_to_do(bare: Installation, device: CrbDevice) -> None:
    refused = bare.init(tcti=device.setting(3).text, check=False)
    assert refused.code == 7
    assert "do not become valid" in refused.err
    assert "Check `base=` and `locality=`" in refused.err
    wrong = bare.init(tcti=device.setting(0).text, check=False)
    assert wrong.code == 7
    assert "gives locality 0 only" in wrong.err
    assert not (bare.state / "store.img").exists()
