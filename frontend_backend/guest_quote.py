"""`vtpm-guest-quote`: asks the vTPM, from inside the guest, for a deep quote, and writes the bundle.

One file, standard library only: it can be copied into a guest and run by its python3. It speaks to the TPM's device or
to a Unix socket that takes raw TPM commands; the resource manager (/dev/tpmrm0) lets no vendor command pass.
"""

import argparse
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence

CODE = 0x2000_0016
MAX_NONCE = 64
PCR_COUNT = 24
MAX_ANSWER = 4096
SECONDS = 120.0
TAG_20, TAG_12 = 0x8001, 0x00C1
MEANINGS = {
    0x922: "asked too often, or the hardware TPM is busy: try again in a second",
    0x800: "asked too often, or the hardware TPM is busy: try again in a second",
    0x120: "the manager gives no quotes for this vTPM: its group is not enrolled, or its hardware TPM is away",
    0x008: "the manager gives no quotes for this vTPM: its group is not enrolled, or its hardware TPM is away",
    0x100: "the TPM was not started up",
    0x101: "the vTPM is in failure mode: reset the platform",
    0x143: "this TPM knows no deep quotes (is it a vTPM of vtpm-manager?)",
    0x00A: "this TPM knows no deep quotes (is it a vTPM of vtpm-manager?)",
}
OK, FAILURE, USAGE, NOT_FOUND, DENIED, BUSY = 0, 1, 2, 3, 5, 8


class QuoteError(Exception):
    """There is no quote; `code` is the command's exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def selection_of(text: str) -> int:
    """Return the bit map of `0,2,4-7`. Raises argparse.ArgumentTypeError."""
    selected = 0
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            first, last = int(low), int(high if dash else low)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text[:80]}' names no PCRs: write for example 0,2,4-7") from None
        if not 0 <= first <= last < PCR_COUNT:
            raise argparse.ArgumentTypeError(f"'{part[:80]}': PCRs are numbered 0 to {PCR_COUNT - 1}")
        selected |= sum(1 << pcr for pcr in range(first, last + 1))
    return selected


def nonce_of(text: str) -> bytes:
    """Return a nonce given in hexadecimal. Raises argparse.ArgumentTypeError."""
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:140]}' is not hexadecimal") from None
    if not 1 <= len(nonce) <= MAX_NONCE:
        raise argparse.ArgumentTypeError(f"a nonce has 1 to {MAX_NONCE} bytes")
    return nonce


def command_of(nonce: bytes, selection: int, tag: int) -> bytes:
    """Return the TPM command (docs/attestation.md)."""
    body = struct.pack(">H", len(nonce)) + nonce + bytes([3]) + selection.to_bytes(3, "little")
    return struct.pack(">HII", tag, 10 + len(body), CODE) + body


def bundle_of(answer: bytes) -> bytes:
    """Return the bundle in an answer. Raises QuoteError."""
    if len(answer) < 10 or struct.unpack_from(">I", answer, 2)[0] != len(answer):
        raise QuoteError("the TPM's answer is no TPM packet", FAILURE)
    code = struct.unpack_from(">I", answer, 6)[0]
    if code:
        text = MEANINGS.get(code, "look the code up with tpm2_rc_decode")
        raise QuoteError(f"the TPM refused with 0x{code:x}: {text}", BUSY if code in (0x922, 0x800) else DENIED)
    if len(answer) < 12 or struct.unpack_from(">H", answer, 10)[0] != len(answer) - 12:
        raise QuoteError("the TPM's answer is cut short", FAILURE)
    return answer[12:]


def by_device(path: str) -> Callable[[bytes], bytes]:
    """Return what sends a command to a character device."""

    def transmit(command: bytes) -> bytes:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(device, command)
            return os.read(device, MAX_ANSWER)
        finally:
            os.close(device)

    return transmit


def by_socket(path: str) -> Callable[[bytes], bytes]:
    """Return what sends a command to a Unix socket."""

    def transmit(command: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS)
            sock.connect(path)
            sock.sendall(command)
            answer = b""
            while len(answer) < 10 or len(answer) < struct.unpack_from(">I", answer, 2)[0]:
                piece = sock.recv(MAX_ANSWER)
                if not piece:
                    break
                answer += piece
            return answer

    return transmit


def _put(bundle: bytes, path: str | None) -> None:
    """Write the bundle to a file, or print it. Raises QuoteError."""
    try:
        if path:
            with open(path, "wb") as file:
                file.write(bundle)
        else:
            sys.stdout.write(bundle.hex() + "\n")
            sys.stdout.flush()
    except OSError as error:
        code = DENIED if isinstance(error, PermissionError) else FAILURE
        where = path or "standard output"
        raise QuoteError(f"{where}: {error.strerror or error}. The quote was made, and is lost", code) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 1 failure, 2 usage, 3 no TPM, 5 refused, 8 try again."""
    parser = argparse.ArgumentParser(prog="vtpm-guest-quote", description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", default="/dev/tpm0", help="the TPM's device (default: /dev/tpm0)")
    where.add_argument("--socket", metavar="PATH", help="a Unix socket that takes raw TPM commands, instead")
    parser.add_argument("--nonce", required=True, type=nonce_of, metavar="HEX", help="1 to 64 bytes")
    parser.add_argument("--pcrs", default="0-15", type=selection_of, help="the vTPM's PCRs (default: 0-15)")
    parser.add_argument("--tpm", default="2.0", choices=("2.0", "1.2"), help="the vTPM's family (default: 2.0)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the bundle there (default: hexadecimal, printed)")
    options = parser.parse_args(argv)
    transmit = by_socket(options.socket) if options.socket else by_device(options.device)
    try:
        answer = transmit(command_of(options.nonce, options.pcrs, TAG_20 if options.tpm == "2.0" else TAG_12))
        bundle = bundle_of(answer)
        _put(bundle, options.output)
    except QuoteError as error:
        sys.stderr.write(f"vtpm-guest-quote: {error}\n")
        return error.code
    except OSError as error:
        place = options.socket or options.device
        sys.stderr.write(f"vtpm-guest-quote: {place}: {error.strerror or error}. There is no quote\n")
        if isinstance(error, PermissionError):
            return DENIED
        if isinstance(error, BlockingIOError):
            return BUSY
        return NOT_FOUND if isinstance(error, FileNotFoundError | ConnectionRefusedError) else FAILURE
    return OK


if __name__ == "__main__":
    sys.exit(main())
