"""The verbs about quotes, as verb_table has them."""

from typing import Final

from manager.verb_form import Argument, Role, Verb

QUOTE_VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "quote",
        "quote a running vTPM's PCRs, and the hardware's, signed by its group's attestation key in the hardware TPM",
        Role.OPERATOR,
        (
            Argument("vtpm", "UUID or name", positional=True, required=True),
            Argument("nonce", "what the verifier sent, 1 to 64 bytes in hexadecimal", required=True),
            Argument("pcrs", "the vTPM's PCRs: sha256:0,2,4-7, or all", default="all"),
        ),
        prints="bundle",
        terse=True,
        saves="bundle",
        saves_as="bytes",
        columns=("uuid", "name", "group", "nonce", "bytes", "output"),
    ),
    Verb(
        "group-enroll",
        "enrol a group's attestation key: make a request for a verifier, or with --challenge the proof for him",
        Role.ADMINISTRATOR,
        (
            Argument("group", "UUID or name", positional=True, required=True),
            Argument("challenge", "what the verifier made of the request", kind="text"),
            Argument(
                "renew", "make a new key: certificates of the old one are worth nothing then", "flag", default=False
            ),
        ),
        prints="document",
        terse=True,
        saves="document",
        columns=("uuid", "name", "step", "ak", "key", "output"),
    ),
)
