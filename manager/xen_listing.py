"""What the document of a vTPM says of Xen: who may have it, on what terms, and who has it now."""

from typing import Final

from manager.services import Document
from manager.tombstones import iso
from manager.xen_attach import XEN, localities_text
from manager.xen_binding import Bound
from storage.catalogue_rows import AttachmentRow

_TERMS: Final = ("domain", "xsm_label", "instance_domain", "localities", "compat", "maintenance", "trace")
_NOW: Final = ("bound_domain", "bound_name", "bound_uuid", "bound_device", "bound_since")
XEN_FIELDS: Final = _TERMS + _NOW


def xen_terms(attachment: AttachmentRow | None, bound: Bound | None) -> Document:
    """Return the fields; null where the vTPM is attached otherwise, or where no domain has it now."""
    document: Document = dict.fromkeys(XEN_FIELDS)
    if attachment is None or attachment.frontend != XEN:
        return document
    for name in ("domain", "xsm_label", "instance_domain"):
        document[name] = getattr(attachment, name) or None
    for name in ("compat", "maintenance", "trace"):
        document[name] = getattr(attachment, name)
    document["localities"] = localities_text(attachment.localities)
    if bound is not None:
        domain = bound.domain
        values = (domain.number, bound.name, domain.uuid or None, bound.device, iso(bound.since))
        document.update(zip(_NOW, values, strict=True))
    return document
