import pytest
from tpm2_pytss import TSS2_Exception

from manager import hwtpm_errors
from manager.errors import ManagerError
from manager.hwtpm_errors import (
    OwnerAuthWanted,
    TpmError,
    TpmFailureMode,
    TpmFull,
    TpmLockout,
    TpmNotStarted,
    TpmTransport,
    UnknownTpmCode,
    WrongLocality,
)
from manager.hwtpm_rc import context_survives, is_about_arguments, meaning, tpm_code, translate

# The rows of reference hardware-tpm.md sections 2, 3, 5 and 7 that have one meaning in every command.
TABLE: dict[int, type[TpmError]] = {
    0x100: TpmNotStarted,
    0x101: TpmFailureMode,
    0x907: WrongLocality,
    0x921: TpmLockout,
    0x902: TpmFull,
    0x903: TpmFull,
    0x905: TpmFull,
    0x14B: TpmFull,
    0x9A2: OwnerAuthWanted,
    0x98E: OwnerAuthWanted,
    0xA0001: TpmTransport,
    0xA000A: TpmTransport,
    0x70007: TpmTransport,
    0x7001B: TpmTransport,
    0x99D: UnknownTpmCode,
    0x1C4: UnknownTpmCode,
    0x1DF: UnknownTpmCode,
}


@pytest.mark.parametrize("rc", TABLE)
def test_each_code_has_its_error_and_a_sentence_for_the_operator(rc: int) -> None:
    error = translate(TSS2_Exception(rc), "try it")
    assert type(error) is TABLE[rc]
    assert "try it" in str(error)
    assert error.kept.endswith(".")
    assert error.todo.endswith(".")


def test_an_unknown_code_is_shown_in_hex_and_words() -> None:
    error = translate(TSS2_Exception(0x1DF), "load it")
    assert isinstance(error, UnknownTpmCode)
    assert error.rc == 0x1DF
    assert "0x1df (tpm:parameter(1):integrity check failed)" in str(error)


@pytest.mark.parametrize(("rc", "code"), [(0x99D, 0x9D), (0x1DF, 0x9F), (0x5DB, 0x9B), (0x128, 0x128), (0x18B, 0x8B)])
def test_codes_lose_the_number_of_what_they_are_about(rc: int, code: int) -> None:
    assert tpm_code(TSS2_Exception(rc)) == code


@pytest.mark.parametrize("layer", [11, 12])
def test_codes_passed_on_by_a_resource_manager_are_the_tpms(layer: int) -> None:
    assert tpm_code(TSS2_Exception(layer << 16 | 0x907)) == 0x907


@pytest.mark.parametrize("rc", [0x70007, 0x7001B, 0xA000A, 0x80012, 0x90001])
def test_codes_of_the_tss_end_the_context(rc: int) -> None:
    assert not context_survives(TSS2_Exception(rc))
    assert tpm_code(TSS2_Exception(rc)) == -1
    assert not is_about_arguments(TSS2_Exception(rc))


def test_arguments_are_format_one_codes_but_not_passwords() -> None:
    assert is_about_arguments(TSS2_Exception(0x1DF))
    assert is_about_arguments(TSS2_Exception(0x18B))
    assert not is_about_arguments(TSS2_Exception(0x98E))
    assert not is_about_arguments(TSS2_Exception(0x921))


def refuse(rc: int) -> None:
    with meaning({0x9F: lambda: TpmFull("x", "y")}):
        raise TSS2_Exception(rc)


def test_a_command_can_give_codes_a_meaning_of_its_own() -> None:
    with pytest.raises(TpmFull):
        refuse(0x1DF)
    with pytest.raises(TSS2_Exception):
        refuse(0x128)


def test_every_error_is_a_manager_error_with_an_exit_code() -> None:
    classes = [item for item in vars(hwtpm_errors).values() if isinstance(item, type) and issubclass(item, TpmError)]
    assert len(classes) > 20
    for item in classes:
        assert issubclass(item, ManagerError)
        assert 1 <= int(item.code) <= 8
        assert item.__doc__
