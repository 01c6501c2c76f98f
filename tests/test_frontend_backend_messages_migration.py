import pytest
from generated_docs import check_generated
from message_conformance import check_protocol
from message_tables import table

from frontend_backend import messages_migration as m
from frontend_backend.errors import MessageError

VTPM, EXPORT, CLAIM = b"v" * 16, b"e" * 16, b"c" * 16


@pytest.mark.parametrize("protocol", [m._REQUESTS, m._REPLIES], ids=["requests", "replies"])
def test_messages_travel_unharmed_and_nothing_else_is_one(protocol: m.Protocol) -> None:
    check_protocol(protocol, protocol.encode, protocol.decode, lambda untrusted: untrusted)


@pytest.mark.parametrize(
    "request_",
    [
        m.Claim(VTPM, b"header", CLAIM[:15]),
        m.Claim(VTPM + b"x", b"header", CLAIM),
        m.Confirm(VTPM, b"", CLAIM),
        m.Confirm(VTPM, EXPORT, CLAIM * 2),
        m.Renounce(VTPM[:1], EXPORT),
        m.Renounce(VTPM, EXPORT[:8]),
    ],
    ids=str,
)
def test_ids_of_another_size_are_refused(request_: m.MigrationRequest) -> None:
    with pytest.raises(MessageError, match="16 bytes"):
        m.decode_migration_request(m.encode_migration_request(request_)[4:])


def test_a_right_request_is_read() -> None:
    for request in (m.Claim(VTPM, b"header", CLAIM), m.Confirm(VTPM, EXPORT, CLAIM), m.Renounce(VTPM, EXPORT)):
        assert m.decode_migration_request(m.encode_migration_request(request)[4:]) == request


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(MessageError, match="32 bytes"):
        m.decode_migration_reply(m.encode_migration_reply(m.ClaimReply(b"k" * 31))[4:])


def test_a_key_is_not_printed() -> None:
    assert "kkkk" not in repr(m.ClaimReply(b"k" * 32))


@pytest.mark.parametrize("length", [0, m.MAX_MESSAGE + 1, 2**32 - 1])
def test_a_length_that_no_message_has_is_refused_before_it_is_read(length: int) -> None:
    with pytest.raises(MessageError, match="1 to 4096"):
        m.body_size(length.to_bytes(4))
    assert m.body_size(m.MAX_MESSAGE.to_bytes(4)) == m.MAX_MESSAGE


def test_what_does_not_fit_is_not_sent() -> None:
    with pytest.raises(MessageError, match="at most"):
        m.encode_migration_request(m.Claim(VTPM, bytes(m.MAX_MESSAGE), CLAIM))


def test_the_document_has_the_messages() -> None:
    check_generated("protocol.md", "migration requests", table(m._REQUESTS))
    check_generated("protocol.md", "migration replies", table(m._REPLIES))
