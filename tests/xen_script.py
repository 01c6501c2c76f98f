"""A session of tests/xen_rig.py: a script's lines, run one by one in dom0 and in domains."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import xen_rig
from xen_consoles import Domain, domain_config, guest_config
from xen_link import XenError
from xen_rig import XenHost


def _options(words: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        found.setdefault(key, []).append(value)
    return found


def _created(host: XenHost, kind: str, name: str, words: list[str]) -> Domain:
    given = _options(words)
    lines = given.get("line", [])
    memory = int(given.get("memory", ["192" if kind == "@domain" else "160"])[0])
    vtpm, extra = given.get("vtpm", []), " ".join(given.get("extra", []))
    if kind == "@guest":
        config = guest_config(name, vtpm=vtpm, memory=memory, extra=extra, lines=lines)
    else:
        disks, iomem = given.get("disk", []), given.get("iomem", [""])[0]
        config = domain_config(name, memory=memory, disks=disks, iomem=iomem, vtpm=vtpm, extra=extra, lines=lines)
    domain = host.create(name, config)
    domain.ready()
    return domain


def obey(host: XenHost, line: str, domains: dict[str, Domain]) -> None:
    """Do what one line of a script says."""
    first, *words = line.split()
    if first in {"@guest", "@domain"}:
        domains[words[0]] = _created(host, first, words[0], words[1:])
    elif first == "@power-off":
        host.power_off()
    elif first == "@power-cut":
        host.power_cut()
    elif first == "@boot":
        domains.clear()
        host.boot()
    elif first.endswith(":") and first[:-1] in domains:
        domains[first[:-1]].run(line.split(":", 1)[1].strip())
    else:
        host.run(line)


def main() -> int:
    """Run a script on a new machine, or one that was kept."""
    parser = argparse.ArgumentParser(
        prog="tests/xen_rig.py", description=xen_rig.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=argparse.FileType(), nargs="?", default=sys.stdin)
    parser.add_argument("--keep", type=Path, help="a directory for disks and the TPM, which stays")
    parser.add_argument("--disks", type=int, default=2, help="data disks for domains (default: %(default)s)")
    options = parser.parse_args()
    directory = options.keep or Path(tempfile.mkdtemp(prefix="xen"))
    directory.mkdir(exist_ok=True)
    host = XenHost(directory, disks=options.disks, progress=sys.stdout)
    domains: dict[str, Domain] = {}
    try:
        host.boot()
        for line in options.script:
            if line.strip() and not line.startswith("#"):
                try:
                    obey(host, line.strip(), domains)
                except (XenError, TimeoutError) as error:
                    host.note(f"FAILED: {error}")
    finally:
        host.power_cut()
        if options.keep is None:
            shutil.rmtree(directory)
    return 0
