"""What tests do with the TPM of a Linux guest, by its tpm2-tools: measured boot, secrets sealed to PCRs, counters."""

import re

from qemu_rig import Agent

SEALED, INDEX, COUNTER = "0x81000016", "0x1500016", "0x1500017"
BOOT_PCRS = "sha256:0,2,4,7"
SECRET = "what the disk is encrypted with"


def devices(guest: Agent) -> None:
    """There is a TPM device, and one with the kernel's resource manager."""
    guest.good("test -c /dev/tpm0 && test -c /dev/tpmrm0")


def pcrs(guest: Agent, selection: str = "0,1,2,3,4,5,6,7") -> dict[int, str]:
    said = guest.good(f"tpm2 pcrread sha256:{selection}")
    return {int(number): value.lower() for number, value in re.findall(r"(\d+)\s*: 0x([0-9A-F]{64})", said)}


def measured_boot(guest: Agent) -> dict[int, str]:
    """The firmware measured into PCRs 0 to 7, and its log explains each value."""
    found = pcrs(guest)
    assert sorted(found) == list(range(8))
    assert not [number for number, value in found.items() if not value.strip("0")], found
    said = guest.good("tpm2 eventlog /sys/kernel/security/tpm0/binary_bios_measurements | sed -n '/^pcrs:/,$p'")
    (bank,) = re.findall(r"  sha256:\n((?:    \d+.*\n?)+)", said)
    logged = {int(number): value for number, value in re.findall(r"(\d+)\s*: 0x([0-9a-f]{64})", bank)}
    assert {number: logged[number] for number in found} == found
    return found


def seal(guest: Agent) -> None:
    """Put the secret into the TPM twice, readable in this boot's state only: as a sealed object, and in NV."""
    for command in (
        "tpm2 createprimary -Q -C o -g sha256 -G ecc -c primary",
        f"tpm2 createpolicy -Q --policy-pcr -l {BOOT_PCRS} -L policy",
        f"printf %s '{SECRET}' >secret",
        "tpm2 create -Q -C primary -L policy -i secret -u sealed.pub -r sealed.priv",
        "tpm2 load -Q -C primary -u sealed.pub -r sealed.priv -c sealed",
        f"tpm2 evictcontrol -Q -C o -c sealed {SEALED}",
        f"tpm2 nvdefine -Q {INDEX} -C o -s {len(SECRET)} -L policy -a 'policyread|ownerwrite'",
        f"tpm2 nvwrite {INDEX} -C o -i secret",
    ):
        guest.good(command)


def unsealed(guest: Agent) -> tuple[bool, bool]:
    """Whether the sealed object and the NV index give the secret."""
    found = []
    for command in (f"tpm2 unseal -c {SEALED} -p pcr:{BOOT_PCRS}", f"tpm2 nvread {INDEX} -P pcr:{BOOT_PCRS}"):
        code, said = guest.run(command)
        assert (code == 0) == (SECRET in said), said
        found.append(code == 0)
    return found[0], found[1]


def extend(guest: Agent, pcr: int, what: str) -> str:
    """Extend by a word's digest; returns the PCR's new value."""
    guest.good(f"tpm2 pcrextend {pcr}:sha256=$(printf %s '{what}' | sha256sum | cut -d' ' -f1)")
    return pcrs(guest, str(pcr))[pcr]


def define_counter(guest: Agent) -> None:
    guest.good(f"tpm2 nvdefine -Q {COUNTER} -C o -a 'nt=counter|authread|authwrite'")
    increment(guest)


def increment(guest: Agent) -> None:
    guest.good(f"tpm2 nvincrement {COUNTER}")


def counter(guest: Agent) -> int:
    return int(guest.good(f"tpm2 nvread {COUNTER} -s 8 | xxd -p"), 16)


def start_counting(guest: Agent) -> None:
    guest.good(f"counting {COUNTER} >/tmp/counted 2>&1 & counting=$!")


def stop_counting(guest: Agent) -> str:
    """Stop what counts; returns what it said. It must not have met an error."""
    return guest.good("kill $counting; wait $counting; code=$?; cat /tmp/counted; (exit $code)")
