"""Deep quotes beside a plain TPM2_Quote; a part of bench_trust."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from attestation_rig import Verifier
from document import Section, Table
from fixtures_tpm import running_swtpm
from options import Options, progress
from subjects import running_subject
from timing import MILLISECONDS, Sample, in_turns
from tpm2_pytss import ESYS_TR, TPM2B_PUBLIC, TPMT_PUBLIC

from frontend_backend.tpmhdr import TpmFamily
from manager.attest_wire import VTPM_KEY_ATTRIBUTES, ecc_area
from manager.hwtpm import HardwareTpm
from vtpm_instance import tpm_commands
from vtpm_instance.evidence import gather
from vtpm_instance.libtpms import the_tpm

QUOTES = 40
_PCRS = 0xFF
_NAMES = {
    "plain": "TPM2_Quote by a loaded key with an empty password",
    "ours": "the hardware's part: load the key, read 8 PCRs, satisfy its policy, quote, flush",
    "made": "the same where the key is made anew (the first after a reset of the TPM)",
    "evidence": "the vTPM's part: 24 PCRs, a key, a quote, within its instance",
    "verb": "the whole verb, from request to bundle",
}


def add_quotes(section: Section, options: Options) -> None:
    """Measure and add the table and what it means."""
    progress("trust: quotes")
    taken = _hardware(options) | _evidence(options) | _verb(options)
    table = Table(("a deep quote and its parts", "median, ms", "p99, ms", "plain TPM2_Quote = 1.0"))
    for name, text in _NAMES.items():
        sample = taken[name]
        cells = (f"{value / MILLISECONDS:.2f}" for value in (sample.median, sample.p99))
        table.add(text, *cells, f"{sample.median / taken['plain'].median:.2f}")
    section.tables.append(table)
    section.meaning.append(
        "The hardware's part of a deep quote is eight commands, of which one signs. Beside swtpm most of its time is "
        "the TSS's own, in this process (policy session, HMACs); on a chip, where signing takes most of the time, it"
        " is nearer to a plain quote. The vTPM's part holds up its own guest for that long; a quote that a guest asks"
        " for holds it up for both parts, and nobody else."
    )


def _hardware(options: Options) -> dict[str, Sample]:
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        key, attester = tpm.attester.new_key(), tpm.attester
        with _plain_quote(tpm) as plain:

            def made() -> object:
                attester._saved.clear()
                return attester.quote(key, _PCRS, bytes(32))

            calls = {"plain": plain, "ours": partial(attester.quote, key, _PCRS, bytes(32)), "made": made}
            return in_turns(calls, options.rounds(5), options.each(QUOTES))


@contextmanager
def _plain_quote(tpm: HardwareTpm) -> Iterator[Callable[[], object]]:
    """Yield what quotes by a key that stays loaded, through the same TSS and connection."""
    area = ecc_area(VTPM_KEY_ATTRIBUTES, b"", os.urandom(32), bytes(32))
    link = tpm._link
    with link.operation("make a key") as esapi:
        template = TPM2B_PUBLIC(publicArea=TPMT_PUBLIC.unmarshal(area)[0])
        handle: Any = esapi.create_primary(None, template, ESYS_TR.ENDORSEMENT)[0]

    def quote() -> object:
        with link.operation("quote") as esapi:
            return esapi.quote(handle, "sha256:0,1,2,3,4,5,6,7", bytes(32))

    yield quote
    with link.operation("flush it") as esapi:
        esapi.flush_context(handle)


def _evidence(options: Options) -> dict[str, Sample]:
    emulator, family = the_tpm(), TpmFamily.TPM_2_0
    emulator.start(family, {}, fresh=True)
    try:
        emulator.process(tpm_commands.startup(family, tpm_commands.Startup.CLEAR))
        calls = {"evidence": partial(gather, emulator.process, family, bytes(32), 0xFFFFFF, "libtpms")}
        return in_turns(calls, options.rounds(5), options.each(QUOTES))
    finally:
        emulator.terminate()


def _verb(options: Options) -> dict[str, Sample]:
    with running_subject() as subject:
        subject.make("guest")
        subject.run_for("guest")
        Verifier(subject, subject.base / "verifier").enrol()
        calls = {"verb": lambda: subject.ask("quote", vtpm="guest", nonce="00" * 32)}
        return in_turns(calls, options.rounds(5), options.each(QUOTES))
