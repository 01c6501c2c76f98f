"""Deep quotes as a verifier, an administrator and a guest use them; the hardware TPM has an endorsement certificate."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attestation_rig import Verifier, certified_swtpm
from e2e_rig import Guest, Installation, installation
from fixtures_tpm import SwtpmProcess

from frontend_backend.deep_quote import DeepQuoteCommand
from frontend_backend.tpmhdr import TpmFamily

pytestmark = pytest.mark.e2e
NONCE = "0123456789abcdef"
OTHER = "fedcba9876543210"


@pytest.fixture
def rig() -> Iterator[tuple[Installation, SwtpmProcess, Path]]:
    """A running installation on a swtpm with an endorsement certificate, and its maker's authorities.

    The endorsement hierarchy has a password, without which no attestation key is made.
    """
    with installation() as vtpms, certified_swtpm(vtpms.base) as (swtpm, authorities):
        vtpms.init("--set-hierarchy-auth", tcti=swtpm.tcti)
        vtpms.start()
        yield vtpms, swtpm, authorities


def quote(vtpms: Installation, name: str, nonce: str = NONCE, *options: str) -> str:
    bundle = str(vtpms.base / f"{os.urandom(4).hex()}.quote")
    vtpms.command("vtpm-quote", name, "--nonce", nonce, *options, "-o", bundle)
    return bundle


def test_a_quote_changes_with_the_guests_pcrs_and_holds_for_nobody_else(
    rig: tuple[Installation, SwtpmProcess, Path],
) -> None:
    vtpms, _, authorities = rig
    uuid = vtpms.add("web")
    refused = vtpms.command("vtpm-quote", "web", "--nonce", NONCE, check=False)
    assert refused.code == 4
    assert "vtpm-group-enroll default" in refused.err
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    certificate = verifier.enrol()
    refused = vtpms.command("vtpm-quote", "web", "--nonce", NONCE, check=False)
    assert refused.code == 4
    assert "does not run" in refused.err

    guest = vtpms.attach("web", "customer-7")
    first = quote(vtpms, "web")
    verdicts = verifier.verdicts(first, certificate, NONCE, "--vtpm", uuid)
    assert set(verdicts.values()) == {"ok", "not checked"}
    assert {name for name, verdict in verdicts.items() if verdict == "not checked"} == {
        "hardware PCR policy",
        "vTPM PCR policy",
    }
    before = verifier.says
    assert (before["vtpm"], before["guest"], before["tpm"], before["for_guest"]) == (uuid, "customer-7", "2.0", False)

    vtpms.tool(guest["tcti"], "tpm2_pcrextend", f"10:sha256={'ab' * 32}")
    second = quote(vtpms, "web")
    verifier.verdicts(second, certificate, NONCE, "--vtpm", uuid)
    after = verifier.says
    assert after["vtpm_pcrs"].pop("10") == hashlib.sha256(bytes(32) + b"\xab" * 32).hexdigest()
    assert before["vtpm_pcrs"].pop("10") == "00" * 32
    assert after["vtpm_pcrs"] == before["vtpm_pcrs"]
    assert after["hardware_pcrs"] == before["hardware_pcrs"]

    policy = vtpms.base / "policy.json"
    policy.write_text(json.dumps({"vtpm": {"10": ["00" * 32]}, "hardware": {"0": [before["hardware_pcrs"]["0"]]}}))
    assert verifier.verdicts(first, certificate, NONCE, "--pcr-policy", str(policy))["vTPM PCR policy"] == "ok"
    refused = verifier.verdicts(second, certificate, NONCE, "--pcr-policy", str(policy), code=6)
    assert [name for name, verdict in refused.items() if verdict == "failed"] == ["vTPM PCR policy"]

    replayed = verifier.verdicts(second, certificate, OTHER, code=6)
    assert {name for name, verdict in replayed.items() if verdict == "failed"} == {"nonce", "vTPM nonce"}

    other = vtpms.add("mail")
    vtpms.attach("mail", "customer-8", "--hwinitpcrs", "0,2")
    theirs = quote(vtpms, "mail")
    swapped = verifier.verdicts(theirs, certificate, NONCE, "--vtpm", uuid, code=6)
    assert [name for name, verdict in swapped.items() if verdict == "failed"] == ["vTPM"]
    assert (verifier.says["vtpm"], verifier.says["hwinitpcrs"]) == (other, "0,2")
    assert before["hwinitpcrs"] is None

    vtpms.command("vtpm-measure", "web", "--measure", "cmdline=quiet")
    vtpms.command("vtpm-reset-platform", "web")
    log = str(vtpms.base / "web.log")
    vtpms.command("vtpm-event-log", "web", "-o", log)
    measured = verifier.verdicts(quote(vtpms, "web"), certificate, NONCE, "--event-log", log)
    assert (measured["event log"], measured["boot"]) == ("ok", "ok")
    assert (before["boot_measured"], verifier.says["boot_measured"]) == (False, True)
    vtpms.tool(guest["tcti"], "tpm2_pcrextend", f"5:sha256={'ab' * 32}")
    more = verifier.verdicts(quote(vtpms, "web"), certificate, NONCE, "--event-log", log, code=6)
    assert [name for name, verdict in more.items() if verdict == "failed"] == ["boot"]


def test_a_group_is_not_taken_for_another(rig: tuple[Installation, SwtpmProcess, Path]) -> None:
    vtpms, _, authorities = rig
    group = vtpms.command("vtpm-group-add", "tenant").out.strip()
    vtpms.add("theirs", "--group", "tenant")
    vtpms.attach("theirs")
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    ours, tenants = verifier.enrol(), verifier.enrol("tenant")
    bundle = quote(vtpms, "theirs")
    verifier.verdicts(bundle, tenants, NONCE, "--group", group)
    failed = {name for name, verdict in verifier.verdicts(bundle, ours, NONCE, code=6).items() if verdict == "failed"}
    assert failed == {"group", "hardware signature", "key's attributes"}
    # who answers for one group cannot have the other's key certified as his
    request = json.loads(Path(verifier.path("tenant.request")).read_text())
    forged = Path(verifier.path("forged.request"))
    forged.write_text(
        json.dumps(request | {"group": json.loads(Path(verifier.path("default.request")).read_text())["group"]})
    )
    authority = ("--ca-key", verifier.path("ca.key"), "--ca-cert", verifier.path("ca.crt"))
    words = ("certify", str(forged), verifier.path("tenant.proof"), verifier.path("tenant.kept"))
    assert "another request" in verifier.check(*words, *authority, "-o", verifier.path("no.crt"), code=6).err


def test_a_key_survives_restarts_and_is_renewed_when_asked(rig: tuple[Installation, SwtpmProcess, Path]) -> None:
    vtpms, swtpm, authorities = rig
    vtpms.add("web")
    vtpms.attach("web")
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    certificate = verifier.enrol()
    verifier.verdicts(quote(vtpms, "web"), certificate, NONCE)
    resets = verifier.says["reset_count"]
    vtpms.restart()
    swtpm_reset(vtpms, swtpm)
    verifier.verdicts(quote(vtpms, "web"), certificate, NONCE)
    assert verifier.says["reset_count"] == resets + 1
    assert vtpms.command("vtpm-group-enroll", "default", "--json").json["key"] == "kept"
    name = vtpms.command("vtpm-group-show", "default", "--json").json["ak"]
    renewed = vtpms.command("vtpm-group-enroll", "default", "--renew", "--json").json
    assert renewed["key"].startswith("renewed")
    assert renewed["ak"] != name
    failed = verifier.verdicts(quote(vtpms, "web"), certificate, NONCE, code=6)
    assert failed["hardware signature"] == "failed"
    events = vtpms.command("vtpm-events", "--json").json
    assert sum(event["kind"] == "group-enrolled" for event in events) == 2


def swtpm_reset(vtpms: Installation, swtpm: SwtpmProcess) -> None:
    assert vtpms.stop() == 0
    swtpm.stop()
    swtpm.start()
    vtpms.start()


def test_a_guest_quotes_itself_and_is_held_back_when_it_asks_too_often(
    rig: tuple[Installation, SwtpmProcess, Path],
) -> None:
    vtpms, _, authorities = rig
    uuid = vtpms.add("web")
    guest = vtpms.attach("web", "customer-7")
    refused = vtpms.command("vtpm-guest-quote", "--socket", guest["endpoint"], "--nonce", NONCE, check=False)
    assert refused.code == 5, refused.err
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    certificate = verifier.enrol()
    bundle = str(vtpms.base / "guest.quote")
    vtpms.command("vtpm-guest-quote", "--socket", guest["endpoint"], "--nonce", NONCE, "--pcrs", "0-7,23", "-o", bundle)
    verifier.verdicts(bundle, certificate, NONCE, "--vtpm", uuid)
    assert verifier.says["for_guest"] is True
    assert sorted(map(int, verifier.says["vtpm_pcrs"])) == [*range(8), 23]
    speaker = Guest(guest["endpoint"])
    wish = DeepQuoteCommand(b"again", 1).pack(TpmFamily.TPM_2_0)
    codes = {speaker.code(wish) for _ in range(12)}
    assert codes == {0, 0x922}
    # an administrator is not held back, nor is the guest's other work
    quote(vtpms, "web")
    assert speaker.pcr(10) == bytes(32)
    speaker.close()


def test_one_that_sleeps_is_woken_to_be_quoted(rig: tuple[Installation, SwtpmProcess, Path]) -> None:
    vtpms, _, authorities = rig
    uuid = vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.extend(3, b"\x33" * 32)
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    certificate = verifier.enrol()
    vtpms.command("vtpm-hibernate", "web")
    verifier.verdicts(quote(vtpms, "web"), certificate, NONCE, "--vtpm", uuid)
    assert verifier.says["vtpm_pcrs"]["3"] == guest.pcr(3).hex()
    guest.close()


def test_a_tpm_1_2_is_quoted_by_its_instances_word(rig: tuple[Installation, SwtpmProcess, Path]) -> None:
    vtpms, _, authorities = rig
    uuid = vtpms.add("old", "--tpm", "1.2")
    endpoint = vtpms.attach("old")["endpoint"]
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    certificate = verifier.enrol()
    verdicts = verifier.verdicts(quote(vtpms, "old"), certificate, NONCE, "--vtpm", uuid)
    assert verdicts["vTPM quote"] == "not checked"
    assert verifier.says["tpm"] == "1.2"
    assert verifier.says["vtpm_pcrs"]["0"] == "00" * 20
    bundle = str(vtpms.base / "guest.quote")
    words = ("--socket", endpoint, "--nonce", NONCE, "--tpm", "1.2", "--pcrs", "0-23", "-o", bundle)
    vtpms.command("vtpm-guest-quote", *words)
    verifier.verdicts(bundle, certificate, NONCE, "--vtpm", uuid)


def test_a_challenge_for_another_key_or_altered_is_refused(rig: tuple[Installation, SwtpmProcess, Path]) -> None:
    vtpms, _, authorities = rig
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    verifier.enrol()
    challenge = json.loads(Path(verifier.path("default.challenge")).read_text())
    altered = vtpms.base / "altered.challenge"
    for field in ("identity", "encrypted_seed"):
        turned = bytearray.fromhex(challenge[field])
        turned[40] ^= 1
        altered.write_text(json.dumps(challenge | {field: turned.hex()}))
        answer = vtpms.command("vtpm-group-enroll", "default", "--challenge", str(altered), check=False)
        assert answer.code == 5
        assert "altered on the way" in answer.err
    altered.write_text(json.dumps(challenge | {"attestation_name": "000b" + "00" * 32}))
    assert vtpms.command("vtpm-group-enroll", "default", "--challenge", str(altered), check=False).code == 5
    altered.write_text("{}")
    assert vtpms.command("vtpm-group-enroll", "default", "--challenge", str(altered), check=False).code == 6
    # a maker that the verifier does not trust
    stranger = Verifier(vtpms, vtpms.base / "stranger")
    words = ("challenge", verifier.path("default.request"), "--ca", stranger.path("ca.crt"), "-o", "x", "--keep", "y")
    assert "nobody in the chain issued" in stranger.check(*words, code=6).err


def test_a_quote_tells_which_approval_holds(rig: tuple[Installation, SwtpmProcess, Path]) -> None:
    vtpms, _, authorities = rig
    saa = str(vtpms.base / "saa.pem")
    vtpms.command("vtpm-approve", "new-key", saa)
    vtpms.command("vtpm-group-add", "acme", "--saa", f"{saa}.pub")
    vtpms.add("web", "--group", "acme")
    vtpms.attach("web")
    verifier = Verifier(vtpms, vtpms.base / "verifier", authorities)
    certificate = verifier.enrol("acme")
    verifier.verdicts(quote(vtpms, "web"), certificate, NONCE)
    assert verifier.says["approval"] == 0
    target, values, approval = (str(vtpms.base / name) for name in ("acme.json", "pcrs.json", "acme.approval"))
    Path(target).write_text(vtpms.command("vtpm-group-show", "acme", "--json").out)
    Path(values).write_text(vtpms.command("vtpm-group-predict", "acme", "--json").out)
    words = ("--group", target, "--pcrs-from", values, "--sequence", "7", "--key", saa, "-o", approval)
    vtpms.command("vtpm-approve", "sign", *words)
    vtpms.command("vtpm-group-update", "acme", approval)
    verifier.verdicts(quote(vtpms, "web"), certificate, NONCE)
    assert verifier.says["approval"] == 7
