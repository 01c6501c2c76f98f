"""The options of vtpm-attach for guests of Xen. This module imports nothing heavy: the commands start with it."""

from typing import Final

from manager.verb_form import Argument

XEN_OPTIONS: Final = (
    Argument(
        "domain",
        "xen: the only domain that gets it, by name or UUID (default: GUEST); any: whichever the toolstack gives it to",
    ),
    Argument("xsm_label", "xen: the XSM label that the domain must have (default: none is asked for)"),
    Argument("instance_domain", "xen: its instance runs in this domain, by name or UUID, and joins from there"),
    Argument("localities", "xen: localities that the guest may claim, like 0,1,2-4 (default: 0)"),
    Argument(
        "compat",
        "xen: answer the TPM 1.2 probes of Linux's driver (default: on, of TPM 1.2 off)",
        choices=("on", "off"),
    ),
    Argument(
        "trace", "xen: have the log tell of each of its commands, without their parameters", kind="flag", default=False
    ),
    Argument("maintenance", "xen: allow the guest TPM 1.2's maintenance commands", kind="flag", default=False),
)
