import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from crb_device import BASE, BUFFER, PAGE, Quirks, crb_device
from fixtures_tpm import SwtpmProcess, running_swtpm
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm_registers import Hostile, run_to_end

from manager.hwtpm import HardwareTpm
from manager.hwtpm_crb import CrbExchange, CrbState
from manager.hwtpm_errors import TpmBusy, TpmError, TpmFailureMode, WrongLocality
from manager.hwtpm_localities import survey
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.hwtpm_tis_errors import (
    CommandCancelled,
    CommandRefused,
    LocalityHeld,
    LocalityLost,
    RegistersInvalid,
    ResponseCut,
    ResponseTooLong,
    TpmStuck,
    WrongInterface,
)
from manager.hwtpm_tis_place import Place
from manager.hwtpm_tis_transport import RegisterTransport
from manager.hwtpm_transport import HEADER
from manager.policy import SealPolicy

GET_RANDOM = bytes.fromhex("80010000000c0000017b0010")
SECRET = b"thirty-two bytes of a store key."


@pytest.fixture(scope="module")
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


def seconds(count: float) -> float:
    return time.monotonic() + count


def test_a_key_is_sealed_and_unsealed_at_locality_two(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm) as device, HardwareTpm.open(device.setting(2)) as tpm:
        assert not tpm.check_locality().weaker
        tpm.provision_srk()
        sealed = tpm.seal(SECRET, SealPolicy.build(pcrs=(), recovery_point=None, reference=b"", locality=2))
        assert tpm.unseal(sealed) == SECRET


def test_at_locality_zero_the_tpm_is_used_but_does_not_reset_pcr_20(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm) as device:
        with HardwareTpm.open(device.setting(0), locality=0) as tpm:
            assert len(tpm.random(40)) == 40
        with pytest.raises(WrongLocality, match="gives locality 0 only"):
            HardwareTpm.open(device.setting(0), locality=2)


def test_the_survey_tells_what_is_granted(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm, Quirks(localities=(0, 2))) as device:
        found = {tried.locality: tried for tried in survey(device.setting(2)) if tried.locality is not None}
    assert [found[number].usable for number in range(5)] == [True, False, True, False, False]
    assert "sees us at locality 2 " in found[2].text
    assert "another locality than 2" in found[0].text
    assert "do not become valid" in found[1].text


def test_the_survey_finds_the_interface_by_itself(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm, Quirks(localities=(2,))) as device:
        setting = replace(device.setting(2), kind=TctiKind.TIS)
        tried = next(each for each in survey(setting) if each.locality == 2)
    assert tried.usable
    assert "through crb:" in tried.text


def test_the_survey_says_that_nobody_started_the_tpm(tmp_path: Path) -> None:
    with running_swtpm(flags="not-need-init") as bare, crb_device(tmp_path, bare) as device:
        (tried,) = [each for each in survey(device.setting(2)) if each.locality == 2]
    assert "but the TPM was not started" in tried.text


def test_the_survey_says_that_another_manager_uses_the_tpm(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm) as device, HardwareTpm.open(device.setting(2)):
        tried = list(survey(device.setting(2)))
    assert not any(each.usable for each in tried)
    assert "another vtpm-manager uses this TPM" in tried[-1].text


def test_a_locality_that_keeps_the_tpm_is_seized(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm, Quirks(holder=0)) as device, HardwareTpm.open(device.setting(2)) as tpm:
        assert len(tpm.random(8)) == 8


@pytest.mark.parametrize(
    ("quirks", "error", "says"),
    [
        (Quirks(localities=(0,)), RegistersInvalid, "do not become valid"),
        (Quirks(interface=0), WrongInterface, "Use `tis:`"),
        (Quirks(holder=3, seizable=False), LocalityHeld, "locality 3 holds the TPM"),
        (Quirks(gets_ready=False), TpmStuck, "does not get ready"),
        (Quirks(fatal=True), TpmFailureMode, "its control status is 0x"),
        (Quirks(room=11), CommandRefused, "takes 11 bytes, the command has 12"),
        (Quirks(buffer=3 * PAGE), CommandRefused, "not inside the page"),
        (Quirks(room=PAGE), CommandRefused, "not inside the page"),
        (Quirks(room=4), CommandRefused, "not inside the page"),
        (Quirks(answers=[HEADER.pack(0x8001, 9, 0)]), ResponseCut, "tells 9 bytes"),
        (Quirks(answers=[HEADER.pack(0x8001, 5000, 0)]), ResponseTooLong, "tells 5000 bytes"),
        (Quirks(silent=True), CommandCancelled, "it was cancelled"),
        (Quirks(steal=True), LocalityLost, "taken from us"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_each_way_to_fail_has_an_error_that_says_so(
    swtpm: SwtpmProcess, tmp_path: Path, quirks: Quirks, error: type[TpmError], says: str
) -> None:
    def drive(setting: TctiSetting) -> None:
        transport = RegisterTransport(setting, seconds(10))
        try:
            transport.exchange(GET_RANDOM, seconds(0.5))
        finally:
            transport.close()

    with crb_device(tmp_path, swtpm, quirks) as device:
        with pytest.raises(error) as refused:
            drive(device.setting(2))
        assert says in str(refused.value)
        assert refused.value.code == 7


def test_a_tpm_that_ignores_the_cancel_is_busy_and_given_back(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm, Quirks(silent=True, cancels=False)) as device:
        with pytest.raises(TpmBusy, match="does not answer"):
            HardwareTpm.open(device.setting(2), deadline=0.3)
        limit = seconds(10)
        while device.active is not None:
            assert time.monotonic() < limit
            time.sleep(0.001)


def test_a_tpm_that_another_manager_uses_is_waited_for(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    with crb_device(tmp_path, swtpm) as device:
        with HardwareTpm.open(device.setting(2)) as first:
            with pytest.raises(TpmBusy, match="another vtpm-manager uses this TPM"):
                HardwareTpm.open(device.setting(2), deadline=0.2)
            assert first.clock()
        HardwareTpm.open(device.setting(2)).close()


def test_an_interrupt_in_the_middle_of_a_command_gives_the_locality_back(swtpm: SwtpmProcess, tmp_path: Path) -> None:
    quirks = Quirks()
    with crb_device(tmp_path, swtpm, quirks) as device, HardwareTpm.open(device.setting(2)) as tpm:
        quirks.silent = True
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                tpm.random(8)
        finally:
            signal.signal(signal.SIGALRM, before)
        quirks.silent = False
        assert len(tpm.random(8)) == 8


@settings(max_examples=200, deadline=None)
@given(st.integers(), st.lists(st.integers(0, 0xFF), min_size=1, max_size=6), st.booleans())
def test_whatever_the_registers_say_it_ends_in_an_error_or_a_whole_response(
    seed: int, values: list[int], may_seize: bool
) -> None:
    useful = [0x81, 0x8A, 0x01, 0x00, 0x00]
    place = Place("crb", BASE, 2)
    registers = Hostile(Random(seed), values + useful)
    machine = CrbExchange(registers, place, GET_RANDOM, command_end=5.0, may_seize=may_seize)
    try:
        run_to_end(machine)
    except (TpmError, TimeoutError):
        machine.abandon()
    else:
        assert HEADER.unpack_from(machine.response)[1] == len(machine.response)


def test_every_state_has_a_row() -> None:
    assert set(CrbExchange.TABLE) == set(CrbState) - {CrbState.DONE}
    assert BUFFER < PAGE
