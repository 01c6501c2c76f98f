"""Attestation keys in the hardware TPM: making them, enrolling them, quoting by them. No secret leaves the TPM here.

A group's attestation key is a primary key of the endorsement hierarchy, so that its quotes tell the true reset counters
and firmware version, made from a template whose `unique` is a seed that stands in the group's record only. The TPM
makes the same key from it each time; another TPM makes another one. Its policy is PolicyLocality(2) (attest_wire).
Source: TPM 2.0 Part 1, 16 and 24; Part 3: 18.4, 24.1, 12.5; TCG EK Credential Profile 2.0, 2.1.5 and 2.2.1; reference
hardware-tpm.md section 4.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

from tpm2_pytss import (
    ESYS_TR,
    TPM2_CC,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPMA_LOCALITY,
    TPML_DIGEST,
    TPMT_PUBLIC,
    TSS2_Exception,
)
from tpm2_pytss.utils import NVReadEK, create_ek_template

from frontend_backend.deep_quote import bits
from frontend_backend.errors import MessageError
from manager import hwtpm_rc as rc
from manager.attest_bundle import HardwareQuote
from manager.attest_errors import AttestationKeyChanged, CredentialRefused, EndorsementAuthWanted
from manager.attest_wire import (
    AK_ATTRIBUTES,
    KeyPublic,
    QuoteAttest,
    ak_branches,
    ak_policy,
    ecc_area,
    p256_area,
    pcr_digest,
)
from manager.hwtpm_errors import PcrsMoving, TpmTransport, WrongLocality
from manager.hwtpm_link import TpmLink, flushed
from manager.hwtpm_pcr import read_pcrs, selection_text
from manager.hwtpm_srk import Srk

SEED_BYTES: Final = 32
# TCG EK Credential Profile, 2.2.1.4 and 2.2.1.5: certificates of the low range, and of the authorities above them.
_CERTIFICATES: Final = {"EK-ECC256": 0x01C0000A, "EK-RSA2048": 0x01C00002}
_FIRST_NV, _FIRST_CHAIN, _LAST_CHAIN = 0x01000000, 0x01C00100, 0x01C001FF
_QUOTE_TRIES: Final = 16  # something may extend a PCR between reading it and quoting it
_RC_HIERARCHY: Final = 0x85  # Part 2, 6.6.3
_ABOUT_A_PARAMETER: Final = 0x40  # Part 2, 6.6.2: of a format-one code


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """A group's attestation key as its record keeps it: seed (32 bytes) and public area (TPMT_PUBLIC)."""

    seed: bytes = field(repr=False)
    public: KeyPublic

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form for the group's record, which is encrypted."""
        return {
            "version": 1,
            "name": self.public.name.hex(),
            "seed": self.seed.hex(),
            "public": self.public.area.hex(),
        }

    @classmethod
    def from_json(cls, untrusted: Any) -> Self:
        """Read `to_json` back. Raises AttestationKeyChanged: an unreadable record is no key."""
        try:
            if untrusted["version"] != 1:
                raise AttestationKeyChanged(f"its record has version {untrusted['version']!r}, this manager reads 1")
            return cls(bytes.fromhex(untrusted["seed"]), KeyPublic.unpack(bytes.fromhex(untrusted["public"])))
        except (KeyError, TypeError, ValueError, MessageError) as error:
            raise AttestationKeyChanged(f"its record cannot be read ({error})") from error


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """The TPM's endorsement key; `certificate` (DER) is empty where the TPM has none, `chain` is DER after DER."""

    public: KeyPublic
    certificate: bytes
    chain: bytes


class Attester:
    """Makes, enrols and uses attestation keys through one link, which knows the endorsement hierarchy's password."""

    def __init__(self, link: TpmLink, srk: Srk) -> None:
        self._link, self._srk = link, srk
        self._saved: dict[bytes, Any] = {}  # seed -> context: loading it is quicker than making the key

    def new_key(self) -> AttestationKey:
        """Make a group's attestation key. Raises WrongLocality, EndorsementAuthWanted."""
        self._need_two()
        while True:
            seed = os.urandom(SEED_BYTES)
            with self._link.operation("make an attestation key") as esapi, self._made(esapi, seed) as (_, public):
                # a TPM may leave leading zeros of a coordinate out; verifiers compute the key's Name with them
                if public.area == p256_area(AK_ATTRIBUTES, ak_policy(), public.point):
                    return AttestationKey(seed, public)

    def is_ours(self, key: AttestationKey) -> bool:
        """Tell whether this TPM makes this key. Raises EndorsementAuthWanted."""
        with self._link.operation("make an attestation key") as esapi, self._made(esapi, key.seed) as (_, public):
            return public.name == key.public.name

    def endorsement(self) -> EndorsementKey:
        """Return the endorsement key that a certificate stands for, or a P-256 one where there is no certificate."""
        with self._link.operation("read the endorsement key") as esapi:
            with self._endorsement_key(esapi) as (_, public, certificate):
                pass
            reader = NVReadEK(esapi)
            chain = (reader(i) for i in self._link.handles(esapi, _FIRST_NV) if _FIRST_CHAIN <= i <= _LAST_CHAIN)
            return EndorsementKey(public, certificate, b"".join(chain))

    def activate(self, key: AttestationKey, identity: bytes, encrypted_seed: bytes) -> bytes:
        """Return the secret of a credential made for this key and this TPM's endorsement key.

        Raises CredentialRefused: it is for another key or TPM, or was altered. AttestationKeyChanged.
        """
        with (
            self._link.operation("activate a credential") as esapi,
            self._endorsement_key(esapi) as (endorsement, _, _),
            self._loaded(esapi, key) as handle,
            self._link.session(esapi, self._srk.handle(esapi), policy=True) as theirs,
        ):
            with self._endorsement_password(esapi) as password, self._endorsement_refusals():
                esapi.policy_secret(ESYS_TR.ENDORSEMENT, theirs, expiration=0, session1=password)
            with self._link.session(esapi, ESYS_TR.NONE, policy=True) as ours, _credential_refusals(esapi):
                _satisfy(esapi, ours, TPM2_CC.ActivateCredential)
                credential = TPM2B_ID_OBJECT(identity), TPM2B_ENCRYPTED_SECRET(encrypted_seed)
                return bytes(
                    esapi.activate_credential(handle, endorsement, *credential, session1=ours, session2=theirs)
                )

    def quote(self, key: AttestationKey, selection: int, qualifying: bytes) -> HardwareQuote:
        """Quote the PCRs in the bit map (SHA-256 bank), `qualifying` (32 bytes) in it; no PCR is touched.

        Raises AttestationKeyChanged: this TPM makes another key. WrongLocality, PcrsMoving.
        """
        self._need_two()
        pcrs = bits(selection)
        meanings = {rc.RC_LOCALITY: lambda: WrongLocality(2, "it refused to quote, attestation keys want locality 2")}
        with self._link.operation("quote") as esapi, self._loaded(esapi, key, cached=True) as handle:
            for _ in range(_QUOTE_TRIES):
                values = tuple(read_pcrs(esapi, pcrs).values())
                with self._link.session(esapi, ESYS_TR.NONE, policy=True) as session, rc.meaning(meanings):
                    _satisfy(esapi, session)
                    attest, signature = esapi.quote(handle, selection_text(pcrs), qualifying, session1=session)
                if _attest_of(bytes(attest)).pcr_digest == pcr_digest(values):
                    return HardwareQuote(bytes(attest), bytes(signature.marshal()), selection, values)
        raise PcrsMoving(_QUOTE_TRIES)

    def _need_two(self) -> None:
        if self._link.locality != 2:
            raise WrongLocality(
                2, "attestation keys are for locality 2 only: at 0 the host's software could use them too"
            )

    # --- keys, inside an operation -----------------------------------------------------------------

    @contextmanager
    def _made(self, esapi: Any, seed: bytes) -> Iterator[tuple[Any, KeyPublic]]:
        """Make the key of a seed; ESYS_TR and public area."""
        template = TPMT_PUBLIC.unmarshal(ecc_area(AK_ATTRIBUTES, ak_policy(), seed, bytes(32)))[0]
        with self._primary(esapi, TPM2B_PUBLIC(publicArea=template)) as made:
            yield made

    @contextmanager
    def _primary(self, esapi: Any, template: Any) -> Iterator[tuple[Any, KeyPublic]]:
        with self._endorsement_password(esapi) as session, self._endorsement_refusals():
            handle, public, *_ = esapi.create_primary(None, template, ESYS_TR.ENDORSEMENT, session1=session)
        with flushed(esapi, handle):
            yield handle, KeyPublic.unpack(bytes(public.publicArea.marshal()))

    @contextmanager
    def _loaded(self, esapi: Any, key: AttestationKey, *, cached: bool = False) -> Iterator[Any]:
        """Yield the key's ESYS_TR. Raises AttestationKeyChanged."""
        saved = self._saved.get(key.seed) if cached else None
        if saved is not None:
            try:
                handle = esapi.context_load(saved)
            except TSS2_Exception as error:  # the TPM was reset since: contexts end with that
                if not rc.context_survives(error):
                    raise
                del self._saved[key.seed]
            else:
                with flushed(esapi, handle):
                    yield handle
                return
        with self._made(esapi, key.seed) as (handle, public):
            if public.name != key.public.name:
                raise AttestationKeyChanged("the TPM makes another one from its seed: this is another TPM")
            if cached:
                self._saved[key.seed] = esapi.context_save(handle)
            yield handle

    @contextmanager
    def _endorsement_key(self, esapi: Any) -> Iterator[tuple[Any, KeyPublic, bytes]]:
        there = self._link.handles(esapi, _FIRST_NV)
        kind = next((kind for kind, index in _CERTIFICATES.items() if index in there), "EK-ECC256")
        certificate, template = create_ek_template(kind, NVReadEK(esapi))
        with self._primary(esapi, template) as (handle, public):
            yield handle, public, certificate or b""

    @contextmanager
    def _endorsement_password(self, esapi: Any) -> Iterator[Any]:
        """Yield a session that proves the password (the link's) without showing it, salted where there is an SRK."""
        salt = ESYS_TR.NONE if self._srk.pinned is None else self._srk.handle(esapi)
        with self._link.session(esapi, salt) as session:
            yield session

    @staticmethod
    @contextmanager
    def _endorsement_refusals() -> Iterator[None]:
        wanted = dict.fromkeys((rc.RC_AUTH_FAIL, rc.RC_BAD_AUTH, _RC_HIERARCHY), EndorsementAuthWanted)
        with rc.meaning(wanted):
            yield


def _satisfy(esapi: Any, session: Any, code: Any = None) -> None:
    """Walk the branch of an attestation key's policy that allows `code` (None: a quote)."""
    esapi.policy_locality(session, TPMA_LOCALITY.TWO)
    if code is not None:
        esapi.policy_command_code(session, code)
    esapi.policy_or(session, TPML_DIGEST(list(ak_branches())))


@contextmanager
def _credential_refusals(esapi: Any) -> Iterator[None]:
    """Say CredentialRefused where the TPM finds a parameter wrong: both come from the verifier.

    libtpms answers TPM_RC_FAILURE to an altered RSA seed, without being in failure mode [measured]: it is asked.
    """
    try:
        yield
    except TSS2_Exception as error:
        about_a_parameter = rc.is_about_arguments(error) and int(error.rc) & _ABOUT_A_PARAMETER
        if about_a_parameter or (rc.tpm_code(error) == rc.RC_FAILURE and int(esapi.get_test_result()[1]) == 0):
            raise CredentialRefused from error
        raise


def _attest_of(attest: bytes) -> QuoteAttest:
    try:
        return QuoteAttest.unpack(attest)
    except MessageError as error:
        raise TpmTransport("quote", f"its answer is no quote: {error}") from error
