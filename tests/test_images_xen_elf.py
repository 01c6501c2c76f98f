"""images/xen/elf.py: a program without the zeros at the end of its segments is the same program."""

import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "images" / "xen"))
from elf import without_zeros

# Of the last section of the file only the beginning is not 0; .bss is behind it. Without a library, which has more.
PROGRAM = r"""
static char data[1 << 20] = "what the file has\n", empty[1 << 20];
static long call(long number, long one, const void *two, long three)
{
    __asm__ volatile("syscall" : "+a"(number) : "D"(one), "S"(two), "d"(three) : "rcx", "r11", "memory");
    return number;
}
void _start(void)
{
    volatile char *behind = data + 18, *last = empty + (1 << 20);
    long sum = 0;
    while (behind < data + (1 << 20))
        sum |= *behind++;
    for (behind = empty; behind < last;)
        sum |= *behind++;
    call(1, 1, data, 18);
    call(60, sum != 0, 0, 0);
}
"""


def test_a_program_without_its_zeros_is_smaller_and_does_the_same(tmp_path: Path) -> None:
    whole, smaller = tmp_path / "whole", tmp_path / "smaller"
    command = ["gcc", "-static", "-nostdlib", "-fno-stack-protector", "-O1", "-x", "c", "-", "-o", whole]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    smaller.write_bytes(without_zeros(whole.read_bytes()))
    smaller.chmod(0o755)
    said = [subprocess.run([path], capture_output=True, text=True, check=True).stdout for path in (whole, smaller)]
    assert said == ["what the file has\n"] * 2
    assert whole.stat().st_size - smaller.stat().st_size > 1_000_000
