"""The verbs about migration between managers, as verb_table has them."""

from typing import Final

from manager.verb_form import Argument, Role, Verb

_VTPM: Final = Argument("vtpm", "UUID or name", positional=True, required=True)
_PEER: Final = Argument("peer", "what you call the other manager", positional=True, required=True)
_PEER_COLUMNS: Final = ("peer", "address", "leave", "come", "until", "fingerprint")

MIGRATION_VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "migrate-identity",
        "print this manager's certificate for other managers; it is made at the first need",
        Role.ADMINISTRATOR,
        (
            Argument(
                "anew",
                "the data about migration is lost: begin again without it. What is frozen stays frozen",
                kind="flag",
                default=False,
            ),
            Argument("yes", "confirm --anew: this cannot be undone", kind="flag", default=False),
        ),
        prints="certificate",
        terse=True,
        saves="certificate",
        columns=("store", "fingerprint", "listen", "output"),
    ),
    Verb(
        "migrate-authorise",
        "pair with another manager, and say what may leave for it or come from it; replaces what was said before",
        Role.ADMINISTRATOR,
        (
            _PEER,
            Argument("certificate", "its vtpm-migrate-identity (default: the one it has)", kind="text"),
            Argument("fingerprint", "refuse another certificate than that of this fingerprint (SHA-256, hex)"),
            Argument("address", "where it listens: unix:/PATH, tcp:PORT, tcp:HOST:PORT (default: as before)"),
            Argument("leave", "a vTPM that may leave for it; may be given again", kind="list"),
            Argument("leave_group", "a group whose vTPMs may leave for it; may be given again", kind="list"),
            Argument("come", "UUID of a vTPM that may come from it; may be given again", kind="list"),
            Argument("come_group", "a group of this manager that its vTPMs may come into; may be given again", "list"),
            Argument("valid", "for how long: 90s, 30m, 12h, 7d", default="7d"),
        ),
        prints="fingerprint",
        columns=_PEER_COLUMNS,
    ),
    Verb(
        "migrate-list",
        "list paired managers and what may move",
        Role.AUDITOR,
        many=True,
        prints="peer",
        columns=_PEER_COLUMNS,
    ),
    Verb(
        "migrate-revoke",
        "forget another manager: it can claim and confirm nothing any more",
        Role.ADMINISTRATOR,
        (_PEER,),
        prints="peer",
        columns=_PEER_COLUMNS,
    ),
    Verb(
        "migrate-expect",
        "make an incoming vTPM: its state comes from another manager, through QEMU's migration",
        Role.ADMINISTRATOR,
        (
            _PEER,
            Argument("uuid", "its UUID at the other manager", positional=True, required=True),
            Argument("name", "its name here (default: made of the UUID)"),
            Argument("group", "the group it comes into", default="default"),
            Argument("tpm", "TPM family", default="2.0", choices=("2.0", "1.2")),
        ),
        terse=True,
    ),
    Verb(
        "migrate-release",
        "remove a frozen vTPM: you know that the manager that claimed it has it",
        Role.ADMINISTRATOR,
        (_VTPM, Argument("yes", "confirm: this cannot be undone", kind="flag", default=False)),
    ),
    Verb(
        "migrate-reclaim",
        "take a frozen vTPM back: asks the manager that claimed it, which promises never to run it, or has it",
        Role.ADMINISTRATOR,
        (
            _VTPM,
            Argument("yes", "confirm: what the guest did over there is given up", kind="flag", default=False),
            Argument(
                "destination_is_gone",
                "do not ask: that manager, its disk and all copies of it are gone for good. If not, two will run",
                kind="flag",
                default=False,
            ),
        ),
    ),
)
