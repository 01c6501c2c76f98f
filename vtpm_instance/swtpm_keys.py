"""Keys of swtpm's state files, read from where --key and --migration-key say.

Source: swtpm's common.c (parse_key_options) and key.c; reference/swtpm-libtpms-qemu.md 3.5.
"""

import os
from contextlib import suppress
from typing import Final

from frontend_backend.swtpm_records import KeySource
from frontend_backend.swtpm_suboptions import OptionError
from storage.swtpm_crypto import Kdf, KeyFormat, SwtpmKey, key_of_file, key_of_password
from storage.swtpm_errors import SwtpmKeyUnusable

_LARGEST: Final = 64 * 1024  # bytes of a key or password file


def read_key(source: KeySource | None) -> SwtpmKey | None:
    """Return the key; its file is taken away where that is wanted, its descriptor closed.

    Raises:
        OptionError: it cannot be read or is none.

    """
    if source is None:
        return None
    content = _content(source)
    try:
        if source.password:
            key = key_of_password(content, Kdf(source.kdf), source.size)
        else:
            key = key_of_file(content, KeyFormat(source.format), source.size)
    except SwtpmKeyUnusable as error:
        raise OptionError(str(error)) from error
    if source.remove and source.file is not None:
        with suppress(FileNotFoundError):
            _remove(source.file)
    return key


def _content(source: KeySource) -> bytes:
    what = "passphrase" if source.password else "key"
    if source.file is not None:
        try:
            descriptor = os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OptionError(f"Unable to open file {source.file}: {error.strerror}") from error
    else:
        assert source.descriptor is not None, "a key has a file or a descriptor"
        descriptor = source.descriptor
    try:
        with open(descriptor, "rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise OptionError(f"Unable to read {what}: {error.strerror}") from error
    if len(content) > _LARGEST:
        raise OptionError(f"Unable to read {what}: it is longer than {_LARGEST} bytes")
    return content


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        # the user wanted the key to be gone: that it is not must not stay unsaid
        raise OptionError(f"The key file {path} was read, but cannot be removed: {error.strerror}") from error
