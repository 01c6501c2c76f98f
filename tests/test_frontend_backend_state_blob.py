"""The format of state blobs: what was written once is read for ever, and nothing else is."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from generated_docs import check_generated
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend_backend import state_blob
from frontend_backend.errors import BlobDamagedError, BlobFormatError
from frontend_backend.state_blob import BlobHeader, Part, PartFlags, SealedPart, seal_part, unwrap, wrap

VECTOR: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "state-blob-v1.json").read_text())
MANAGER_KEY, KEY = bytes(range(32)), bytes(range(100, 132))
HEADER = BlobHeader(
    family="2.0",
    parts=frozenset({Part.PERMANENT, Part.VOLATILE}),
    store=UUID(int=1),
    vtpm=UUID(int=2),
    export=bytes(range(16)),
    generation=7,
    made=1_795_000_000,
    state=bytes([9]) * 32,
)
WRAPPED = wrap(MANAGER_KEY, HEADER, KEY)
CONTENT = b"the volatile part"
BLOB = seal_part(WRAPPED.pack(), KEY, Part.VOLATILE, CONTENT, bytes(range(12)), PartFlags.UNSTARTED)


def opened(blob: bytes, manager_key: bytes = MANAGER_KEY) -> bytes:
    sealed = SealedPart.parse(blob)
    return sealed.open(unwrap(manager_key, sealed.header))


def test_the_vector_is_read_and_written() -> None:
    assert VECTOR["blob"] == BLOB.hex(), "version 1 is written as it always was"
    sealed = SealedPart.parse(bytes.fromhex(VECTOR["blob"]))
    assert unwrap(bytes.fromhex(VECTOR["manager_key"]), sealed.header).hex() == VECTOR["key"]
    assert opened(sealed.raw).decode() == VECTOR["content"]
    found = sealed.header
    told = (found.family, str(found.vtpm), str(found.store), found.generation, found.made, found.export.hex())
    assert [*told, found.state.hex(), sorted(found.parts), sealed.part, sealed.flags] == VECTOR["header"]


def test_every_byte_counts() -> None:
    for position in range(len(BLOB)):
        for change in (1, 0x80):
            changed = BLOB[:position] + bytes([BLOB[position] ^ change]) + BLOB[position + 1 :]
            with pytest.raises((BlobFormatError, BlobDamagedError)):
                opened(changed)


@pytest.mark.parametrize("length", [0, 7, 8, 159, 160, 179, 195, len(BLOB) - 1])
def test_a_cut_blob_is_none(length: int) -> None:
    with pytest.raises(BlobFormatError):
        SealedPart.parse(BLOB[:length])
    with pytest.raises(BlobFormatError):
        SealedPart.parse(BLOB + b"\0")


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_whatever_is_put_in_is_an_error_of_ours_or_a_blob(noise: bytes) -> None:
    for untrusted in (noise, state_blob.MAGIC + noise, BLOB[:180] + noise):
        try:
            SealedPart.parse(untrusted)
        except BlobFormatError:
            continue


def test_another_managers_key_opens_nothing() -> None:
    with pytest.raises(BlobDamagedError):
        opened(BLOB, bytes(32))


def test_a_key_is_bound_to_each_field_of_its_header() -> None:
    changes: dict[str, Any] = {
        "family": "1.2", "parts": frozenset(Part), "store": UUID(int=3), "vtpm": UUID(int=3), "export": bytes(16),
        "generation": 8, "made": 1, "state": bytes(32),
    }  # fmt: skip
    assert changes.keys() == {field.name for field in fields(HEADER)} - {"wrapped"}
    for field, value in changes.items():
        with pytest.raises(BlobDamagedError):
            unwrap(MANAGER_KEY, replace(WRAPPED, **{field: value}))


def test_parts_of_one_export_do_not_pass_for_each_other() -> None:
    permanent = seal_part(WRAPPED.pack(), KEY, Part.PERMANENT, CONTENT, bytes(12))
    as_volatile = permanent[:160] + bytes([Part.VOLATILE]) + permanent[161:]
    with pytest.raises(BlobDamagedError):
        opened(as_volatile)


def test_a_newer_version_is_named() -> None:
    newer = BLOB[:10] + (2).to_bytes(2) + BLOB[12:]
    with pytest.raises(BlobFormatError, match="reader of version 2"):
        SealedPart.parse(newer)


def test_no_header_and_no_part_prints_a_secret() -> None:
    text = repr(WRAPPED) + repr(SealedPart.parse(BLOB))
    assert "wrapped" not in text
    assert repr(WRAPPED.wrapped) not in text
    assert "raw" not in text


@pytest.mark.parametrize(
    ("section", "declared"),
    [("export header", state_blob.HEADER_FIELDS), ("part header", state_blob.PART_FIELDS)],
)
def test_the_table_in_the_document_is_the_declaration(section: str, declared: tuple[tuple[str, str, str], ...]) -> None:
    import struct

    rows, offset = ["| offset | bytes | field | meaning |", "|---|---|---|---|"], 0
    for name, code, meaning in declared:
        size = struct.calcsize(">" + code)
        rows.append(f"| {offset} | {size} | `{name}` | {meaning} |")
        offset += size
    check_generated("format.md", section, "\n".join([*rows, ""]))
