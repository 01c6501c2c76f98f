"""Public areas of what we make or load in the hardware TPM. Changing one changes Names: nothing sealed opens then.

Source: TPM 2.0 Part 2, 12.2.4 TPMT_PUBLIC; reference hardware-tpm.md section 2.
"""

from typing import Any, Final

from tpm2_pytss import (
    TPM2_ALG,
    TPM2_ECC,
    TPM2B_PUBLIC,
    TPMA_OBJECT,
    TPMS_ECC_PARMS,
    TPMS_ECC_POINT,
    TPMS_KEYEDHASH_PARMS,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_KEYEDHASH_SCHEME,
    TPMT_PUBLIC,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_ID,
    TPMU_PUBLIC_PARMS,
    TPMU_SYM_KEY_BITS,
    TPMU_SYM_MODE,
)

from manager.policy_digests import p256_key_name

SRK_ATTRIBUTES: Final = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)


def srk_template() -> Any:
    """TPM2B_PUBLIC: ECC P-256 storage key, AES-128-CFB, noDA, unique = zeros (reference section 2)."""
    symmetric = TPMT_SYM_DEF_OBJECT(
        algorithm=TPM2_ALG.AES,
        keyBits=TPMU_SYM_KEY_BITS(aes=128),
        mode=TPMU_SYM_MODE(aes=TPM2_ALG.CFB),
    )
    parameters = TPMS_ECC_PARMS(
        symmetric=symmetric,
        scheme=TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL),
        curveID=TPM2_ECC.NIST_P256,
        kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
    )
    return TPM2B_PUBLIC(
        TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=SRK_ATTRIBUTES | TPMA_OBJECT.NODA,
            parameters=TPMU_PUBLIC_PARMS(eccDetail=parameters),
            unique=TPMU_PUBLIC_ID(ecc=TPMS_ECC_POINT(x=bytes(32), y=bytes(32))),
        )
    )


def seal_template(policy_digest: bytes) -> Any:
    """TPM2B_PUBLIC: sealed data, policy only (no userWithAuth), adminWithPolicy, noDA (reference section 0)."""
    return TPM2B_PUBLIC(
        TPMT_PUBLIC(
            type=TPM2_ALG.KEYEDHASH,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=TPMA_OBJECT.FIXEDTPM
            | TPMA_OBJECT.FIXEDPARENT
            | TPMA_OBJECT.ADMINWITHPOLICY
            | TPMA_OBJECT.NODA,
            authPolicy=policy_digest,
            parameters=TPMU_PUBLIC_PARMS(
                keyedHashDetail=TPMS_KEYEDHASH_PARMS(scheme=TPMT_KEYEDHASH_SCHEME(scheme=TPM2_ALG.NULL))
            ),
            unique=TPMU_PUBLIC_ID(keyedHash=b""),
        )
    )


def recovery_key_template(point: bytes) -> Any:
    """TPM2B_PUBLIC of the external P-256 recovery signing key; its Name is policy.p256_key_name(point)."""
    parameters = TPMS_ECC_PARMS(
        symmetric=TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL),
        scheme=TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL),
        curveID=TPM2_ECC.NIST_P256,
        kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
    )
    public = TPM2B_PUBLIC(
        TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SIGN_ENCRYPT | TPMA_OBJECT.NODA,
            parameters=TPMU_PUBLIC_PARMS(eccDetail=parameters),
            unique=TPMU_PUBLIC_ID(ecc=TPMS_ECC_POINT(x=point[1:33], y=point[33:])),
        )
    )
    assert bytes(public.get_name()) == p256_key_name(point), "policy.py and the TSS name the key alike"
    return public
