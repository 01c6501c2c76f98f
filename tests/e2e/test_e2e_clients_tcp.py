"""Programs that reach a TPM by TCP: IBM's TSS, tpm2-tools over both TCTIs that can, TrouSerS."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from clients_rig import Programs, free_ports, listens, tcsd
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from e2e_rig import BIN, Installation, installation, wait_for
from qemu_tpms import SUBJECTS

pytestmark = pytest.mark.e2e
COMMANDS = {"swtpm": shutil.which("swtpm") or "swtpm", "ours": str(BIN / "vtpm-swtpm")}


@dataclass
class Served:
    """A TPM 2.0 on TCP ports of the loopback interface."""

    programs: Programs
    port: int

    def ibm(self, server_type: str) -> Programs:
        """The environment that IBM's programs want; without encryption of what they keep between each other."""
        files = tempfile.mkdtemp(dir=self.programs.base)
        return self.programs.with_(
            TPM_INTERFACE_TYPE="socsim",
            TPM_SERVER_TYPE=server_type,
            TPM_SERVER_NAME="localhost",
            TPM_COMMAND_PORT=str(self.port),
            TPM_PLATFORM_PORT=str(self.port + 1),
            TPM_DATA_DIR=files,
            TPM_ENCRYPT_SESSIONS="0",
        )


@pytest.fixture(params=SUBJECTS)
def emulator(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(request.param, "--tpm2") as served:
        yield served


@contextmanager
def serving(name: str, *options: str) -> Iterator[Served]:
    base = Path(tempfile.mkdtemp(prefix="vp"))
    port = free_ports()
    programs = Programs(base)
    (base / "state").mkdir()
    words = (
        *(COMMANDS[name], "socket", *options, "--tpmstate", f"dir={base}/state", "--flags", "startup-clear"),
        *("--server", f"type=tcp,port={port}", "--ctrl", f"type=tcp,port={port + 1}"),
    )
    with programs.running(*words) as daemon:
        wait_for(lambda: listens(port + 1) or not daemon.alive(), name)
        assert daemon.alive(), daemon.said
        yield Served(programs, port)
    shutil.rmtree(base, ignore_errors=True)


def signature_of(file: Path) -> bytes:
    """TPMT_SIGNATURE of ECDSA (TPM 2.0 Part 2, 11.3.4) as DER."""
    content = file.read_bytes()
    assert content[:4] == bytes.fromhex("0018000b"), content[:4].hex()
    size = int.from_bytes(content[4:6], "big")
    r, s = content[6 : 6 + size], content[8 + size :]
    return utils.encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))


def work_with_ibm_tss(ibm: Programs) -> None:
    home = Path(tempfile.mkdtemp(dir=ibm.base))

    def run(*words: str, check: bool = True) -> str:
        return ibm.run(*words, check=check).out

    def file(name: str) -> str:
        return str(home / name)

    (home / "message").write_bytes(b"to be signed")
    (home / "secret").write_bytes(b"to be sealed")
    run("tsscreateprimary", "-hi", "o", "-ecc", "nistp256", "-pwdk", "parent")
    parts = ("-opu", file("key.pub"), "-opr", file("key.priv"), "-opem", file("key.pem"))
    run("tsscreate", "-hp", "80000000", "-ecc", "nistp256", "-si", *parts, "-pwdp", "parent", "-pwdk", "key")
    run("tssload", "-hp", "80000000", "-ipu", file("key.pub"), "-ipr", file("key.priv"), "-pwdp", "parent")
    run("tssstartauthsession", "-se", "h", "-bi", "80000001", "-pwdb", "key")
    signed = ("-if", file("message"), "-os", file("signature"))
    run("tsssign", "-hk", "80000001", "-ecc", "-halg", "sha256", *signed, "-pwdk", "key", "-se0", "02000000", "0")
    public = serialization.load_pem_public_key((home / "key.pem").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature_of(home / "signature"), b"to be signed", ec.ECDSA(hashes.SHA256()))
    run("tssflushcontext", "-ha", "80000001")
    parts = ("-opu", file("seal.pub"), "-opr", file("seal.priv"))
    sealed = ("-bl", "-kt", "f", "-kt", "p", *parts, "-if", file("secret"))
    run("tsscreate", "-hp", "80000000", *sealed, "-pwdp", "parent", "-pwdk", "seal")
    run("tssload", "-hp", "80000000", "-ipu", file("seal.pub"), "-ipr", file("seal.priv"), "-pwdp", "parent")
    run("tssstartauthsession", "-se", "h", "-hs", "80000000", "-sym", "aes")
    encrypted = ("-pwd", "seal", "-se0", "02000000", "40")  # the answer's first parameter
    run("tssunseal", "-ha", "80000001", "-of", file("unsealed"), *encrypted)
    assert (home / "unsealed").read_bytes() == b"to be sealed"
    wrong = ibm.run("tssunseal", "-ha", "80000001", "-of", file("stolen"), "-pwd", "wrong", check=False)
    assert "TPM_RC_BAD_AUTH" in wrong.out
    run("tssflushcontext", "-ha", "80000001")
    run("tssnvdefinespace", "-ha", "01500000", "-hi", "o", "-sz", "12", "-pwdn", "nv")
    run("tssnvwrite", "-ha", "01500000", "-if", file("secret"), "-pwdn", "nv")
    run("tssnvread", "-ha", "01500000", "-sz", "12", "-of", file("nv"), "-pwdn", "nv")
    assert (home / "nv").read_bytes() == b"to be sealed"


def test_ibm_tss_on_the_raw_port(emulator: Served) -> None:
    work_with_ibm_tss(emulator.ibm("raw"))


def test_tpm2_tools_on_tcp(emulator: Served) -> None:
    tools = emulator.programs.with_(TPM2TOOLS_TCTI=f"swtpm:host=127.0.0.1,port={emulator.port}")
    assert len(tools.run("tpm2_getrandom", "--hex", "16").out) == 32
    piped = emulator.programs.with_(TPM2TOOLS_TCTI=f"cmd:tpm2_send -T {tools.environment['TPM2TOOLS_TCTI']}")
    assert len(piped.run("tpm2_getrandom", "--hex", "16").out) == 32
    tools.run("tpm2_createprimary", "-Q", "-C", "o", "-c", "primary.ctx")
    tools.run("tpm2_create", "-Q", "-C", "primary.ctx", "-i", "-", "-u", "seal.pub", "-r", "seal.priv", given=b"sealed")
    tools.run("tpm2_flushcontext", "-t")
    tools.run("tpm2_load", "-Q", "-C", "primary.ctx", "-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
    assert tools.run("tpm2_unseal", "-Q", "-c", "seal.ctx").out == "sealed"


@pytest.fixture(scope="module")
def vtpms() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        yield made


def managed(vtpms: Installation, name: str, *options: str) -> tuple[Served, str]:
    """A vTPM that is attached with a TCP port, and the TCTI that is told."""
    port = free_ports()
    vtpms.add(name)
    shown = vtpms.attach(name, f"guest-of-{name}", *options, "--tcp", str(port))
    return Served(Programs(vtpms.base), port), str(shown["tcti"])


def test_ibm_tss_on_the_simulators_ports_of_a_managed_vtpm(vtpms: Installation) -> None:
    served, _ = managed(vtpms, "simulator", "--frontend", "mssim", "--startup", "none")
    ibm = served.ibm("mssim")
    ibm.run("tsspowerup")
    ibm.run("tssstartup")
    work_with_ibm_tss(ibm)


def test_tpm2_tools_by_the_mssim_tcti_over_a_restart(vtpms: Installation) -> None:
    served, tcti = managed(vtpms, "mssim", "--frontend", "mssim")
    assert tcti.startswith("mssim:")
    tools = served.programs.with_(TPM2TOOLS_TCTI=tcti)
    tools.run("tpm2_startup", "-c")
    tools.run("tpm2_createprimary", "-Q", "-C", "o", "-c", "mssim.ctx")
    tools.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "mssim.ctx", "0x81000001")
    tools.run("tpm2_flushcontext", "-t")
    parts = ("-u", "mssim.pub", "-r", "mssim.priv")
    tools.run("tpm2_create", "-Q", "-C", "0x81000001", "-i", "-", *parts, given=b"sealed")
    vtpms.restart()
    tools.run("tpm2_load", "-Q", "-C", "0x81000001", *parts, "-c", "sealed.ctx")
    assert tools.run("tpm2_unseal", "-Q", "-c", "sealed.ctx").out == "sealed"


def test_ibm_tss_and_tpm2_tools_on_the_tcp_port_of_a_managed_vtpm(vtpms: Installation) -> None:
    served, tcti = managed(vtpms, "tcp")
    assert tcti == f"swtpm:host=127.0.0.1,port={served.port}"
    assert len(served.programs.with_(TPM2TOOLS_TCTI=tcti).run("tpm2_getrandom", "--hex", "8").out) == 16
    work_with_ibm_tss(served.ibm("raw"))


@pytest.mark.skipif(os.geteuid() != 0, reason="tcsd wants to be started by root")
@pytest.mark.parametrize("name", SUBJECTS)
def test_trousers_on_tcp(name: str) -> None:
    with serving(name) as served:
        device = {"TCSD_TCP_DEVICE_HOSTNAME": "127.0.0.1", "TCSD_TCP_DEVICE_PORT": str(served.port)}
        with tcsd(served.programs.base, **device) as tpm:
            assert "1.2" in tpm.run("tpm_version").out
            tpm.run("tpm_selftest")
