"""Attestation keys of groups: made, enrolled with a verifier, renewed. They stand in the groups' records.

A key is made when a group is first enrolled, and durable and anchored before anybody is told of it.
"""

import logging
from dataclasses import replace
from uuid import UUID

import trio

from manager.attest_enrolment import Challenge, Proof, Request, new_request, proof_of
from manager.attest_errors import AttestationKeyChanged, CredentialRefused, EndorsementAuthWanted
from manager.errors import ConflictError
from manager.groups import Groups
from manager.hardware import Hardware
from manager.hwtpm import HardwareTpm
from manager.hwtpm_quote import AttestationKey
from manager.keys import GroupSeal
from storage.catalogue import GroupRow, Happened

_log = logging.getLogger("vtpm.attestation")


def key_of(seal: GroupSeal) -> AttestationKey:
    """Return a group's attestation key. Raises ConflictError: it has none. AttestationKeyChanged: unreadable."""
    if seal.ak is None:
        raise ConflictError(
            f"group {seal.name} has no attestation key yet, so nothing can be quoted: 'vtpm-group-enroll {seal.name}' "
            f"makes one, which a verifier then certifies"
        )
    return AttestationKey.from_json(seal.ak)


def renew(seal: GroupSeal) -> GroupSeal:
    """Return a group's record without its attestation key: the next enrolment makes another."""
    return replace(seal, ak=None)


def without_a_strangers(tpm: HardwareTpm, seal: GroupSeal) -> GroupSeal:
    """Return a group's record, without its attestation key where this TPM does not make it (`recover`).

    A key of which that cannot be told stays: a quote or an enrolment says then what is wrong, and vTPMs do without it.
    """
    if seal.ak is None:
        return seal
    try:
        if tpm.attester.is_ours(key_of(seal)):
            return seal
    except EndorsementAuthWanted as error:
        _log.warning("group %s: whose its attestation key is, cannot be told: %s", seal.name, error)
        return seal
    except AttestationKeyChanged as error:
        _log.warning("group %s: %s", seal.name, error)
        return renew(seal)
    _log.warning("group %s: its attestation key stayed in another hardware TPM; it must be enrolled again", seal.name)
    return renew(seal)


class Attestation:
    """The attestation keys of a running manager's groups; `store` is the store's UUID."""

    def __init__(self, groups: Groups, hardware: Hardware, store: UUID) -> None:
        """Keep the keys of `groups`."""
        self._groups, self._hardware, self._store = groups, hardware, store
        self._enrolling = trio.Lock()

    async def request(self, row: GroupRow, *, fresh: bool) -> tuple[Request, str]:
        """Return a group's enrolment request, and in words where its key comes from; `fresh`: from a new key.

        Raises:
            DeniedError: the group is closed, or the endorsement hierarchy is. TpmError: the hardware TPM.

        """
        self._groups.refuse_closed(row)
        async with self._enrolling:
            key, how = await self._key(row, fresh=fresh)
            endorsement = await self._hardware.lane.run(self._hardware.tpm.attester.endorsement)
        parts = (endorsement.public, endorsement.certificate, endorsement.chain)
        return new_request((row.uuid, self._store), row.name, parts, key.public), how

    async def _key(self, row: GroupRow, *, fresh: bool) -> tuple[AttestationKey, str]:
        seal = self._groups.seal(row.uuid)
        how = "new"
        if seal.ak is not None and not fresh:
            key = key_of(seal)
            if await self._hardware.lane.run(self._hardware.tpm.attester.is_ours, key):
                return key, "kept"
            how = "renewed: the hardware TPM is another one; certificates of the old key certify nothing any more"
        elif fresh and seal.ak is not None:
            how = "renewed; certificates of the old key certify nothing any more"
        key = await self._hardware.lane.run(self._hardware.tpm.attester.new_key)
        text = f"{row.name}: attestation key {key.public.name.hex()} ({how})"
        await self._groups.rewrite(row, lambda seal: replace(seal, ak=key.to_json()), Happened("group-enrolled", text))
        _log.info("group %s", text)
        return key, how

    async def prove(self, row: GroupRow, challenge: Challenge) -> Proof:
        """Have the hardware TPM open a challenge, and return the proof that it did.

        Raises:
            CredentialRefused: it is for another group, key or TPM, or was altered. DeniedError, TpmError.

        """
        self._groups.refuse_closed(row)
        key = key_of(self._groups.seal(row.uuid))
        name = key.public.name
        if (challenge.group, challenge.attestation_name) != (str(row.uuid), name.hex()):
            raise CredentialRefused
        parts = bytes.fromhex(challenge.identity), bytes.fromhex(challenge.encrypted_seed)
        secret = await self._hardware.lane.run(self._hardware.tpm.attester.activate, key, *parts)
        proof = proof_of(secret, (row.uuid, self._store), name)
        return Proof(str(row.uuid), name.hex(), proof.hex())
