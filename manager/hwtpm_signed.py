"""Signatures as the TPM takes them: TPM2_PolicySigned with nonceTPM, and tickets of TPM2_VerifySignature."""

from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import utils as asymmetric_utils
from tpm2_pytss import ESYS_TR, TPM2_ALG, TPMS_SIGNATURE_ECC, TPMT_SIGNATURE, TPMU_SIGNATURE

from manager import hwtpm_rc as rc
from manager.hwtpm_errors import TpmError
from manager.hwtpm_link import flushed
from manager.hwtpm_templates import recovery_key_template
from manager.policy_digests import signed_statement

SignStatement = Callable[[bytes], bytes]
"""Signs a digest of 32 bytes: ECDSA P-256, DER (RecoveryPrivate.sign_statement)."""


def policy_signed(
    esapi: Any, session: Any, point: bytes, reference: bytes, sign: SignStatement, refused: Callable[[str], TpmError]
) -> None:
    """Satisfy TPM2_PolicySigned by a statement with this session's nonceTPM: useless in any other session.

    refused: makes the error for a signature that does not fit.
    """
    nonce = bytes(esapi.trsess_get_nonce_tpm(session))
    der = sign(signed_statement(nonce, reference))
    try:
        r, s = asymmetric_utils.decode_dss_signature(der)
        signature = tpm_signature(r.to_bytes(32) + s.to_bytes(32))
    except (ValueError, OverflowError) as error:
        raise refused("the signature is not an ECDSA P-256 one in DER") from error
    key = esapi.load_external(recovery_key_template(point), hierarchy=ESYS_TR.OWNER)
    wrong = {rc.RC_SIGNATURE: lambda: refused("the signature is not by the key it was sealed with")}
    with flushed(esapi, key), rc.meaning(wrong):
        esapi.policy_signed(key, session, signature, nonce_tpm=nonce, policy_ref=reference, expiration=0)


def verified_ticket(
    esapi: Any,
    point: bytes,
    digest: bytes,
    signature: bytes,
    refused: Callable[[], TpmError],
    hierarchy: Any = ESYS_TR.OWNER,
) -> Any:
    """Have the TPM verify an ECDSA P-256 signature (r, s: 64 bytes) and return its ticket; the key is flushed.

    The key is loaded in the owner hierarchy: tickets of the NULL hierarchy authorise nothing (Part 3, 23.16).
    """
    key = esapi.load_external(recovery_key_template(point), hierarchy=hierarchy)
    with flushed(esapi, key), rc.meaning({rc.RC_SIGNATURE: refused}):
        return esapi.verify_signature(key, digest, tpm_signature(signature))


def tpm_signature(signature: bytes) -> Any:
    """Return TPMT_SIGNATURE of r and s, 32 bytes each."""
    ecdsa = TPMS_SIGNATURE_ECC(hash=TPM2_ALG.SHA256, signatureR=signature[:32], signatureS=signature[32:])
    return TPMT_SIGNATURE(sigAlg=TPM2_ALG.ECDSA, signature=TPMU_SIGNATURE(ecdsa=ecdsa))
