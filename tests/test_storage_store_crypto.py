import os
from binascii import unhexlify

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from storage.secrets import GroupKey, Secret
from storage.store_crypto import Purpose, derive


class Rfc5869Key(Secret):
    size = 22


class Rfc5869Purpose:
    value = bytes(range(0xF0, 0xFA))


def test_derive_gives_the_first_block_of_the_test_vector_of_rfc_5869() -> None:
    key = Rfc5869Key(b"\x0b" * 22)
    salt = bytes(range(13))
    expected = unhexlify("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf")
    assert derive(key, salt, Rfc5869Purpose()) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("salt_bytes", [0, 16, 32, 63, 64])
def test_derive_equals_the_librarys_hkdf(purpose: Purpose, salt_bytes: int) -> None:
    key, salt = GroupKey.new(), os.urandom(salt_bytes)
    assert derive(key, salt, purpose) == HKDF(SHA256(), 32, salt, purpose.value).derive(key.view)


def test_derive_refuses_a_salt_that_hmac_would_hash_first() -> None:
    with pytest.raises(AssertionError):
        derive(GroupKey.new(), bytes(65), Purpose.LEAF)
