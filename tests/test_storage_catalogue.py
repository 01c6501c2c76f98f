"""The catalogue, on SQLite and on PostgreSQL; what only one of them can meet is in the second half."""

import hashlib
import os
import resource
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier
from uuid import UUID, uuid4

import pytest
from postgresql_rig import Server, name_of, server

from storage.catalogue import AttachmentRow, Catalogue, EventRow, Filter, GroupRow, Happened, Listed, Place, VtpmRow
from storage.catalogue_database import SQLITE_CONNECTIONS_MOST
from storage.errors import (
    CatalogueBusy,
    CatalogueDamaged,
    CatalogueError,
    CatalogueForeign,
    CatalogueTooNew,
    CatalogueUnreachable,
    CatalogueUnwritten,
    NameTaken,
    NoSuchRow,
    RowTampered,
)

KEY = hashlib.sha256(b"catalogue key of the tests").digest()
STORE = UUID("77777777-2222-4333-8444-555555555555")
GROUP = UUID("11111111-2222-4333-8444-555555555555")
ONE = VtpmRow(UUID("aaaaaaaa-2222-4333-8444-555555555555"), "one", GROUP, "2.0", created="2026-11-20T12:00:00+00:00")
TWO = VtpmRow(
    UUID("bbbbbbbb-2222-4333-8444-555555555555"), "two", GROUP, "1.2", "/dev/vg/two", "2026-11-20T12:00:01+00:00"
)
AT_ONE = AttachmentRow(ONE.uuid, "guest-1", "socket", "1000:1000", "0660", "clear", 7, "2026-11-20T12:00:02+00:00", 3)
AT_TWO = AttachmentRow(TWO.uuid, "guest-2", "qemu", "64055:64055", "0600", "none", 8, "2026-11-20T12:00:03+00:00", 4)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    with server() as running:
        yield running


class Site:
    """Where a catalogue lies in a test, and how an adversary reaches it there."""

    def __init__(self, place: Place, run: Callable[..., int]) -> None:
        self.place, self._run = place, run

    @property
    def is_file(self) -> bool:
        return isinstance(self.place, Path)

    def edit(self, statement: str, *values: object) -> None:
        """Edit as an adversary would; ? stands for a value."""
        assert self._run(statement, *values) != 0

    def uuid(self, value: UUID) -> str:
        """A UUID as its column has it."""
        return value.hex if self.is_file else str(value)

    def state(self) -> object:
        """What must not have changed after a refusal."""
        if isinstance(self.place, Path):
            return self.place.read_bytes() if self.place.exists() else None
        return Catalogue.whose(self.place)


def sqlite_site(path: Path) -> Site:
    def run(statement: str, *values: object) -> int:
        with closing(sqlite3.connect(path)) as database, database:
            return database.execute(statement, values).rowcount

    return Site(path, run)


def postgresql_site(running: Server) -> Site:
    url = running.clean_database()
    database = name_of(url)

    def run(statement: str, *values: object) -> int:
        text = "set search_path = vtpm_manager"
        import psycopg

        with psycopg.connect(host=str(running.base), user="postgres", dbname=database, autocommit=True) as connection:
            connection.execute(text)
            return connection.execute(statement.replace("?", "%s").encode(), values or None).rowcount

    return Site(url, run)


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    if request.param == "sqlite":
        return sqlite_site(tmp_path / "catalogue.sqlite")
    return postgresql_site(request.getfixturevalue("postgresql"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


def filled(place: Place) -> Catalogue:
    made = Catalogue.create(place, KEY, STORE)
    made.add_group(GroupRow(GROUP, "default"))
    made.add_vtpm(ONE)
    made.add_vtpm(TWO)
    return made


@pytest.fixture
def catalogue(site: Site) -> Iterator[Catalogue]:
    with filled(site.place) as made:
        yield made


@pytest.fixture
def in_file(path: Path) -> Iterator[Catalogue]:
    with filled(path) as made:
        yield made


def edit(path: Path, statement: str, *values: object) -> None:
    """Edit the file as an adversary would."""
    sqlite_site(path).edit(statement, *values)


def test_rows_come_back_as_they_went_in(catalogue: Catalogue, site: Site) -> None:
    catalogue.attach(AT_ONE)
    catalogue.close()
    with Catalogue.open(site.place, KEY, STORE) as again:
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


def test_a_full_disk_is_no_damage_and_takes_the_transaction_back(in_file: Catalogue, path: Path) -> None:
    """Who was told that the catalogue "cannot be read" and "nothing was changed" was told wrong on both counts."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    three = replace(TWO, uuid=uuid4(), name="three", state_image="")
    room = path.with_name(f"{path.name}-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
    try:
        with pytest.raises(CatalogueUnwritten, match=r"could not be written.*It is as it was.*Make room"):
            in_file.add_vtpm(three)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert in_file.find_vtpm_by_name("three") is None
    in_file.add_vtpm(three)
    assert in_file.find_vtpm_by_name("three") is not None


def test_an_attachment_is_renewed_and_detached(catalogue: Catalogue) -> None:
    catalogue.attach(AT_ONE)
    catalogue.attach(AT_TWO)
    catalogue.renew(replace(AT_ONE, lease=9))
    assert catalogue.find_attachment(ONE.uuid) == replace(AT_ONE, lease=9)
    catalogue.detach(ONE.uuid)
    assert catalogue.attachments() == [AT_TWO]


def test_a_vtpm_and_its_attachment_are_found_together_or_not_at_all(catalogue: Catalogue, site: Site) -> None:
    assert catalogue.find_attached(ONE.uuid) is None
    assert catalogue.attach(replace(AT_ONE, created="")).created
    row, attachment = catalogue.find_attached(ONE.uuid) or pytest.fail("it is attached")
    assert (row, attachment) == (catalogue.find_vtpm(ONE.uuid), catalogue.find_attachment(ONE.uuid))
    assert catalogue.find_attached(uuid4()) is None
    for table, column in (("vtpms", "name"), ("attachments", "guest")):
        site.edit(f"update {table} set {column} = {column} || 'x'")
        with pytest.raises(RowTampered):
            catalogue.find_attached(ONE.uuid)
        site.edit(f"update {table} set {column} = substr({column}, 1, length({column}) - 1)")
    assert catalogue.find_attached(ONE.uuid) == (row, attachment)


def test_an_attachment_is_found_by_each_of_its_ports_and_by_no_other(catalogue: Catalogue) -> None:
    catalogue.attach(AT_ONE)
    for first in (1, 2, 3):
        assert catalogue.find_attachment_at_ports(first, 2) is None, "it has none"
    on_tcp = replace(AT_TWO, tcp_port=2)
    catalogue.attach(on_tcp)
    assert [catalogue.find_attachment_at_ports(first, 2) for first in (1, 2, 3)] == [on_tcp] * 3
    assert catalogue.find_attachment_at_ports(4, 2) is None


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


def test_the_file_is_for_its_owner_only(in_file: Catalogue, path: Path) -> None:
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_a_path_with_odd_characters_is_that_path(tmp_path: Path) -> None:
    path = tmp_path / "a?b=c%41 #d.sqlite"
    Catalogue.create(path, KEY).close()
    Catalogue.open(path, KEY).close()
    assert path.stat().st_size > 0


def test_the_mac_key_is_not_in_the_file(in_file: Catalogue, path: Path) -> None:
    in_file.close()
    content = path.read_bytes()
    assert KEY not in content
    assert b"/dev/vg/two" in content  # the search can see what is in clear


# --- what an adversary with the file may try --------------------------------------------------------


def assert_tampered(site: Site, table: str) -> None:
    with pytest.raises((RowTampered, CatalogueDamaged)) as caught:
        Catalogue.open(site.place, KEY)
    if isinstance(caught.value, RowTampered):
        assert caught.value.table == table


@pytest.mark.parametrize("column", list(asdict(ONE)))
def test_every_edited_column_of_a_vtpm_is_refused(catalogue: Catalogue, site: Site, column: str) -> None:
    catalogue.close()
    value = site.uuid(uuid4()) if column in {"uuid", "group"} else "3.0"
    site.edit(f'update vtpms set "{column}" = ? where name = ?', value, "one")
    assert_tampered(site, "vtpms")


@pytest.mark.parametrize("column", list(asdict(AT_ONE)))
def test_every_edited_column_of_an_attachment_is_refused(catalogue: Catalogue, site: Site, column: str) -> None:
    catalogue.attach(AT_ONE)
    catalogue.close()
    value: object = {"vtpm": site.uuid(TWO.uuid)}.get(column, 99 if column in NUMBERS else column in TRUTHS or "other")
    site.edit(f'update attachments set "{column}" = ?', value)
    assert_tampered(site, "attachments")


@pytest.mark.parametrize("column", ["localities", "bound_domain", "ran_before", "domain", "xsm_label", "bound_uuid"])
def test_what_a_row_says_of_a_domain_cannot_be_made_what_older_rows_stand_for(
    catalogue: Catalogue, site: Site, column: str
) -> None:
    """Then it would be left out of the MAC, as in rows of older schemas."""
    said = {"localities": 3, "bound_domain": 7, "ran_before": True}.get(column, "web")
    catalogue.attach(replace(AT_ONE, **{column: said}))  # type: ignore[arg-type]
    catalogue.close()
    site.edit(f'update attachments set "{column}" = ?', asdict(AT_ONE)[column])
    assert_tampered(site, "attachments")


@pytest.mark.parametrize("epoch", [0, 1, 2**31 - 1])
def test_an_epoch_cannot_be_taken_from_a_row_or_given_to_one(catalogue: Catalogue, site: Site, epoch: int) -> None:
    catalogue.attach(replace(AT_ONE, epoch=0) if epoch == 1 else AT_ONE)
    catalogue.close()
    site.edit("update attachments set epoch = ?", epoch)
    assert_tampered(site, "attachments")


NUMBERS = ("lease", "epoch", "hibernate_after", "tcp_port", "commands_per_second", "saves_per_second", "nv_bytes")
NUMBERS += ("localities", "bound_domain")
TRUTHS = ("compat", "maintenance", "trace", "ran_before")


@pytest.mark.parametrize("column", ["commands_per_second", "saves_per_second", "nv_bytes", "tcp_port"])
@pytest.mark.parametrize(("kept", "put"), [(0, 5), (5, 0), (5, 6)])
def test_a_quota_cannot_be_taken_from_a_row_or_given_to_one(
    catalogue: Catalogue, site: Site, column: str, kept: int, put: int
) -> None:
    catalogue.attach(replace(AT_ONE, **{column: kept}))  # type: ignore[arg-type]
    catalogue.close()
    site.edit(f"update attachments set {column} = ?", put)
    assert_tampered(site, "attachments")


@pytest.mark.parametrize(("kept", "put"), [(None, 0), (None, 5), (0, None), (5, None), (5, 6)])
def test_a_time_to_hibernate_cannot_be_taken_from_a_row_or_given_to_one(
    catalogue: Catalogue, site: Site, kept: int | None, put: int | None
) -> None:
    catalogue.attach(replace(AT_ONE, hibernate_after=kept))
    catalogue.close()
    site.edit("update attachments set hibernate_after = ?", put)
    assert_tampered(site, "attachments")


@pytest.mark.parametrize("value", [b"", bytes(32), b"short"])
@pytest.mark.parametrize("table", ["vtpms", "attachments"])
def test_a_mac_of_any_kind_but_the_right_one_is_refused(
    catalogue: Catalogue, site: Site, table: str, value: object
) -> None:
    catalogue.attach(AT_ONE)
    catalogue.close()
    site.edit(f"update {table} set mac = ?", value)
    assert_tampered(site, table)


@pytest.mark.parametrize("value", ["text", 5])
def test_a_mac_that_is_no_bytes_is_refused(in_file: Catalogue, path: Path, value: object) -> None:
    in_file.close()
    edit(path, "update vtpms set mac = ?", value)
    assert_tampered(sqlite_site(path), "vtpms")


@pytest.mark.parametrize("value", ["no uuid", "", 17, b"\xff\xfe"])
def test_a_uuid_that_is_none_is_refused(in_file: Catalogue, path: Path, value: object) -> None:
    in_file.close()
    edit(path, "update vtpms set uuid = ? where name = 'one'", value)
    assert_tampered(sqlite_site(path), "vtpms")


def test_swapped_attachments_are_refused(catalogue: Catalogue, site: Site) -> None:
    catalogue.attach(AT_ONE)
    catalogue.attach(AT_TWO)
    catalogue.close()
    site.edit("update attachments set guest = case guest when 'guest-1' then 'guest-2' else 'guest-1' end")
    assert_tampered(site, "attachments")


def test_another_key_refuses_every_row_and_the_row_is_named(catalogue: Catalogue, site: Site) -> None:
    catalogue.close()
    with pytest.raises(RowTampered, match=r"one|two"):
        Catalogue.open(site.place, bytes(32))


def test_a_row_copied_to_another_uuid_is_refused(catalogue: Catalogue, site: Site) -> None:
    catalogue.close()
    columns = "'copy', \"group\", family, state_image, created, mac"
    kind = "?" if site.is_file else "?::uuid"
    site.edit(f"insert into vtpms select {kind}, {columns} from vtpms where name = 'one'", site.uuid(uuid4()))
    assert_tampered(site, "vtpms")


def test_an_audit_names_what_fails_and_reads_the_rest(catalogue: Catalogue, site: Site) -> None:
    catalogue.attach(AT_TWO)
    catalogue.close()
    site.edit("update vtpms set name = 'evil' where name = 'one'")
    with Catalogue.open(site.place, KEY, STORE, check_rows=False) as opened:
        audit = opened.audit()
    assert (audit.vtpms, audit.attachments, [found.row for found in audit.tampered]) == ([TWO], [AT_TWO], ["vTPM evil"])


# --- files that are no catalogue, or not ours -------------------------------------------------------


def refused(site: Site, *kinds: type[CatalogueError]) -> str:
    before = site.state() if site.is_file else None
    with pytest.raises(kinds) as caught:
        Catalogue.open(site.place, KEY)
    assert not site.is_file or site.state() == before
    return str(caught.value)


def test_a_missing_catalogue_is_an_error_and_stays_missing(site: Site) -> None:
    refused(site, CatalogueDamaged)
    assert site.state() is None


@pytest.mark.parametrize("content", [b"", b"not a database" * 100, b"SQLite format 3\0" + bytes(100)])
def test_another_file_is_no_catalogue(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CatalogueDamaged):
        Catalogue.open(path, KEY)


def test_a_truncated_catalogue_is_refused(in_file: Catalogue, path: Path) -> None:
    in_file.close()
    whole = path.read_bytes()
    for size in (100, 4096, 8192, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises((CatalogueDamaged, RowTampered)):
            Catalogue.open(path, KEY)


def test_a_newer_schema_is_refused_and_named(catalogue: Catalogue, site: Site) -> None:
    catalogue.close()
    site.edit("update about set schema = 7")
    assert "7" in refused(site, CatalogueTooNew)


@pytest.mark.parametrize(
    "statement", ["delete from about", "insert into about (schema) values (1)", "update about set schema='x'"]
)
def test_a_catalogue_that_does_not_say_its_schema_is_damaged(catalogue: Catalogue, site: Site, statement: str) -> None:
    catalogue.close()
    if not site.is_file and "'x'" in statement:
        statement = "alter table about rename to what"
    site.edit(statement)
    refused(site, CatalogueDamaged)


def test_creating_over_one_is_refused(catalogue: Catalogue, site: Site) -> None:
    with pytest.raises(NameTaken):
        Catalogue.create(site.place, KEY)
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


def test_the_catalogue_of_another_store_is_refused(catalogue: Catalogue, site: Site) -> None:
    catalogue.close()
    with pytest.raises(CatalogueForeign, match=str(STORE)):
        Catalogue.open(site.place, KEY, uuid4())
    Catalogue.open(site.place, KEY, STORE).close()


# --- changes and their events, labels, listings -----------------------------------------------------


def test_a_change_and_its_event_are_kept_together_or_not_at_all(catalogue: Catalogue) -> None:
    catalogue.attach(AT_ONE, Happened("attached", "one to guest-1"))
    with pytest.raises(NameTaken):
        catalogue.attach(AT_ONE, Happened("attached", "again"))
    with pytest.raises(NoSuchRow):
        catalogue.detach(uuid4(), Happened("detached", "nothing"))
    with pytest.raises(NameTaken):
        catalogue.add_vtpm(ONE, Happened("added", "again"), {"a": "b"})
    catalogue.detach(ONE.uuid, Happened("detached", "one"))
    catalogue.remove_vtpm(ONE.uuid, Happened("removed", "one"))
    assert [(event.kind, event.text) for event in catalogue.events()] == [
        ("attached", "one to guest-1"),
        ("detached", "one"),
        ("removed", "one"),
    ]
    assert catalogue.labels(ONE.uuid) == {}


def test_labels_are_put_replaced_removed_and_go_with_their_vtpm(catalogue: Catalogue, site: Site) -> None:
    catalogue.change_labels(ONE.uuid, {"tier": "web", "env": "prod"}, [])
    catalogue.change_labels(ONE.uuid, {"env": "test"}, ["no-such"])
    catalogue.change_labels(TWO.uuid, {"tier": "web"}, [], Happened("labelled", "two"))
    assert catalogue.labels(ONE.uuid) == {"env": "test", "tier": "web"}
    catalogue.change_labels(ONE.uuid, {}, ["env"])
    catalogue.remove_vtpm(TWO.uuid)
    catalogue.close()
    with Catalogue.open(site.place, KEY, STORE) as again:
        assert again.labels(ONE.uuid) == {"tier": "web"}
        assert again.labels(TWO.uuid) == {}


def names(catalogue: Catalogue, only: Filter, limit: int = 100) -> list[str]:
    found, after = [], ""
    while page := catalogue.listing(only, after, limit):
        found += [row.vtpm.name for row in page]
        after = found[-1]
    return found


def test_a_listing_filters_by_labels_all_of_which_must_match(catalogue: Catalogue) -> None:
    catalogue.add_vtpms([VtpmRow(uuid4(), f"vm-{n}", GROUP, "2.0") for n in range(5)], "added", "", {"tier": "db"})
    catalogue.change_labels(ONE.uuid, {"tier": "web", "env": "prod"}, [])
    catalogue.change_labels(TWO.uuid, {"tier": "web", "env": "test"}, [])
    assert names(catalogue, Filter(labels=(("tier", "web"),))) == ["one", "two"]
    assert names(catalogue, Filter(labels=(("tier", "web"), ("env", "prod")))) == ["one"]
    assert names(catalogue, Filter(labels=(("env", None),))) == ["one", "two"]
    assert names(catalogue, Filter(labels=(("tier", "db"),)), 2) == [f"vm-{n}" for n in range(5)]
    assert names(catalogue, Filter(labels=(("tier", "x"),))) == []
    (listed,) = catalogue.listing(Filter(labels=(("env", "prod"),)), "", 10)
    assert listed == Listed(ONE, None, {"env": "prod", "tier": "web"})


def test_names_are_ordered_by_their_bytes_on_every_database(catalogue: Catalogue) -> None:
    odd = ["B", "a", "_x", "a.b", "a-b", "Z9", "10", "9"]
    catalogue.add_vtpms([VtpmRow(uuid4(), name, GROUP, "2.0") for name in odd], "added", "")
    assert names(catalogue, Filter(), 3) == sorted([*odd, "one", "two"])
    assert [row.name for row in catalogue.each_vtpm()] == sorted([*odd, "one", "two"])
    assert catalogue.count_vtpms() == 10
    assert catalogue.names_taken(["a", "nobody", *map(str, range(2000))]) == {"a", "10", "9"}


def test_events_are_paged_chosen_and_pruned(catalogue: Catalogue) -> None:
    for number in range(7):
        catalogue.log("tick", ONE.uuid if number % 2 else None, str(number))
    everything = catalogue.events_after(0)
    assert [row.text for _, row in everything] == list("0123456")
    assert [row.text for _, row in catalogue.events_after(everything[2][0], limit=2)] == ["3", "4"]
    after = catalogue.before_newest_events(2, ONE.uuid)
    assert [row.text for _, row in catalogue.events_after(after, ONE.uuid)] == ["3", "5"]
    assert catalogue.before_newest_events(100) == 0
    assert catalogue.events_after(0, since="2999-01-01T00:00:00+00:00") == []
    assert catalogue.prune_events(5, "") == 2
    assert catalogue.prune_events(5, "") == 0
    assert [event.text for event in catalogue.events()] == list("23456")
    assert catalogue.prune_events(5, "2999-01-01T00:00:00+00:00") == 5
    catalogue.log("tick", None, "later")
    assert [event.text for event in catalogue.events()] == ["later"]


def test_a_compacted_catalogue_has_what_it_had_and_takes_less_room(catalogue: Catalogue, site: Site) -> None:
    catalogue.add_vtpms([VtpmRow(uuid4(), f"vm-{n}", GROUP, "2.0") for n in range(2000)], "added", "")
    while catalogue.prune_events(1, ""):
        pass
    for row in catalogue.vtpms()[:200]:
        catalogue.remove_vtpm(row.uuid)
    before = len(catalogue.snapshot())
    left = catalogue.vtpms()
    catalogue.compact()
    assert catalogue.vtpms() == left
    assert len(catalogue.events()) == 1
    if site.is_file:
        assert len(catalogue.snapshot()) < before
    catalogue.log("after", None, "it goes on")


def test_group_rows_carry_the_groups_public_data(catalogue: Catalogue, site: Site) -> None:
    row = GroupRow(uuid4(), "tenant", "sha256:0,7", 2, "2026-11-20T12:00:00+00:00")
    catalogue.add_group(row, Happened("group-added", "tenant"))
    catalogue.change_group(replace(row, pcrs="none"))
    with pytest.raises(NoSuchRow):
        catalogue.change_group(GroupRow(uuid4(), "nobody"))
    with pytest.raises(NameTaken):
        catalogue.change_group(replace(row, name="default"))
    assert catalogue.find_group_by_name("tenant") == replace(row, pcrs="none")
    catalogue.close()
    with Catalogue.open(site.place, KEY, STORE) as again:
        assert again.find_group_by_name("tenant") == replace(row, pcrs="none")


def open_here(path: Path) -> int:
    """How often this process has a file open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed by another thread by now, as the one that lists them
            found += os.readlink(f"/proc/self/fd/{name}") == str(path)
    return found


def test_however_many_threads_read_a_file_it_is_open_as_often_as_its_pool_has_connections(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.sqlite"
    with filled(path) as catalogue:
        most = []
        for _ in range(3):
            threads = SQLITE_CONNECTIONS_MOST + 10
            together, seen = Barrier(SQLITE_CONNECTIONS_MOST), []

            def hold(together: Barrier = together, seen: list[int] = seen) -> None:
                with catalogue._database.read() as connection:
                    connection.exec_driver_sql("select count(*) from vtpms").scalar_one()
                    if len(seen) < SQLITE_CONNECTIONS_MOST:  # the first wait for each other, the others for them
                        seen.append(0)
                        together.wait(30)
                    seen.append(open_here(path))

            with ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(hold) for _ in range(threads)]:
                    done.result()
            most.append(max(seen))
        assert most == [SQLITE_CONNECTIONS_MOST] * 3
    assert open_here(path) == 0


# --- snapshots, and from one database into another --------------------------------------------------


def contents(catalogue: Catalogue) -> object:
    listing = catalogue.listing(Filter(), "", 1000)
    return listing, catalogue.groups(), [replace(event) for event in catalogue.events()]


def test_a_snapshot_is_the_same_file_from_both_and_is_loaded_into_the_other(
    catalogue: Catalogue, site: Site, postgresql: Server, path: Path
) -> None:
    catalogue.attach(AT_ONE, Happened("attached", "one"))
    catalogue.change_labels(ONE.uuid, {"env": "prod"}, [])
    rows = [VtpmRow(uuid4(), f"vm-{number}", GROUP, "2.0") for number in range(2500)]
    catalogue.add_vtpms(rows, "added", ", bulk", {"many": "yes"})
    wanted = contents(catalogue)
    file = path.with_name("snapshot.sqlite")
    file.write_bytes(catalogue.snapshot())
    with Catalogue.open(file, KEY, STORE) as copy:
        assert contents(copy) == wanted
    target = postgresql.new_database()
    Catalogue.load(target, file)
    with pytest.raises(NameTaken):
        Catalogue.load(target, file)
    with Catalogue.open(target, KEY, STORE) as loaded:
        assert contents(loaded) == wanted
        loaded.log("next", None, "its number is free")
        assert loaded.events()[-1].text == "its number is free"


def test_what_is_no_catalogue_is_not_loaded_and_leaves_nothing(postgresql: Server, path: Path) -> None:
    target = postgresql.clean_database()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CatalogueDamaged):
        Catalogue.load(target, path)
    path.unlink()
    filled(path).close()
    edit(path, "drop table labels")
    with pytest.raises(CatalogueDamaged):
        Catalogue.load(target, path)
    assert Catalogue.whose(target) is None


def test_one_that_is_put_aside_keeps_every_row(postgresql: Server) -> None:
    site = postgresql_site(postgresql)
    assert isinstance(site.place, str)
    assert Catalogue.put_aside(site.place) is None
    filled(site.place).close()
    assert Catalogue.put_aside(site.place) == "vtpm_manager_old_1"
    filled(site.place).close()
    assert Catalogue.put_aside(site.place) == "vtpm_manager_old_2"
    assert Catalogue.whose(site.place) is None
    site.edit("update vtpm_manager_old_1.vtpms set name = 'still' where name = 'one'")


# --- PostgreSQL only --------------------------------------------------------------------------------


def test_one_manager_at_a_time_has_the_database(postgresql: Server) -> None:
    url = postgresql.clean_database()
    with filled(url), pytest.raises(CatalogueBusy, match="another vtpm-manager"):
        Catalogue.open(url, KEY, STORE)
    with Catalogue.open(url, KEY, STORE), Catalogue.open(url, KEY, STORE, change=False) as reader:
        assert reader.count_vtpms() == 2
        with pytest.raises(CatalogueBusy):
            reader.log("no", None, "no")


def test_a_server_that_was_restarted_is_met_again_and_nothing_is_half_done() -> None:
    with server() as running:
        url = running.new_database()
        with filled(url) as catalogue:
            for end in (running.stop, running.kill):
                catalogue.attach(AT_ONE)
                end()
                with pytest.raises(CatalogueUnreachable, match="does not answer"):
                    catalogue.vtpms()
                with pytest.raises(CatalogueUnreachable):
                    catalogue.detach(ONE.uuid, Happened("detached", "no"))
                running.start()
                assert catalogue.attachments() == [AT_ONE]
                catalogue.detach(ONE.uuid, Happened("detached", "yes"))
                with pytest.raises(CatalogueBusy):
                    Catalogue.open(url, KEY, STORE)
            assert [event.text for event in catalogue.events()] == ["yes", "yes"]
        running.execute("postgres", "alter system set fsync = off")
        running.stop()
        running.start()
        with pytest.raises(CatalogueDamaged, match="fsync"):
            Catalogue.open(url, KEY, STORE)


def test_commits_are_durable_whatever_the_database_was_told(postgresql: Server) -> None:
    site = postgresql_site(postgresql)
    assert isinstance(site.place, str)
    name = name_of(site.place)
    postgresql.execute(name, f"alter database {name} set synchronous_commit = off")
    with filled(site.place) as catalogue, catalogue._database.change() as connection:
        assert connection.exec_driver_sql("show synchronous_commit").scalar_one() == "on"
        assert connection.exec_driver_sql("show fsync").scalar_one() == "on"


def test_no_password_is_in_an_error(postgresql: Server) -> None:
    database = name_of(postgresql.new_database())
    for url in (
        postgresql.url("nowhere", "hunter2-secret"),
        f"postgresql://u:hunter2-secret@127.0.0.1:1/{database}",
        f"postgresql://u@127.0.0.1:1/{database}?password=hunter2-secret",
        "postgresql://u:hunter2-secret@[bad/x",
        "mysql://u:hunter2-secret@host/x",
    ):
        with pytest.raises(CatalogueError) as caught:
            Catalogue.open(url, KEY, STORE)
        assert "hunter2" not in str(caught.value)
        assert len(str(caught.value)) > 40
