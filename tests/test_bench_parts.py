"""Where a sample of perf is counted by `./dev bench slowdisk`: by process, and by the part of it that ran."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("bench")))

import parts

# As perf script writes them, with --fields pid,ip,sym,dso.
SCRIPT = """
 4400
\tffffffff821f51c6 finish_task_switch.isra.0 ([kernel.kallsyms])
\tffffffff821f51c6 __schedule ([kernel.kallsyms])
\tffffffff821f51c6 io_schedule ([kernel.kallsyms])
\tffffffff821f51c6 __x64_sys_fdatasync ([kernel.kallsyms])
\t          10ea26 __GI_fdatasync (/usr/lib/x86_64-linux-gnu/libc.so.6)

 4400
\tffffffff821f51c6 iowrite16 ([kernel.kallsyms])
\tffffffff821f51c6 __x64_sys_fdatasync.part.0 ([kernel.kallsyms])

 4400
\t           ff05b [unknown] (/usr/bin/python3.11)

 4376
\t           ff05b ossl_aes_gcm_encrypt_avx512 (/usr/lib/python3/_rust.abi3.so)

    0
\tffffffff821f51c6 native_halt ([kernel.kallsyms])

   99
\t           ff05b [unknown] ([unknown])
"""


def test_every_sample_is_counted_once_by_process_and_part() -> None:
    shares = parts.shares_of(SCRIPT, {"instances": [4400], "manager": [4376]})
    assert shares == {
        ("instances", "kernel: scheduler"): pytest.approx(1 / 6),
        ("instances", "kernel: writing and flushing"): pytest.approx(1 / 6),
        ("instances", "interpreter and other libraries"): pytest.approx(1 / 6),
        ("manager", "encryption and digests"): pytest.approx(1 / 6),
        (parts.OTHERS, parts.IDLE): pytest.approx(1 / 6),
        (parts.OTHERS, "interpreter and other libraries"): pytest.approx(1 / 6),
    }


@pytest.mark.parametrize("part", parts.PARTS)
def test_the_table_has_a_line_for_each_part_and_no_share_is_lost(part: str) -> None:
    table = parts.cpu_table({("manager", part): 0.25, (parts.OTHERS, part): 0.75}, 1000.0, ("instances", "manager"))
    (row,) = [row for row in table.rows if row[0] == part]
    assert row[1] == "0"
    assert 3 * int(row[2]) == int(row[3]) > 0
