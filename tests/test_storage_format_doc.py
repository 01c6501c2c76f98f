import pytest
from generated_docs import DOCS, check_generated

from storage import state_format, store_format
from storage.layout import WireRecord

RECORDS: dict[str, type[WireRecord]] = {
    "state header": state_format.ImageHeader,
    "slot header": state_format.SlotHeader,
    "blob header": state_format.BlobHeader,
    "store header": store_format.StoreHeader,
    "boot header": store_format.BootHeader,
    "seal context": store_format.SealContext,
    "root header": store_format.RootHeader,
    "root body": store_format.RootBody,
    "sector ref": store_format.SectorRef,
    "vtpm row": store_format.VtpmRow,
    "group head": store_format.GroupHead,
    "frame header": store_format.FrameHeader,
    "envelope head": store_format.EnvelopeHead,
    "part head": store_format.PartHead,
    "carry head": store_format.CarryHead,
    "carried part": store_format.CarriedPart,
}


def table(record: type[WireRecord]) -> str:
    rows = [f"| {row.offset} | {row.size} | `{row.name}` | {row.meaning} |" for row in record.table()]
    return "\n".join(["| offset | bytes | field | meaning |", "|---|---|---|---|", *rows, ""])


@pytest.mark.parametrize("section", RECORDS)
def test_the_table_in_the_document_is_the_declaration(section: str) -> None:
    check_generated("format.md", section, table(RECORDS[section]))


def test_the_sizes_in_the_document_are_those_of_the_code() -> None:
    sizes = {
        "records in a leaf": store_format.ROWS_PER_LEAF,
        "references in a map sector": store_format.REFS_PER_MAP,
        "map sectors a root can name": store_format.MAX_MAPS,
        "vTPMs at most": store_format.MAX_MAPS * store_format.REFS_PER_MAP * store_format.ROWS_PER_LEAF,
        "groups at most": store_format.MAX_GROUPS,
        "bytes of a group's blob": store_format.MAX_GROUP_BLOB,
        "bytes of the boot area": store_format.MAX_BOOT_BYTES,
        "sectors of the log at least": store_format.MIN_LOG_SECTORS,
        "sectors of the log at most": store_format.MAX_LOG_SECTORS,
        "spare sectors at least": store_format.MIN_SPARE,
    }
    rows = [f"| {name} | {value} |" for name, value in sizes.items()]
    check_generated("format.md", "store sizes", "\n".join(["| what | number |", "|---|---|", *rows, ""]))


def test_every_declared_record_has_its_table() -> None:
    declared = {
        item
        for module in (state_format, store_format)
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, WireRecord) and item is not WireRecord
    }
    assert declared - set(RECORDS.values()) == {store_format.PartContext}  # said in words: two UUIDs and a number


def test_the_document_names_every_record_kind_and_purpose() -> None:
    from storage.store_crypto import Purpose

    text = (DOCS / "format.md").read_text(encoding="utf-8")
    assert all(purpose.value.decode() in text for purpose in Purpose)
