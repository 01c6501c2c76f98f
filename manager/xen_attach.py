"""What an attachment with the front end xen says: vtpm-attach's words, and what its row keeps of them."""

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from manager.errors import UsageError
from manager.registry import check_name

XEN: Final = "xen"
ANY: Final = "any"  # in place of a domain: whichever the toolstack gave the vTPM's UUID to
_MOST_LABEL: Final = 256  # bytes; Flask's labels have some forty
_LOCALITIES: Final = 5  # 0 to 4 (TPM 2.0 Part 1, locality)
_DEFAULT_LOCALITIES: Final = "0"


@dataclass(frozen=True, slots=True)
class XenOptions:
    """The options of vtpm-attach that only guests of Xen have; None (or False) where one was not given."""

    domain: str | None = None
    xsm_label: str | None = None
    instance_domain: str | None = None
    localities: str | None = None
    compat: str | None = None
    maintenance: bool = False
    trace: bool = False

    @property
    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        values = ((name, getattr(self, name)) for name in self.__slots__)
        return ["--" + name.replace("_", "-") for name, value in values if value not in (None, False)]


def xen_fields(options: XenOptions, frontend: str, guest: str, family: str) -> dict[str, Any]:
    """Return what the options mean as fields of an AttachmentRow; of another front end nothing.

    Raises:
        UsageError: one cannot be what it says, or does not go with the others.

    """
    if frontend != XEN:
        if options.given:
            raise UsageError(f"{', '.join(options.given)}: that is for --frontend xen. Nothing was done")
        return {}
    if options.compat == "on" and family != "2.0":
        raise UsageError("--compat on is for a TPM 2.0: Linux's driver knows a TPM 1.2 as it is. Nothing was done")
    if options.maintenance and family == "2.0":
        raise UsageError("--maintenance is for a TPM 1.2: a TPM 2.0 has no such commands. Nothing was done")
    if options.domain is None and guest == ANY:
        raise UsageError(
            f"a guest called '{ANY}' would be every domain: name it by --domain UUID, or say --domain {ANY} if every "
            f"domain is meant. Nothing was done"
        )
    return {
        "domain": parse_domain(guest if options.domain is None else options.domain),
        "xsm_label": "" if options.xsm_label is None else _checked_label(options.xsm_label),
        "instance_domain": "" if options.instance_domain is None else parse_domain(options.instance_domain),
        "localities": parse_localities(_DEFAULT_LOCALITIES if options.localities is None else options.localities),
        "compat": family == "2.0" if options.compat is None else options.compat == "on",
        "maintenance": options.maintenance,
        "trace": options.trace,
    }


def refuse_for_xen(
    startup: str | None, frontend: str, family: str, given: dict[str, object], *, elsewhere: bool
) -> None:
    """Refuse what does not go with the front end xen, or only with it.

    `given`: other options by name, None where one was not given; `elsewhere`: its instance runs in another domain.

    Raises:
        UsageError: something does not.

    """
    if startup == "deactivated" and (frontend != XEN or family != "1.2"):
        raise UsageError(
            "--startup deactivated is TPM 1.2's Startup(ST_DEACTIVATED), for --frontend xen: a TPM 2.0 has none. "
            "Nothing was done"
        )
    if frontend != XEN:
        return
    if startup == "none":
        raise UsageError("--startup none: no firmware of a guest of Xen starts its TPM. Nothing was done")
    wrong = [name for name in ("owner", "mode") if given[name] is not None]
    if elsewhere:
        wrong += [name for name in given if name not in wrong and given[name] is not None]
    if wrong:
        why = "its instance's domain decides on it" if elsewhere else "only vtpm-xen uses its ring"
        names = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise UsageError(f"{names}: not with --frontend xen{' --instance-domain' * elsewhere}: {why}. Nothing was done")


def parse_domain(text: str) -> str:
    """Return a domain's name, its UUID in small letters with hyphens, or ANY. Raises UsageError."""
    try:
        return str(UUID(text))
    except ValueError:
        return check_name(text, "domain's name")


def _checked_label(text: str) -> str:
    if not 0 < len(text.encode()) <= _MOST_LABEL or not all(32 < ord(character) < 127 for character in text):
        raise UsageError(
            f"'{text[:80]}' is no XSM label: 1 to {_MOST_LABEL} visible characters of ASCII, as in "
            f"system_u:system_r:domU_t. Nothing was done"
        )
    return text


def parse_localities(text: str) -> int:
    """Read numbers and ranges like 0,2-4; returns a bit map, bit 0 for locality 0. Raises UsageError."""
    bits = 0
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        last = high if dash else low
        if not all(len(word) == 1 and word.isascii() and word.isdecimal() for word in (low, last)):
            raise UsageError(f"'{text[:80]}' names no localities: write for example 0, 0,1 or 0-4. Nothing was done")
        if int(low) > int(last) or int(last) >= _LOCALITIES:
            raise UsageError(f"'{part.strip()[:20]}': localities are 0 to {_LOCALITIES - 1}. Nothing was done")
        for number in range(int(low), int(last) + 1):
            bits |= 1 << number
    return bits


def localities_text(bits: int) -> str:
    """Return a bit map of localities as `parse_localities` reads it."""
    return ",".join(str(number) for number in range(_LOCALITIES) if bits >> number & 1)
