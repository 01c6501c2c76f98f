"""The verbs about boot measurements, as verb_table has them. Imports nothing heavy: the commands start with it."""

from typing import Final

from manager.verb_form import Argument, Role, Verb

_VTPM = Argument("vtpm", "UUID or name", positional=True, required=True)
MEASURE: Final = Argument(
    "measure",
    "extend what the guest is started with before it runs: kernel=FILE (PCR 4), cmdline=TEXT or @FILE, initrd=FILE "
    "(PCR 5), digests, or toolstack; once for each",
    kind="measurements",
)

MEASUREMENT_VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "measure",
        "set what an attached vTPM's guest is measured by from its next boot on; without --measure: by nothing",
        Role.OPERATOR,
        (_VTPM, MEASURE),
        columns=("uuid", "name", "guest", "state", "measured", "measure"),
    ),
    Verb(
        "event-log",
        "show what the present boot of a vTPM's guest was measured by, and the PCRs that come of it",
        Role.AUDITOR,
        (_VTPM,),
        prints="event_log",
        saves="event_log",
        saves_as="bytes",
        columns=("uuid", "name", "guest", "format", "measured", "pcr4", "pcr5", "late_attach", "output"),
    ),
)
