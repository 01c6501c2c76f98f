"""Each way that the hardware TPM refuses us, with the code on the wire and our words (reference hardware-tpm.md, 2, 3).

The rows about approvals are with the approvals. And what must never be on that wire in clear.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures_tpm import BusRelay, SwtpmProcess, extend_command, recorded_bus, running_swtpm
from test_manager_hwtpm_seal import DAMAGE, RECOVERY, SECRET, altered, flip, platform_policy, unseal_by_hand
from tpm2_pytss import ESYS_TR, TPM2_CC

from manager.anchor import clean_stop
from manager.config import Config, Layout
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    AnchorDenied,
    AnchorMissing,
    OwnerAuthWanted,
    PolicyMismatch,
    RecoveryRefused,
    SealDamaged,
    TpmError,
    TpmTransport,
    UnknownTpmCode,
    WrongLocality,
)
from manager.hwtpm_records import AnchorInfo
from manager.opening import locked_store, open_store
from manager.policy import PcrBranch, SealPolicy
from manager.provision import InitOptions, initialise
from manager.recovery_key import RecoveryPrivate

AUTH, DIGEST = bytes(range(32)), b"\xd5" * 32


@pytest.fixture(scope="module")
def chip() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


@dataclass
class Bench:
    """An open TPM with its bus; a new one for each row, on the same chip."""

    tpm: HardwareTpm
    bus: BusRelay

    def at(self, locality: int) -> "Bench":
        self.tpm._link.locality = locality
        return self

    def fixed(self) -> SealPolicy:
        return SealPolicy.build(pcrs=[self.tpm.pcr_values_to_seal((0, 2, 4, 7))])

    def anchor(self, *, written: bool = True) -> AnchorInfo:
        info = self.tpm.anchor_define(self.tpm.anchor_free_index(), AUTH)
        if written:
            self.tpm.anchor_write(info, AUTH, DIGEST, first=True)
        return info


@pytest.fixture
def bench(chip: SwtpmProcess) -> Iterator[Bench]:
    with recorded_bus(chip) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        yield Bench(tpm, bus)
        tpm._link.locality = 2
        tpm.clock()  # a row may have ended the connection
        assert tpm.transient_handles() == (), "nothing is left behind"
        for index in range(0x01800100, 0x01800104):
            try:
                tpm.anchor_undefine(tpm.anchor_plan(index))
            except TpmError:
                break


def unseal_elsewhere(bench: Bench, locality: int) -> None:
    blob = bench.tpm.seal(SECRET, bench.fixed())
    bench.at(locality).tpm.unseal(blob)


def unseal_after_change(bench: Bench) -> None:
    blob = bench.tpm.seal(SECRET, bench.fixed())
    with bench.tpm._link.operation("change a PCR") as esapi:
        esapi.pcr_event(ESYS_TR.PCR4, b"an update")
    bench.tpm.unseal(blob)


def unseal_otherwise(bench: Bench, *, branch: bool, password: bool) -> None:
    policy = bench.fixed()
    first = policy.branches[0]
    assert isinstance(first, PcrBranch)
    blob = bench.tpm.seal(SECRET, policy)
    unseal_by_hand(bench.tpm, blob, first if branch else None, password=password)


def unseal_while_moving(bench: Bench) -> None:
    blob = bench.tpm.seal(SECRET, bench.fixed())
    bench.bus.before[int(TPM2_CC.Unseal)] = [extend_command(12) for _ in range(100)]
    try:
        bench.tpm.unseal(blob)
    finally:
        bench.bus.before.clear()


def recover_with_another_key(bench: Bench) -> None:
    blob = bench.tpm.seal(SECRET, platform_policy(bench.tpm))
    bench.tpm.unseal_with_recovery(blob, RecoveryPrivate.new().sign_statement)


def unseal_damaged(bench: Bench, what: str) -> None:
    bench.tpm.unseal(DAMAGE[what](bench.tpm.seal(SECRET, platform_policy(bench.tpm))))


def unseal_another_policy(bench: Bench) -> None:
    one, two = bench.tpm.seal(SECRET, bench.fixed()), bench.tpm.seal(SECRET, SealPolicy.build())
    bench.tpm.unseal(altered(two, private=one.private))


def unseal_with_a_shorter_length(bench: Bench) -> None:
    """The size inside TPM2B_PRIVATE, of the integrity value: what the TPM unmarshals itself."""
    blob = bench.tpm.seal(SECRET, SealPolicy.build())
    bench.tpm.unseal(altered(blob, private=flip(blob.private, 2)))


def unseal_an_altered_answer(bench: Bench) -> None:
    blob = bench.tpm.seal(SECRET, bench.fixed())
    bench.bus.flip.add(int(TPM2_CC.Unseal))
    bench.tpm.unseal(blob)


def write_elsewhere(bench: Bench, locality: int) -> None:
    info = bench.anchor()
    bench.at(locality).tpm.anchor_write(info, AUTH, DIGEST)


def write_by_hand(bench: Bench, who: ESYS_TR | None) -> None:
    info = bench.anchor()
    with bench.tpm._link.operation("write it in another way") as esapi:
        handle = esapi.tr_from_tpmpublic(info.index)
        esapi.tr_set_auth(handle, AUTH)
        esapi.nv_write(handle, DIGEST, 0, handle if who is None else who)


def read_unwritten(bench: Bench) -> None:
    """Past our own check of the Name, which already tells: the TPM's word."""
    info = bench.anchor(written=False)
    bare = AnchorInfo(info.index, bench.tpm._anchors.plan(info.index).name, 2)
    bench.tpm._anchors._open = lambda esapi, found, **_: esapi.tr_from_tpmpublic(found.index)  # type: ignore[method-assign]
    bench.tpm.anchor_read(bare, AUTH)


def define_as_a_stranger(bench: Bench) -> None:
    bench.tpm.use_hierarchy_auths(b"no such password", b"")
    try:
        bench.anchor()
    finally:
        bench.tpm.use_hierarchy_auths(b"", b"")


def define_twice(bench: Bench) -> None:
    bench.tpm.anchor_define(bench.anchor().index, AUTH)


Row = tuple[str, int, type[TpmError], str, Callable[[Bench], None]]
ROWS: list[Row] = [
    *(
        (f"unseal at {n}", 0x907, WrongLocality, "wants locality 2", lambda b, n=n: unseal_elsewhere(b, n))
        for n in (0, 1, 3, 4)
    ),
    ("unseal, PCRs changed", 0x1C4, PolicyMismatch, "PCRs that differ: 4", unseal_after_change),
    (
        "unseal, empty policy",
        0x99D,
        UnknownTpmCode,
        "0x99d",
        lambda b: unseal_otherwise(b, branch=False, password=False),
    ),
    (
        "unseal, PolicyLocality omitted",
        0x99D,
        UnknownTpmCode,
        "0x99d",
        lambda b: unseal_otherwise(b, branch=True, password=False),
    ),
    ("unseal by password", 0x12F, UnknownTpmCode, "0x12f", lambda b: unseal_otherwise(b, branch=True, password=True)),
    ("PCRs move before unseal", 0x128, TpmError, "TPM_RC_PCR_CHANGED", unseal_while_moving),
    ("recovery by another key", 0x5DB, RecoveryRefused, "not by the key", recover_with_another_key),
    ("private altered", 0x1DF, SealDamaged, "0x1df", lambda b: unseal_damaged(b, "private")),
    (
        "private cut",
        0x1DF,
        SealDamaged,
        "0x1df",
        lambda b: unseal_damaged(b, "private cut and relabelled"),
    ),
    ("public attributes", 0x1DF, SealDamaged, "0x1df", lambda b: unseal_damaged(b, "public unique")),
    ("another object's private", 0x1DF, SealDamaged, "0x1df", unseal_another_policy),
    ("private length", 0x1D5, SealDamaged, "0x1d5", unseal_with_a_shorter_length),
    ("answer altered", 0, TpmTransport, "0x7001b", unseal_an_altered_answer),
    *(
        (f"anchor written at {n}", 0x907, WrongLocality, "wants locality 2", lambda b, n=n: write_elsewhere(b, n))
        for n in (0, 1, 3, 4)
    ),
    (
        "anchor, wrong auth",
        0x9A2,
        AnchorDenied,
        "to write it",
        lambda b: b.tpm.anchor_write(b.anchor(), DIGEST, DIGEST),
    ),
    ("anchor by password", 0x12F, UnknownTpmCode, "0x12f", lambda b: write_by_hand(b, None)),
    ("anchor by the owner", 0x149, UnknownTpmCode, "0x149", lambda b: write_by_hand(b, ESYS_TR.OWNER)),
    ("anchor unwritten", 0x14A, AnchorMissing, "never written", read_unwritten),
    ("anchor without owner's password", 0x9A2, OwnerAuthWanted, "owner password", define_as_a_stranger),
    ("anchor defined twice", 0x14C, TpmError, "0x0180010", define_twice),
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_each_refusal_has_its_code_and_our_words(bench: Bench, row: Row) -> None:
    _, code, error, words, act = row
    bench.bus.clear()
    with pytest.raises(error) as refused:
        act(bench)
    message = str(refused.value)
    assert words in message
    assert len(message.split(". ")) >= 3, "what happened, what was kept, what to do"
    seen = {int.from_bytes(response[6:10]) for response in bench.bus.responses} - {0}
    assert code in (seen or {0}), f"the TPM said {[hex(one) for one in seen]}"


# --- the bus --------------------------------------------------------------------------------------


def test_no_key_and_no_authorisation_is_ever_in_clear_on_the_bus(tmp_path: Path) -> None:
    """init, open, unseal by policy and by the recovery key, anchors, a clean stop: all of it recorded."""
    from manager.recovery_key import write_recovery_files

    layout = Layout(tmp_path / "state", tmp_path / "run")
    layout.state_dir.mkdir(mode=0o700)
    public = write_recovery_files(str(tmp_path / "recovery.pem"), RECOVERY, None)
    options = InitOptions("embedded", 2, "sha256:0,7", Path(public), 256 * 1024, set_hierarchy_auth=True)
    with running_swtpm() as swtpm, recorded_bus(swtpm) as bus:
        with HardwareTpm.open(bus.setting) as tpm:
            initialise(layout, options, tpm)
        config = Config.load(layout.config)
        digests, secrets = [], []
        with HardwareTpm.open(bus.setting) as tpm, locked_store(layout) as descriptor:
            made = open_store(descriptor, tpm, config)
            secret = made.secret
            secrets += [secret.store_key.reveal(), secret.anchor_auth, secret.owner_auth, secret.endorsement_auth]
            for record in made.store.groups().values():
                from manager.keys import GroupSeal

                secrets.append(tpm.unseal(GroupSeal.unpack(record.blob).sealed))
            tpm.unseal_with_recovery(made.boot.platform, RECOVERY.sign_statement)
            tpm.pcr22_extend(made.store.digest())
            for digest in (made.store.digest(), clean_stop(made.store.digest())):
                tpm.anchor_write(made.boot.anchor, secret.anchor_auth, digest)
                assert tpm.anchor_read(made.boot.anchor, secret.anchor_auth) == digest
                digests.append(digest)
            public_part = made.boot.platform.public
            made.store.close()
        assert len(set(secrets)) == 5
        assert all(len(one) >= 24 for one in secrets)
        for one in secrets:
            for part in (one, one[:16], one[8:24]):
                assert not bus.saw(part)
        assert not bus.saw(digests[1]), "what the durable anchor holds is not shown either"
        assert bus.saw(digests[0]), "the control: PCR 22 is extended in clear, and the test sees it"
        assert bus.saw(public_part[20:52])
        assert bus.saw(swtpm_random(bus)), "the control: what goes in clear is seen"


def swtpm_random(bus: BusRelay) -> bytes:
    """Fetch random bytes without a session: they cross the bus in clear."""
    with HardwareTpm.open(bus.setting) as tpm:
        found = tpm.random(16)
    assert len(found) == 16
    assert os.urandom(16) != found
    return found
