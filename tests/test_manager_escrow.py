from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from manager.escrow import EscrowPlace, EscrowPurpose, unwrap, wrap
from manager.recovery_errors import EscrowError, EscrowMismatch, EscrowUnreadable, EscrowWrongKey
from manager.recovery_key import RecoveryPrivate, RecoveryPublic

STORE, GROUP = UUID(int=1), UUID(int=2)
STORE_KEY = EscrowPlace(STORE, EscrowPurpose.STORE_KEY)
GROUP_KEY = EscrowPlace(STORE, EscrowPurpose.GROUP_KEY, GROUP)
SECRET = b"\x5e" * 32
X25519 = RecoveryPrivate.new()
P256 = RecoveryPrivate(ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize("key", [X25519, P256])
@pytest.mark.parametrize("place", [STORE_KEY, GROUP_KEY])
def test_a_secret_comes_back_at_its_place(key: RecoveryPrivate, place: EscrowPlace) -> None:
    public = RecoveryPublic.parse(key.public.to_pem())
    escrow = wrap(SECRET, public, place)
    assert unwrap(escrow, key, place) == SECRET
    assert SECRET[:8] not in escrow
    assert len(escrow) - len(SECRET) in {88, 121}


def test_two_escrows_of_one_secret_differ() -> None:
    assert wrap(SECRET, X25519.public, STORE_KEY) != wrap(SECRET, X25519.public, STORE_KEY)


@pytest.mark.parametrize(
    "place",
    [
        EscrowPlace(UUID(int=9), EscrowPurpose.GROUP_KEY, GROUP),
        EscrowPlace(STORE, EscrowPurpose.STORE_KEY, GROUP),
        EscrowPlace(STORE, EscrowPurpose.GROUP_KEY, UUID(int=9)),
        EscrowPlace(STORE, EscrowPurpose.GROUP_KEY),
        EscrowPlace(STORE, EscrowPurpose.GROUP_KEY, UUID(int=0)),
    ],
)
def test_an_escrow_moved_elsewhere_does_not_open(place: EscrowPlace) -> None:
    escrow = wrap(SECRET, X25519.public, GROUP_KEY)
    with pytest.raises(EscrowMismatch, match="made for something else than the") as refused:
        unwrap(escrow, X25519, place)
    assert str(place.store) in str(refused.value)


def test_no_two_places_bind_alike() -> None:
    groups = (None, GROUP, UUID(int=0))
    places = [
        EscrowPlace(store, purpose, group) for store in (STORE, GROUP) for purpose in EscrowPurpose for group in groups
    ]
    assert len({place.info() for place in places}) == len(places)


def test_another_recovery_key_is_named_by_fingerprint() -> None:
    escrow = wrap(SECRET, X25519.public, STORE_KEY)
    other = RecoveryPrivate.new()
    with pytest.raises(EscrowWrongKey) as refused:
        unwrap(escrow, other, STORE_KEY)
    assert refused.value.wanted == X25519.public.escrow_fingerprint
    assert refused.value.given == other.public.escrow_fingerprint
    assert refused.value.code == 5


@pytest.mark.parametrize("at", [40, 71, 72, 80, -1])
def test_a_flipped_bit_in_the_ciphertext_is_damage(at: int) -> None:
    escrow = bytearray(wrap(SECRET, X25519.public, STORE_KEY))
    escrow[at] ^= 1
    with pytest.raises(EscrowMismatch):
        unwrap(bytes(escrow), X25519, STORE_KEY)


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [(0, 0, "begin"), (4, 2, "version 2"), (5, 9, "suite 9"), (6, 1, "version"), (7, 1, "version")],
)
def test_heads_that_are_not_ours_are_unreadable(at: int, value: int, why: str) -> None:
    escrow = bytearray(wrap(SECRET, X25519.public, STORE_KEY))
    escrow[at] = value
    with pytest.raises(EscrowUnreadable, match=why):
        unwrap(bytes(escrow), X25519, STORE_KEY)


@pytest.mark.parametrize("length", [0, 3, 39])
def test_too_few_bytes_are_unreadable(length: int) -> None:
    with pytest.raises(EscrowUnreadable, match="too few"):
        unwrap(wrap(SECRET, X25519.public, STORE_KEY)[:length], X25519, STORE_KEY)


@pytest.mark.parametrize("size", [0, 4097])
def test_secrets_of_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 4096"):
        wrap(bytes(size), X25519.public, STORE_KEY)


@given(head=st.binary(max_size=48), tail=st.binary(max_size=128), cut=st.booleans())
def test_hostile_bytes_raise_one_kind_of_error(head: bytes, tail: bytes, cut: bool) -> None:
    good = wrap(SECRET, X25519.public, STORE_KEY)
    hostile = head + tail if cut else good[:40] + tail
    with pytest.raises(EscrowError):
        unwrap(hostile, X25519, STORE_KEY)
