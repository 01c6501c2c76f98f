"""Which domain may have which vTPM: the rules, tried against whoever can be made up."""

import os
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from frontend_backend.messages_xen import Bind, Join, XenCode
from manager.attach_options import AttachOptions, attachment_of
from manager.config import QuotaConfig
from manager.errors import UsageError
from manager.xen_attach import ANY, XenOptions, localities_text, parse_localities
from manager.xen_binding import Bound, Coming, Refused, admission, bound_row, domain_of, objection, taken, vtpm_of
from storage.catalogue_rows import AttachmentRow, VtpmRow

VTPM = UUID(int=1)
UUIDS = [str(UUID(int=number)) for number in (0xA, 0xB)]
NAMES = ["web", "db", "Web", ANY, *UUIDS]
LABELS = ["", "a:b:c", "a:b:d"]
BOOTS = ["boot-1", "boot-2"]


def attachment(**fields: Any) -> AttachmentRow:
    row = AttachmentRow(VTPM, "web", "xen", "0:0", "0600", "clear", 1, domain="web")
    return replace(row, **fields)


def bind(number: int = 3, name: str = "web", uuid: str = UUIDS[0], **fields: Any) -> Bind:
    return replace(Bind(VTPM.bytes, number, 0, name, uuid, ""), **fields)


@settings(max_examples=500)
@given(
    frontend=st.sampled_from(["xen", "xen", "xen", "ring", "qemu"]),
    wanted=st.sampled_from(NAMES),
    elsewhere=st.sampled_from(["", "", *NAMES]),
    label=st.sampled_from(LABELS),
    kind=st.sampled_from([Bind, Join]),
    name=st.sampled_from(["", *NAMES]),
    uuid=st.sampled_from(["", "garbage", *UUIDS, UUIDS[0].upper()]),
    its=st.sampled_from(LABELS),
)
def test_nobody_gets_a_vtpm_whom_its_attachment_does_not_name(
    frontend: str, wanted: str, elsewhere: str, label: str, kind: type, name: str, uuid: str, its: str
) -> None:
    row = attachment(frontend=frontend, domain=wanted, instance_domain=elsewhere, xsm_label=label)
    request = kind(VTPM.bytes, 3, 0, name, uuid, its)
    asked_for = elsewhere if kind is Join else wanted
    named = asked_for == ANY or (uuid.lower() == asked_for if asked_for in UUIDS else bool(name) and name == asked_for)
    right_kind = frontend == "xen" and bool(elsewhere) == (kind is Join)
    refused = objection("v", row, request)
    assert (refused is None) == (right_kind and named and label in ("", its))
    if refused is not None:
        assert (refused.code is XenCode.WRONG_FRONTEND) == (not right_kind), "the wrong kind is said first"


def test_a_migrated_guest_waits_until_xl_has_given_it_its_name() -> None:
    """`xl migrate` calls the domain so until the old one is gone; Linux's driver gives a refused device up for good."""
    refused = objection("v", attachment(), bind(name="web--incoming"))
    assert refused is not None
    assert (refused.code, "once it is called web" in refused.text) == (XenCode.TAKEN, True)
    for row, name in ((attachment(domain=UUIDS[1]), "web--incoming"), (attachment(), "db--incoming")):
        refused = objection("v", row, bind(name=name))
        assert refused is not None
        assert refused.code is XenCode.DENIED


@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(UUIDS),
    st.sampled_from(UUIDS),
    st.integers(0, 1),
    st.integers(0, 1),
)
def test_two_domains_that_live_never_have_one_vtpm(
    number: int, other: int, uuid: str, its: str, device: int, its_device: int
) -> None:
    domain, theirs = domain_of(bind(number, uuid=uuid), "b"), domain_of(bind(other, uuid=its), "b")
    held = Bound(theirs, its_device, "x", 0.0)
    free = taken("v", held, domain, device) is None
    assert free == ((number, uuid, device) == (other, its, its_device))
    assert taken("v", None, domain, device) is None


class Life(RuleBasedStateMachine):
    """One vTPM, domains that come, go, boot, are saved and resumed; and hosts that boot.

    What is followed is whose boot the TPM's PCRs tell of. `running` has every guest that lives: number, UUID, boot.
    """

    @initialize(wanted=st.sampled_from([ANY, *UUIDS]))
    def begin(self, wanted: str) -> None:
        self.row = attachment(domain=wanted)
        self.wanted = wanted
        self.host = 0
        self.next = 1
        self.boots = 0
        self.living: dict[int, tuple[str, int]] = {}  # number: UUID, which boot of a guest
        self.saved: list[tuple[str, int]] = []
        self.bound: Bound | None = None
        self.told: int | None = None  # whose boot the PCRs tell of
        self.used: set[int] = set()

    @rule(uuid=st.sampled_from(UUIDS))
    def boot_a_guest(self, uuid: str) -> None:
        self.boots += 1
        self.living[self.next] = uuid, self.boots
        self.next += 1

    @rule()
    def boot_the_host(self) -> None:
        self.host += 1
        self.next = 1  # numbers come again
        self.living.clear()
        self.saved.clear()
        self.bound = None

    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        if self.living:
            number = data.draw(st.sampled_from(sorted(self.living)))
            del self.living[number]
            self.ended(number)

    def ended(self, number: int) -> None:
        if self.bound is not None and self.bound.domain.number == number:
            self.bound = None

    @rule()
    def lose_the_connection(self) -> None:
        self.bound = None

    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        if self.living:
            number = data.draw(st.sampled_from(sorted(self.living)))
            self.saved.append(self.living.pop(number))
            self.ended(number)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        if self.saved:
            guest = self.saved.pop(data.draw(st.integers(0, len(self.saved) - 1)))
            self.living[self.next] = guest
            self.ask(self.next, resumed=True)
            self.next += 1

    @rule()
    def restart_the_back_end(self) -> None:
        self.bound = None

    @rule(data=st.data())
    def come(self, data: st.DataObject) -> None:
        if self.living:
            self.ask(data.draw(st.sampled_from(sorted(self.living))))

    def ask(self, number: int, *, resumed: bool = False) -> None:
        uuid, boot = self.living[number]
        others = tuple(other for other in self.living if other != number)
        request = replace(bind(number, "", uuid, resumed=resumed), others=others)
        domain = domain_of(request, f"host-{self.host}")
        still_there = self.row.bound_boot == domain.boot and self.row.bound_domain in others
        coming = admission("v", self.row, request, domain, self.bound)
        if isinstance(coming, Refused):
            wrong = self.wanted not in (ANY, uuid) or self.bound is not None or still_there
            assert wrong or (resumed and uuid != self.row.bound_uuid), coming
            return
        assert self.wanted in (ANY, uuid)
        assert not still_there, "the one that had it lives, and has not asked yet"
        if coming is Coming.FIRST:
            assert self.told is None, "it would find what another boot left"
            self.told = boot
        elif coming is Coming.POWER_CYCLE:
            assert self.told is None or boot not in self.used or boot != self.told, "reset under a guest that runs"
            self.told = boot
        elif coming is Coming.BACK:
            assert self.told == boot, "it finds what another boot left"
        else:
            assert uuid == self.row.bound_uuid, "a resumed guest goes on with another domain's TPM"
            self.told = boot  # or a later boot of the same domain: which save is restored is for the toolstack to know
        self.used.add(boot)
        self.row = replace(self.row, **bound_row(request, domain, coming, "now"))  # type: ignore[arg-type]
        self.bound = Bound(domain, 0, "", 0.0)

    @invariant()
    def only_a_living_one_has_it(self) -> None:
        bound = getattr(self, "bound", None)
        assert bound is None or bound.domain.number in self.living


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=30)


def test_an_instances_domain_outlives_our_kernel() -> None:
    row = attachment(instance_domain="tpm")
    join = Join(VTPM.bytes, 9, 0, "tpm", UUIDS[0], "")
    first = domain_of(join, BOOTS[0])
    assert admission("v", row, join, first, None) is Coming.FIRST
    row = replace(row, **bound_row(join, first, Coming.FIRST, "now"))  # type: ignore[arg-type]
    assert admission("v", row, join, domain_of(join, BOOTS[1]), None) is Coming.BACK
    other = replace(join, domain=10)
    assert admission("v", row, other, domain_of(other, BOOTS[1]), None) is Coming.POWER_CYCLE


def test_a_guests_number_counts_in_one_boot_of_the_host() -> None:
    request = bind(1, ran_before=None)
    fields = bound_row(request, domain_of(request, BOOTS[0]), Coming.FIRST, "now")
    row = replace(attachment(), **fields)  # type: ignore[arg-type]
    assert admission("v", row, request, domain_of(request, BOOTS[0]), None) is Coming.BACK
    assert admission("v", row, request, domain_of(request, BOOTS[1]), None) is Coming.POWER_CYCLE


@pytest.mark.parametrize(
    "request_",
    [bind(-1), bind(0x7FF0), replace(bind(), device=-1), replace(bind(), device=1 << 31), replace(bind(), uuid=b"x")],
)
def test_what_is_no_domain_asks_for_nothing(request_: Bind) -> None:
    assert vtpm_of(request_) is None


@given(st.sets(st.integers(0, 4), min_size=1))
def test_localities_are_read_as_they_are_written(numbers: set[int]) -> None:
    bits = sum(1 << number for number in numbers)
    assert parse_localities(localities_text(bits)) == bits


@pytest.mark.parametrize(
    ("options", "xen", "family", "words"),
    [
        ({"owner": "root"}, {}, "2.0", "only vtpm-xen uses its ring"),
        ({"mode": "0666"}, {}, "2.0", "only vtpm-xen uses its ring"),
        ({"tcp": 2321}, {}, "2.0", "--tcp"),
        ({"startup": "none"}, {}, "1.2", "no firmware"),
        ({"startup": "deactivated"}, {}, "2.0", "TPM 1.2"),
        ({"startup": "deactivated", "frontend": "ring"}, {}, "1.2", "--frontend xen"),
        ({"measure": ("toolstack",)}, {"instance_domain": "i"}, "2.0", "--measure toolstack"),
        ({"measure": ("toolstack",), "startup": "state"}, {}, "2.0", "not with --startup state"),
        ({"hibernate": "5"}, {"instance_domain": "i"}, "2.0", "its instance's domain decides"),
        ({"quota": (None, None, 5)}, {"instance_domain": "i"}, "2.0", "--nv-bytes"),
        (
            {"frontend": "ring"},
            {"domain": "web", "trace": True},
            "2.0",
            "--domain, --trace: that is for --frontend xen",
        ),
        ({"guest": ANY}, {}, "2.0", "every domain"),
        ({}, {"localities": "5"}, "2.0", "0 to 4"),
        ({}, {"localities": "a"}, "2.0", "no localities"),
        ({}, {"localities": ""}, "2.0", "no localities"),
        ({}, {"localities": "2-1"}, "2.0", "0 to 4"),
        ({}, {"xsm_label": "a b"}, "2.0", "no XSM label"),
        ({}, {"xsm_label": ""}, "2.0", "no XSM label"),
        ({}, {"maintenance": True}, "2.0", "TPM 1.2"),
        ({}, {"compat": "on"}, "1.2", "TPM 2.0"),
        ({}, {"domain": "../x"}, "2.0", "domain's name"),
        ({}, {"instance_domain": ""}, "2.0", "domain's name"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], xen: dict[str, Any], family: str, words: str) -> None:
    row = VtpmRow(VTPM, "v", UUID(int=2), family)
    asked = AttachOptions(**({"guest": "web", "frontend": "xen"} | options), xen=XenOptions(**xen))
    with pytest.raises(UsageError) as caught:
        attachment_of(row, asked, 1000, QuotaConfig())
    assert words in str(caught.value)
    assert "Nothing was done" in str(caught.value) or "domain's name" in words or words == "--tcp"


def test_what_the_row_keeps() -> None:
    row = VtpmRow(VTPM, "v", UUID(int=2), "1.2")
    xen = XenOptions(UUIDS[0].upper(), "a:b:c", None, "0,2-3", None, maintenance=True)
    made = attachment_of(row, AttachOptions("web", "xen", startup="deactivated", xen=xen), 1000, QuotaConfig())
    assert (made.domain, made.xsm_label, made.localities, made.maintenance) == (UUIDS[0], "a:b:c", 0b1101, True)
    assert (made.compat, made.startup, made.owner.split(":")[0]) == (False, "deactivated", str(os.geteuid()))
    assert made.mode == "0600"
    plain = attachment_of(replace(row, family="2.0"), AttachOptions("web", "xen"), 1000, QuotaConfig())
    assert (plain.domain, plain.localities, plain.compat, plain.xsm_label) == ("web", 1, True, "")
    ring = attachment_of(row, AttachOptions("web", "ring"), 1000, QuotaConfig())
    assert (ring.domain, ring.localities, ring.compat, ring.owner.split(":")[0]) == ("", 1, False, "1000")
