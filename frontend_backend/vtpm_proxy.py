"""How Linux' vTPM proxy (/dev/vtpmx) is asked for a device: the request of its one ioctl, which is its answer too.

Source: linux/vtpm_proxy.h.
"""

import struct
from typing import Final

CONTROL: Final = "/dev/vtpmx"
NEW_DEVICE: Final = struct.Struct("=IIIII")  # struct vtpm_proxy_new_dev: flags, tpm_num, fd, major, minor
assert NEW_DEVICE.size == 20
IOC_NEW_DEV: Final = 3 << 30 | NEW_DEVICE.size << 16 | 0xA1 << 8 | 0x00  # _IOWR(0xa1, 0x00, ...)
FLAG_TPM2: Final = 1 << 0  # VTPM_PROXY_FLAG_TPM2
