"""Which domain may have which vTPM, and what its coming means for the vTPM: the rules. No I/O.

What a UUID is: the name of a vTPM, known to every toolstack, and no credential. What decides is the attachment, whose
row carries a MAC: it names the domain, and the label where one is asked for. Source: reference/xen-vtpm.md 7.2.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple
from uuid import UUID

from frontend_backend.messages_xen import Bind, Join, XenCode
from manager.running import printable
from manager.xen_attach import ANY, XEN
from storage.catalogue_rows import AttachmentRow

_FIRST_RESERVED: Final = 0x7FF0  # DOMID_FIRST_RESERVED (xen.h): numbers from here on are no domain's
_MOST_DEVICE: Final = 1 << 31  # a handle of xenstore
_ARRIVING: Final = "--incoming"  # what xl adds to the name of a migrated domain until the old one is gone
_SHOWN: Final = 80  # characters of a name in messages
_UUID_BYTES: Final = 16
_NO_BOOT: Final = "-"  # in place of a boot of our kernel: no domain's


class Refused(NamedTuple):
    """Why a domain does not get a vTPM."""

    code: XenCode
    text: str


class Coming(Enum):
    """What it means that a domain has come for its vTPM."""

    FIRST = "first"  # since it was attached: it has been started up, and nobody has used it
    BACK = "back"  # the one that had it last, whose guest runs on
    RESUMED = "resumed"  # under a new number, with what its TPM held
    POWER_CYCLE = "power-cycle"  # another one, or the same one booted again


class Domain(NamedTuple):
    """Who asks: Xen's number, the UUID where it may be read, and the boot of our kernel in which that number counts.

    A domain with an instance has no boot here: it outlives ours. Two that live never have the same number.
    """

    number: int
    uuid: str
    boot: str


@dataclass(frozen=True, slots=True)
class Bound:
    """A binding that stands: who has it, by which device; `name` may be empty, `since` is in seconds since 1970."""

    domain: Domain
    device: int
    name: str
    since: float


class Bindings:
    """Who has which vTPM now."""

    def __init__(self) -> None:
        """Nobody has any."""
        self.bound: dict[UUID, Bound] = {}

    def of(self, vtpm: UUID) -> Bound | None:
        """Return who has a vTPM, None where nobody has."""
        return self.bound.get(vtpm)


def vtpm_of(request: Bind | Join) -> UUID | None:
    """Return the UUID that is asked for, None where it is none, or the numbers are no domain's and device's."""
    sound = 0 <= request.domain < _FIRST_RESERVED and 0 <= request.device < _MOST_DEVICE
    return UUID(bytes=request.uuid) if sound and len(request.uuid) == _UUID_BYTES else None


def domain_of(request: Bind | Join, boot: str) -> Domain:
    """Return who asks, in this boot of our kernel."""
    return Domain(request.domain, _plain_uuid(request.domain_uuid), boot if isinstance(request, Bind) else "")


def admission(
    name: str, attachment: AttachmentRow, request: Bind | Join, domain: Domain, other: Bound | None
) -> Coming | Refused:
    """Tell whether who asks gets the vTPM called `name`, which `other` has now, and what its coming means."""
    refused = objection(name, attachment, request) or taken(name, other, domain, request.device)
    refused = refused or still_there(name, attachment, request, domain)
    return refused or coming_of(name, attachment, request, domain)


def objection(name: str, attachment: AttachmentRow, request: Bind | Join) -> Refused | None:
    """Return why who asks may not have the vTPM called `name`, None where the attachment names it."""
    return _wrong_kind(name, attachment, request) or _wrong_domain(name, attachment, request)


def _wrong_kind(name: str, attachment: AttachmentRow, request: Bind | Join) -> Refused | None:
    if attachment.frontend != XEN:
        return Refused(
            XenCode.WRONG_FRONTEND,
            f"vTPM {name} is attached with --frontend {attachment.frontend}: detach it and attach it with --frontend "
            f"{XEN}",
        )
    elsewhere = attachment.instance_domain
    if elsewhere and isinstance(request, Bind):
        return Refused(
            XenCode.WRONG_FRONTEND,
            f"the instance of vTPM {name} lives in domain {elsewhere}: its guest's device has that domain as back end, "
            f"and that domain joins here",
        )
    if not elsewhere and isinstance(request, Join):
        return Refused(
            XenCode.WRONG_FRONTEND,
            f"the instance of vTPM {name} runs here: attach it with --instance-domain where another is to run it",
        )
    return None


def _wrong_domain(name: str, attachment: AttachmentRow, request: Bind | Join) -> Refused | None:
    wanted = attachment.instance_domain if isinstance(request, Join) else attachment.domain
    by_uuid = _is_uuid(wanted)
    told = _plain_uuid(request.domain_uuid) if by_uuid else request.name
    if not told and wanted != ANY:
        what = "UUID" if by_uuid else "name"
        node = "vm" if by_uuid else "name"
        return Refused(
            XenCode.DENIED,
            f"the domain's {what} cannot be read here, and vTPM {name} is {wanted}'s; attach with --domain {ANY}, or "
            f"let this domain read it: xenstore-chmod /local/domain/{request.domain}/{node} n0 r{request.domain} rME",
        )
    if not by_uuid and told == f"{wanted}{_ARRIVING}":
        return Refused(
            XenCode.TAKEN,
            f"domain {request.domain} is being migrated here: it gets vTPM {name} once it is called {wanted}",
        )
    if wanted not in (ANY, told):
        return Refused(
            XenCode.DENIED,
            f"vTPM {name} is for domain {wanted}, not for {shown(told)} ({request.domain}): the device's uuid names "
            f"another's vTPM, or vtpm-attach another domain",
        )
    if attachment.xsm_label and request.label != attachment.xsm_label:
        has = f"has {shown(request.label)}" if request.label else "has none that can be read here"
        return Refused(
            XenCode.DENIED,
            f"vTPM {name} is for a domain with the XSM label {attachment.xsm_label}, and domain {request.domain} {has}",
        )
    return None


def taken(name: str, other: Bound | None, domain: Domain, device: int) -> Refused | None:
    """Return the refusal where another domain has it, or another device of this one; its own device may ask anew."""
    if other is None or (other.domain == domain and other.device == device):
        return None
    return Refused(
        XenCode.TAKEN,
        f"vTPM {name} is bound to domain {other.domain.number} ({shown(other.name)}), device {other.device}; nobody "
        f"else gets it while that domain lives. Destroy that one, or detach the device from it",
    )


def still_there(name: str, attachment: AttachmentRow, request: Bind | Join, domain: Domain) -> Refused | None:
    """Return the refusal where the domain that had it last still has a device for it, and is not bound again yet."""
    last = Domain(-1 if attachment.bound_domain is None else attachment.bound_domain, "", attachment.bound_boot)
    if last.number not in request.others or last.boot != domain.boot:
        return None
    return Refused(
        XenCode.TAKEN,
        f"vTPM {name} was bound to domain {last.number} last, which still has a device for it, as domain "
        f"{domain.number} has; nobody else gets it while that domain lives. Destroy one of them, or detach its device",
    )


def coming_of(name: str, attachment: AttachmentRow, request: Bind | Join, domain: Domain) -> Coming | Refused:
    """Tell what it means that an admitted domain comes for its vTPM.

    A guest that runs on, but not the one that had this vTPM last, is refused: its PCRs would say what never was.
    """
    if attachment.bound_domain is None:
        return Coming.FIRST
    last = Domain(attachment.bound_domain, attachment.bound_uuid, attachment.bound_boot)
    if domain == last:
        return Coming.BACK
    if isinstance(request, Bind) and request.resumed:
        if domain.uuid and domain.uuid == last.uuid:
            return Coming.RESUMED
        return Refused(
            XenCode.DENIED,
            f"domain {domain.number} was resumed, and vTPM {name} was {last.uuid or 'another domain'}'s last: "
            f"what it holds is not that guest's. Boot that guest anew",
        )
    return Coming.POWER_CYCLE


def bound_row(request: Bind | Join, domain: Domain, coming: Coming, now: str) -> dict[str, object]:
    """Return what changes in an attachment's row as a domain gets its vTPM; `now` in UTC, ISO 8601."""
    fields: dict[str, object] = {
        "bound_domain": domain.number,
        "bound_uuid": domain.uuid,
        "bound_boot": domain.boot,
        "bound_since": now,
    }
    if isinstance(request, Bind) and coming is not Coming.RESUMED:  # then its first boot counts
        fields["ran_before"] = request.resumed or request.ran_before
    return fields


def nobodys(attachment: AttachmentRow) -> AttachmentRow:
    """Return the row as it is while the TPM is reset for another domain: the one before is not BACK after that."""
    return replace(attachment, bound_uuid="", bound_boot=_NO_BOOT)


def _is_uuid(text: str) -> bool:
    return bool(_plain_uuid(text))


def _plain_uuid(untrusted: str) -> str:
    """Return a UUID in small letters with hyphens, nothing where it is none."""
    try:
        return str(UUID(untrusted))
    except ValueError:
        return ""


def shown(untrusted: str) -> str:
    """Return a name for a message: a guest's toolstack chose it."""
    return printable(untrusted[:_SHOWN]) or "without a name"
