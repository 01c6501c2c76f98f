"""The layouts of deep quotes that guests, instances and the manager share."""

import argparse
import socket
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend_backend import guest_quote
from frontend_backend.deep_quote import (
    CODE,
    DIGEST_BYTES,
    MAX_EVIDENCE,
    MAX_NONCE,
    PCR_COUNT,
    DeepQuoteCommand,
    Evidence,
    Reader,
    bits,
    success,
)
from frontend_backend.errors import MessageError
from frontend_backend.tpmhdr import TpmFamily

FAMILIES = list(TpmFamily)


def evidence_of(family: TpmFamily, selection: int = 0b1001) -> Evidence:
    values = tuple(bytes([pcr]) * DIGEST_BYTES[family] for pcr in bits(selection))
    quote = (b"public", b"attest", b"signature") if family is TpmFamily.TPM_2_0 else (b"", b"", b"")
    return Evidence(family, "libtpms 0.9.2", selection, values, *quote)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nonce", [b"n", b"n" * MAX_NONCE])
def test_a_command_is_read_as_it_was_written(family: TpmFamily, nonce: bytes) -> None:
    packet = DeepQuoteCommand(nonce, 0x800001).pack(family)
    assert struct.unpack_from(">HII", packet) == (
        0x8001 if family is TpmFamily.TPM_2_0 else 0xC1,
        len(packet),
        0x20000016,
    )
    assert packet[10:] == len(nonce).to_bytes(2) + nonce + b"\x03\x01\x00\x80"
    assert DeepQuoteCommand.unpack(packet, family) == DeepQuoteCommand(nonce, 0x800001)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\0\3\1\0\0",  # no nonce
        struct.pack(">H", 65) + bytes(65) + b"\3\1\0\0",
        b"\0\1n\3\0\0\0",  # no PCR
        b"\0\1n\2\1\0",
        b"\0\1n\3\1\0\0\0",
        b"\0\1n\3\1\0",
        b"\xff\xffn\3\1\0\0",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_command_that_is_not_this_layout_is_refused(family: TpmFamily, body: bytes) -> None:
    tag = 0x8001 if family is TpmFamily.TPM_2_0 else 0xC1
    with pytest.raises(MessageError):
        DeepQuoteCommand.unpack(struct.pack(">HII", tag, 10 + len(body), CODE) + body, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tag", [0x8002, 0xC2, 0])
def test_a_command_with_sessions_is_refused(family: TpmFamily, tag: int) -> None:
    packet = DeepQuoteCommand(b"n", 1).pack(family)
    with pytest.raises(MessageError, match="no sessions"):
        DeepQuoteCommand.unpack(tag.to_bytes(2) + packet[2:], family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guests_tool_speaks_the_same_language(family: TpmFamily) -> None:
    assert (guest_quote.CODE, guest_quote.MAX_NONCE, guest_quote.PCR_COUNT) == (CODE, MAX_NONCE, PCR_COUNT)
    tag = guest_quote.TAG_20 if family is TpmFamily.TPM_2_0 else guest_quote.TAG_12
    selection = guest_quote.selection_of("0,2,4-7,23")
    assert bits(selection) == (0, 2, 4, 5, 6, 7, 23)
    assert guest_quote.command_of(b"nonce", selection, tag) == DeepQuoteCommand(b"nonce", selection).pack(family)
    assert guest_quote.bundle_of(success(family, b"bundle")) == b"bundle"


def test_a_quote_that_cannot_be_kept_is_not_blamed_on_the_tpm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path := str(tmp_path / "tpm"))
        sock.listen()

        def answer() -> None:
            guest, _ = sock.accept()
            with guest:
                guest.recv(4096)
                guest.sendall(success(TpmFamily.TPM_2_0, b"bundle"))

        answered = threading.Thread(target=answer)
        answered.start()
        code = guest_quote.main(["--socket", path, "--nonce", "00", "-o", "/dev/full"])
        answered.join(20)
    assert code == guest_quote.FAILURE
    assert "/dev/full: No space left on device. The quote was made, and is lost" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "24", "7-4", "a", "-1", "1-"])
def test_the_guests_tool_refuses_what_is_no_selection(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"0,2,4-7|0 to 23"):
        guest_quote.selection_of(text)


@pytest.mark.parametrize(
    "answer", [b"", b"\x80\x01\0\0\0\x0a\0\0\0", b"\x80\x01\0\0\0\x0c\0\0\0\0\0\5", b"\x80\x01\0\0\0\x0a\0\0\0\0"]
)
def test_the_guests_tool_refuses_an_answer_that_is_none(answer: bytes) -> None:
    with pytest.raises(guest_quote.QuoteError):
        guest_quote.bundle_of(answer)


@pytest.mark.parametrize(("code", "left"), [(0x922, 8), (0x800, 8), (0x120, 5), (0x101, 5), (0x7FFFFFFF, 5)])
def test_the_guests_tool_says_what_a_refusal_means(code: int, left: int) -> None:
    with pytest.raises(guest_quote.QuoteError, match=f"refused with 0x{code:x}: .") as refused:
        guest_quote.bundle_of(struct.pack(">HII", 0x8001, 10, code))
    assert refused.value.code == left


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_is_read_as_it_was_written(family: TpmFamily) -> None:
    evidence = evidence_of(family)
    assert Evidence.unpack(evidence.pack()) == evidence


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_has_one_encoding_only(family: TpmFamily) -> None:
    packed = evidence_of(family).pack()
    for position in range(len(packed)):
        for cut in (packed[:position], packed[:position] + b"\0" + packed[position:]):
            _refused_or_its_own_encoding(cut)
        for bit in range(8):
            _refused_or_its_own_encoding(
                packed[:position] + bytes([packed[position] ^ 1 << bit]) + packed[position + 1 :]
            )


def _refused_or_its_own_encoding(data: bytes) -> None:
    try:
        evidence = Evidence.unpack(data)
    except MessageError:
        return
    assert evidence.pack() == data


@given(st.binary(max_size=200))
def test_hostile_bytes_are_no_evidence_or_encode_back(data: bytes) -> None:
    for start in (b"", b"vTPMevid\0\1\2\0", b"vTPMevid\0\1\1\2"):
        _refused_or_its_own_encoding(start + data)


def test_evidence_of_a_tpm_1_2_with_a_quote_and_of_a_2_0_without_one_is_refused() -> None:
    with_quote = Evidence(TpmFamily.TPM_1_2, "x", 1, (bytes(20),), b"p", b"a", b"s")
    without = Evidence(TpmFamily.TPM_2_0, "x", 1, (bytes(32),))
    for wrong in (with_quote, without):
        with pytest.raises(MessageError, match="a quote of its own"):
            Evidence.unpack(wrong.pack())
    with pytest.raises(MessageError, match="at most"):
        Evidence.unpack(bytes(MAX_EVIDENCE + 1))


def test_text_that_a_terminal_would_obey_is_refused() -> None:
    with pytest.raises(MessageError, match="printed"):
        Reader(b"\0\4\x1b[2J").text(64)
