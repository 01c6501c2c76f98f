"""Boot measurements: what a guest is started with is in its vTPM's PCRs, and the event log explains them.

Every PCR is computed here with hashlib from the files; the log is read by tpm2_eventlog and by a parser of this test's.
"""

import hashlib
import os
import struct
from pathlib import Path

import pytest
from e2e_rig import Guest, Installation, may_enter
from vtpm_instance_commands import command12

pytestmark = pytest.mark.e2e
BANKS = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
KERNEL, CMDLINE, INITRD = b"a kernel" * 999, "root=/dev/xvda1 console=hvc0,115200 ip=a,b=c", os.urandom(70_000)


def shown(vtpms: Installation, tcti: str) -> dict[str, dict[int, bytes]]:
    """PCRs 0 to 7 of every bank of a vTPM, as tpm2_pcrread lists them."""
    found: dict[str, dict[int, bytes]] = {}
    values: dict[int, bytes] = {}
    for line in vtpms.tool(
        tcti, "tpm2_pcrread", "+".join(f"{bank}:0,1,2,3,4,5,6,7" for bank in BANKS)
    ).out.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if value:
            values[int(name)] = bytes.fromhex(value.removeprefix("0x"))
        else:
            values = found.setdefault(name, {})
    return found


def extended(bank: str, *contents: bytes) -> bytes:
    value = bytes(BANKS[bank])
    for content in contents:
        value = hashlib.new(bank, value + hashlib.new(bank, content).digest()).digest()
    return value


def check(vtpms: Installation, tcti: str, kernel: bytes, *others: bytes) -> None:
    banks = shown(vtpms, tcti)
    assert banks.keys() == BANKS.keys()
    for bank, size in BANKS.items():
        wanted = dict.fromkeys(range(8), bytes(size))
        wanted[4] = extended(bank, kernel) if kernel else wanted[4]
        wanted[5] = extended(bank, *others)
        assert banks[bank] == wanted, bank


def files(where: Path) -> tuple[str, ...]:
    (where / "vmlinuz").write_bytes(KERNEL)
    (where / "initrd.img").write_bytes(INITRD)
    # any order on the command line; the order of the extends is pv-grub's
    return (
        *("--measure", f"initrd={where / 'initrd.img'}", "--measure", f"cmdline={CMDLINE}"),
        *("--measure", f"kernel={where / 'vmlinuz'}"),
    )


def tools_pcrs(vtpms: Installation, log: Path) -> dict[str, dict[int, bytes]]:
    """What tpm2_eventlog makes of a log: its last section has the PCRs of each bank."""
    found: dict[str, dict[int, bytes]] = {}
    text = vtpms.tool("none", "tpm2_eventlog", str(log)).out
    for line in text[text.rindex("\npcrs:") :].splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in BANKS:
            bank = found.setdefault(name, {})
        elif value:
            bank[int(name)] = int(value, 16).to_bytes(BANKS[list(found)[-1]])
    return found


def test_every_bank_has_the_boot_and_the_log_explains_it(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("web")
    options = files(tmp_path)
    web = vtpms.attach("web", "guest", *options)
    assert (web["measured"], web["measure"], web["late_attach"]) == ("kernel,cmdline,initrd",) * 2 + (None,)
    check(vtpms, web["tcti"], KERNEL, CMDLINE.encode(), INITRD)
    log = tmp_path / "log"
    told = vtpms.command("vtpm-event-log", "web", "-o", str(log), "--json").json
    assert (told["format"], told["pcr4"]) == ("crypto-agile", extended("sha256", KERNEL).hex())
    assert tools_pcrs(vtpms, log) == {
        bank: {4: extended(bank, KERNEL), 5: extended(bank, CMDLINE.encode(), INITRD)} for bank in BANKS
    }
    # the boot that is, not the next one; and each boot again, whoever is alive meanwhile
    (tmp_path / "vmlinuz").write_bytes(b"another kernel")
    vtpms.command("vtpm-hibernate", "web")
    check(vtpms, web["tcti"], KERNEL, CMDLINE.encode(), INITRD)
    vtpms.kill()
    vtpms.start()
    assert vtpms.show("web")["measured"] == "kernel,cmdline,initrd"
    vtpms.command("vtpm-reset-platform", "web")
    check(vtpms, web["tcti"], KERNEL, CMDLINE.encode(), INITRD)


def test_the_next_boot_is_measured_anew_and_the_log_is_of_the_present_one(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("web")
    web = vtpms.attach("web", "guest", *files(tmp_path))
    (tmp_path / "vmlinuz").write_bytes(b"another kernel")
    (tmp_path / "cmdline").write_text(f"{CMDLINE}\n")
    names = ("--measure", f"kernel={tmp_path / 'vmlinuz'}", "--measure", f"cmdline=@{tmp_path / 'cmdline'}")
    changed = vtpms.command("vtpm-measure", "web", *names, "--json").json
    assert (changed["measured"], changed["measure"]) == ("kernel,cmdline,initrd", "kernel,cmdline")
    check(vtpms, web["tcti"], KERNEL, CMDLINE.encode(), INITRD)
    guest = Guest(web["endpoint"])
    guest.extend(4, b"\x11" * 32)
    guest.close()
    vtpms.command("vtpm-reset-platform", "web")
    check(vtpms, web["tcti"], b"another kernel", CMDLINE.encode())
    assert vtpms.show("web")["measured"] == "kernel,cmdline"
    assert vtpms.command("vtpm-measure", "web", "--json").json["measure"] is None
    assert vtpms.command("vtpm-event-log", "web", "--json").json["pcr4"] == extended("sha256", b"another kernel").hex()
    vtpms.command("vtpm-reset-platform", "web")
    check(vtpms, web["tcti"], b"")
    assert vtpms.command("vtpm-event-log", "web", "--json").json["pcr4"] is None


def test_a_tpm_1_2_and_digests_that_a_toolstack_has_computed(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("old", "--tpm", "1.2")
    digests = ",".join(f"{bank}={hashlib.new(bank, KERNEL).hexdigest()}" for bank in BANKS)
    old = vtpms.attach("old", "guest", "--measure", f"kernel:{digests}", "--measure", f"cmdline={CMDLINE}")
    guest = Guest(old["endpoint"])
    values = [guest.good(command12(0x15, pcr.to_bytes(4)))[-20:] for pcr in range(8)]
    guest.close()
    wanted = [bytes(20)] * 8
    wanted[4], wanted[5] = extended("sha1", KERNEL), extended("sha1", CMDLINE.encode())
    assert values == wanted
    log = tmp_path / "log"
    vtpms.command("vtpm-event-log", "old", "-o", str(log))
    events, rest = [], log.read_bytes()
    while rest:  # TCG_PCClientPCREvent: PCR, EV_IPL, SHA-1, size, data
        pcr, kind, digest, size = struct.unpack_from("<II20sI", rest)
        events.append((pcr, kind, digest, rest[32 : 32 + size]))
        rest = rest[32 + size :]
    assert events == [
        (4, 0x0D, hashlib.sha1(KERNEL).digest(), b"kernel"),
        (5, 0x0D, hashlib.sha1(CMDLINE.encode()).digest(), b"cmdline"),
    ]


def test_what_cannot_be_is_refused_and_nothing_is_attached(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("web")
    kernel = f"kernel={tmp_path / 'vmlinuz'}"
    (tmp_path / "vmlinuz").write_bytes(KERNEL)
    for words, code in (
        (("--measure", "kernel"), 2),
        (("--measure", f"kernel={tmp_path / 'none'}"), 3),
        (("--measure", f"kernel={tmp_path}"), 3),
        (("--measure", "/dev/zero"), 2),
        (("--measure", "kernel=/dev/zero"), 2),
        (("--measure", "kernel:sha256=" + "00" * 32), 2),
        (("--measure", "firmware=x"), 2),
        (("--measure", kernel, "--measure", kernel), 2),
        (("--measure", kernel, "--startup", "none"), 2),
        (("--measure", kernel, "--frontend", "qemu"), 2),
        (("--measure", kernel, "--hwinitpcrs", "0-7"), 2),
        (("--measure", "toolstack"), 2),
    ):
        answer = vtpms.command("vtpm-attach", "web", "guest", *words, check=False)
        assert (answer.code, "Nothing was done" in answer.err) == (code, True), f"{words}: {answer.err}"
    assert vtpms.show("web")["state"] == "added"
    assert vtpms.command("vtpm-measure", "web", "--measure", kernel, check=False).code == 4


@pytest.mark.skipif(os.geteuid() != 0 or not may_enter(65534), reason="no other user can run our commands here")
def test_the_manager_opens_no_file_for_who_may_not(vtpms: Installation, tmp_path: Path) -> None:
    """The digest of a file tells whoever may try contents: so it is the command that reads it."""
    vtpms.add("web")
    secret = tmp_path / "vmlinuz"
    secret.write_bytes(KERNEL)
    secret.chmod(0o600)
    words = ("vtpm-attach", "web", "guest", "--measure", f"kernel={secret}")
    answer = vtpms.command(*words, check=False, user=65534)
    assert (answer.code, "cannot be read" in answer.err) == (3, True), answer.err
