"""The administrators' verbs, declared once: the client's parser, the server's dispatch and the manual derive from it.

This module imports nothing heavy: the commands start with it.
"""

from typing import Final

from manager.verb_form import Argument, Role, Verb
from manager.verb_table_groups import APPROVE, GROUP_VERBS
from manager.verb_table_measurements import MEASURE, MEASUREMENT_VERBS
from manager.verb_table_migration import MIGRATION_VERBS
from manager.verb_table_quotes import QUOTE_VERBS
from manager.verb_table_restores import RESTORE_VERBS
from manager.verb_table_swtpm import SWTPM_VERBS
from manager.verb_table_xen import XEN_OPTIONS

__all__ = [
    "BY_NAME",
    "DAEMON_VERBS",
    "REMOVED_COLUMNS",
    "SCHEMA_VERSION",
    "STATES",
    "VERBS",
    "Argument",
    "Role",
    "Verb",
]

SCHEMA_VERSION: Final = 1  # `schema` in every JSON document; grows when a field changes its meaning
# docs/states.md; an attached vTPM's are the stages of its instance (manager.running)
STATES: Final = (
    *("added", "starting", "running", "needs-reset", "stopping", "stopped", "failed", "ended", "down", "detached"),
    *("hibernated", "quarantined", "closed", "missing", "stale", "incoming", "frozen", "waiting"),
)


REMOVED_COLUMNS: Final = ("uuid", "name", "group", "tpm", "removed", "removed_by", "kept_until")  # of list --removed
_VTPM = Argument("vtpm", "UUID or name", positional=True, required=True)
_YES = Argument("yes", "confirm: this cannot be undone", kind="flag", default=False)

VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "add",
        "make a vTPM; prints its UUID",
        Role.ADMINISTRATOR,
        (
            Argument("name", "a name: 1 to 64 of A-Z a-z 0-9 . _ -; with --count a template: web-{} or web-{:05}"),
            Argument("count", "make so many", kind="int"),
            Argument("first", "with --count: the first number in the template", kind="int", default=1),
            Argument("uuid", "its UUID (default: a random one)"),
            Argument("group", "the group it belongs to", default="default"),
            Argument("tpm", "TPM family", default="2.0", choices=("2.0", "1.2")),
            Argument("label", "a label, KEY=VALUE; may be given again", kind="list"),
            Argument(
                "state_image", "file or block device for its state (default: in the state directory)", kind="path"
            ),
        ),
        terse=True,
    ),
    Verb(
        "attach",
        "start a vTPM for a guest; prints how to connect",
        Role.OPERATOR,
        (
            _VTPM,
            Argument("guest", "the guest's name: 1 to 64 of A-Z a-z 0-9 . _ -", positional=True, required=True),
            Argument(
                "frontend",
                "how the guest connects",
                default="socket",
                choices=("socket", "qemu", "ring", "mssim", "proxy", "xen"),
            ),
            Argument("owner", "USER[:GROUP] that may use the sockets: USER may also reset the platform"),
            Argument("mode", "permissions of the sockets, octal (default: 0660, of qemu 0600)"),
            Argument(
                "startup",
                "TPM2_Startup done for the guest (default: clear, of qemu none: firmware does it); xen: at each boot",
                choices=("clear", "state", "none", "deactivated"),
            ),
            Argument(
                "tcp", "for socket and mssim: ports PORT and PORT+1 of 127.0.0.1, open to every user of the host", "int"
            ),
            Argument("hwinitpcrs", "hardware PCRs that are put into the vTPM's at its start: all, none, 0,2,4-7"),
            MEASURE,
            Argument("hibernate", "'never', or after how many seconds without a command (default: as configured)"),
            Argument("commands_per_second", "answer no more on average; 0: as many as come (default: [quota])", "int"),
            Argument("saves_per_second", "make no more durable on average; 0: no quota (default: [quota])", "int"),
            Argument("nv_bytes", "NV that the guest may define; 0: as much as a TPM has (default: [quota])", "int"),
            *XEN_OPTIONS,
        ),
        prints="endpoint",
        columns=("uuid", "name", "guest", "state", "frontend", "endpoint", "tcti", "pid", "qemu", "libvirt_xml"),
    ),
    Verb(
        "hibernate",
        "save everything of an idle vTPM and end its process; the next command of its guest brings it back",
        Role.OPERATOR,
        (_VTPM,),
    ),
    Verb("detach", "stop a vTPM cleanly and take it from its guest", Role.OPERATOR, (_VTPM,)),
    Verb(
        "list",
        "list vTPMs by name",
        Role.AUDITOR,
        (
            Argument("group", "only those of this group"),
            Argument("state", "only those in this state", choices=STATES),
            Argument("guest", "only those attached to this guest"),
            Argument("tpm", "only those of this TPM family", choices=("2.0", "1.2")),
            Argument("removed", "those that were removed, as long as they are remembered", kind="flag", default=False),
            Argument(
                "label", "only those with this label, KEY or KEY=VALUE; given again: with all of them", kind="list"
            ),
        ),
        many=True,
    ),
    Verb("show", "show one vTPM", Role.AUDITOR, (_VTPM,)),
    Verb(
        "label",
        "put labels on a vTPM, replacing those of the same key, and show it",
        Role.OPERATOR,
        (
            _VTPM,
            Argument("labels", "KEY=VALUE", kind="list", positional=True),
            Argument("remove", "take the label of this key away; may be given again", kind="list"),
        ),
        columns=("uuid", "name", "labels"),
    ),
    Verb(
        "events",
        "tell what happened, oldest first",
        Role.AUDITOR,
        (
            Argument("vtpm", "UUID or name: only what happened to it", positional=True),
            Argument("since", "only from this time on: ISO 8601, UTC where it names no zone"),
            Argument("limit", "only the newest so many", kind="int"),
        ),
        many=True,
        prints="text",
        columns=("time", "kind", "vtpm", "text"),
    ),
    Verb(
        "reset-platform",
        "tell a vTPM that its guest's platform was reset: loads the last state, starts it up, PCRs as after power-on",
        Role.OPERATOR,
        (_VTPM,),
    ),
    Verb(
        "reset",
        "throw a detached vTPM's state away: the next attach makes a new TPM",
        Role.ADMINISTRATOR,
        (_VTPM, _YES),
    ),
    Verb(
        "remove",
        "remove a detached vTPM, its key and its state image at once: nobody can bring it back",
        Role.ADMINISTRATOR,
        (_VTPM, _YES),
    ),
    Verb(
        "verify",
        "check store, catalogue and state images by each other; changes nothing, exits with 6 if anything is wrong",
        Role.AUDITOR,
        (
            Argument("vtpm", "UUID or name", positional=True),
            Argument("all", "the store, the catalogue and every vTPM", kind="flag", default=False),
            Argument("state_dir", "verify this installation, which no manager serves now, opening its TPM", local=True),
            Argument("config", "with --state-dir: its configuration (default: DIR/config.toml)", local=True),
        ),
        many=True,
        prints="verdict",
        judges=True,
        columns=("what", "vtpm", "name", "verdict", "text"),
    ),
    *GROUP_VERBS,
    *QUOTE_VERBS,
    *MEASUREMENT_VERBS,
    *RESTORE_VERBS,
    *MIGRATION_VERBS,
    *SWTPM_VERBS,
)

# Verbs of the daemon's own command, on the same socket.
DAEMON_VERBS: Final[tuple[Verb, ...]] = (
    Verb("status", "show the manager, its store, anchors and hardware TPM", Role.AUDITOR, prints="pid"),
    Verb(
        "tpm-status",
        "show the hardware TPM: maker, resets, self-test, lockout, passwords, what is in use",
        Role.AUDITOR,
        prints="firmware",
    ),
    Verb(
        "backup",
        "write store, catalogue, configuration and state images to one file, while everything goes on",
        Role.ADMINISTRATOR,
        (Argument("file", "a new file", kind="path", positional=True, required=True),),
        prints="file",
    ),
    Verb(
        "scrub",
        "overwrite what the store's image still holds of removed and replaced keys, while everything goes on",
        Role.ADMINISTRATOR,
        (Argument("state_images", "earlier states in state images, too", kind="flag", default=False),),
        prints="sectors",
    ),
    Verb(
        "compact",
        "drop what is not needed, gather the records and cut the store's image, while everything goes on",
        Role.ADMINISTRATOR,
        (Argument("to_size", "cut to so many bytes, 0: as few as possible (default: the size at init)", kind="int"),),
        prints="bytes",
    ),
    APPROVE,
    Verb("stop", "stop every instance cleanly, then the manager", Role.ADMINISTRATOR, prints="pid"),
    Verb(
        "upgrade",
        "hand over to the code that is installed now, if it can take over; running vTPMs go on",
        Role.ADMINISTRATOR,
        prints="release",
    ),
)

BY_NAME: Final = {verb.name: verb for verb in VERBS + DAEMON_VERBS}


def command_of(verb: Verb) -> str:
    """Return the command that a verb is given as, for messages."""
    return f"vtpm-manager {verb.name}" if verb in DAEMON_VERBS else f"vtpm-{verb.name}"
