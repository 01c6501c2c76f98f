"""What QEMU and libvirt are told to use a vTPM: arguments for a shell, an element for a domain's XML. Pure."""

import shlex
from typing import Final
from uuid import UUID
from xml.sax.saxutils import escape

# The device is the guest's choice: tpm-crb is what Windows and UEFI expect of a TPM 2.0, tpm-tis is there for both
# families (QEMU refuses tpm-crb for TPM 1.2).
_DEVICES: Final = {"2.0": "tpm-crb", "1.2": "tpm-tis"}


def qemu_arguments(control: str, vtpm: UUID, family: str) -> str:
    """Return QEMU's arguments, quoted for a shell, for the control socket at `control`.

    Ids carry the beginning of the UUID, so that they do not meet other devices' of the same command line.
    """
    number = vtpm.hex[:8]
    path = control.replace(",", ",,")  # how QEMU's options quote a comma
    words = (
        *("-chardev", f"socket,id=vtpm-{number}-ctrl,path={path}"),
        *("-tpmdev", f"emulator,id=vtpm-{number},chardev=vtpm-{number}-ctrl"),
        *("-device", f"{_DEVICES[family]},tpmdev=vtpm-{number}"),
    )
    return shlex.join(words)


def libvirt_xml(control: str, family: str) -> str:
    """Return the element for a domain's <devices>, in one line; libvirt 9.0 and newer know the external back end."""
    path = escape(control, {"'": "&apos;"})
    source = f"<source type='unix' mode='connect' path='{path}'/>"
    return f"<tpm model='{_DEVICES[family]}'><backend type='external'>{source}</backend></tpm>"
