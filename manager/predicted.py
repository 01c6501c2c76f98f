"""PCR values written on a command line, PCR=HEX."""

from typing import Final

from manager.errors import UsageError

_DIGEST_BYTES: Final = 32  # of the SHA-256 bank


def parse_predicted(pairs: list[str]) -> dict[int, bytes]:
    """Return PCR values written as PCR=HEX.

    Raises:
        UsageError: not of that form, or not 32 bytes, or two values for one PCR.

    """
    predicted: dict[int, bytes] = {}
    for pair in pairs:
        pcr, equals, value = pair.partition("=")
        try:
            digest = bytes.fromhex(value)
        except ValueError:
            digest = b""
        if not equals or not (pcr.isascii() and pcr.isdecimal()) or len(digest) != _DIGEST_BYTES:
            raise UsageError(f"'{pair[:80]}' is no predicted PCR: write PCR=HEX with 64 hexadecimal digits")
        if predicted.setdefault(int(pcr), digest) != digest:
            raise UsageError(f"there are two values for PCR {int(pcr)}: give one")
    return predicted
