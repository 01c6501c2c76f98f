"""Policy digests, object Names and NV Names, computed in software: pure, no TPM, no I/O.

The TPM computes the same digests step by step inside a policy session; sealing needs them beforehand.
Source: TPM 2.0 Library Part 3, section 23 (enhanced authorisation); Part 1, section 16 (Names).
"""

import hashlib
import struct
from collections.abc import Iterable
from typing import Final

from manager.hwtpm_errors import SealDamaged

ZERO_DIGEST: Final = bytes(32)
ALG_SHA256: Final = 0x000B
PCR_COUNT: Final = 24
# Part 2, TPMA_LOCALITY: one bit per locality 0..4.
LOCALITY_TWO_MASK: Final = 1 << 2
# Part 2, TPM_CC.
CC_POLICY_NV: Final = 0x0149
CC_UNSEAL: Final = 0x015E
CC_POLICY_SIGNED: Final = 0x0160
CC_POLICY_AUTHORIZE: Final = 0x016A
CC_POLICY_AUTH_VALUE: Final = 0x016B
CC_POLICY_COMMAND_CODE: Final = 0x016C
CC_POLICY_LOCALITY: Final = 0x016F
CC_POLICY_OR: Final = 0x0171
CC_POLICY_PCR: Final = 0x017F


def hashed(*parts: bytes) -> bytes:
    """SHA-256 over the parts, one after the other, 32 bytes."""
    return hashlib.sha256(b"".join(parts)).digest()


def _command(code: int) -> bytes:
    return struct.pack(">I", code)


def after_locality(digest: bytes, mask: int = LOCALITY_TWO_MASK) -> bytes:
    """Extend a policy digest by TPM2_PolicyLocality; mask is a TPMA_LOCALITY, not a number. Part 3, 23.8."""
    return hashed(digest, _command(CC_POLICY_LOCALITY), bytes([mask]))


def after_auth_value(digest: bytes) -> bytes:
    """Extend a policy digest by TPM2_PolicyAuthValue. Part 3, 23.17."""
    return hashed(digest, _command(CC_POLICY_AUTH_VALUE))


def after_command_code(digest: bytes, code: int) -> bytes:
    """Extend a policy digest by TPM2_PolicyCommandCode. Part 3, 23.11."""
    return hashed(digest, _command(CC_POLICY_COMMAND_CODE), _command(code))


def after_pcr(digest: bytes, selection: Iterable[int], pcr_digest: bytes) -> bytes:
    """Extend a policy digest by TPM2_PolicyPCR over the SHA-256 bank. Part 3, 23.7."""
    return hashed(digest, _command(CC_POLICY_PCR), pcr_selection_bytes(selection), pcr_digest)


def after_signed(digest: bytes, key_name: bytes, reference: bytes) -> bytes:
    """Extend a policy digest by TPM2_PolicySigned of the key with this Name. Part 3, 23.3 and 23.2.3."""
    return hashed(hashed(digest, _command(CC_POLICY_SIGNED), key_name), reference)


def after_authorize(key_name: bytes, reference: bytes) -> bytes:
    """Return the policy digest that TPM2_PolicyAuthorize leaves, whatever came before it. Part 3, 23.16 and 23.2.3."""
    return hashed(hashed(ZERO_DIGEST, _command(CC_POLICY_AUTHORIZE), key_name), reference)


def after_nv(digest: bytes, nv_name: bytes, operand: bytes, offset: int, operation: int) -> bytes:
    """Extend a policy digest by TPM2_PolicyNV: the bytes from `offset` on, compared to `operand`. Part 3, 23.9."""
    arguments = hashed(operand, struct.pack(">HH", offset, operation))
    return hashed(digest, _command(CC_POLICY_NV), arguments, nv_name)


def approval_statement(approved: bytes, reference: bytes) -> bytes:
    """Return the digest (aHash) an approver signs for TPM2_PolicyAuthorize. Part 3, 23.16.1."""
    return hashed(approved, reference)


def policy_or(branches: Iterable[bytes]) -> bytes:
    """TPM2_PolicyOR over the digests of 2..8 branches. Part 3, 23.6."""
    return hashed(ZERO_DIGEST, _command(CC_POLICY_OR), *branches)


def signed_statement(nonce_tpm: bytes, reference: bytes, expiration: int = 0) -> bytes:
    """Return the digest (aHash) a recovery key signs for TPM2_PolicySigned, without a cpHash. Part 3, 23.2.2.

    nonce_tpm must not be empty: a statement without it could be replayed for ever.
    """
    assert nonce_tpm, "a recovery statement always carries nonceTPM"
    return hashed(nonce_tpm, struct.pack(">i", expiration), reference)


def pcr_selection_bytes(selection: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION of one SHA-256 bank with 24 PCRs. Part 2, 10.9.7."""
    bitmap = bytearray(PCR_COUNT // 8)
    for pcr in selection:
        bitmap[pcr // 8] |= 1 << (pcr % 8)
    return struct.pack(">IHB", 1, ALG_SHA256, len(bitmap)) + bytes(bitmap)


def p256_key_name(point: bytes) -> bytes:
    """Compute the Name of an external P-256 verification key (sign only, no scheme) as our hwtpm modules load it.

    point: SEC1 uncompressed, 65 bytes. Result: 34 bytes. Source: Part 2, 12.2.4 TPMT_PUBLIC; Part 1, 16.
    """
    if len(point) != 65 or point[0] != 4:
        raise SealDamaged("its signing key is not an uncompressed P-256 point of 65 bytes")
    # type ECC, nameAlg SHA256, userWithAuth|noDA|sign, no policy, symmetric NULL, scheme NULL, P-256, kdf NULL.
    head = struct.pack(">HHIHHHHH", 0x0023, ALG_SHA256, 0x0004_0440, 0, 0x0010, 0x0010, 0x0003, 0x0010)
    unique = b"".join(struct.pack(">H", 32) + half for half in (point[1:33], point[33:]))
    return struct.pack(">H", ALG_SHA256) + hashed(head, unique)


def nv_index_name(index: int, attributes: int, auth_policy: bytes, size: int) -> bytes:
    """Compute the Name of an NV index with these public values, 34 bytes. Source: Part 2, 13.5 TPMS_NV_PUBLIC."""
    public = struct.pack(">IHIH", index, ALG_SHA256, attributes, len(auth_policy)) + auth_policy
    return struct.pack(">H", ALG_SHA256) + hashed(public, struct.pack(">H", size))


def revocation_write_policy(locality: int | None, writer_name: bytes) -> bytes:
    """Compute the write policy of the revocation index: PolicyLocality(2) where we have it, then PolicySigned."""
    start = ZERO_DIGEST if locality is None else after_locality(ZERO_DIGEST)
    return after_signed(start, writer_name, b"")


def anchor_write_policy(locality: int | None) -> bytes:
    """Compute the write policy of the durable anchor: PolicyLocality(2) where we have it, then PolicyAuthValue."""
    start = ZERO_DIGEST if locality is None else after_locality(ZERO_DIGEST)
    return after_auth_value(start)
