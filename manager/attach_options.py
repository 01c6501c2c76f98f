"""What vtpm-attach is told, and the attachment's row that it makes."""

import os
from dataclasses import dataclass, field
from typing import Any, Final

from manager.attachment_marks import new_lease
from manager.attachment_words import default_startup, parse_rest
from manager.boot_measurements import refuse_setting
from manager.config import QuotaConfig
from manager.errors import ConflictError, UsageError
from manager.hardware_pcrs import parse_hw_pcrs
from manager.measure_option import TOOLSTACK, parse
from manager.quotas import NO_QUOTA, asked_for
from manager.registry import check_name
from manager.sockets import Owner, check_port, default_mode, parse_mode
from manager.xen_attach import XEN, XenOptions, refuse_for_xen, xen_fields
from storage.catalogue import AttachmentRow, Catalogue, VtpmRow

_PORTS: Final = 2  # that an attachment with TCP ports has: data, and the next one for control
_QUOTAS: Final = ("commands_per_second", "saves_per_second", "nv_bytes")


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """How a vTPM is attached; the fields are vtpm-attach's options."""

    guest: str
    frontend: str = "socket"
    owner: str | None = None
    mode: str | None = None
    startup: str | None = None
    hwinitpcrs: str | None = None
    measure: tuple[str, ...] = ()  # as the command sends them (manager.measure_option)
    hibernate: str | None = None
    tcp: int | None = None
    quota: tuple[int | None, int | None, int | None] = (None, None, None)  # as VtpmQuota's; None: as configured
    xen: XenOptions = field(default_factory=XenOptions)


def attachment_of(row: VtpmRow, options: AttachOptions, caller_uid: int, config: QuotaConfig) -> AttachmentRow:
    """Return the row of a new attachment with a lease of its own; its epoch is still 0.

    Raises:
        UsageError: an option cannot be what it says.

    """
    check_name(options.guest, "guest's name")
    # vtpm-xen alone uses the ring of a guest of Xen: it runs as root, or as the manager's user
    owner = Owner.parse(options.owner, os.geteuid() if options.frontend == XEN else caller_uid)
    mode = default_mode(options.frontend) if options.mode is None else options.mode
    parse_mode(mode)
    startup = default_startup(options.frontend) if options.startup is None else options.startup
    hw_pcrs = parse_hw_pcrs(options.hwinitpcrs)
    if hw_pcrs and startup == "none":
        raise UsageError("--hwinitpcrs needs a start that the host does: not --startup none. Nothing was done")
    measure = parse(options.measure)
    refuse_setting(measure, startup, options.frontend, hw_pcrs)
    xen = xen_fields(options.xen, options.frontend, options.guest, row.family)
    elsewhere = bool(xen.get("instance_domain"))
    if elsewhere and measure == TOOLSTACK:
        raise UsageError(
            f"--measure {TOOLSTACK}: the instance's domain is not told how its guest was booted; give digests. "
            f"Nothing was done"
        )
    refuse_for_xen(startup, options.frontend, row.family, _others(options), elsewhere=elsewhere)
    return AttachmentRow(
        vtpm=row.uuid,
        guest=options.guest,
        frontend=options.frontend,
        owner=f"{owner.uid}:{owner.gid}",
        mode=mode,
        startup=startup,
        lease=new_lease(),
        hw_pcrs=hw_pcrs,
        measure=measure,
        hibernate_after=0 if elsewhere else parse_rest(options.hibernate),
        tcp_port=check_port(options.frontend, options.tcp),
        **(NO_QUOTA if elsewhere else asked_for(options.quota, config))._asdict(),
        **xen,
    )


def _others(options: AttachOptions) -> dict[str, Any]:
    """Return the options that do not go with every front end, None where one was not given."""
    given = {"owner": options.owner, "mode": options.mode, "hibernate": options.hibernate}
    return given | dict(zip(_QUOTAS, options.quota, strict=True))


def refuse_taken_ports(catalogue: Catalogue, wanted: AttachmentRow) -> None:
    """Refuse TCP ports of a vTPM that is attached, though it is down and nobody listens: it comes back to them.

    Raises:
        ConflictError: another vTPM has one of them.

    """
    if not wanted.tcp_port:
        return
    other = catalogue.find_attachment_at_ports(wanted.tcp_port, _PORTS)
    if other is None or other.vtpm == wanted.vtpm:
        return
    row = catalogue.find_vtpm(other.vtpm)
    raise ConflictError(
        f"vTPM {row.name if row else other.vtpm} is attached to guest {other.guest} with the ports {other.tcp_port} "
        f"and {other.tcp_port + 1}, also while it is down; nothing was started. Choose another --tcp, or detach it"
    )
