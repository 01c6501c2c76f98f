"""An approver says which platforms may open an installation: the ceremony, upgrades, revocation, recovery."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Answer, Guest, Installation, installation
from fixtures_tpm import SwtpmProcess, running_swtpm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
FIRMWARE = "11" * 32  # what new firmware measures into PCR 7
DENIED, INTEGRITY = 5, 6


class Site:
    """An installation on a real swtpm, and its approver, who sits elsewhere with a key file."""

    def __init__(self, vtpms: Installation, swtpm: SwtpmProcess) -> None:
        self.vtpms, self.swtpm = vtpms, swtpm
        self.key = str(vtpms.base / "saa.pem")
        vtpms.command("vtpm-approve", "new-key", self.key)

    def boot(self, *measured: str) -> None:
        """Reset the platform; firmware measures these into PCR 7."""
        self.swtpm.stop()
        self.swtpm.start()
        for digest in measured:
            self.swtpm.tool("tpm2_pcrextend", f"7:sha256={digest}")

    def target(self, name: str) -> Path:
        return self.vtpms.state / "approvals" / f"{name}.json"

    def sign(self, target: Path, sequence: int, *options: str, check: bool = True) -> str:
        output = str(self.vtpms.base / f"{target.stem}-{sequence}-{len(list(self.vtpms.base.iterdir()))}")
        words = ["vtpm-approve", "sign", "--key", self.key, "--group", str(target), "--sequence", str(sequence)]
        self.vtpms.command(*words, "-o", output, *options, check=check)
        return output

    def signed(self, sequence: int, *options: str) -> list[str]:
        """Approvals of the platform object and of the default group."""
        targets = [self.target(name) for name in ("platform", "default")]
        return [self.sign(target, sequence, "--pcrs-from", str(target), *options) for target in targets]

    def approve(self, *approvals: str, check: bool = True) -> Answer:
        return self.vtpms.vtpm_manager("approve", *approvals, check=check)

    def value(self, *measured: str) -> str:
        """PCR 7 after these measurements."""
        pcr = bytes(32)
        for digest in measured:
            pcr = hashlib.sha256(pcr + bytes.fromhex(digest)).digest()
        return pcr.hex()

    def store_something(self) -> None:
        self.vtpms.add("web")
        guest = Guest(self.vtpms.attach("web")["endpoint"])
        guest.define(INDEX, 8)
        guest.write(INDEX, b"precious")
        guest.close()
        self.vtpms.command("vtpm-detach", "web")

    def still_precious(self) -> None:
        guest = Guest(self.vtpms.attach("web")["endpoint"])
        assert guest.read(INDEX, 8) == b"precious"
        guest.close()
        self.vtpms.command("vtpm-detach", "web")


@pytest.fixture
def site() -> Iterator[Site]:
    """Initialised with an approver, nothing approved yet."""
    with running_swtpm() as swtpm, installation() as vtpms:
        made = Site(vtpms, swtpm)
        vtpms.init("--pcrs", "sha256:0,7", "--saa", f"{made.key}.pub", tcti=swtpm.tcti)
        yield made


def test_an_approved_upgrade_opens_without_sealing_anew_and_is_not_gone_back_from(site: Site) -> None:
    vtpms = site.vtpms
    assert vtpms.try_start() == DENIED
    assert "there is no approval yet" in vtpms.refusal
    site.approve(*site.signed(1, "--comment", "as delivered"))
    vtpms.start()
    site.store_something()
    predicted = site.value(FIRMWARE)
    for approval in site.signed(2, "--pcr", f"7={predicted}", "--comment", "new firmware"):
        answer = site.approve(approval)
        assert "does not hold on this platform as it is now: PCR 7 differ" in answer.out
    rows = vtpms.command("vtpm-group-predict", "default", "--json").json
    assert {(row["sequence"], row["pcr"], row["opens"], row["same"]) for row in rows} == {
        *((1, 0, True, True), (1, 7, True, True), (2, 0, False, True), (2, 7, False, False)),
    }
    rows = vtpms.command("vtpm-group-predict", "default", "--pcr", f"7={predicted}", "--json").json
    assert {row["sequence"] for row in rows if row["opens"]} == {2}
    sealed = vtpms.command("vtpm-group-show", "default", "--json").json["reference"]
    assert vtpms.stop() == 0

    site.boot("22" * 32)  # the update fails: something else came up, which nobody approved
    assert vtpms.try_start() == DENIED
    assert f"PCR 7 is {site.value('22' * 32)}, approved {predicted}" in vtpms.refusal
    assert f"approved {'00' * 32}" in vtpms.refusal
    answer = vtpms.vtpm_manager("check", "--allow-weak", check=False)
    assert answer.code == DENIED
    assert f"PCR 7 is {site.value('22' * 32)}" in answer.out

    site.boot()  # and the old firmware, put back, is as good as before
    vtpms.start()
    site.still_precious()
    assert vtpms.stop() == 0

    site.boot(FIRMWARE)
    vtpms.start()
    site.still_precious()
    assert vtpms.command("vtpm-group-show", "default", "--json").json["reference"] == sealed
    assert vtpms.command("vtpm-group-show", "default", "--json").json["sequence"] == 2
    assert vtpms.stop() == 0

    site.boot()  # the new one came up, so the old one is refused from now on
    assert vtpms.try_start() == DENIED
    assert "approval 2 (new firmware): PCR 7 is" in vtpms.refusal
    old = site.signed(1)
    answer = site.approve(*old, check=False)
    assert answer.code == DENIED
    assert "sequence 1 is revoked" in answer.err
    site.boot(FIRMWARE)
    vtpms.start()
    site.still_precious()


def test_a_platform_that_nobody_approved_comes_back_by_a_new_approval(site: Site) -> None:
    vtpms = site.vtpms
    site.approve(*site.signed(1))
    vtpms.start()
    site.store_something()
    assert vtpms.stop() == 0
    site.boot(FIRMWARE)
    assert vtpms.try_start() == DENIED
    told = vtpms.vtpm_manager("approvals", "--json").json
    assert [document["name"] for document in told] == ["platform"]
    assert told[0]["pcr_values"].endswith(f"7={site.value(FIRMWARE)}")
    carried = vtpms.base / "platform.json"
    carried.write_text(json.dumps(told))
    values = vtpms.base / "pcrs.yaml"
    values.write_text(site.swtpm.tool("tpm2_pcrread", "sha256:0,7"))
    platform = site.sign(carried, 2, "--pcrs-from", str(values), "--previous", site.signed(1)[0])
    site.approve(platform)
    vtpms.start()  # the store opens, the default group is another matter
    assert vtpms.command("vtpm-group-show", "default", "--json").json["state"] == "closed"
    answer = vtpms.command("vtpm-attach", "web", "guest", check=False)
    assert answer.code == DENIED
    assert f"PCR 7 is {site.value(FIRMWARE)}" in answer.err
    group = vtpms.base / "group.json"
    group.write_text(vtpms.command("vtpm-group-show", "default", "--json").out)
    predicted = vtpms.base / "predicted.json"
    predicted.write_text(vtpms.command("vtpm-group-predict", "default", "--json").out)
    approval = site.sign(group, 2, "--pcrs-from", str(predicted))
    assert vtpms.command("vtpm-group-update", "default", approval, "--json").json["holds"] is True
    vtpms.command("vtpm-group-open", "default")
    site.still_precious()


def test_a_revoked_approval_opens_neither_an_old_store_nor_a_backup(site: Site) -> None:
    vtpms = site.vtpms
    first = site.signed(1)
    site.approve(*first)
    vtpms.start()
    site.store_something()
    backup = vtpms.base / "backup.tar"
    vtpms.vtpm_manager("backup", str(backup))
    assert vtpms.stop() == 0
    saved = vtpms.base / "saved"
    shutil.copytree(vtpms.state, saved)
    vtpms.start()
    for approval in site.signed(2):
        vtpms.vtpm_manager("approve", approval, "--revoke-older")
    site.still_precious()
    answer = site.approve(first[0], check=False)
    assert answer.code == 4
    assert "takes 2 and above" in answer.err
    assert vtpms.stop() == 0
    current = vtpms.state.rename(vtpms.base / "current")

    shutil.copytree(saved, vtpms.state)  # the whole state directory of the time of approval 1
    assert vtpms.try_start() == DENIED
    assert "sequence 1 is revoked" in vtpms.refusal
    shutil.rmtree(vtpms.state)
    vtpms.vtpm_manager("restore", str(backup))
    assert vtpms.try_start() == DENIED
    assert "sequence 1 is revoked" in vtpms.refusal
    restored = vtpms.state.rename(vtpms.base / "restored")
    with tarfile.open(backup) as tar:
        assert tar.getnames()

    current.rename(vtpms.state)
    vtpms.start()
    site.still_precious()
    second = site.signed(2)
    assert vtpms.stop() == 0
    shutil.rmtree(vtpms.state)
    restored.rename(vtpms.state)  # what if it is all that is left: go back with the recovery key, approve anew
    vtpms.vtpm_manager("accept-rollback", "--key", str(vtpms.recovery))
    assert vtpms.try_start() == DENIED
    (told,) = vtpms.vtpm_manager("approvals", "--json").json
    assert (told["sequence"], told["holds"]) == (2, None), "what is taken is not what the older store knows"
    site.approve(*second)
    vtpms.start()
    site.still_precious()


def test_an_approver_whose_key_is_lost_is_replaced_with_the_recovery_key(site: Site) -> None:
    vtpms, lost = site.vtpms, site.key
    first = site.signed(3)
    site.approve(*first)
    vtpms.start()
    site.store_something()
    assert vtpms.stop() == 0
    answer = vtpms.vtpm_manager("reseal", "--saa", f"{site.key}.pub", check=False)
    assert (answer.code, "recovery key" in answer.err) == (DENIED, True), "also where all is well"
    site.boot(FIRMWARE)
    vtpms.vtpm_manager("reseal", "--recovery-key", str(vtpms.recovery))
    assert vtpms.try_start() == DENIED, "sealed for the same approver, who cannot sign any more"
    site.key = str(vtpms.base / "next.pem")
    vtpms.command("vtpm-approve", "new-key", site.key)
    answer = vtpms.vtpm_manager("reseal", "--saa", f"{site.key}.pub", check=False)
    assert answer.code == DENIED, "not without the recovery key where the seals do not open"
    vtpms.vtpm_manager("reseal", "--recovery-key", str(vtpms.recovery), "--saa", f"{site.key}.pub")
    assert vtpms.try_start() == DENIED
    answer = site.approve(first[0], check=False)
    assert answer.code != 0, "the former approver's word counts no longer"
    document = json.loads(site.target("platform").read_text())
    assert (document["sequence"], document["pcr_values"].endswith(site.value(FIRMWARE))) == (3, True)
    site.approve(*site.signed(3))
    vtpms.start()
    site.still_precious()
    assert vtpms.command("vtpm-group-show", "default", "--json").json["state"] == "open"
    assert lost != site.key


def test_revoking_what_holds_now_has_to_be_confirmed(site: Site) -> None:
    vtpms = site.vtpms
    site.approve(*site.signed(1))
    vtpms.start()
    future = site.signed(2, "--pcr", f"7={site.value(FIRMWARE)}")
    answer = vtpms.vtpm_manager("approve", future[0], "--revoke-older", check=False)
    assert answer.code == 4
    assert "would be closed at the next start" in answer.err
    assert vtpms.command("vtpm-group-predict", "platform", "--json").json[0]["sequence"] == 1
    vtpms.vtpm_manager("approve", future[0], "--revoke-older", "--yes")
    assert vtpms.stop() == 0
    assert vtpms.try_start() == DENIED
    site.boot(FIRMWARE)
    vtpms.start()  # the group's own is still the old one
    assert vtpms.command("vtpm-group-show", "default", "--json").json["state"] == "closed"
    vtpms.command("vtpm-group-update", "default", future[1])
    vtpms.command("vtpm-group-open", "default")


def test_another_tenants_approver_opens_that_tenants_group_only(site: Site) -> None:
    vtpms = site.vtpms
    site.approve(*site.signed(1))
    vtpms.start()
    theirs = str(vtpms.base / "tenant.pem")
    vtpms.command("vtpm-approve", "new-key", theirs)
    added = vtpms.command("vtpm-group-add", "acme", "--saa", f"{theirs}.pub")
    assert "will be CLOSED after the next start" in added.err
    vtpms.add("their", "--group", "acme")
    vtpms.add("ours")
    target = vtpms.base / "acme.json"
    target.write_text(vtpms.command("vtpm-group-show", "acme", "--json").out)
    values = vtpms.base / "acme-pcrs.json"
    values.write_text(vtpms.command("vtpm-group-predict", "acme", "--json").out)
    words = ["vtpm-approve", "sign", "--group", str(target), "--pcrs-from", str(values), "--sequence", "1", "-o"]
    answer = vtpms.command(*words, str(vtpms.base / "no"), "--key", site.key, check=False)
    assert answer.code == 4, "the platform's approver is not theirs"
    vtpms.restart()
    refused = vtpms.command("vtpm-attach", "their", "guest", check=False)
    assert refused.code == DENIED
    assert "there is no approval yet" in refused.err
    vtpms.attach("ours")
    approval = str(vtpms.base / "acme.approval")
    vtpms.command(*words, approval, "--key", theirs)
    refused = vtpms.command("vtpm-group-update", "default", approval, check=False)
    assert refused.code == 4
    vtpms.command("vtpm-group-update", "acme", approval)
    vtpms.command("vtpm-group-open", "acme")
    vtpms.attach("their")
    vtpms.restart()
    assert vtpms.command("vtpm-group-show", "acme", "--json").json["state"] == "open"

    assert vtpms.stop() == 0
    following = str(vtpms.base / "following.pem")
    vtpms.command("vtpm-approve", "new-key", following)
    recover = ["recover", "--key", str(vtpms.recovery), "--saa", f"{following}.pub"]
    assert vtpms.vtpm_manager(*recover, check=False).code == 2
    vtpms.vtpm_manager(*recover, "--group", "acme")
    vtpms.start()
    assert vtpms.command("vtpm-group-show", "acme", "--json").json["state"] == "closed"
    answer = vtpms.command("vtpm-group-update", "acme", approval, check=False)
    assert answer.code == INTEGRITY, "their former approver's word counts no longer"
    target.write_text(vtpms.command("vtpm-group-show", "acme", "--json").out)
    last = str(vtpms.base / "acme.last")
    vtpms.command(*words, last, "--key", following)
    vtpms.command("vtpm-group-update", "acme", last)
    vtpms.command("vtpm-group-open", "acme")
    assert vtpms.command("vtpm-group-show", "acme", "--json").json["state"] == "open"


def test_a_recovery_on_another_tpm_keeps_what_was_revoked_revoked(site: Site) -> None:
    vtpms = site.vtpms
    first = site.signed(1)
    site.approve(*first)
    vtpms.start()
    site.store_something()
    for approval in site.signed(2):
        vtpms.vtpm_manager("approve", approval, "--revoke-older")
    assert vtpms.stop() == 0
    site.swtpm.tool("tpm2_clear", "-c", "p")
    assert vtpms.try_start() == INTEGRITY
    vtpms.vtpm_manager("recover", "--key", str(vtpms.recovery))
    vtpms.start()  # the index has its old number and Name, so approval 2 is as good as before
    site.still_precious()
    for approval in first:
        answer = vtpms.vtpm_manager("approve", approval, check=False)
        assert answer.code == 4
        assert "takes 2 and above" in answer.err


def test_an_owner_who_takes_the_index_away_stops_the_manager_until_the_recovery_key_brings_it_back(site: Site) -> None:
    vtpms = site.vtpms
    first, second = site.signed(1), site.signed(2)
    site.approve(*second)
    vtpms.start()
    site.store_something()
    assert vtpms.stop() == 0
    site.swtpm.tool("tpm2_nvundefine", "0x1800200", "-C", "o")
    assert vtpms.try_start() == INTEGRITY
    assert "revocation index" in vtpms.refusal
    size, attributes = "512", "policywrite|authread|no_da"
    site.swtpm.tool("tpm2_nvdefine", "0x1800200", "-C", "o", "-s", size, "-a", attributes, "-p", "his")
    assert vtpms.try_start() == INTEGRITY
    site.swtpm.tool("tpm2_nvundefine", "0x1800200", "-C", "o")
    answer = vtpms.vtpm_manager("reseal", "--recovery-key", str(vtpms.recovery))
    assert "the store key" in answer.out
    vtpms.start()
    site.still_precious()
    answer = vtpms.vtpm_manager("approve", first[0], check=False)
    assert answer.code == 4, "what was revoked stays revoked"


def test_an_init_that_fails_leaves_no_index_behind(site: Site) -> None:
    vtpms = site.vtpms
    before = site.swtpm.tool("tpm2_getcap", "handles-nv-index")
    again = [str(vtpms.base / "elsewhere"), "--runtime-dir", str(vtpms.runtime), "--tcti", site.swtpm.tcti]
    words = ["vtpm-manager", "init", "--state-dir", *again, "--recovery", f"{vtpms.recovery}.pub"]
    words += ["--pcrs", "sha256:0,7", "--saa", f"{site.key}.pub"]
    small = vtpms.command(*words, "--store-size", "8192", check=False)
    assert small.code == 2
    assert site.swtpm.tool("tpm2_getcap", "handles-nv-index") == before
    vtpms.command(*words)
    assert len(site.swtpm.tool("tpm2_getcap", "handles-nv-index").split()) == len(before.split()) + 4
