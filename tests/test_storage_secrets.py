import copy
import pickle

import pytest

from storage.errors import SecretWiped, WrongSecretSize
from storage.secrets import GroupKey, Secret, StateKey, StoreKey

CONTENT = bytes(range(32))


@pytest.mark.parametrize("kind", [StoreKey, GroupKey, StateKey])
def test_a_secret_never_prints_its_content(kind: type[Secret]) -> None:
    secret = kind(CONTENT)
    assert repr(secret) == str(secret) == f"{secret}" == f"<{kind.__name__} 32 bytes>"


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_another_size_is_refused_without_printing_it(size: int) -> None:
    with pytest.raises(WrongSecretSize, match=f"has 32 bytes, got {size}$"):
        StateKey(b"A" * size)


def test_new_secrets_are_random() -> None:
    assert len({StateKey.new().reveal() for _ in range(20)}) == 20


def test_secrets_are_equal_only_to_the_same_bytes_of_the_same_type() -> None:
    assert StateKey(CONTENT) == StateKey(bytearray(CONTENT))
    assert StateKey(CONTENT) != StateKey(CONTENT[::-1])
    assert StateKey(CONTENT) != GroupKey(CONTENT)
    assert (StateKey(CONTENT) == CONTENT) is False


def test_a_wiped_secret_is_overwritten_and_refuses_every_use() -> None:
    secret = StateKey(CONTENT)
    view = secret.view
    secret.wipe()
    secret.wipe()
    assert bytes(view) == bytes(32)
    assert repr(secret) == "<StateKey wiped>"
    for use in (secret.reveal, lambda: secret.view, lambda: secret == StateKey(CONTENT)):
        with pytest.raises(SecretWiped):
            use()


def test_a_secret_keeps_its_own_copy() -> None:
    source = bytearray(CONTENT)
    secret = StateKey(source)
    source[:] = bytes(32)
    assert secret.reveal() == CONTENT


def test_a_view_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        StateKey(CONTENT).view[0] = 1


def test_secrets_are_neither_hashed_nor_pickled_nor_copied() -> None:
    secret = StateKey(CONTENT)
    for use in (hash, pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            use(secret)
