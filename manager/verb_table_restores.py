"""The verb about older states, as verb_table has it."""

from typing import Final

from manager.verb_form import Argument, Role, Verb

RESTORE_VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "allow-restore",
        "permit that QEMU puts an older saved state or snapshot of a vTPM in place of its newest state: a rollback",
        Role.ADMINISTRATOR,
        (
            Argument("vtpm", "UUID or name", positional=True, required=True),
            Argument("once", "the next one (the default); ends unused with the manager", kind="flag", default=False),
            Argument("always", "at any time, for hosts that snapshot routinely", kind="flag", default=False),
            Argument("never", "take back what was permitted", kind="flag", default=False),
        ),
        columns=("uuid", "name", "restore", "generation", "state"),
    ),
)
