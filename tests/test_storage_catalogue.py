import hashlib
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from storage.catalogue import AttachmentRow, Catalogue, EventRow, GroupRow, VtpmRow
from storage.errors import CatalogueDamaged, CatalogueError, CatalogueTooNew, NameTaken, NoSuchRow, RowTampered

KEY = hashlib.sha256(b"catalogue key of the tests").digest()
GROUP = UUID("11111111-2222-4333-8444-555555555555")
ONE = VtpmRow(UUID("aaaaaaaa-2222-4333-8444-555555555555"), "one", GROUP, "2.0", created="2026-11-20T12:00:00+00:00")
TWO = VtpmRow(
    UUID("bbbbbbbb-2222-4333-8444-555555555555"), "two", GROUP, "1.2", "/dev/vg/two", "2026-11-20T12:00:01+00:00"
)
AT_ONE = AttachmentRow(ONE.uuid, "guest-1", "socket", "1000:1000", "0660", "clear", 7, "2026-11-20T12:00:02+00:00")
AT_TWO = AttachmentRow(TWO.uuid, "guest-2", "qemu", "64055:64055", "0600", "none", 8, "2026-11-20T12:00:03+00:00")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    with Catalogue.create(path, KEY) as made:
        made.add_group(GroupRow(GROUP, "default"))
        made.add_vtpm(ONE)
        made.add_vtpm(TWO)
        yield made


def edit(path: Path, statement: str, *values: object) -> None:
    """Edit the file as an adversary would."""
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(statement, values).rowcount != 0


def test_rows_come_back_as_they_went_in(catalogue: Catalogue, path: Path) -> None:
    catalogue.attach(AT_ONE)
    catalogue.close()
    with Catalogue.open(path, KEY) as again:
        assert sorted(again.vtpms(), key=lambda row: row.name) == [ONE, TWO]
        assert (again.find_vtpm(ONE.uuid), again.find_vtpm_by_name("two")) == (ONE, TWO)
        assert again.groups() == [GroupRow(GROUP, "default")]
        assert again.find_group_by_name("default") == GroupRow(GROUP, "default")
        assert again.attachments() == [AT_ONE]
        assert again.find_attachment(ONE.uuid) == AT_ONE


def test_what_is_not_there_is_none_to_find_and_an_error_to_remove(catalogue: Catalogue) -> None:
    assert catalogue.find_vtpm(uuid4()) is None
    assert catalogue.find_vtpm_by_name("three") is None
    assert catalogue.find_group_by_name("other") is None
    assert catalogue.find_attachment(ONE.uuid) is None
    for remove in (catalogue.remove_vtpm, catalogue.detach):
        with pytest.raises(NoSuchRow):
            remove(uuid4())
    with pytest.raises(NoSuchRow):
        catalogue.renew(AT_ONE)


def test_names_uuids_and_attachments_are_unique_and_a_refusal_changes_nothing(catalogue: Catalogue) -> None:
    catalogue.attach(AT_ONE)
    with pytest.raises(NameTaken):
        catalogue.add_vtpm(replace(TWO, uuid=uuid4()))
    with pytest.raises(NameTaken):
        catalogue.add_vtpm(replace(TWO, name="three"))
    with pytest.raises(NameTaken):
        catalogue.add_group(GroupRow(uuid4(), "default"))
    with pytest.raises(NameTaken):
        catalogue.attach(replace(AT_ONE, guest="guest-2"))
    assert len(list(catalogue.vtpms())) == 2
    assert catalogue.attachments() == [AT_ONE]


def test_an_attachment_is_renewed_and_detached(catalogue: Catalogue) -> None:
    catalogue.attach(AT_ONE)
    catalogue.attach(AT_TWO)
    catalogue.renew(replace(AT_ONE, lease=9))
    assert catalogue.find_attachment(ONE.uuid) == replace(AT_ONE, lease=9)
    catalogue.detach(ONE.uuid)
    assert catalogue.attachments() == [AT_TWO]


def test_a_removed_vtpm_frees_its_name(catalogue: Catalogue) -> None:
    catalogue.remove_vtpm(ONE.uuid)
    catalogue.add_vtpm(replace(TWO, uuid=uuid4(), name="one"))
    assert catalogue.find_vtpm(ONE.uuid) is None


def test_times_are_filled_in_as_utc(catalogue: Catalogue) -> None:
    catalogue.add_vtpm(VtpmRow(uuid4(), "three", GROUP, "2.0"))
    row = catalogue.find_vtpm_by_name("three")
    assert row is not None
    assert row.created.endswith("+00:00")


def test_events_keep_their_order(catalogue: Catalogue) -> None:
    catalogue.log("started", None, "first")
    catalogue.log("added", ONE.uuid, "second")
    assert [event.text for event in catalogue.events()] == ["first", "second"]
    [event] = catalogue.events(ONE.uuid)
    assert event == EventRow(event.time, "added", ONE.uuid, "second")


def test_any_text_is_kept_as_it_is(catalogue: Catalogue) -> None:
    odd = replace(ONE, uuid=uuid4(), name="odd", state_image="/dev/'; drop table vtpms; --\n\u00e9\u4e2d")
    catalogue.add_vtpm(odd)
    catalogue.log("odd", odd.uuid, odd.state_image)
    assert catalogue.find_vtpm(odd.uuid) == odd
    assert catalogue.events(odd.uuid)[0].text == odd.state_image


def test_the_file_is_for_its_owner_only(catalogue: Catalogue, path: Path) -> None:
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_a_path_with_odd_characters_is_that_path(tmp_path: Path) -> None:
    path = tmp_path / "a?b=c%41 #d.sqlite"
    Catalogue.create(path, KEY).close()
    Catalogue.open(path, KEY).close()
    assert path.stat().st_size > 0


def test_the_mac_key_is_not_in_the_file(catalogue: Catalogue, path: Path) -> None:
    catalogue.close()
    content = path.read_bytes()
    assert KEY not in content
    assert b"/dev/vg/two" in content  # the search can see what is in clear


# --- what an adversary with the file may try --------------------------------------------------------


def assert_tampered(path: Path, table: str) -> None:
    with pytest.raises((RowTampered, CatalogueDamaged)) as caught:
        Catalogue.open(path, KEY)
    if isinstance(caught.value, RowTampered):
        assert caught.value.table == table


@pytest.mark.parametrize("column", list(asdict(ONE)))
def test_every_edited_column_of_a_vtpm_is_refused(catalogue: Catalogue, path: Path, column: str) -> None:
    catalogue.close()
    value = uuid4().hex if column in {"uuid", "group"} else "other"
    edit(path, f'update vtpms set "{column}" = ? where name = ?', value, "one")
    assert_tampered(path, "vtpms")


@pytest.mark.parametrize("column", list(asdict(AT_ONE)))
def test_every_edited_column_of_an_attachment_is_refused(catalogue: Catalogue, path: Path, column: str) -> None:
    catalogue.attach(AT_ONE)
    catalogue.close()
    value: object = {"vtpm": TWO.uuid.hex, "lease": 99}.get(column, "other")
    edit(path, f'update attachments set "{column}" = ?', value)
    assert_tampered(path, "attachments")


@pytest.mark.parametrize("value", [b"", bytes(32), "text", 5])
@pytest.mark.parametrize("table", ["vtpms", "attachments"])
def test_a_mac_of_any_kind_but_the_right_one_is_refused(
    catalogue: Catalogue, path: Path, table: str, value: object
) -> None:
    catalogue.attach(AT_ONE)
    catalogue.close()
    edit(path, f"update {table} set mac = ?", value)
    assert_tampered(path, table)


@pytest.mark.parametrize("value", ["no uuid", "", 17, b"\xff\xfe"])
def test_a_uuid_that_is_none_is_refused(catalogue: Catalogue, path: Path, value: object) -> None:
    catalogue.close()
    edit(path, "update vtpms set uuid = ? where name = 'one'", value)
    assert_tampered(path, "vtpms")


def test_swapped_attachments_are_refused(catalogue: Catalogue, path: Path) -> None:
    catalogue.attach(AT_ONE)
    catalogue.attach(AT_TWO)
    catalogue.close()
    edit(path, "update attachments set guest = case guest when 'guest-1' then 'guest-2' else 'guest-1' end")
    assert_tampered(path, "attachments")


def test_another_key_refuses_every_row_and_the_row_is_named(catalogue: Catalogue, path: Path) -> None:
    catalogue.close()
    with pytest.raises(RowTampered, match=r"one|two"):
        Catalogue.open(path, bytes(32))


def test_a_row_copied_to_another_uuid_is_refused(catalogue: Catalogue, path: Path) -> None:
    catalogue.close()
    columns = "'copy', \"group\", family, state_image, created, mac"
    edit(path, f"insert into vtpms select ?, {columns} from vtpms where name = 'one'", uuid4().hex)
    assert_tampered(path, "vtpms")


# --- files that are no catalogue, or not ours -------------------------------------------------------


def refused(path: Path, *kinds: type[CatalogueError]) -> str:
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(kinds) as caught:
        Catalogue.open(path, KEY)
    assert (path.read_bytes() if path.exists() else None) == before
    return str(caught.value)


def test_a_missing_catalogue_is_an_error_and_stays_missing(path: Path) -> None:
    refused(path, CatalogueDamaged)


@pytest.mark.parametrize("content", [b"", b"not a database" * 100, b"SQLite format 3\0" + bytes(100)])
def test_another_file_is_no_catalogue(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CatalogueDamaged):
        Catalogue.open(path, KEY)


def test_a_truncated_catalogue_is_refused(catalogue: Catalogue, path: Path) -> None:
    catalogue.close()
    whole = path.read_bytes()
    for size in (100, 4096, 8192, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises((CatalogueDamaged, RowTampered)):
            Catalogue.open(path, KEY)


def test_a_newer_schema_is_refused_and_named(catalogue: Catalogue, path: Path) -> None:
    catalogue.close()
    edit(path, "update about set schema = 7")
    assert "7" in refused(path, CatalogueTooNew)


@pytest.mark.parametrize(
    "statement", ["delete from about", "insert into about values (1)", "update about set schema='x'"]
)
def test_a_catalogue_that_does_not_say_its_schema_is_damaged(catalogue: Catalogue, path: Path, statement: str) -> None:
    catalogue.close()
    edit(path, statement)
    refused(path, CatalogueDamaged)


def test_creating_over_a_file_is_refused(catalogue: Catalogue, path: Path) -> None:
    with pytest.raises(NameTaken):
        Catalogue.create(path, KEY)
    assert len(list(catalogue.vtpms())) == 2


def test_a_full_disk_is_an_error_and_keeps_what_was_there(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    path = mount / "catalogue.sqlite"
    try:
        with Catalogue.create(path, KEY) as catalogue:
            catalogue.add_vtpm(ONE)
            with pytest.raises(CatalogueError, match="full"):
                catalogue.log("filler", None, "x" * 1_000_000)
            assert list(catalogue.vtpms()) == [ONE]
        with Catalogue.open(path, KEY) as catalogue:
            assert list(catalogue.vtpms()) == [ONE]
    finally:
        subprocess.run(["umount", str(mount)], check=True)
