"""Fuzz what a verifier and the manager read of quotes: bundles, evidence, attestations, keys, enrolment documents.

Everything starts from what a real hardware TPM and a real vTPM made. Nothing altered may hold, and nothing may raise
anything but the documented errors.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures_tpm import running_swtpm
from fuzz_frontend_backend import mutated

from frontend_backend.deep_quote import DeepQuoteCommand, Evidence
from frontend_backend.errors import MessageError
from frontend_backend.tpmhdr import TpmFamily
from manager.attest_bundle import Bundle, Statement
from manager.attest_check import Expected, judge
from manager.attest_enrolment import Challenge, Kept, Proof, Request, new_challenge, new_request
from manager.attest_errors import DocumentUnreadable
from manager.attest_wire import KeyPublic, QuoteAttest, verify
from manager.hwtpm import HardwareTpm
from vtpm_instance import tpm_commands
from vtpm_instance.evidence import gather
from vtpm_instance.libtpms import the_tpm

NONCE = b"nonce"
Step = Callable[[random.Random], None]


def steps() -> list[Step]:
    """Have a bundle and the documents of an enrolment made, and return what to do with them."""
    family = TpmFamily.TPM_2_0
    emulator = the_tpm()
    emulator.start(family, {}, fresh=True)
    emulator.process(tpm_commands.startup(family, tpm_commands.Startup.CLEAR))
    evidence = gather(emulator.process, family, NONCE, 0x8001, "libtpms")
    emulator.terminate()
    place, digest = (UUID(int=1), UUID(int=2)), sha256(evidence.pack()).digest()
    said = Statement(NONCE, UUID(int=3), *place, 0, 1, False, "guest", "socket", "clear", "0,2", "fuzz", digest)
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        key, endorsement = tpm.attester.new_key(), tpm.attester.endorsement()
        bundle = Bundle(said, evidence, tpm.attester.quote(key, 7, said.digest()))
    request = new_request(place, "group", (endorsement.public, b"", b""), key.public)
    challenge, kept = new_challenge(request)
    proof = Proof(challenge.group, challenge.attestation_name, "00" * 32)
    expected = Expected(key.public.point, NONCE, datetime.now(UTC))
    parsers: tuple[tuple[Callable[[bytes], Any], bytes], ...] = (
        (Evidence.unpack, evidence.pack()),
        (Statement.unpack, said.pack()),
        (QuoteAttest.unpack, bundle.hardware.attest),
        (KeyPublic.unpack, endorsement.public.area),
        (lambda data: verify(data, bundle.hardware.attest, key.public.point), bundle.hardware.signature),
        (lambda data: DeepQuoteCommand.unpack(data, family), DeepQuoteCommand(NONCE, 7).pack(family)),
        (Request.from_text, request.to_text().encode()),
        (Challenge.from_text, challenge.to_text().encode()),
        (Kept.from_text, kept.to_text().encode()),
        (Proof.from_text, proof.to_text().encode()),
    )
    return [_bundle_step(bundle.pack(), expected), *(_parser_step(*pair) for pair in parsers)]


def _bundle_step(whole: bytes, expected: Expected) -> Step:
    def step(chance: random.Random) -> None:
        data = mutated(whole, whole, chance)
        assert judge(data, expected).holds == (data == whole), data.hex()

    return step


def _parser_step(parse: Callable[[bytes], Any], sample: bytes) -> Step:
    def step(chance: random.Random) -> None:
        try:
            parse(mutated(sample, sample, chance))
        except (MessageError, DocumentUnreadable):
            return

    return step


def main() -> int:
    """Run the steps in turn until the time is up."""
    parser = argparse.ArgumentParser(description="Fuzz what is read of quotes.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    todo, count = steps(), 0
    started = time.monotonic()
    while time.monotonic() - started < options.seconds:
        seed = options.seed + count
        try:
            todo[count % len(todo)](random.Random(seed))
        except BaseException:
            sys.stdout.write(f"fuzz quotes: step {count % len(todo)} failed with random.Random({seed})\n")
            raise
        count += 1
    seconds = time.monotonic() - started
    sys.stdout.write(f"fuzz quotes: {count} inputs in {seconds:.1f} s from seed {options.seed}: nothing altered held\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
