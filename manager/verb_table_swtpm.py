"""The verbs that take swtpm's states in and let states out in its form, as verb_table has them."""

from typing import Final

from manager.verb_form import Argument, Role, Verb

_KEY = (
    Argument("key", "file with the AES key of the state files", local=True),
    Argument("key_format", "how that file is to be read", default="hex", choices=("hex", "binary"), local=True),
    Argument("pwdfile", "file with the password that their key is made of", local=True),
    Argument("kdf", "how it is", default="pbkdf2", choices=("pbkdf2", "sha512"), local=True),
    Argument(
        "key_mode", "their cipher", default="aes-cbc", choices=("aes-cbc", "aes-128-cbc", "aes-256-cbc"), local=True
    ),
)
_COLUMNS: Final = ("uuid", "name", "group", "tpm", "state", "generation")

SWTPM_VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "import",
        "adopt a TPM of swtpm's as a new vTPM: its state is copied, encrypted as ours; the source is left as it is",
        Role.ADMINISTRATOR,
        (
            Argument("from_swtpm", "its state: a directory, or a file or block device", required=True, local=True),
            *_KEY,
            Argument("tpm", "TPM family (default: as the state tells)", choices=("2.0", "1.2")),
            Argument("name", "a name: 1 to 64 of A-Z a-z 0-9 . _ -"),
            Argument("uuid", "its UUID (default: a random one)"),
            Argument("group", "the group it belongs to", default="default"),
            Argument("label", "a label, KEY=VALUE; may be given again", kind="list"),
        ),
        terse=True,
        columns=_COLUMNS,
    ),
    Verb(
        "export",
        "write a detached vTPM's state as swtpm's state files; its group must allow that (vtpm-group-update)",
        Role.ADMINISTRATOR,
        (
            Argument("vtpm", "UUID or name", positional=True, required=True),
            Argument("to_swtpm", "a directory without a TPM's state", required=True, local=True),
            *_KEY,
            Argument("yes", "confirm: outside nobody can tell old states from new ones", kind="flag", default=False),
        ),
        columns=_COLUMNS,
    ),
)
