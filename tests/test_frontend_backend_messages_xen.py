from uuid import UUID

import pytest
from generated_docs import check_generated
from message_conformance import check_protocol
from message_tables import table

from frontend_backend import messages_xen as m
from frontend_backend.errors import MessageError, MessageVersionError
from frontend_backend.messages import Protocol

VTPM = UUID(int=7).bytes


def test_messages_travel_unharmed_and_nothing_else_is_one() -> None:
    check_protocol(m._PROTOCOL, m.encode_xen, m.decode_xen, lambda untrusted: untrusted)


@pytest.mark.parametrize("ran_before", [None, True, False])
def test_what_is_not_known_is_not_taken_for_no(ran_before: bool | None) -> None:
    bind = m.Bind(VTPM, 3, 0, "web", "", "", ran_before, resumed=True, kernel="/boot/vmlinuz")
    assert m.decode_xen(m.encode_xen(bind)) == bind


def test_the_longest_texts_of_xenstore_fit() -> None:
    most = "x" * m.MOST_TEXT
    bind = m.Bind(VTPM, 3, 0, most, most, most, None, False, most, most, most)
    assert len(m.encode_xen(bind)) <= m.XEN_DATAGRAM


def test_another_version_and_another_code_are_refused() -> None:
    refusal = m.encode_xen(m.XenRefusal(m.XenCode.TAKEN, "x"))
    with pytest.raises(MessageError):
        m.decode_xen(refusal.replace(b"taken", b"token"))
    with pytest.raises(MessageVersionError):
        m.decode_xen(Protocol(m.VERSION + 1, (m.Joined,)).encode(m.Joined()))


def test_the_document_has_the_messages() -> None:
    check_generated("protocol.md", "vtpm-xen", table(m._PROTOCOL))
