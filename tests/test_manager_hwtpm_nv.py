import os
from collections.abc import Iterator

import pytest
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm
from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    AnchorDenied,
    AnchorExists,
    AnchorMissing,
    OwnerAuthWanted,
    TpmFull,
    TpmLockout,
    TpmTransport,
    UnknownTpmCode,
    WrongLocality,
)
from manager.hwtpm_nv import DEFAULT_INDEX, LAST_INDEX
from manager.hwtpm_records import AnchorInfo

AUTH = b"anchor-auth-value-" + os.urandom(13) + b"\x01"
DIGEST = b"anchored-digest!" + os.urandom(16)
OTHER = bytes(reversed(DIGEST))


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


def defined(tpm: HardwareTpm, auth: bytes = AUTH) -> AnchorInfo:
    info = tpm.anchor_define(tpm.anchor_free_index(), auth)
    tpm.anchor_write(info, auth, DIGEST, first=True)
    return info


def test_what_was_written_is_read(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    assert info.index == DEFAULT_INDEX
    assert tpm.anchor_read(info, AUTH) == DIGEST
    tpm.anchor_write(info, AUTH, OTHER)
    assert tpm.anchor_read(info, AUTH) == OTHER


def test_the_pinned_name_is_the_one_of_the_written_index(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    with tpm._link.operation("read its public area") as esapi:
        handle = esapi.tr_from_tpmpublic(info.index)
        assert bytes(esapi.nv_read_public(handle)[1]) == info.name


@pytest.mark.parametrize("tail", [b"\0", b"\0\0\0", bytes(31)])
def test_an_authorisation_value_may_end_in_zeros(tpm: HardwareTpm, tail: bytes) -> None:
    auth = b"\x07" * (32 - len(tail)) + tail
    info = defined(tpm, auth)
    tpm.anchor_write(info, auth, OTHER)
    assert tpm.anchor_read(info, auth) == OTHER


def test_the_anchor_survives_clean_and_unclean_resets(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    info, name = defined(tpm), tpm.provision_srk()
    tpm.close()
    swtpm.stop()
    swtpm.start()
    with HardwareTpm.open(swtpm.setting) as again:
        again.open_srk(name)
        kept = AnchorInfo.from_json(info.to_json())
        assert again.anchor_read(kept, AUTH) == DIGEST
        again.anchor_write(kept, AUTH, OTHER)
        swtpm.kill()
        swtpm.start()
        with pytest.raises(TpmTransport):
            again.anchor_read(kept, AUTH)
        assert again.anchor_read(kept, AUTH) == OTHER


def test_a_free_index_is_found_beside_used_ones(tpm: HardwareTpm) -> None:
    first = tpm.anchor_define(tpm.anchor_free_index(), AUTH)
    second = tpm.anchor_define(tpm.anchor_free_index(), AUTH)
    assert (first.index, second.index) == (DEFAULT_INDEX, DEFAULT_INDEX + 1)
    tpm.anchor_undefine(first)
    assert tpm.anchor_free_index() == DEFAULT_INDEX
    assert LAST_INDEX - DEFAULT_INDEX == 255


def test_an_index_in_use_is_not_defined_again(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    with pytest.raises(AnchorExists, match="0x01800100 exists already"):
        tpm.anchor_define(info.index, AUTH)
    assert tpm.anchor_read(info, AUTH) == DIGEST


def test_an_index_that_was_never_defined_is_missing(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    absent = AnchorInfo(DEFAULT_INDEX + 9, info.name)
    with pytest.raises(AnchorMissing, match="does not exist"):
        tpm.anchor_read(absent, AUTH)
    with pytest.raises(AnchorMissing, match="does not exist"):
        tpm.anchor_write(absent, AUTH, OTHER)
    with pytest.raises(AnchorMissing, match="does not exist"):
        tpm.anchor_undefine(absent)


def test_an_unwritten_index_is_neither_read_nor_written_by_the_way(tpm: HardwareTpm) -> None:
    info = tpm.anchor_define(DEFAULT_INDEX, AUTH)
    with pytest.raises(AnchorMissing, match="never written"):
        tpm.anchor_read(info, AUTH)
    with pytest.raises(AnchorMissing, match="never written"):
        tpm.anchor_write(info, AUTH, DIGEST)


def test_another_authorisation_value_is_denied(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    wrong = os.urandom(32)
    with pytest.raises(AnchorDenied, match="to read it"):
        tpm.anchor_read(info, wrong)
    with pytest.raises(AnchorDenied, match="to write it"):
        tpm.anchor_write(info, wrong, OTHER)
    assert tpm.anchor_read(info, AUTH) == DIGEST
    assert tpm.properties().lockout_counter == 0


@pytest.mark.parametrize("locality", [0, 1, 3, 4])
def test_no_other_locality_writes(tpm: HardwareTpm, locality: int) -> None:
    info = defined(tpm)
    tpm._link.locality = locality
    with pytest.raises(WrongLocality, match="the anchor wants locality 2"):
        tpm.anchor_write(info, AUTH, OTHER)
    tpm._link.locality = 2
    assert tpm.anchor_read(info, AUTH) == DIGEST


@pytest.mark.parametrize(("who", "code"), [("password", 0x12F), ("owner", 0x149)])
def test_neither_password_nor_owner_writes(tpm: HardwareTpm, who: str, code: int) -> None:
    info = defined(tpm)
    with pytest.raises(UnknownTpmCode) as refused:
        write_by_hand(tpm, info, ESYS_TR.OWNER if who == "owner" else None)
    assert refused.value.rc == code
    assert tpm.anchor_read(info, AUTH) == DIGEST


def write_by_hand(tpm: HardwareTpm, info: AnchorInfo, who: ESYS_TR | None) -> None:
    with tpm._link.operation("write it in another way") as esapi:
        handle = esapi.tr_from_tpmpublic(info.index)
        esapi.tr_set_auth(handle, AUTH)
        esapi.nv_write(handle, OTHER, 0, handle if who is None else who)


def redefine(tpm: HardwareTpm, info: AnchorInfo, auth: bytes, attributes: TPMA_NV, policy: bytes) -> None:
    public = TPM2B_NV_PUBLIC(
        TPMS_NV_PUBLIC(
            nvIndex=info.index, nameAlg=TPM2_ALG.SHA256, attributes=attributes, authPolicy=policy, dataSize=32
        )
    )
    tpm.anchor_undefine(info)
    with tpm._link.operation("redefine it as an attacker with the owner's rights") as esapi:
        esapi.tr_close(esapi.nv_define_space(auth, public))


def test_an_index_redefined_by_the_owner_is_detected_unwritten(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    tpm.anchor_undefine(info)
    tpm.anchor_define(info.index, b"attacker" * 4)
    with pytest.raises(AnchorMissing, match=r"never written.*vtpm-manager recover"):
        tpm.anchor_read(info, AUTH)
    with pytest.raises(AnchorDenied):
        tpm.anchor_write(info, AUTH, DIGEST, first=True)


def test_an_index_redefined_and_written_by_an_attacker_is_denied(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    tpm.anchor_undefine(info)
    foreign = tpm.anchor_define(info.index, b"attacker" * 4)
    tpm.anchor_write(foreign, b"attacker" * 4, OTHER, first=True)
    assert foreign.name == info.name
    with pytest.raises(AnchorDenied, match="to read it"):
        tpm.anchor_read(info, AUTH)


def test_an_index_redefined_with_laxer_rights_has_another_name(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    lax = TPMA_NV.AUTHWRITE | TPMA_NV.OWNERWRITE | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA
    redefine(tpm, info, AUTH, lax, b"")
    write_by_hand(tpm, info, ESYS_TR.OWNER)
    with pytest.raises(AnchorMissing, match="its Name is"):
        tpm.anchor_read(info, AUTH)


def test_neither_the_value_nor_its_authorisation_is_in_clear_on_the_bus(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        info = defined(tpm)
        assert tpm.anchor_read(info, AUTH) == DIGEST
        assert bus.saw(info.index.to_bytes(4))
        assert not bus.saw(AUTH[:16])
        assert not bus.saw(DIGEST[:16])
        with tpm._link.operation("leak in a test") as esapi:
            handle = esapi.tr_from_tpmpublic(info.index)
            esapi.tr_set_auth(handle, AUTH)
            assert bytes(esapi.nv_read(handle, 32, 0, handle)) == DIGEST
        assert bus.saw(AUTH[:16])
        assert bus.saw(DIGEST[:16])


def test_a_value_faked_on_the_bus_is_refused(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        info = defined(tpm)
        bus.flip.add(int(TPM2_CC.NV_Read))
        with pytest.raises(TpmTransport, match="0x7001b"):
            tpm.anchor_read(info, AUTH)
        assert tpm.anchor_read(info, AUTH) == DIGEST


def test_the_answer_to_an_earlier_read_is_no_answer_to_this_one(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        info = defined(tpm)
        bus.clear()
        assert tpm.anchor_read(info, AUTH) == DIGEST
        code = int(TPM2_CC.NV_Read)
        old = next(
            response
            for command, response in zip(bus.commands, bus.responses, strict=True)
            if int.from_bytes(command[6:10]) == code
        )
        tpm.anchor_write(info, AUTH, OTHER)
        bus.alter[code] = old
        with pytest.raises(TpmTransport, match="0x7001b"):
            tpm.anchor_read(info, AUTH)
        assert tpm.anchor_read(info, AUTH) == OTHER


def test_a_write_whose_answer_is_lost_is_durable(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.provision_srk()
        info = defined(tpm)
        bus.alter[int(TPM2_CC.NV_Write)] = b"\x80\x02\0\0\0\x04\0\0\0\0"
        with pytest.raises(TpmTransport, match="is not known"):
            tpm.anchor_write(info, AUTH, OTHER)
        assert tpm.anchor_read(info, AUTH) == OTHER


def test_without_locality_two_the_policy_is_the_authorisation_value_alone(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, locality=0) as weak:
        weak.provision_srk()
        info = defined(weak)
        assert info.locality is None
        weak.anchor_write(info, AUTH, OTHER)
        assert weak.anchor_read(info, AUTH) == OTHER
        with pytest.raises(AnchorDenied):
            weak.anchor_write(info, os.urandom(32), DIGEST)


def test_an_owner_password_is_needed_and_never_in_clear(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    name = tpm.provision_srk()
    tpm.close()
    swtpm.tool("tpm2_changeauth", "-c", "owner", "hidden-owner-password")
    with HardwareTpm.open(swtpm.setting) as without:
        without.open_srk(name)
        assert without.properties().owner_auth_set
        with pytest.raises(OwnerAuthWanted, match="owner password"):
            without.anchor_define(DEFAULT_INDEX, AUTH)
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting, owner_auth=b"hidden-owner-password") as owner:
        owner.open_srk(name)
        info = owner.anchor_define(DEFAULT_INDEX, AUTH)
        owner.anchor_undefine(info)
        assert bus.commands
        assert not bus.saw(b"hidden-owner")


def test_dictionary_attack_lockout_is_said_and_does_not_touch_the_anchor(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    guarded = AnchorInfo(DEFAULT_INDEX + 1, bytes(34))
    tpm.anchor_define(guarded.index, AUTH)
    redefine_guarded(tpm, guarded)
    for _ in range(4):
        with pytest.raises((OwnerAuthWanted, TpmLockout)) as refused:
            guess(tpm, guarded)
    assert isinstance(refused.value, TpmLockout)
    assert "tpm2_dictionarylockout" in str(refused.value)
    assert tpm.properties().in_lockout
    tpm.anchor_write(info, AUTH, OTHER)
    assert tpm.anchor_read(info, AUTH) == OTHER


def redefine_guarded(tpm: HardwareTpm, guarded: AnchorInfo) -> None:
    public = TPM2B_NV_PUBLIC(
        TPMS_NV_PUBLIC(
            nvIndex=guarded.index,
            nameAlg=TPM2_ALG.SHA256,
            attributes=TPMA_NV.AUTHWRITE | TPMA_NV.AUTHREAD,
            authPolicy=b"",
            dataSize=32,
        )
    )
    with tpm._link.operation("define a guarded index") as esapi:
        esapi.nv_undefine_space(esapi.tr_from_tpmpublic(guarded.index))
        handle = esapi.nv_define_space(AUTH, public)
        esapi.tr_set_auth(handle, AUTH)
        esapi.nv_write(handle, bytes(32), 0, handle)


def guess(tpm: HardwareTpm, guarded: AnchorInfo) -> None:
    with tpm._link.operation("guess a password") as esapi:
        handle = esapi.tr_from_tpmpublic(guarded.index)
        esapi.tr_set_auth(handle, b"wrong")
        esapi.nv_read(handle, 32, 0, handle)


def test_a_full_nv_memory_is_said(tpm: HardwareTpm) -> None:
    info = defined(tpm)
    with pytest.raises(TpmFull, match="NV index"):
        fill(tpm, info.index + 1)
    assert tpm.anchor_read(info, AUTH) == DIGEST


def fill(tpm: HardwareTpm, first: int) -> None:
    for index in range(first, first + 100):
        public = TPMS_NV_PUBLIC(
            nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD, dataSize=2048
        )
        with tpm._link.operation("fill its memory") as esapi:
            esapi.nv_define_space(b"", TPM2B_NV_PUBLIC(public))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_values_of_another_size_are_refused(tpm: HardwareTpm, size: int) -> None:
    info = defined(tpm)
    with pytest.raises(ValueError, match="32 bytes"):
        tpm.anchor_write(info, AUTH, bytes(size))
    with pytest.raises(ValueError, match="32 bytes"):
        tpm.anchor_define(info.index + 1, bytes(size))
