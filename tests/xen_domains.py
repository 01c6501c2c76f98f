"""The manager, its back end and instances in domains of their own, led command by command: steps that tests share.

Each step is a command that a person could type into that domain's console; the transcript has it with its answer.
"""

import re
from pathlib import Path
from typing import Final

from xen_rig import Domain, XenHost, domain_config, guest_config

Place = Domain | XenHost  # dom0
STATE, RUNTIME = "/data/state", "/run/vtpm-manager"
LOCALITY_2: Final = "fed42,1"
MANAGER_MIB: Final = 320
INSTANCE_MIB: Final = 256
GUEST_MIB: Final = 128
START_SECONDS: Final = (
    300.0  # the manager's start, with a rehearsal of instances, under emulation: 40 on a quiet machine
)
RUN_MANAGER: Final = f"vtpm-manager run --state-dir {STATE} --runtime-dir {RUNTIME}"
RUN_BACK_END: Final = f"vtpm-xen run --runtime-dir {RUNTIME}"
MANAGER_READY: Final = "Waiting for commands from vTPMs"
NV_INDEX: Final = "0x1500016"
_PEEK: Final = (
    "import mmap, os; page = mmap.mmap(os.open('/dev/mem', os.O_RDWR), 4096, offset={page:#x}); print(page[0])"
)
SIGBUS_CODE: Final = 128 + 7


def driver_domain(host: XenHost, name: str, disk: str, *, memory: int = MANAGER_MIB, iomem: str = LOCALITY_2) -> Domain:
    """A domain with Python and this project that may be a back end, its own data disk, and pages of the TPM."""
    config = domain_config(
        name, memory=memory, processors=host.processors, disks=[disk], iomem=iomem, lines=["driver_domain=1"]
    )
    domain = host.create(name, config)
    domain.ready()
    return domain


def instance_domain(host: XenHost, name: str, disk: str, manager: str, vtpm: str) -> Domain:
    """A domain for one vTPM's instance: front end of the manager's domain, no page of the TPM."""
    device = f"backend={manager},uuid={vtpm}"
    config = domain_config(name, memory=INSTANCE_MIB, disks=[disk], vtpm=[device], lines=["driver_domain=1"])
    domain = host.create(name, config)
    domain.ready()
    return domain


def guest(host: XenHost, name: str, back_end: str, vtpm: str) -> Domain:
    """A guest with Linux's own driver."""
    made = host.create(name, guest_config(name, vtpm=[f"backend={back_end},uuid={vtpm}"], memory=GUEST_MIB))
    made.ready()
    return made


def launch(domain: Place, command: str) -> str:
    """Start a program as its unit does, again where that may help; returns the name of its log."""
    log = f"/run/{Path(command.split(maxsplit=1)[0]).name}.log"
    again = "case $? in 0 | 2 | 3 | 5 | 6 | 143) break ;; esac; sleep 2"
    once = f"{command} & echo $! >{log}.pid; wait $!"
    domain.good(f">>{log}; (while :; do {once}; {again}; done) </dev/null >>{log} 2>&1 &")
    return log


def awaited(domain: Place, log: str, ready: str, seconds: float = START_SECONDS) -> None:
    """Wait until a program says that it is ready; without forks, which would cost the program a tenth."""
    said = f'while read -r line; do case "$line" in *"{ready}"*) exit 0 ;; esac; done <{log}'
    pause = f"mkfifo {log}.pause; exec 9<>{log}.pause; i=0; while [ $i -lt {int(seconds)} ]; do {said}"
    domain.good(f"({pause}; read -r -t 1 line <&9; i=$((i+1)); done; tail -n 30 {log}; exit 1)", seconds + 60)


def background(domain: Place, command: str, ready: str, seconds: float = START_SECONDS) -> None:
    """Start a program and wait until it says that it is ready."""
    awaited(domain, launch(domain, command), ready, seconds)


def end(domain: Place, program: str) -> None:
    """End what `background` started, and wait for it."""
    pid = f"$(cat /run/{program}.log.pid)"
    domain.good(f"kill {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done; rm /run/{program}.log*")


def install(domain: Place, pcrs: str = "sha256:0,1,7") -> None:
    """Make the installation, sealed by the hardware TPM at locality 2."""
    domain.good(f"mkdir -m 700 {STATE} && vtpm-recovery-key new /data/recovery.pem")
    words = f"--tcti tis:locality=2 --pcrs {pcrs} --recovery /data/recovery.pem.pub"
    domain.good(f"vtpm-manager init --state-dir {STATE} {words}")


def start_manager(domain: Place, seconds: float = START_SECONDS) -> None:
    background(domain, RUN_MANAGER, MANAGER_READY, seconds)


def start_back_end(domain: Place) -> None:
    background(domain, RUN_BACK_END, "ready")


def start_both(domain: Place, seconds: float = START_SECONDS) -> None:
    """Start the manager and the back end, which waits for it, at the same time."""
    logs = [launch(domain, command) for command in (RUN_MANAGER, RUN_BACK_END)]
    for log, ready in zip(logs, (MANAGER_READY, "ready"), strict=True):
        awaited(domain, log, ready, seconds)


def start_instance(domain: Domain) -> None:
    background(domain, "vtpm-xen-instance --image /data/vtpm.img", "ready")


def new_vtpm(domain: Place, name: str, options: str) -> str:
    """Make a vTPM and attach it for the guest of its name; returns its UUID."""
    uuid = domain.good(f"vtpm-add --name {name} --quiet")
    assert re.fullmatch(r"[0-9a-f-]{36}", uuid), uuid
    domain.good(f"vtpm-attach {name} {name} --frontend xen {options} --quiet")
    return uuid


def only_locality_two(domain: Domain) -> None:
    """Show that Xen itself keeps the domain from the pages of the other localities: whoever touches one is ended."""
    code, said = touch(domain, 0xFED42000)
    assert (code, said.strip().isdecimal()) == (0, True), f"the page of locality 2: {code} {said}"
    code, said = touch(domain, 0xFED40000)
    assert code == SIGBUS_CODE, f"the page of locality 0 was there: {code} {said}"


def no_tpm_at_all(domain: Domain) -> None:
    """Show that the domain has neither a page of the TPM nor a device of it."""
    for page in (0xFED40000, 0xFED42000):
        code, said = touch(domain, page)
        assert code == SIGBUS_CODE, f"{page:#x} was there: {code} {said}"
    assert domain.run("ls /dev/tpm0 /dev/tpmrm0")[0] != 0


def touch(domain: Domain, page: int) -> tuple[int, str]:
    """Read the first byte of a page of device memory."""
    return domain.run(f'python3.11 -I -S -c "{_PEEK.format(page=page)}"')


def write_secret(domain: Domain, secret: str) -> None:
    """Put a secret into the guest's TPM, by the guest's own commands, and read it back."""
    domain.good(f"tpm2 nvdefine {NV_INDEX} -C o -s {len(secret)} -a 'ownerread|ownerwrite'")
    domain.good(f"printf {secret} | tpm2 nvwrite {NV_INDEX} -C o -i -")
    assert read_secret(domain, secret) == secret


def read_secret(domain: Domain, secret: str) -> str:
    return domain.good(f"tpm2 nvread {NV_INDEX} -C o -s {len(secret)}")


def write_more(domain: Domain) -> None:
    """Change what is durable: this is answered only when a manager has committed it."""
    domain.good("tpm2 nvdefine 0x1500017 -C o -s 8 -a 'ownerread|ownerwrite'")


def sealed_and_opened(domain: Domain, secret: str) -> None:
    """Have the guest's TPM seal something under a key of its own, and unseal it."""
    domain.good("tpm2 createprimary -Q -C o -G ecc -c /tmp/primary")
    domain.good(f"printf {secret} | tpm2 create -Q -C /tmp/primary -i - -u /tmp/public -r /tmp/private")
    domain.good("tpm2 flushcontext -t")
    domain.good("tpm2 load -Q -C /tmp/primary -u /tmp/public -r /tmp/private -c /tmp/sealed")
    assert domain.good("tpm2 unseal -c /tmp/sealed") == secret
