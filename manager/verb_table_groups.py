"""The verbs about groups, as verb_table has them."""

from typing import Final

from manager.verb_form import Argument, Role, Verb

_GROUP = Argument("group", "UUID or name", positional=True, required=True)
_SAA = Argument(
    "saa", "its approver's public key (PEM): what may open the group is what this key approves", kind="text"
)
_RECOVERY = Argument("recovery", "its own recovery public key (PEM; default: the installation's)", kind="text")
_QUOTA = Argument("quota", "how many vTPMs it may have, 0 for as many as the configuration allows", kind="int")

APPROVAL_OPTIONS: Final = (
    Argument("revoke_older", "with an approval: those with a lower sequence never open again", "flag", default=False),
    Argument(
        "yes", "with --revoke-older: also where the approval does not hold on this platform now", "flag", default=False
    ),
)
APPROVE: Final = Verb(
    "approve",
    "install an approval of the platform object or of a group, signed by its approver (vtpm-approve)",
    Role.ADMINISTRATOR,
    (
        Argument("approval", "the file that vtpm-approve wrote", "text", positional=True, required=True),
        *APPROVAL_OPTIONS,
    ),
    prints="sequence",
)

GROUP_VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "group-add",
        "make a group with a master key of its own, sealed to the hardware TPM; prints its UUID",
        Role.ADMINISTRATOR,
        (
            Argument("name", "its name: 1 to 64 of A-Z a-z 0-9 . _ -", positional=True, required=True),
            _SAA,
            _RECOVERY,
            Argument("pcrs", "PCRs that its key is bound to, or none (default: the installation's)"),
            _QUOTA,
        ),
        terse=True,
    ),
    Verb(
        "group-list",
        "list groups by name",
        Role.AUDITOR,
        many=True,
        columns=("uuid", "name", "state", "pcrs", "vtpms", "tombstones", "saa", "recovery"),
    ),
    Verb("group-show", "show one group", Role.AUDITOR, (_GROUP,)),
    Verb(
        "group-update",
        "change a group: its name, to what its key is sealed, who may recover it",
        Role.ADMINISTRATOR,
        (
            _GROUP,
            Argument("name", "another name"),
            Argument("pcrs", "seal its key to these PCRs as they are now, or to none"),
            _RECOVERY,
            _SAA,
            _QUOTA,
            Argument(
                "allow_export",
                "whether states of its vTPMs may leave as swtpm's files (vtpm-export)",
                choices=("yes", "no"),
            ),
            Argument(
                "approval", "install this approval, signed by its approver (vtpm-approve)", "text", positional=True
            ),
            *APPROVAL_OPTIONS,
        ),
        columns=("uuid", "name", "state", "pcrs", "saa", "recovery"),
    ),
    Verb(
        "group-predict",
        "compare what opens a group (or 'platform') with the PCRs of now, or as they are expected to become",
        Role.AUDITOR,
        (_GROUP, Argument("pcr", "PCR=HEX: what it will be; may be given again", kind="list")),
        many=True,
        prints="sequence",
        columns=("by", "sequence", "opens", "pcr", "same", "approved", "present", "reason"),
    ),
    Verb(
        "group-open",
        "try to unseal the key of a closed group again, and start its attached vTPMs",
        Role.ADMINISTRATOR,
        (_GROUP,),
        columns=("uuid", "name", "state", "vtpms"),
    ),
    Verb(
        "group-rotate",
        "give a group a new master key: every record of it is encrypted anew, while its vTPMs run and save",
        Role.ADMINISTRATOR,
        (_GROUP,),
        columns=("uuid", "name", "state", "vtpms"),
    ),
    Verb(
        "group-remove",
        "remove a group that has no vTPMs, its key and its escrow at once",
        Role.ADMINISTRATOR,
        (_GROUP, Argument("yes", "confirm: this cannot be undone", kind="flag", default=False)),
    ),
)
