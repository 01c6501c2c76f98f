"""TrouSerS and tpm-tools, which know TPM 1.2 only, on a vTPM of that kind."""

import os
from pathlib import Path

import pytest
from clients_rig import tcsd
from e2e_rig import Guest, Installation

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="tcsd wants to be started by root, and becomes the user tss"),
]
_PCR = 10
_INDEX = "0x00001500"


def extend(endpoint: str) -> None:
    """TPM_Extend, TPM 1.2 Part 3, section 16.1."""
    guest = Guest(endpoint)
    assert guest.code(bytes.fromhex("00c10000002200000014") + _PCR.to_bytes(4, "big") + b"\x7b" * 20) == 0
    guest.close()


def test_ownership_sealing_and_nv_by_tpm_tools(vtpms: Installation, tmp_path: Path) -> None:
    vtpms.add("old", "--tpm", "1.2")
    shown = vtpms.attach("old")
    assert shown["tcti"] is None, "tpm2-tss has no TPM 1.2"
    endpoint = shown["endpoint"]
    secret, sealed = tmp_path / "secret", tmp_path / "sealed"
    secret.write_text("of an old guest")
    device = {"TCSD_UN_SOCKET_DEVICE_PATH": endpoint}
    seal = ("tpm_sealdata", "-z", "-i", str(secret), "-o", str(sealed), "-p", str(_PCR))
    unseal = ("tpm_unsealdata", "-z", "-i", str(sealed))
    with tcsd(vtpms.base, **device) as tpm:
        assert "1.2" in tpm.run("tpm_version").out
        tpm.run("tpm_createek")
        tpm.run("tpm_takeownership", "-y", "-z")
        assert tpm.run("tpm_takeownership", "-y", "-z", check=False).code != 0, "it has an owner"
        tpm.run(*seal)
        assert b"of an old guest" not in sealed.read_bytes()
        assert tpm.run(*unseal).out == "of an old guest"
        tpm.run("tpm_nvdefine", "-i", _INDEX, "-s", "16", "-p", "OWNERWRITE|OWNERREAD", "-y", "-z")
        vtpms.command("vtpm-hibernate", "old")
        assert tpm.run(*unseal).out == "of an old guest"
        tpm.run("tpm_nvwrite", "-i", _INDEX, "-d", "sixteen of bytes", "-z")
    vtpms.restart()
    with tcsd(vtpms.base, **device) as tpm:
        assert tpm.run(*unseal).out == "of an old guest"
        assert "sixteen of bytes" in tpm.run("tpm_nvread", "-i", _INDEX, "-z").out
        assert "OWNERREAD|OWNERWRITE" in tpm.run("tpm_nvinfo", "-i", _INDEX).out
    extend(endpoint)
    with tcsd(vtpms.base, **device) as tpm:
        assert tpm.run(*unseal, check=False).code != 0, "it unseals with another PCR"
    vtpms.command("vtpm-reset-platform", "old")
    with tcsd(vtpms.base, **device) as tpm:
        assert tpm.run(*unseal).out == "of an old guest"
