"""Touches one page of physical memory in a process of its own: if Xen refuses it, that process gets the SIGBUS.

Run as a program, with nothing but the standard library: `python -I -S hwtpm_tis_probe.py DESCRIPTOR ADDRESS`. Ends with
0 when a byte could be read; with the number of the error when the kernel refused the mapping; by SIGBUS otherwise.
It keeps no secret and leaves no core.
"""

import mmap
import resource
import sys


def main() -> int:
    """Map the page at ADDRESS of the open file DESCRIPTOR and read its first byte."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    descriptor, address = int(sys.argv[1]), int(sys.argv[2])
    try:
        page = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=address)
    except OSError as error:
        return error.errno or 1
    page[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
