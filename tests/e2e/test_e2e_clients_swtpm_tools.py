"""swtpm's own tools, which know swtpm by its command line and its control channel, with `vtpm-swtpm` in its place.

With VTPM_QEMU_SUBJECTS=swtpm,ours each test runs with swtpm itself, too: what it asks for is what swtpm does.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clients_rig import PCR_7, Daemon, Programs, tcsd
from e2e_rig import BIN, Answer, Installation, wait_for
from qemu_tpms import SUBJECTS

pytestmark = pytest.mark.e2e
COMMANDS = {"swtpm": shutil.which("swtpm") or "swtpm", "ours": str(BIN / "vtpm-swtpm")}
_EK_RSA, _EK_RSA_CERTIFICATE, _PLATFORM_CERTIFICATE = "0x81010001", "0x1c00002", "0x1c08000"
_EK_ECC, _EK_ECC_CERTIFICATE = "0x81010016", "0x1c00016"


class Place:
    """A directory with an emulator's state, a certificate authority, and what swtpm_setup is configured by."""

    def __init__(self, base: Path, emulator: str) -> None:
        self.base, self.emulator, self.programs = base, emulator, Programs(base)
        self.state, self.authority = base / "state", base / "ca"
        self.state.mkdir()
        self.authority.mkdir()
        (base / "localca.conf").write_text(
            f"statedir = {self.authority}\n"
            f"signingkey = {self.authority}/signkey.pem\n"
            f"issuercert = {self.authority}/issuercert.pem\n"
            f"certserial = {self.authority}/certserial\n"
        )
        (base / "localca.options").write_text(
            "--platform-manufacturer Tests\n--platform-version 1\n--platform-model Test\n"
        )
        (base / "setup.conf").write_text(
            f"create_certs_tool = {shutil.which('swtpm_localca')}\n"
            f"create_certs_tool_config = {base}/localca.conf\n"
            f"create_certs_tool_options = {base}/localca.options\n"
        )

    def setup(self, *options: str, check: bool = True) -> int:
        words = ("--tpm", f"{COMMANDS[self.emulator]} socket", "--config", str(self.base / "setup.conf"))
        return self.programs.run("swtpm_setup", *words, "--tpmstate", str(self.state), *options, check=check).code

    @contextmanager
    def running(self, *options: str, state: Path | None = None, emulator: str = "") -> Iterator[Daemon]:
        """The emulator on the sockets `data` and `data.ctrl`."""
        control = self.base / "data.ctrl"
        words = (
            *(COMMANDS[emulator or self.emulator], "socket", "--tpmstate", f"dir={state or self.state}"),
            *("--server", f"type=unixio,path={self.base}/data", "--ctrl", f"type=unixio,path={control}"),
        )
        with self.programs.running(*words, *options) as daemon:
            wait_for(lambda: accepts(control) or not daemon.alive(), self.emulator)
            assert daemon.alive(), daemon.said
            yield daemon

    def ioctl(self, *words: str, check: bool = True) -> str:
        answer = self.programs.run("swtpm_ioctl", "--unix", str(self.base / "data.ctrl"), *words, check=check)
        return answer.out if answer.code == 0 else f"code {answer.code}: {answer.err}"

    def tool(self, *words: str) -> str:
        return self.programs.with_(TPM2TOOLS_TCTI=f"swtpm:path={self.base}/data").run(*words).out


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as tried:
        return tried.connect_ex(str(path)) == 0


@pytest.fixture(params=SUBJECTS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="vs"))
    yield Place(base, request.param)
    shutil.rmtree(base, ignore_errors=True)


def test_swtpm_setup_and_localca_make_a_tpm_with_certified_endorsement_keys(place: Place) -> None:
    certified = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram")
    place.setup("--tpm2", *certified, "--vmid", "guest-1", "--pcr-banks", "sha256")
    assert place.setup("--tpm2", check=False) == 1, "there is a state"
    assert place.setup("--tpm2", "--not-overwrite") == 0
    with place.running("--tpm2", "--flags", "startup-clear"):
        banks = place.tool("tpm2_getcap", "pcrs")
        assert banks.count("[ 0, ") == 1, banks
        for certificate, key in ((_EK_RSA_CERTIFICATE, _EK_RSA), (_EK_ECC_CERTIFICATE, _EK_ECC)):
            der, pem = place.base / "certificate.der", place.base / "certificate.pem"
            place.tool("tpm2_nvread", certificate, "-o", str(der))
            place.programs.run("openssl", "x509", "-inform", "DER", "-in", str(der), "-out", str(pem))
            place.programs.run(
                *(
                    "openssl",
                    "verify",
                    "-ignore_critical",
                    "-CAfile",
                    f"{place.authority}/swtpm-localca-rootca-cert.pem",
                ),
                *("-untrusted", f"{place.authority}/issuercert.pem", str(pem)),
            )
            place.tool("tpm2_readpublic", "-Q", "-c", key, "-f", "pem", "-o", f"{place.base}/ek.pem")
            subject = place.programs.run("openssl", "x509", "-in", str(pem), "-noout", "-pubkey").out
            assert subject == (place.base / "ek.pem").read_text()
        place.tool("tpm2_nvread", _PLATFORM_CERTIFICATE, "-o", str(place.base / "platform.der"))
    place.setup("--tpm2", "--reconfigure", "--pcr-banks", "sha1,sha384")
    with place.running("--tpm2", "--flags", "startup-clear"):
        assert place.tool("tpm2_getcap", "pcrs").count("[ 0, ") == 2
        place.tool("tpm2_readpublic", "-Q", "-c", _EK_RSA)
    for emulator in COMMANDS:
        with place.running("--tpm2", "--flags", "startup-clear", emulator=emulator):
            place.tool("tpm2_readpublic", "-Q", "-c", _EK_RSA)


def test_swtpm_setup_makes_an_encrypted_state_that_opens_with_its_key_only(place: Place) -> None:
    key = place.base / "key"
    key.write_text("00112233445566778899aabbccddeeff")
    place.setup("--tpm2", "--create-ek-cert", "--keyfile", str(key))
    with place.running("--tpm2", "--flags", "startup-clear", "--key", f"file={key},mode=aes-cbc,format=hex"):
        place.tool("tpm2_readpublic", "-Q", "-c", _EK_RSA)
    key.write_text("ffeeddccbbaa99887766554433221100")
    with (
        pytest.raises(AssertionError),
        place.running("--tpm2", "--flags", "startup-clear", "--key", f"file={key},mode=aes-cbc,format=hex"),
    ):
        place.tool("tpm2_readpublic", "-Q", "-c", _EK_RSA)


@pytest.mark.skipif(os.geteuid() != 0, reason="tcsd wants to be started by root")
def test_swtpm_setup_makes_a_tpm_12_that_tpm_tools_use(place: Place) -> None:
    place.setup("--create-ek-cert", "--create-platform-cert", "--lock-nvram")
    with place.running(), tcsd_on(place) as tpm:
        tpm.run("tpm_takeownership", "-y", "-z")
        assert "0x1000f000" in tpm.run("tpm_nvinfo").out
        (place.base / "secret").write_text("of an old guest")
        files = ("-z", "-i", str(place.base / "secret"), "-o", str(place.base / "sealed"))
        tpm.run("tpm_sealdata", *files)
        assert tpm.run("tpm_unsealdata", "-z", "-i", str(place.base / "sealed")).out == "of an old guest"


@contextmanager
def tcsd_on(place: Place) -> Iterator[Programs]:
    place.ioctl("-i")
    place.programs.run("swtpm_bios", "--unix", str(place.base / "data"))
    with tcsd(place.base, TCSD_UN_SOCKET_DEVICE_PATH=str(place.base / "data")) as programs:
        yield programs


def test_swtpm_ioctl_and_bios_drive_every_command_and_move_a_state(place: Place) -> None:
    blobs = {kind: place.base / kind for kind in ("permanent", "volatile")}
    with place.running("--tpm2") as first:
        assert "ptm capability is 0x" in place.ioctl("-c")
        assert "TPM buffersize: 4096" in place.ioctl("-b", "0")
        place.ioctl("-i")
        place.programs.run("swtpm_bios", "--tpm2", "--unix", str(place.base / "data"))
        assert "ptm configuration flags: 0x0" in place.ioctl("-g")
        assert '"family":"2.0"' in place.ioctl("--info", "1").replace(" ", "")
        assert "tpmEstablished is 0" in place.ioctl("-e")
        place.ioctl("-h", "measured by a dynamic launch")
        assert "tpmEstablished is 1" in place.ioctl("-e")
        place.ioctl("-r", "3")
        assert "tpmEstablished is 0" in place.ioctl("-e")
        assert "code " in place.ioctl("-l", "5", check=False)
        place.ioctl("-l", "2")
        place.ioctl("-l", "0")
        place.ioctl("-C")
        place.tool("tpm2_pcrextend", f"16:sha256={'7b' * 32}")
        place.tool("tpm2_nvdefine", "-Q", "0x1500016", "-C", "o", "-s", "5", "-a", "ownerread|ownerwrite")
        (place.base / "five").write_bytes(b"moved")
        place.tool("tpm2_nvwrite", "-Q", "0x1500016", "-C", "o", "-i", str(place.base / "five"))
        pcrs = place.tool("tpm2_pcrread", "sha256:16,17")
        for kind, file in blobs.items():
            place.ioctl("--save", kind, str(file))
        place.ioctl("-s")
        assert first.process.wait(20) == 0
    (elsewhere := place.base / "elsewhere").mkdir()
    with place.running("--tpm2", state=elsewhere):
        for kind, file in blobs.items():
            place.ioctl("--load", kind, str(file))
        place.ioctl("-i")
        assert place.tool("tpm2_pcrread", "sha256:16,17") == pcrs
        assert place.tool("tpm2_nvread", "-C", "o", "0x1500016") == "moved"
        place.ioctl("-v")
        assert (elsewhere / "tpm2-00.volatilestate").exists()
        place.ioctl("--stop")
        place.ioctl("-i")
        assert place.tool("tpm2_pcrread", "sha256:16,17") == pcrs, "it goes on with the volatile state that was stored"
        place.ioctl("-s")


def test_capabilities_are_printed_as_swtpm_setup_reads_them(place: Place) -> None:
    words = ("swtpm_setup", "--tpm2", "--tpm", f"{COMMANDS[place.emulator]} socket", "--print-capabilities")
    printed = json.loads(place.programs.run(*words).out)
    assert printed["type"] == "swtpm_setup"
    assert {"tpm-2.0", "tpm-1.2", "tpm2-rsa-keysize-2048"} <= set(printed["features"])


def test_swtpm_setup_finds_it_under_swtpms_name(place: Place) -> None:
    (folder := place.base / "bin").mkdir()
    (folder / "swtpm").symlink_to(COMMANDS[place.emulator])
    first = place.programs.with_(PATH=f"{folder}:{place.programs.environment['PATH']}")
    first.run("swtpm_setup", "--tpm2", "--tpmstate", str(place.state), "--createek", "--ecc")
    first.run("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={place.state}", "--print-states")
    with place.running("--tpm2", "--flags", "startup-clear"):
        place.tool("tpm2_readpublic", "-Q", "-c", _EK_ECC)


def test_swtpm_ioctl_moves_a_managed_state_once_and_encrypted(vtpms: Installation) -> None:
    vtpms.add("managed")
    shown = vtpms.attach("managed", "guest", "--frontend", "qemu")
    programs = Programs(vtpms.base)

    def ioctl(*words: str, check: bool = True) -> Answer:
        return programs.run("swtpm_ioctl", "--unix", str(shown["control"]), *words, check=check)

    def tool(*words: str) -> str:
        return programs.with_(TPM2TOOLS_TCTI=str(shown["tcti"])).run(*words).out

    ioctl("-i")
    assert "tpmEstablished is 0" in ioctl("-e").out
    programs.run("swtpm_bios", "--tpm2", "--unix", str(shown["control"]).removesuffix(".ctrl"))
    tool("tpm2_nvdefine", "-Q", "0x1500016", "-C", "o", "-s", "16", "-a", "ownerread|ownerwrite")
    (programs.home / "secret").write_bytes(b"sixteen of bytes")
    tool("tpm2_nvwrite", "-Q", "0x1500016", "-C", "o", "-i", str(programs.home / "secret"))
    tool("tpm2_pcrextend", PCR_7)
    pcr = tool("tpm2_pcrread", "sha256:7")
    blobs = {kind: programs.home / kind for kind in ("permanent", "volatile")}
    for kind, file in blobs.items():
        ioctl("--save", kind, str(file))
        assert b"sixteen of bytes" not in file.read_bytes()
    ioctl("--stop")
    for kind, file in blobs.items():
        ioctl("--load", kind, str(file))
    ioctl("-i")
    assert tool("tpm2_pcrread", "sha256:7") == pcr
    assert tool("tpm2_nvread", "-C", "o", "0x1500016") == "sixteen of bytes"
    ioctl("--stop")
    again = [ioctl("--load", kind, str(file), check=False).code for kind, file in blobs.items()]
    assert again[0] != 0, "an old state is taken back without permission"
    ioctl("-i")
    tool("tpm2_startup", "-c")
    assert tool("tpm2_nvread", "-C", "o", "0x1500016") == "sixteen of bytes"
