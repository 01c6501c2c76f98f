"""Programs that unlock disks and credentials with a TPM: systemd-creds, systemd-cryptenroll and clevis, with LUKS2."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from clients_rig import PCR_7, Programs, message_bus, resource_manager
from e2e_rig import Installation, installation

pytestmark = pytest.mark.e2e
_IMAGE_BYTES = 20 * 1024 * 1024  # LUKS2 takes 16 MiB of it for its header
# What systemd-cryptsetup does at boot, without the device mapper, which wants a kernel that has it: libcryptsetup
# loads systemd's token library, hands it the TPM device that crypttab names, and tries the key that comes out.
_OPEN_BY_TOKEN = """
import ctypes, sys
class Parameters(ctypes.Structure):  # struct systemd_tpm2_plugin_params
    _fields_ = [("pcrs", ctypes.c_uint32), ("device", ctypes.c_char_p), ("signature", ctypes.c_char_p)]
library, context = ctypes.CDLL("libcryptsetup.so.12"), ctypes.c_void_p()
assert library.crypt_init(ctypes.byref(context), sys.argv[1].encode()) == 0
assert library.crypt_load(context, b"LUKS2", None) == 0
opened = library.crypt_activate_by_token_pin
opened.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t,
                   ctypes.c_void_p, ctypes.c_uint32]
parameters = Parameters(0xFFFFFFFF, sys.argv[2].encode(), None)
print(opened(context, None, b"systemd-tpm2", -1, None, 0, ctypes.addressof(parameters), 0))
"""


@dataclass
class Host:
    """Programs, and two vTPMs: of "one" what tools connect to, of "two" through a resource manager."""

    programs: Programs
    vtpms: Installation
    one: str
    two: str
    managed: str

    def measure(self, tcti: str) -> None:
        """Extend PCR 7, as firmware does."""
        self.vtpms.tool(tcti, "tpm2_pcrextend", PCR_7)

    def boot(self, name: str, tcti: str) -> None:
        """A guest's machine is reset, and its firmware measures what it always does."""
        self.vtpms.command("vtpm-reset-platform", name)
        self.measure(tcti)

    def luks(self, name: str) -> tuple[Path, Path]:
        """A LUKS2 image in a file, and a file with its passphrase."""
        image, passphrase = self.programs.home / f"{name}.img", self.programs.home / f"{name}.passphrase"
        image.write_bytes(b"")
        with image.open("r+b") as file:
            file.truncate(_IMAGE_BYTES)
        passphrase.write_text("of the administrator")
        cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
        words = ("luksFormat", "--batch-mode", "--type", "luks2", *cheap)
        self.programs.run("cryptsetup", *words, str(image), str(passphrase))
        return image, passphrase


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with installation() as made:
        made.init()
        made.start()
        for name in ("one", "two"):
            made.add(name)
        one, two = (str(made.attach(name, f"guest-{name}")["tcti"]) for name in ("one", "two"))
        with message_bus(made.base) as programs, resource_manager(programs, two, "two") as managed:
            ready = Host(programs, made, one, two, managed)
            ready.measure(one)
            ready.measure(two)
            yield ready


def test_a_credential_of_systemd_opens_in_its_vtpm_while_its_pcr_holds(host: Host) -> None:
    programs = host.programs
    credential = programs.home / "credential"
    sealed = ("encrypt", "--name=secret", "--with-key=tpm2", "--tpm2-pcrs=7")
    programs.run("systemd-creds", *sealed, f"--tpm2-device={host.managed}", "-", str(credential), given=b"of a service")
    assert b"of a service" not in credential.read_bytes()

    def opened(tcti: str) -> tuple[int, str]:
        answer = programs.run(
            "systemd-creds", "decrypt", "--name=secret", f"--tpm2-device={tcti}", str(credential), "-", check=False
        )
        return answer.code, answer.out

    for _ in range(5):  # each leaves a session behind, which the resource manager takes away
        assert opened(host.managed) == (0, "of a service")
    assert opened(host.two) == (0, "of a service"), "and without a resource manager"
    assert opened(host.one)[0] != 0, "another vTPM opens it"
    host.measure(host.two)
    assert opened(host.managed)[0] != 0, "it opens with other PCRs"
    host.boot("two", host.two)
    assert opened(host.two) == (0, "of a service")


def test_a_luks2_image_enrolled_by_systemd_opens_by_the_vtpm(host: Host) -> None:
    image, passphrase = host.luks("systemd")
    enrol = host.programs.with_(PASSWORD=passphrase.read_text())
    enrol.run("systemd-cryptenroll", f"--tpm2-device={host.one}", "--tpm2-pcrs=7", str(image))
    assert "systemd-tpm2" in host.programs.run("cryptsetup", "luksDump", str(image)).out
    (script := host.programs.home / "open_by_token.py").write_text(_OPEN_BY_TOKEN)

    def key_slot() -> int:
        return int(host.programs.run(sys.executable, str(script), str(image), host.one).out.split()[-1])

    assert key_slot() == 1
    host.measure(host.one)
    assert key_slot() < 0, "it opens with other PCRs"
    host.boot("one", host.one)
    assert key_slot() == 1
    host.vtpms.restart()
    assert key_slot() == 1


def test_clevis_binds_secrets_and_a_luks2_image_to_a_vtpm(host: Host) -> None:
    clevis = host.programs.with_(TPM2TOOLS_TCTI=host.two)
    policy = '{"pcr_bank":"sha256","pcr_ids":"7"}'
    host.boot("two", host.two)
    bound = clevis.run("clevis", "encrypt", "tpm2", policy, given=b"of a network").out.encode()
    assert clevis.run("clevis", "decrypt", given=bound).out == "of a network"
    image, passphrase = host.luks("clevis")
    clevis.run("clevis", "luks", "bind", "-y", "-k", str(passphrase), "-d", str(image), "tpm2", policy)
    assert clevis.run("clevis", "luks", "list", "-d", str(image)).out.startswith("1: tpm2 ")

    def opened() -> bool:
        """What `clevis luks unlock` does up to the device mapper."""
        key = clevis.run("clevis", "luks", "pass", "-d", str(image), "-s", "1", check=False)
        tried = ("cryptsetup", "open", "--test-passphrase", "--key-file", "-", str(image))
        return key.code == 0 and host.programs.run(*tried, given=key.out.encode(), check=False).code == 0

    assert opened()
    other = host.programs.with_(TPM2TOOLS_TCTI=host.one)
    assert other.run("clevis", "decrypt", given=bound, check=False).code != 0, "another vTPM opens it"
    host.measure(host.two)
    assert clevis.run("clevis", "decrypt", given=bound, check=False).code != 0, "it opens with other PCRs"
    assert not opened()
    host.boot("two", host.two)
    assert opened()
