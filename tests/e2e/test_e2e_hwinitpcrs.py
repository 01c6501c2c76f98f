"""Hardware PCRs in a vTPM's: which bytes result, computed here with hashlib, in every bank and both families."""

import hashlib
import sqlite3
from pathlib import Path

import pytest
from e2e_rig import Guest, Installation
from fixtures_tpm import SwtpmProcess, running_swtpm
from vtpm_instance_commands import command12

pytestmark = pytest.mark.e2e
EXTENDED = {0: b"firmware", 2: b"drivers", 4: b"loader", 7: b"secure boot"}
BANKS = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}


def hardware_pcrs(chip: SwtpmProcess) -> dict[int, bytes]:
    """Measure something into the chip, as firmware does, and compute what its SHA-256 bank holds then."""
    values = {}
    for pcr, what in EXTENDED.items():
        digest = hashlib.sha256(what).digest()
        chip.tool("tpm2_pcrextend", f"{pcr}:sha256={digest.hex()}")
        values[pcr] = hashlib.sha256(bytes(32) + digest).digest()
    return values


def shown(vtpms: Installation, tcti: str) -> dict[str, dict[int, bytes]]:
    """Every bank of a vTPM, as tpm2_pcrread lists them: a line with the bank's name, then PCR : 0xVALUE."""
    found: dict[str, dict[int, bytes]] = {}
    values: dict[int, bytes] = {}
    for line in vtpms.tool(tcti, "tpm2_pcrread").out.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if value:
            values[int(name)] = bytes.fromhex(value.removeprefix("0x"))
        else:
            values = found.setdefault(name, {})
    return found


def expected(bank: str, value: bytes, start: bytes) -> bytes:
    """docs/hardware.md: the SHA-256 bank is extended by the value itself, another by its own hash of the value."""
    into = value if bank == "sha256" else hashlib.new(bank, value).digest()
    return hashlib.new(bank, start + into).digest()


def pcr_12(guest: Guest, pcr: int) -> bytes:
    return guest.good(command12(0x15, pcr.to_bytes(4)))[-20:]


def test_each_bank_gets_the_hardwares_values_and_again_after_each_reset(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        hardware = hardware_pcrs(chip) | {5: bytes(32), 6: bytes(32), 17: b"\xff" * 32}
        bare.init("--pcrs", "sha256:0,7", tcti=chip.tcti)
        bare.start()
        bare.add("web")
        web = bare.attach("web", "guest-1", "--hwinitpcrs", "0,2,4-7,17")
        assert web["hwinitpcrs"] == "0,2,4,5,6,7,17"

        def check() -> None:
            banks = shown(bare, web["tcti"])
            assert banks.keys() == BANKS.keys()
            for bank, size in BANKS.items():
                for pcr in range(19):
                    start = (b"\xff" if pcr > 16 else b"\0") * size
                    wanted = expected(bank, hardware[pcr], start) if pcr in hardware else start
                    assert banks[bank][pcr] == wanted, (bank, pcr)

        check()
        bare.command("vtpm-hibernate", "web")
        check()  # woken, it does not get them once more
        guest = Guest(web["endpoint"])
        guest.extend(0, b"\x11" * 32)
        bare.command("vtpm-hibernate", "web")
        bare.command("vtpm-reset-platform", "web")
        check()
        guest.extend(0, b"\x11" * 32)
        guest.close()
        bare.kill()
        bare.start()  # an adopted instance may still ask
        bare.command("vtpm-reset-platform", "web")
        check()
        assert bare.stop() == 0


def test_a_tpm_of_the_old_family_gets_them_and_one_without_the_option_none(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        hardware = hardware_pcrs(chip) | {17: b"\xff" * 32}
        bare.init("--pcrs", "sha256:0,7", tcti=chip.tcti)
        bare.start()
        bare.add("old", "--tpm", "1.2")
        bare.add("plain")
        old = bare.attach("old", "guest-2", "--hwinitpcrs", "all")
        guest = Guest(old["endpoint"])
        for pcr, value in hardware.items():
            start = (b"\xff" if pcr == 17 else b"\0") * 20
            assert pcr_12(guest, pcr) == expected("sha1", value, start), pcr
        guest.close()
        plain = bare.attach("plain", "guest-3", "--hwinitpcrs", "none")
        assert plain["hwinitpcrs"] is None
        guest = Guest(plain["endpoint"])
        assert [guest.pcr(pcr) for pcr in range(16)] == [bytes(32)] * 16
        guest.close()
        assert bare.stop() == 0


WRONG = ("24", "7-4", "", "0,,2", "1-", "\u0663")


def test_what_cannot_be_and_what_was_edited_is_refused(vtpms: Installation) -> None:
    vtpms.add("web")
    for words in WRONG:
        answer = vtpms.command("vtpm-attach", "web", "guest", f"--hwinitpcrs={words}", check=False)
        assert answer.code == 2, f"{words}: {answer.err}"
    answer = vtpms.command("vtpm-attach", "web", "guest", "--hwinitpcrs", "0", "--startup", "none", check=False)
    assert (answer.code, "--startup none" in answer.err) == (2, True)
    assert vtpms.show("web")["state"] == "added"
    vtpms.attach("web", "guest", "--hwinitpcrs", "0")
    assert vtpms.stop() == 0
    with sqlite3.connect(vtpms.state / "catalogue.sqlite") as database:
        database.execute("update attachments set hw_pcrs = '0,1'")
    database.close()
    assert vtpms.try_start() == 6


def test_a_running_manager_and_the_tpm_itself_tell_the_same(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip:
        bare.init("--set-hierarchy-auth", tcti=chip.tcti)
        offline = bare.vtpm_manager("tpm-status", "--json").json
        assert (offline["anchor_defined"], offline["lockout_auth_set"]) == (True, True)
        bare.start()
        online = bare.vtpm_manager("tpm-status", "--json").json
        assert online == offline
        status = bare.vtpm_manager("status", "--json").json
        assert (status["anchor_index"], status["tpm_resets"]) == (online["anchor_index"], 0)
        assert bare.vtpm_manager("check", "--json", "--allow-weak", check=False).code == 0
        bare.kill()  # its socket is left behind
        killed = bare.vtpm_manager("tpm-status", "--json").json
        assert killed["anchor_index"] == online["anchor_index"]
