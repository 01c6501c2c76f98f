import json

import pytest
from generated_docs import check_generated
from message_conformance import check_protocol
from message_tables import table

from frontend_backend import messages_admin
from frontend_backend.errors import MessageError
from frontend_backend.messages_admin import AdminRequest, Done, ExitCode, Failure, Row, decode_admin, encode_admin


def test_messages_travel_unharmed_and_nothing_else_is_one() -> None:
    check_protocol(messages_admin._PROTOCOL, encode_admin, decode_admin, lambda untrusted: untrusted)


def test_a_request_without_arguments_has_none() -> None:
    assert AdminRequest("list").arguments == {}
    assert decode_admin(encode_admin(AdminRequest("list"))) == AdminRequest("list", {})


def test_arguments_keep_their_types() -> None:
    arguments: dict[str, str | int | bool | tuple[str, ...] | None]
    arguments = {"name": "1", "count": 1, "yes": True, "group": None, "label": ("a=b", "c=d"), "remove": ()}
    request = decode_admin(encode_admin(AdminRequest("add", arguments)))
    assert isinstance(request, AdminRequest)
    assert [type(value) for value in request.arguments.values()] == [str, int, bool, type(None), tuple, tuple]
    assert request.arguments["label"] == ("a=b", "c=d")


@pytest.mark.parametrize("value", [1.5, b"bytes", [1], ["a", None], {"map": 1}])
def test_an_argument_of_another_type_is_not_believed(value: object) -> None:
    request = AdminRequest("add", {"name": value})  # type: ignore[dict-item]
    with pytest.raises(MessageError, match=r"AdminRequest\.arguments"):
        decode_admin(encode_admin(request))


def test_exit_codes_have_the_documented_numbers() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILURE": 1,
        "USAGE": 2,
        "NOT_FOUND": 3,
        "CONFLICT": 4,
        "DENIED": 5,
        "INTEGRITY": 6,
        "TPM_UNAVAILABLE": 7,
        "BUSY": 8,
    }


def test_an_exit_code_nobody_knows_is_refused() -> None:
    packet = encode_admin(Failure(ExitCode.BUSY, "later"))
    assert decode_admin(packet) == Failure(ExitCode.BUSY, "later")
    with pytest.raises(MessageError, match=r"Failure\.code: '9' is no ExitCode"):
        decode_admin(packet.replace(b"\xa4code\x08", b"\xa4code\x09"))


def test_the_answer_done_is_not_mistaken_for_anything() -> None:
    assert decode_admin(encode_admin(Done())) == Done()
    assert decode_admin(encode_admin(Done())) != Row({})


def test_a_row_can_be_printed_as_json() -> None:
    row = decode_admin(encode_admin(Row({"uuid": "x", "pid": 12, "fresh": False, "guest": None, "list": ["a"]})))
    assert isinstance(row, Row)
    assert json.loads(json.dumps(row.document)) == row.document


def test_the_messages_in_the_documents_are_those_in_the_code() -> None:
    check_generated("protocol.md", "admin", table(messages_admin._PROTOCOL))
