"""A hardware TPM with an endorsement certificate, as its maker would give it one; and the verifier's side."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e_rig import Answer, Installation
from fixtures_tpm import SwtpmProcess, running_swtpm

LOCALCA = "statedir = {0}\nsigningkey = {0}/signkey.pem\nissuercert = {0}/issuercert.pem\ncertserial = {0}/certserial\n"
OPTIONS = "--platform-manufacturer tests --platform-version 1 --platform-model rig\n"
SETUP = """create_certs_tool=swtpm_localca
create_certs_tool_config={0}/localca.conf
create_certs_tool_options={0}/options
"""


@contextmanager
def certified_swtpm(base: Path) -> Iterator[tuple[SwtpmProcess, Path]]:
    """A running swtpm whose RSA endorsement key has a certificate in NV, and the file of its maker's authorities."""
    maker, state = base / "maker", base / "hw"
    maker.mkdir()
    state.mkdir()
    for name, text in (("localca.conf", LOCALCA), ("options", OPTIONS), ("setup.conf", SETUP)):
        (maker / name).write_text(text.format(maker))
    command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--create-ek-cert", "--config", f"{maker}/setup.conf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    authorities = base / "maker.pem"
    pems = [(maker / name).read_text() for name in ("swtpm-localca-rootca-cert.pem", "issuercert.pem")]
    authorities.write_text(pems[0][pems[0].index("-----BEGIN") :] + pems[1][pems[1].index("-----BEGIN") :])
    with running_swtpm(state) as swtpm:
        yield swtpm, authorities


class Verifier:
    """A verifier in a directory of his own; everything by the installed command, which has no TPM."""

    def __init__(self, vtpms: Installation, where: Path, authorities: Path | None = None) -> None:
        self.vtpms, self.where = vtpms, where
        self.trust = ("--ca", str(authorities)) if authorities else ("--unchecked-ek",)
        where.mkdir()
        self.check("new-ca", self.path("ca.key"), self.path("ca.crt"))

    def path(self, name: str) -> str:
        return str(self.where / name)

    def check(self, *words: str, code: int = 0) -> Answer:
        answer = self.vtpms.command("vtpm-check-quote", *words, check=False, env={"TPM2TOOLS_TCTI": "none"})
        assert answer.code == code, f"{words}: {answer.code}\n{answer.out}\n{answer.err}"
        return answer

    def enrol(self, group: str = "default", *options: str) -> str:
        """Enrol a group from its request to its certificate; returns the certificate's file."""
        names = (f"{group}.{end}" for end in ("request", "challenge", "kept", "proof", "crt"))
        request, challenge, kept, proof, certificate = map(self.path, names)
        self.vtpms.command("vtpm-group-enroll", group, *options, "-o", request)
        self.check("challenge", request, *self.trust, "-o", challenge, "--keep", kept)
        self.vtpms.command("vtpm-group-enroll", group, "--challenge", challenge, "-o", proof)
        authority = ("--ca-key", self.path("ca.key"), "--ca-cert", self.path("ca.crt"))
        self.check("certify", request, proof, kept, *authority, "-o", certificate)
        return certificate

    def verdicts(self, bundle: str, certificate: str, nonce: str, *options: str, code: int = 0) -> dict[str, str]:
        """Judge a bundle; the verdict of each check."""
        words = (bundle, "--ak", certificate, "--nonce", nonce, "--ca", self.path("ca.crt"), *options, "--json")
        document = json.loads(self.check(*words, code=code).out)
        self.says = document["says"]
        return {check["name"]: check["verdict"] for check in document["checks"]}
