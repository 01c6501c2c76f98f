"""The registers of the FIFO interface (TIS): offsets in a locality's page, and bits.

Source: PTP 6, TPM_ACCESS_x, TPM_STS_x, TPM_DATA_FIFO_x; the same in TIS 1.3 and in Mini-OS's tpm_tis.c.
"""

from enum import IntFlag
from typing import Final

ACCESS: Final = 0x00
STS: Final = 0x18
BURST_LOW: Final = 0x19
BURST_HIGH: Final = 0x1A
STS_CANCEL: Final = 0x1B  # bits 31..24 of the status
FIFO: Final = 0x24
COMMAND_CANCEL: Final = 0x01  # bit 24 of the status


class Access(IntFlag):
    """TPM_ACCESS_x."""

    REQUEST_USE = 0x02
    PENDING_REQUEST = 0x04  # read: another locality waits
    SEIZE = 0x08  # write
    BEEN_SEIZED = 0x10
    ACTIVE = 0x20  # write: relinquish
    VALID = 0x80


class Status(IntFlag):
    """TPM_STS_x, lowest byte."""

    RESPONSE_RETRY = 0x02  # write
    EXPECT = 0x08
    DATA_AVAILABLE = 0x10
    GO = 0x20  # write
    COMMAND_READY = 0x40
    VALID = 0x80
