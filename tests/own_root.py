"""Whether this process may shut others in: the kernel refuses pivot_root and user namespaces in a chroot."""

from pathlib import Path

import pytest

# unshare(2): EPERM in a chroot; pivot_root(2): EINVAL where the root is no mount point
HAS_OWN_ROOT = any(line.split()[4] == "/" for line in Path("/proc/self/mountinfo").read_text().splitlines())
needs_own_root = pytest.mark.skipif(not HAS_OWN_ROOT, reason="in a chroot the kernel refuses what shuts instances in")
