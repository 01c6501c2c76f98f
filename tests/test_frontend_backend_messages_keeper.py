import pytest
from generated_docs import check_generated
from message_conformance import check_protocol
from message_strategies import kinds
from message_tables import table

from frontend_backend import messages_keeper
from frontend_backend.descriptors import MAX_DATAGRAM
from frontend_backend.errors import MessageError
from frontend_backend.messages_keeper import Kept, ListReply, Spawn, decode_keeper, encode_keeper


def test_messages_travel_unharmed_and_nothing_else_is_one() -> None:
    check_protocol(messages_keeper._PROTOCOL, encode_keeper, decode_keeper, lambda untrusted: untrusted)


def test_a_damaged_entry_of_a_list_spoils_the_list() -> None:
    kept = Kept(bytes(16), 1, 100, "socket", ("data",), alive=True, status=None)
    good = encode_keeper(ListReply((kept, kept), 2))
    with pytest.raises(MessageError):
        decode_keeper(good.replace(b"\xa5alive\xc3", b"\xa5alive\x01", 1))
    with pytest.raises(MessageError, match="Kept has no field"):
        decode_keeper(good.replace(b"\xa5alive", b"\xa5alivf", 1))


def test_a_hundred_kept_instances_fit_one_datagram() -> None:
    kept = Kept(bytes(16), 2**40, 2**22, "socket", ("data", "control", "ring"), alive=False, status=-9)
    assert len(encode_keeper(ListReply((kept,) * 100, 20000))) < MAX_DATAGRAM


def test_the_keeper_learns_no_key() -> None:
    names = {name for kind in kinds(messages_keeper._PROTOCOL) for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    assert not {name for name in names if "key" in name or "digest" in name or "secret" in name}
    assert "vtpm" in Spawn.__dataclass_fields__


def test_the_messages_in_the_documents_are_those_in_the_code() -> None:
    check_generated("protocol.md", "keeper", table(messages_keeper._PROTOCOL))
