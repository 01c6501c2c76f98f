"""What the swtpm command prints and ends: usage, capabilities, states, what libtpms says of itself.

Source: swtpm's capabilities.c, swtpm_nvstore.c (SWTPM_NVRAM_PrintJson); reference/swtpm-libtpms-qemu.md 3.2, 3.3.
"""

import json
from typing import Final

from frontend_backend.release import RELEASE
from frontend_backend.swtpm_options import Interface
from frontend_backend.tpmhdr import TpmFamily
from storage.swtpm_files import Where, open_files
from vtpm_instance.libtpms import Tpm

LEVEL: Final = "0.11.0"  # of swtpm's interface: what a caller that asks for the version may rely on
_FEATURES_INFO: Final = 4  # TPMLIB_INFO_TPMFEATURES
_BEFORE_SIZES: Final = (
    *("tpm-1.2", "tpm-2.0", "tpm-send-command-header", "flags-opt-startup", "flags-opt-disable-auto-shutdown"),
    *("ctrl-opt-terminate", "cmdarg-seccomp", "cmdarg-key-fd", "cmdarg-pwd-fd", "cmdarg-print-states"),
    *("cmdarg-chroot", "cmdarg-migration", "nvram-backend-dir", "nvram-backend-file"),
)
_AFTER_SIZES: Final = (
    *("cmdarg-print-info", "tpmstate-opt-lock", "tpmstate-dir-backend-opt-backup"),
    *("tpmstate-dir-backend-opt-fsync", "systemd-notify"),
)

_USAGE: Final = """\
Usage: {program} {interface} [options]

The following options are supported:

{own}\
-f|--fd <fd>     : take TPM commands from this descriptor
-d|--daemon      : daemonize the TPM
--ctrl type=[unixio|tcp][,path=<path>][,port=<port>[,bindaddr=<address>[,ifname=<ifname>]]]
       [,fd=<fd>|clientfd=<fd>][,mode=0...][,uid=<uid>][,gid=<gid>][,terminate]
                 : the control channel
--tpmstate dir=<dir>|backend-uri=dir://<dir>|file://<file>[,mode=0...][,lock][,backup][,fsync[=false]]
                 : where the TPM's state is; TPM_PATH of the environment else
--key file=<path>|fd=<fd>[,mode=aes-cbc|aes-256-cbc][,format=hex|binary][,remove[=true|false]]
--key pwdfile=<path>|pwdfd=<fd>[,mode=aes-cbc|aes-256-cbc][,kdf=sha512|pbkdf2][,remove[=true|false]]
                 : the key of the state files
--migration-key ...
                 : the key of state blobs that leave over the control channel
--migration [incoming][,release-lock-outgoing]
--log file=<path>|fd=<fd>[,level=<n>][,prefix=<prefix>][,truncate]
--pid file=<path>|fd=<fd>
--locality [reject-locality-4][,allow-set-locality]
--flags [not-need-init][,startup-clear|startup-state|startup-deactivated|startup-none][,disable-auto-shutdown]
-r|--runas <user>
-R|--chroot <path>
--tpm2           : TPM 2.0; else it is a TPM 1.2
--seccomp action=none|log|kill
--profile name=<name>|profile=<json>|file=<path>|fd=<fd>
--print-capabilities
--print-states
--print-info <flags>
--manager[=<socket>] [--vtpm <vtpm>] [--guest <name>]
                 : a vTPM of vtpm-manager in place of state files; not swtpm's
-h|--help        : this text
"""
_OWN: Final = {
    Interface.SOCKET: """\
-p|--port <port> : use the given port
-t|--terminate   : end once the data connection has been lost
--server [type=tcp][,port=<port>[,bindaddr=<address>[,ifname=<ifname>]]][,fd=<fd>][,disconnect]
--server type=unixio[,path=<path>][,fd=<fd>][,mode=0...][,uid=<uid>][,gid=<gid>][,disconnect]
                 : the data channel
""",
    Interface.CHARDEV: """\
-c|--chardev <device>
                 : take TPM commands from this device
--vtpm-proxy     : make a /dev/tpmN through the Linux vTPM proxy
""",
}
GENERAL: Final = """\
TPM emulator of vtpm-manager, in swtpm's place.

Usage: {program} socket|chardev [options]
       {program} -v|--version

Use the --help option to see the options of each interface type.
"""


def usage(program: str, interface: Interface) -> str:
    """Return what --help prints."""
    return _USAGE.format(program=program, interface=interface.value, own=_OWN[interface])


def version(tpm: Tpm | None = None) -> str:
    """Return what --version prints."""
    library = "" if tpm is None else f", libtpms {'.'.join(map(str, tpm.version()))}"
    return f"TPM emulator version {LEVEL}, as vtpm-manager {RELEASE} has it{library}"


def capabilities(tpm: Tpm, *, tpm2: bool) -> str:
    """Return what --print-capabilities prints; `version` is that of swtpm's interface, `implementation` ours."""
    features = [*_BEFORE_SIZES]
    if tpm2:
        features += [f"rsa-keysize-{size}" for size in _rsa_sizes(tpm)]
    if tpm2 and tpm.profiles:
        features += ["cmdarg-profile", "cmdarg-print-profiles"]
    return json.dumps(
        {
            "type": "swtpm",
            "features": [*features, *_AFTER_SIZES],
            "profiles": _profiles(tpm) if tpm2 and tpm.profiles else {},
            "version": LEVEL,
            "implementation": f"vtpm-manager {RELEASE}",
        }
    )


def _rsa_sizes(tpm: Tpm) -> list[int]:
    return list(_info(tpm, _FEATURES_INFO)["TPMFeatures"].get("RSAKeySizes", []))


def _info(tpm: Tpm, flags: int) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = json.loads(tpm.info(TpmFamily.TPM_2_0, flags).rstrip(b"\0"))
    return found


def _profiles(tpm: Tpm) -> dict[str, object]:
    found = json.loads(tpm.info(TpmFamily.TPM_2_0, _PROFILES_INFO).rstrip(b"\0"))
    return {
        "names": [profile["Name"] for profile in found["AvailableProfiles"]],
        **{
            name: {
                "canbedisabled": found[member]["CanBeDisabled"],
                "implemented": found[member]["Implemented"],
            }
            for name, member in (("algorithms", "RuntimeAlgorithms"), ("commands", "RuntimeCommands"))
        },
    }


_PROFILES_INFO: Final = 0x40 | 0x08 | 0x10  # available profiles, run-time algorithms, run-time commands
AVAILABLE_PROFILES: Final = 0x40


def states(where: Where) -> str:
    """Return what --print-states prints: the blobs that are stored, without a lock. Raises SwtpmStateError."""
    files = open_files(where)
    try:
        found = [{"name": name, "size": size} for name, size in files.sizes().items()]
    finally:
        files.close()
    return json.dumps({"type": "swtpm", "states": found})
