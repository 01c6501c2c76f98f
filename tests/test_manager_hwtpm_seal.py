import os
import signal
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from fixtures_tpm import SwtpmProcess, extend_command, recorded_bus, running_swtpm
from hypothesis import given
from hypothesis import strategies as st
from tpm2_pytss import ESYS_TR, TPM2_CC, TPMA_LOCALITY

from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    PcrsMoving,
    PolicyMismatch,
    RecoveryRefused,
    SealDamaged,
    SealUnverified,
    SrkChanged,
    TpmBusy,
    TpmCleared,
    TpmFull,
    TpmTransport,
    UnknownTpmCode,
    WrongLocality,
)
from manager.hwtpm_link import flushed
from manager.hwtpm_records import SealedBlob
from manager.hwtpm_seal import PCR_TRIES, _unmarshal
from manager.policy import PcrBranch, SealPolicy
from manager.recovery_key import RecoveryPrivate

CC_POLICY_PCR = int(TPM2_CC.PolicyPCR)
CC_UNSEAL = int(TPM2_CC.Unseal)
SECRET = b"store-key-" + os.urandom(22)
PCRS = (0, 2, 4, 7)
REFERENCE = b"vtpm-manager-platform-v1" + bytes(16)
RECOVERY = RecoveryPrivate.new()


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


@pytest.fixture
def tpm(swtpm: SwtpmProcess) -> Iterator[HardwareTpm]:
    with HardwareTpm.open(swtpm.setting) as opened:
        opened.provision_srk()
        yield opened
        if not opened._link._closed:
            assert opened.transient_handles() == ()


def platform_policy(tpm: HardwareTpm, *predicted: dict[int, bytes]) -> SealPolicy:
    return SealPolicy.build(
        pcrs=[tpm.pcr_values_to_seal(PCRS), *predicted],
        recovery_point=RECOVERY.public.signing_point,
        reference=REFERENCE,
    )


def extend(tpm: HardwareTpm, pcr: int) -> None:
    with tpm._link.operation("extend a PCR in a test") as esapi:
        assert esapi._tcti.exchange(extend_command(pcr))[6:10] == bytes(4)


def test_a_secret_comes_back_under_the_present_pcrs(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    assert tpm.unseal(blob) == SECRET


@pytest.mark.parametrize("size", [1, 128])
def test_secrets_of_the_least_and_greatest_size_are_sealed(tpm: HardwareTpm, size: int) -> None:
    secret = os.urandom(size)
    assert tpm.unseal(tpm.seal(secret, SealPolicy.build())) == secret


@pytest.mark.parametrize("size", [0, 129])
def test_secrets_of_other_sizes_are_refused(tpm: HardwareTpm, size: int) -> None:
    with pytest.raises(ValueError, match="1 to 128"):
        tpm.seal(bytes(size), SealPolicy.build())


def test_a_sealed_blob_survives_json_and_a_platform_reset(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    name = tpm.provision_srk()
    kept = tpm.seal(SECRET, platform_policy(tpm)).to_json()
    tpm.close()
    swtpm.stop()
    swtpm.start()
    with HardwareTpm.open(swtpm.setting) as again:
        assert again.unseal(SealedBlob.from_json(kept), name) == SECRET


def test_a_policy_without_pcrs_and_recovery_opens_at_locality_two_only(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    name = tpm.provision_srk()
    blob = tpm.seal(SECRET, SealPolicy.build())
    assert tpm.unseal(blob) == SECRET
    tpm.close()
    with HardwareTpm.open(swtpm.setting, locality=0) as weak, pytest.raises(WrongLocality, match="wants locality 2"):
        weak.unseal(blob, name)


@pytest.mark.parametrize("locality", [0, 1, 3, 4])
def test_no_other_locality_unseals(tpm: HardwareTpm, locality: int) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    tpm._link.locality = locality
    with pytest.raises(WrongLocality, match="wants locality 2"):
        tpm.unseal(blob)
    tpm._link.locality = 2
    assert tpm.unseal(blob) == SECRET


def test_a_policy_without_locality_serves_the_weaker_mode(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, locality=0) as weak:
        weak.provision_srk()
        for pcrs in ([], [weak.pcr_values_to_seal(PCRS)]):
            blob = weak.seal(SECRET, SealPolicy.build(pcrs=pcrs, locality=None))
            assert weak.unseal(blob) == SECRET


def test_changed_pcrs_are_named_with_both_values(tpm: HardwareTpm) -> None:
    before = tpm.pcr_read([4])[4]
    blob = tpm.seal(SECRET, platform_policy(tpm))
    extend(tpm, 4)
    with pytest.raises(PolicyMismatch, match=r"PCRs that differ: 4 .*reseal") as refused:
        tpm.unseal(blob)
    assert refused.value.differing == {4: (before, tpm.pcr_read([4])[4])}


def test_the_nearest_of_several_branches_is_explained(tpm: HardwareTpm) -> None:
    far = dict.fromkeys(PCRS, b"\x11" * 32)
    blob = tpm.seal(SECRET, platform_policy(tpm, far))
    extend(tpm, 7)
    with pytest.raises(PolicyMismatch) as refused:
        tpm.unseal(blob)
    assert set(refused.value.differing) == {7}


def test_predicted_values_unlock_after_the_extend(tpm: HardwareTpm) -> None:
    present = tpm.pcr_values_to_seal(PCRS)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(present[4] + b"\x5a" * 32)
    blob = tpm.seal(SECRET, platform_policy(tpm, present | {4: digest.finalize()}))
    assert tpm.unseal(blob) == SECRET
    extend(tpm, 4)
    assert tpm.unseal(blob) == SECRET


def test_a_seal_that_cannot_be_opened_here_is_never_returned(tpm: HardwareTpm) -> None:
    elsewhere = SealPolicy.build(pcrs=[dict.fromkeys(PCRS, b"\x22" * 32)])
    with pytest.raises(SealUnverified, match="thrown away"):
        tpm.seal(SECRET, elsewhere)


def test_the_recovery_key_opens_with_changed_pcrs(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    extend(tpm, 2)
    assert tpm.unseal_with_recovery(blob, RECOVERY.sign_statement) == SECRET


def test_another_recovery_key_is_refused(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    with pytest.raises(RecoveryRefused, match="not by the key"):
        tpm.unseal_with_recovery(blob, RecoveryPrivate.new().sign_statement)


def test_bytes_that_are_no_signature_are_refused(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    with pytest.raises(RecoveryRefused, match="DER"):
        tpm.unseal_with_recovery(blob, lambda digest: digest)


def test_a_seal_without_recovery_branch_says_so(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, SealPolicy.build(pcrs=[tpm.pcr_values_to_seal(PCRS)]))
    with pytest.raises(RecoveryRefused, match="sealed without one"):
        tpm.unseal_with_recovery(blob, RECOVERY.sign_statement)


def test_a_recovery_statement_cannot_be_replayed(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    statements: list[bytes] = []
    signatures: list[bytes] = []

    def sign(digest: bytes) -> bytes:
        statements.append(digest)
        signatures.append(RECOVERY.sign_statement(digest))
        return signatures[-1]

    def replay(digest: bytes) -> bytes:
        statements.append(digest)
        return signatures[0]

    assert tpm.unseal_with_recovery(blob, sign) == SECRET
    with pytest.raises(RecoveryRefused):
        tpm.unseal_with_recovery(blob, replay)
    assert len(set(statements)) == 2


def test_a_signer_that_fails_leaves_nothing_behind(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))

    def fail(_: bytes) -> bytes:
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        tpm.unseal_with_recovery(blob, fail)
    assert tpm.transient_handles() == ()
    assert tpm.unseal(blob) == SECRET


def altered(blob: SealedBlob, *, public: bytes | None = None, private: bytes | None = None) -> SealedBlob:
    return SealedBlob(public or blob.public, private or blob.private, blob.policy)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[SealedBlob], SealedBlob]] = {
    "private": lambda blob: altered(blob, private=flip(blob.private, 60)),
    "private cut": lambda blob: altered(blob, private=blob.private[:60]),
    "private cut and relabelled": lambda blob: altered(blob, private=(58).to_bytes(2) + blob.private[2:60]),
    "private inner size": lambda blob: altered(blob, private=flip(blob.private, 2)),
    "private outer size": lambda blob: altered(blob, private=flip(blob.private, 1)),
    "private with a tail": lambda blob: altered(blob, private=blob.private + b"\0"),
    "private gone": lambda blob: altered(blob, private=b"\0\0"),
    "public attributes": lambda blob: altered(blob, public=flip(blob.public, 9)),
    "public unique": lambda blob: altered(blob, public=flip(blob.public, len(blob.public) - 1)),
    "public type": lambda blob: altered(blob, public=flip(blob.public, 3)),
    "public policy": lambda blob: altered(blob, public=flip(blob.public, 20)),
    "public cut": lambda blob: altered(blob, public=blob.public[:-4]),
    "description": lambda blob: SealedBlob(blob.public, blob.private, SealPolicy.build()),
    "reference": lambda blob: SealedBlob(
        blob.public, blob.private, SealPolicy(blob.policy.branches, b"another store", 2)
    ),
}


@pytest.mark.parametrize("where", DAMAGE)
def test_damaged_and_swapped_blobs_are_refused_and_leave_no_handle(tpm: HardwareTpm, where: str) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    with pytest.raises(SealDamaged, match="bytes were kept"):
        tpm.unseal(DAMAGE[where](blob))
    assert tpm.transient_handles() == ()
    assert tpm.unseal(blob) == SECRET


@given(public=st.binary(max_size=100), private=st.binary(max_size=200))
def test_bytes_that_are_no_blob_are_damage_before_any_tpm_is_asked(public: bytes, private: bytes) -> None:
    with pytest.raises(SealDamaged):
        _unmarshal(SealedBlob(public, private, SealPolicy.build()))


def test_the_private_part_of_another_seal_is_refused(tpm: HardwareTpm) -> None:
    one, two = tpm.seal(SECRET, SealPolicy.build()), tpm.seal(b"other", SealPolicy.build())
    with pytest.raises(SealDamaged, match="0x1df"):
        tpm.unseal(altered(one, private=two.private))


@pytest.mark.parametrize("pcr", [1, 12])
def test_a_pcr_that_moves_during_the_unseal_is_tried_again(swtpm: SwtpmProcess, pcr: int) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(SECRET, platform_policy(tpm))
        bus.clear()
        bus.before[CC_UNSEAL] = [extend_command(pcr)]
        assert tpm.unseal(blob) == SECRET
        assert sum(int.from_bytes(command[6:10]) == CC_UNSEAL for command in bus.commands) == 2


def test_pcrs_that_never_rest_end_the_tries(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(SECRET, platform_policy(tpm))
        bus.before[CC_UNSEAL] = [extend_command(1)] * PCR_TRIES
        with pytest.raises(PcrsMoving, match="TPM_RC_PCR_CHANGED"):
            tpm.unseal(blob)
        assert tpm.transient_handles() == ()
        assert tpm.unseal(blob) == SECRET


def test_an_answer_altered_on_the_bus_is_refused_and_the_next_unseal_works(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(SECRET, platform_policy(tpm))
        bus.flip.add(CC_UNSEAL)
        with pytest.raises(TpmTransport, match="0x7001b"):
            tpm.unseal(blob)
        assert tpm.unseal(blob) == SECRET
        assert tpm.transient_handles() == ()


def test_the_secret_is_never_in_clear_on_the_bus(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(SECRET, platform_policy(tpm))
        assert tpm.unseal(blob) == SECRET
        assert tpm.unseal_with_recovery(blob, RECOVERY.sign_statement) == SECRET
        assert bus.saw(blob.public)
        assert not bus.saw(SECRET)
        assert not bus.saw(SECRET[8:16])


def test_the_bus_test_sees_a_secret_that_an_unsalted_session_fetches(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(SECRET, SealPolicy.build())
        assert not bus.saw(SECRET)
        with (
            tpm._link.operation("leak in a test") as esapi,
            flushed(esapi, tpm._sealer._load(esapi, blob)) as sealed,
            tpm._link.session(esapi, ESYS_TR.NONE, policy=True) as session,
        ):
            esapi.policy_command_code(session, TPM2_CC.Unseal)
            esapi.policy_locality(session, TPMA_LOCALITY.TWO)
            assert bytes(esapi.unseal(sealed, session)) == SECRET
        assert bus.saw(SECRET)


def unseal_by_hand(tpm: HardwareTpm, blob: SealedBlob, branch: PcrBranch | None, *, password: bool) -> None:
    with (
        tpm._link.operation("unseal in another way") as esapi,
        flushed(esapi, tpm._sealer._load(esapi, blob)) as sealed,
        tpm._link.session(esapi, tpm._srk.handle(esapi), policy=True) as session,
    ):
        if branch is not None:
            esapi.policy_pcr(session, branch.pcr_digest, "sha256:0,2,4,7")
        esapi.unseal(sealed, ESYS_TR.PASSWORD if password else session)


@pytest.mark.parametrize(("how", "code"), [("password", 0x12F), ("empty policy", 0x99D), ("no locality", 0x99D)])
def test_the_tpm_itself_refuses_every_other_way_in(tpm: HardwareTpm, how: str, code: int) -> None:
    policy = SealPolicy.build(pcrs=[tpm.pcr_values_to_seal(PCRS)])
    branch = policy.branches[0]
    assert isinstance(branch, PcrBranch)
    blob = tpm.seal(SECRET, policy)
    with pytest.raises(UnknownTpmCode) as refused:
        unseal_by_hand(tpm, blob, branch if how == "no locality" else None, password=how == "password")
    assert refused.value.rc == code


def test_a_hundred_failing_unseals_leak_nothing(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    broken = DAMAGE["private"](blob)
    extend(tpm, 4)
    for _ in range(50):
        with pytest.raises(PolicyMismatch):
            tpm.unseal(blob)
        with pytest.raises(SealDamaged):
            tpm.unseal(broken)
    assert tpm.transient_handles() == ()


def test_no_room_in_the_tpm_is_said_and_nothing_is_lost(tpm: HardwareTpm) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    with tpm._link.operation("fill the TPM in a test") as esapi:
        objects = [tpm._sealer._load(esapi, blob) for _ in range(2)]
    with pytest.raises(TpmFull, match="transient object"):
        tpm.unseal(blob)
    with tpm._link.operation("free it") as esapi:
        for handle in objects:
            esapi.flush_context(handle)
    assert tpm.unseal(blob) == SECRET


def test_a_cleared_tpm_is_recognised_at_open_and_at_unseal(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    name = tpm.provision_srk()
    blob = tpm.seal(SECRET, platform_policy(tpm))
    with tpm._link.operation("clear it in a test") as esapi:
        esapi.clear(ESYS_TR.LOCKOUT)
    with pytest.raises(TpmCleared, match=r"was cleared.*kept.*vtpm-manager recover"):
        tpm.unseal(blob)
    tpm.close()
    with HardwareTpm.open(swtpm.setting) as again:
        with pytest.raises(TpmCleared):
            again.open_srk(name)
        assert again.provision_srk() != name
        with pytest.raises(SrkChanged):
            again.unseal(blob, name)
        with pytest.raises(SealDamaged, match="0x1df"):
            again.unseal(blob)


def test_another_tpm_is_recognised_before_any_secret_is_used(tpm: HardwareTpm) -> None:
    name = tpm.provision_srk()
    blob = tpm.seal(SECRET, platform_policy(tpm))
    with running_swtpm() as foreign, HardwareTpm.open(foreign.setting) as other:
        with pytest.raises(TpmCleared):
            other.open_srk(name)
        other.provision_srk()
        with pytest.raises(SrkChanged, match="not the hardware TPM the store belongs to"):
            other.unseal(blob, name)


def test_an_unseal_after_a_dead_connection_checks_the_pinned_key_again(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    blob = tpm.seal(SECRET, platform_policy(tpm))
    assert tpm.unseal(blob) == SECRET
    swtpm.kill()
    with pytest.raises(TpmTransport):
        tpm.unseal(blob)
    swtpm.start()
    assert tpm.unseal(blob) == SECRET
    swtpm.kill()
    for state in swtpm.directory.glob("tpm2-*"):
        state.unlink()
    swtpm.start()
    with pytest.raises(TpmTransport):
        tpm.unseal(blob)
    with pytest.raises(TpmCleared):
        tpm.unseal(blob)


def test_a_tpm_that_stops_answering_is_given_up_at_the_deadline(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, command_seconds=0.3) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(SECRET, platform_policy(tpm))
        assert swtpm.process is not None
        swtpm.process.send_signal(signal.SIGSTOP)
        with pytest.raises(TpmBusy, match=r"busy for 0\.3 s"):
            tpm.unseal(blob)
        swtpm.process.send_signal(signal.SIGCONT)
        assert tpm.unseal(blob) == SECRET


def test_an_operators_own_der_signature_is_accepted(tpm: HardwareTpm) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    point = RecoveryPrivate(key, RECOVERY.escrow).public.signing_point
    blob = tpm.seal(SECRET, SealPolicy.build(recovery_point=point, reference=REFERENCE))
    prehashed = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
    assert tpm.unseal_with_recovery(blob, lambda digest: key.sign(digest, prehashed)) == SECRET
