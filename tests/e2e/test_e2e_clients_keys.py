"""Programs that keep keys in a TPM: the OpenSSL provider, PKCS#11, FAPI, several at once through tpm2-abrmd."""

import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from clients_rig import OUT_OF_OBJECTS, Programs, message_bus, resource_manager
from e2e_rig import Installation, installation, wait_for

pytestmark = pytest.mark.e2e
PKCS11 = "/usr/lib/x86_64-linux-gnu/pkcs11/libtpm2_pkcs11.so"
PROVIDERS = ("-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2")


@dataclass
class Host:
    """Programs, a resource manager before one vTPM, and another vTPM beside it."""

    programs: Programs
    vtpms: Installation
    direct: str
    managed: str
    other: str

    def directory(self, name: str) -> Path:
        (made := self.programs.home / name).mkdir()
        return made


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with installation() as made:
        made.init()
        made.start()
        for name in ("one", "two"):
            made.add(name)
        one, two = (str(made.attach(name, f"guest-{name}")["tcti"]) for name in ("one", "two"))
        with message_bus(made.base) as programs, resource_manager(programs, one, "one") as managed:
            yield Host(programs, made, one, managed, two)


def public_key(certificate: bytes, programs: Programs) -> str:
    return programs.run("openssl", "x509", "-inform", "DER", "-noout", "-pubkey", given=certificate).out


def test_a_tls_server_with_its_key_in_the_vtpm(host: Host) -> None:
    folder = host.directory("tls")
    key, certificate, place = folder / "key.pem", folder / "certificate.pem", host.programs.home / "tls.socket"
    openssl = host.programs.with_(TPM2OPENSSL_TCTI=host.managed)
    openssl.run(
        "openssl", "genpkey", "-provider", "tpm2", "-algorithm", "EC", "-pkeyopt", "group:P-256", "-out", str(key)
    )
    assert "TSS2 PRIVATE KEY" in key.read_text(), "it is of use to its TPM only"
    named = ("-subj", "/CN=vtpm.test", "-addext", "subjectAltName=DNS:vtpm.test")
    openssl.run("openssl", "req", *PROVIDERS, "-x509", "-new", "-key", str(key), *named, "-out", str(certificate))
    with openssl.running(
        "openssl", "s_server", *PROVIDERS, "-unix", place.name, "-cert", str(certificate), "-key", str(key), "-www"
    ) as server:
        wait_for(lambda: place.exists() or not server.alive(), "the TLS server")
        assert server.alive(), server.said

        def page(trusted: ssl.SSLContext, name: str) -> tuple[bytes, bytes]:
            with socket.socket(socket.AF_UNIX) as plain:
                plain.settimeout(20)
                plain.connect(str(place))
                with trusted.wrap_socket(plain, server_hostname=name) as secure:
                    secure.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    return secure.recv(100), secure.getpeercert(binary_form=True) or b""

        client = ssl.create_default_context(cafile=str(certificate))
        for _ in range(3):
            answer, presented = page(client, "vtpm.test")
            assert answer.startswith(b"HTTP/1.0 200 ok"), answer
        own = openssl.run("openssl", "pkey", "-provider", "tpm2", "-provider", "default", "-in", str(key), "-pubout")
        assert public_key(presented, host.programs) == own.out
        with pytest.raises(ssl.SSLCertVerificationError):
            page(client, "another.test")
        with pytest.raises(ssl.SSLCertVerificationError):
            page(ssl.create_default_context(), "vtpm.test")
    stolen = host.programs.with_(TPM2OPENSSL_TCTI=host.other)
    refused = stolen.run("openssl", "pkey", "-provider", "tpm2", "-provider", "default", "-in", str(key), check=False)
    assert refused.code != 0, "another vTPM can load the key"


def test_a_token_of_pkcs11_signs_for_who_knows_its_pin(host: Host) -> None:
    folder = host.directory("token")
    token = host.programs.with_(
        TPM2_PKCS11_STORE=str(folder), TPM2_PKCS11_TCTI=host.managed, TPM2TOOLS_TCTI=host.managed
    )
    token.run("tpm2_ptool", "init")
    token.run("tpm2_ptool", "addtoken", "--pid=1", "--label=vtpm", "--sopin=so-7293", "--userpin=user-1845")
    key = ("--label=vtpm", "--key-label=signer", "--userpin=user-1845")
    token.run("tpm2_ptool", "addkey", "--algorithm=ecc256", *key)
    document, signature, public = folder / "document", folder / "signature", folder / "public.der"
    document.write_bytes(b"to be signed")
    tool = ("pkcs11-tool", "--module", PKCS11, "--token-label", "vtpm")
    sign = ("--sign", "--mechanism", "ECDSA-SHA256", "--label", "signer", "--signature-format", "openssl")
    files = ("-i", str(document), "-o", str(signature))
    token.run(*tool, "--login", "--pin", "user-1845", *sign, *files)
    token.run(*tool, "--read-object", "--type", "pubkey", "--label", "signer", "-o", str(public))
    verify = ("openssl", "dgst", "-sha256", "-keyform", "DER", "-verify", str(public), "-signature", str(signature))
    assert host.programs.run(*verify, str(document)).out == "Verified OK\n"
    document.write_bytes(b"to be forged")
    assert host.programs.run(*verify, str(document), check=False).code != 0
    made = token.run(*tool, "--login", "--pin", "user-1845", "--keypairgen", "--key-type", "EC:prime256v1")
    assert "EC_POINT" in made.out
    wrong = token.run(*tool, "--login", "--pin", "user-1846", *sign, *files, check=False)
    assert "CKR_PIN_INCORRECT" in wrong.err
    shutil.copytree(folder, folder.with_name("stolen"))
    copied = {"TPM2_PKCS11_STORE": str(folder.with_name("stolen"))}
    signing = (*tool, "--login", "--pin", "user-1845", *sign, *files)
    token.with_(**copied).run(*signing)
    assert token.with_(**copied, TPM2_PKCS11_TCTI=host.other).run(*signing, check=False).code != 0


def test_fapi_provisions_signs_seals_and_keeps_nv(host: Host) -> None:
    folder = host.directory("fapi")
    configuration = folder / "fapi.json"
    configuration.write_text(
        json.dumps(
            {
                "profile_name": "P_ECCP256SHA256",
                "profile_dir": "/etc/tpm2-tss/fapi-profiles/",
                "user_dir": str(folder / "user"),
                "system_dir": str(folder / "system"),
                "log_dir": str(folder / "log"),
                "tcti": host.other,
                "ek_cert_less": "yes",
                "system_pcrs": [],
            }
        )
    )
    for name in ("user", "system", "log"):
        (folder / name).mkdir()
    tss = host.programs.with_(TSS2_FAPICONF=str(configuration))
    document, digest, signature, public = (folder / name for name in ("document", "digest", "signature", "public.pem"))
    document.write_bytes(b"to be signed")
    digest.write_bytes(hashlib.sha256(b"to be signed").digest())
    tss.run("tss2_provision")
    tss.run("tss2_createkey", "--path=HS/SRK/signer", "--type=sign,noDa", "--authValue=")
    signed = (f"--digest={digest}", f"--signature={signature}", f"--publicKey={public}")
    tss.run("tss2_sign", "--keyPath=HS/SRK/signer", *signed)
    verify = ("openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(signature), str(document))
    assert host.programs.run(*verify).out == "Verified OK\n"
    tss.run("tss2_createseal", "--path=HS/SRK/sealed", "--type=noDa", "--authValue=", f"--data={document}")
    assert tss.run("tss2_unseal", "--path=HS/SRK/sealed", "--data=-").out == "to be signed"
    tss.run("tss2_createnv", "--path=/nv/Owner/kept", "--type=noDa", "--size=12", "--authValue=")
    tss.run("tss2_nvwrite", "--nvPath=/nv/Owner/kept", f"--data={document}")
    assert tss.run("tss2_nvread", "--nvPath=/nv/Owner/kept", "--data=-").out == "to be signed"


def test_a_tpm_has_room_for_three_objects_and_a_resource_manager_for_more(host: Host) -> None:
    """The cause of most of what docs/compatibility.md says needs tpm2-abrmd; a real TPM and swtpm are the same."""
    folder = host.directory("objects")
    for tcti, holds in ((host.other, False), (host.managed, True)):
        program = """
import sys
from tpm2_pytss import ESAPI, TCTILdr, TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE
name, _, options = sys.argv[1].partition(":")
with TCTILdr(name, options) as tcti, ESAPI(tcti) as tpm:
    made = []
    try:
        for _ in range(5):
            made.append(tpm.create_primary(TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC.parse("ecc256"))[0])
        print(len(made), "objects at once")
    finally:
        for handle in made:
            tpm.flush_context(handle)
"""
        done = subprocess.run(
            [sys.executable, "-c", program, tcti],
            env=host.programs.environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if holds:
            assert done.stdout == "5 objects at once\n", done.stderr
        else:
            assert done.returncode != 0
            assert OUT_OF_OBJECTS[2:] in done.stderr or "out of memory for object contexts" in done.stderr, done.stderr


def test_two_clients_at_once_through_the_resource_manager(host: Host) -> None:
    """Each has keys that stay loaded, and they sign in turn; the vTPM sleeps for a while in between."""
    program = """
import hashlib, sys
from tpm2_pytss import *
name, _, options = sys.argv[1].partition(":")
digest = TPM2B_DIGEST(hashlib.sha256(b"in turn").digest())
scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.ECDSA)
scheme.details.any.hashAlg = TPM2_ALG.SHA256
check = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
with TCTILdr(name, options) as tcti, ESAPI(tcti) as tpm:
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"
    keys = [
        tpm.create_primary(TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", attributes))[0]
        for _ in range(2)
    ]
    print("loaded", flush=True)
    for line in sys.stdin:
        for key in keys:
            tpm.verify_signature(key, digest, tpm.sign(key, digest, scheme, check))
        print("signed", flush=True)
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, host.managed],
            env=host.programs.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "loaded\n"
        for turn in range(4):
            if turn == 2:
                host.vtpms.command("vtpm-hibernate", "one")
            for process in running:
                assert process.stdin is not None
                process.stdin.write("sign\n")
                process.stdin.flush()
            for process in running:
                assert process.stdout is not None
                assert process.stdout.readline() == "signed\n"
    finally:
        for process in running:
            process.communicate(timeout=20)
    assert [process.returncode for process in running] == [0, 0]
