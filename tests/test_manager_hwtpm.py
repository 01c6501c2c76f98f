import hashlib
import time
from collections.abc import Iterator

import pytest
from fixtures_tpm import SwtpmProcess, extend_command, recorded_bus, running_swtpm
from tpm2_pytss import TPM2_CC

from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    BadSetting,
    PcrsMoving,
    SealDamaged,
    SrkChanged,
    SrkUnusable,
    TpmCleared,
    VolatileAnchorUnavailable,
    WrongLocality,
)
from manager.hwtpm_records import SealedBlob
from manager.hwtpm_srk import SRK_HANDLE
from manager.policy import SealPolicy

CC_PCR_RESET = int(TPM2_CC.PCR_Reset)
CC_READ_PUBLIC = int(TPM2_CC.ReadPublic)
ONES = b"\xff" * 32


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


@pytest.fixture
def tpm(swtpm: SwtpmProcess) -> Iterator[HardwareTpm]:
    with HardwareTpm.open(swtpm.setting) as opened:
        yield opened


def test_locality_two_is_proved_by_pcr_20(tpm: HardwareTpm) -> None:
    report = tpm.check_locality()
    assert (report.locality, report.refused_at_zero, report.weaker) == (2, True, False)


def test_the_probe_never_touches_the_volatile_anchor(tpm: HardwareTpm) -> None:
    tpm.pcr22_extend(b"\x01" * 32)
    before = tpm.pcr22_read()
    tpm.check_locality()
    assert tpm.pcr22_read() == before
    assert tpm.pcr_read([20])[20] == bytes(32)


def test_a_tpm_that_lets_locality_zero_reset_pcr_20_is_refused(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        success = bytes.fromhex("8002000000130000000000000000") + bytes(5)
        first = True

        class Lenient(dict[int, bytes]):
            def __contains__(self, code: object) -> bool:
                nonlocal first
                if code != CC_PCR_RESET:
                    return False
                first, was_first = False, first
                return not was_first

            def pop(self, _: int) -> bytes:  # type: ignore[override]
                return success

        bus.alter = Lenient()
        with pytest.raises(WrongLocality, match="localities mean nothing here"):
            tpm.check_locality()


def test_a_tpm_that_refuses_pcr_20_at_locality_two_is_refused(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        bus.alter[CC_PCR_RESET] = bytes.fromhex("80010000000a00000907")
        with pytest.raises(WrongLocality, match="gives 0x907"):
            tpm.check_locality()


def test_the_weaker_mode_is_reported_as_weaker(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, locality=0) as weak:
        report = weak.check_locality()
        assert (report.locality, report.refused_at_zero, report.weaker) == (0, None, True)


def test_the_weaker_mode_has_no_volatile_anchor(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, locality=0) as weak:
        with pytest.raises(VolatileAnchorUnavailable, match="needs locality 2"):
            weak.pcr22_read()
        with pytest.raises(VolatileAnchorUnavailable):
            weak.pcr22_extend(bytes(32))


@pytest.mark.parametrize("locality", [1, 3, 4, 5, -1])
def test_other_localities_cannot_be_chosen(swtpm: SwtpmProcess, locality: int) -> None:
    with pytest.raises(BadSetting, match="Use 2, or 0"):
        HardwareTpm.open(swtpm.setting, locality=locality)


def test_the_locality_is_set_again_for_every_operation(tpm: HardwareTpm) -> None:
    transport = tpm._link._transport
    assert transport is not None
    transport.set_locality(0, time.monotonic() + 5)
    tpm.pcr22_extend(b"\x02" * 32)
    assert tpm.pcr22_read() == hashlib.sha256(ONES + b"\x02" * 32).digest()


def test_pcr_22_is_extended_as_the_store_expects(tpm: HardwareTpm) -> None:
    assert tpm.pcr22_read() == ONES
    tpm.pcr22_extend(b"\x01" * 32)
    tpm.pcr22_extend(b"\x02" * 32)
    once = hashlib.sha256(ONES + b"\x01" * 32).digest()
    assert tpm.pcr22_read() == hashlib.sha256(once + b"\x02" * 32).digest()
    with pytest.raises(ValueError, match="32 bytes"):
        tpm.pcr22_extend(b"short")


def test_a_platform_reset_shows_in_clock_and_pcr_22(tpm: HardwareTpm, swtpm: SwtpmProcess) -> None:
    tpm.pcr22_extend(b"\x01" * 32)
    before = tpm.clock()
    tpm.close()
    swtpm.kill()
    swtpm.start()
    with HardwareTpm.open(swtpm.setting) as again:
        assert again.clock().reset_count == before.reset_count + 1
        assert not again.clock().safe
        assert again.pcr22_read() == ONES


def test_all_24_pcrs_are_read(tpm: HardwareTpm) -> None:
    values = tpm.pcr_read(range(24))
    assert list(values) == list(range(24))
    assert {len(value) for value in values.values()} == {32}
    assert values[17] == ONES
    assert values[0] == bytes(32)
    assert tpm.pcr_read([]) == {}


def test_a_tpm_without_the_sha256_bank_is_said(swtpm: SwtpmProcess) -> None:
    swtpm.tool("tpm2_pcrallocate", "sha1:all+sha256:none")
    swtpm.stop()
    swtpm.start()
    with HardwareTpm.open(swtpm.setting) as tpm, pytest.raises(BadSetting, match="SHA-256 bank is not active"):
        tpm.pcr_values_to_seal([0, 7])


def test_only_pcrs_that_bind_are_read_for_sealing(tpm: HardwareTpm) -> None:
    assert list(tpm.pcr_values_to_seal([7, 0, 2])) == [0, 2, 7]
    for pcr in (16, 20, 22, 23):
        with pytest.raises(BadSetting, match=f"PCR {pcr}"):
            tpm.pcr_values_to_seal([0, pcr])


def test_random_bytes_have_the_length_asked_for_and_differ(tpm: HardwareTpm) -> None:
    assert [len(tpm.random(count)) for count in (0, 1, 32, 200)] == [0, 1, 32, 200]
    tpm.provision_srk()
    assert tpm.random(32) != tpm.random(32)


def test_random_bytes_are_encrypted_on_the_bus_once_there_is_an_srk(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        assert bus.saw(tpm.random(32))
        tpm.provision_srk()
        assert not bus.saw(tpm.random(32))


def test_properties_tell_who_made_it_and_what_is_open(tpm: HardwareTpm) -> None:
    shown = tpm.properties()
    assert shown.manufacturer == "IBM"
    assert "TPM" in shown.vendor
    assert shown.firmware.count(".") == 3
    assert not any((shown.owner_auth_set, shown.endorsement_auth_set, shown.lockout_auth_set, shown.in_lockout))
    assert shown.max_auth_fail > 0


def test_commands_are_counted(tpm: HardwareTpm) -> None:
    before = tpm.commands_sent
    tpm.clock()
    assert tpm.commands_sent == before + 1


def test_provisioning_is_idempotent_and_gives_the_name(tpm: HardwareTpm) -> None:
    name = tpm.provision_srk()
    assert len(name) == 34
    assert tpm.provision_srk() == name
    tpm.open_srk(name)
    assert tpm.transient_handles() == ()


def test_opening_the_srk_of_a_fresh_tpm_says_cleared(tpm: HardwareTpm) -> None:
    with pytest.raises(TpmCleared, match="0x81000001"):
        tpm.open_srk(b"\x00\x0b" + bytes(32))


def test_an_srk_with_another_name_is_refused(tpm: HardwareTpm) -> None:
    name = tpm.provision_srk()
    with pytest.raises(SrkChanged) as refused:
        tpm.open_srk(b"\x00\x0b" + bytes(32))
    assert refused.value.found == name
    tpm.open_srk(name)


@pytest.mark.parametrize("kind", ["rsa2048:null:aes128cfb", "ecc256:null:aes128cfb", "ecc384:null:aes256cfb"])
def test_a_proper_srk_of_somebody_else_is_used(swtpm: SwtpmProcess, kind: str) -> None:
    persist_primary(swtpm, "-G", kind)
    with HardwareTpm.open(swtpm.setting) as tpm:
        name = tpm.provision_srk()
        tpm.open_srk(name)
        assert len(tpm.random(16)) == 16


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-G", "ecc256:ecdsa:null", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"), "attributes"),
        (
            ("-G", "ecc256:null:null", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|decrypt"),
            "attributes",
        ),
        (("-g", "sha384", "-G", "ecc256:null:aes128cfb"), "SHA-256"),
    ],
)
def test_a_key_that_is_no_srk_is_left_in_place_and_refused(
    swtpm: SwtpmProcess, arguments: tuple[str, ...], why: str
) -> None:
    persist_primary(swtpm, *arguments)
    with HardwareTpm.open(swtpm.setting) as tpm, pytest.raises(SrkUnusable, match=why):
        tpm.provision_srk()
    assert "0x81000001" in swtpm.tool("tpm2_getcap", "handles-persistent")


def persist_primary(swtpm: SwtpmProcess, *arguments: str) -> None:
    context = str(swtpm.directory / "primary.ctx")
    swtpm.tool("tpm2_createprimary", "-Q", "-C", "o", "-c", context, *arguments)
    swtpm.tool("tpm2_evictcontrol", "-Q", "-C", "o", "-c", context, f"0x{SRK_HANDLE:x}")
    swtpm.tool("tpm2_flushcontext", "-t")


def foreign_read_public() -> bytes:
    """What another TPM answers to TPM2_ReadPublic of its SRK."""
    with running_swtpm() as foreign, recorded_bus(foreign) as bus, HardwareTpm.open(bus.setting) as other:
        other.provision_srk()
        return next(
            response
            for command, response in zip(bus.commands, bus.responses, strict=True)
            if int.from_bytes(command[6:10]) == CC_READ_PUBLIC
        )


def test_an_srk_replaced_while_we_hold_the_tpm_is_recognised(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        tpm.open_srk(tpm.provision_srk())
        blob = tpm.seal(b"secret", SealPolicy.build())
        damaged = SealedBlob(blob.public, blob.private[:-1] + bytes([blob.private[-1] ^ 1]), blob.policy)
        bus.alter[CC_READ_PUBLIC] = foreign_read_public()
        with pytest.raises(SrkChanged):
            tpm.unseal(damaged)
        with pytest.raises(SealDamaged):
            tpm.unseal(damaged)
        assert tpm.unseal(blob) == b"secret"


def test_a_public_key_swapped_on_the_bus_is_not_the_srk(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting) as tpm:
        name = tpm.provision_srk()
    forged = foreign_read_public()
    # The forger gives its own public area, then also with the name we want to see in it.
    unique_name = forged.index(b"\x00\x22\x00\x0b")
    renamed = forged[: unique_name + 2] + name + forged[unique_name + 2 + len(name) :]
    for lie, error in ((forged, SrkChanged), (renamed, SrkUnusable)):
        with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
            bus.alter[CC_READ_PUBLIC] = lie
            with pytest.raises(error):
                tpm.open_srk(name)
            tpm.open_srk(name)


def test_a_method_that_needs_the_srk_says_what_comes_first(tpm: HardwareTpm) -> None:
    with pytest.raises(RuntimeError, match="must come first"):
        tpm.anchor_define(0x01800100, bytes(32))


def test_owner_hierarchy_stays_usable_for_others_after_close(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
    assert "0x81000001" in swtpm.tool("tpm2_getcap", "handles-persistent")


def test_pcrs_that_move_while_they_are_read_are_read_again(swtpm: SwtpmProcess) -> None:
    """Twelve PCRs take two commands: somebody extends one of the first eight in between."""
    selection = range(12)
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        bus.before[int(TPM2_CC.PCR_Read)] = [extend_command(pcr) for pcr in (1, 2, 3)]
        together = tpm.pcr_read_together(selection)
        assert not bus.before[int(TPM2_CC.PCR_Read)]
        assert together == tpm.pcr_read(selection)
        assert together[1] == hashlib.sha256(bytes(32) + b"\x5a" * 32).digest()
        bus.before[int(TPM2_CC.PCR_Read)] = [extend_command(16) for _ in range(100)]
        with pytest.raises(PcrsMoving, match="read them together"):
            tpm.pcr_read_together(range(17))
