"""A model of the hardware TPM for the manager's tests: one NV index, PCR 22, sealing, and power cuts at any call.

It keeps what a real one keeps over a power cut (NV, sealed objects, its own secrets) and loses what a real one loses
(PCR 22 at a TPM reset). The same tests also run on swtpm where that matters; the model makes thousands of runs quick.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import trio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from manager_rig_revocation import ModelRevocations, open_approved
from storage_disks import MemoryDisk

from manager.attachments import Attachments
from manager.client import request
from manager.config import Config, Layout
from manager.daemon import Daemon, make_runtime_directory
from manager.hardware import Hardware
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    AnchorDenied,
    AnchorExists,
    AnchorMissing,
    HierarchyAuthRefused,
    OwnerAuthWanted,
    PolicyMismatch,
    RecoveryRefused,
    SealDamaged,
    SrkChanged,
    TpmTransport,
)
from manager.hwtpm_records import AnchorInfo, LocalityReport, SealedBlob, TpmProperties
from manager.opening import Opened, locked_store, open_store
from manager.policy import PcrBranch, SealPolicy
from manager.provision import InitOptions, initialise
from manager.recovery_pair import RecoveryPrivate
from manager.registry import Registry
from storage.disk import Bytes

ONES = b"\xff" * 32
FIRST_INDEX = 0x01800100
SRK_NAME = b"\x00\x0b" + hashlib.sha256(b"the model's storage root key").digest()


class PowerCutError(Exception):
    """The machine went off at this call."""


class ModelTpm:
    """What the manager uses of HardwareTpm. `fail` maps a method's name to what happens at its next call."""

    locality = 2
    commands_sent = 0

    def __init__(self, srk: bytes = SRK_NAME) -> None:
        self.pcrs = {index: bytes(32) for index in range(17)}
        self.pcr22 = ONES
        self.indices: dict[int, tuple[bytes, bytes | None]] = {}  # index -> auth, content
        self.sealed: dict[bytes, tuple[bytes, SealPolicy]] = {}
        self.srk = srk
        self.auths: dict[str, bytes] = {}  # hierarchy -> password
        self.used = {"owner": b"", "endorsement": b""}  # with which passwords we use them
        self.nv_writes = 0
        self.calls: list[str] = []
        self.fail: dict[str, tuple[str, Exception]] = {}  # method -> ("before" or "after", error)
        self.before_call: dict[str, Callable[[], None]] = {}  # method -> what happens just before its next call
        self.revocations = ModelRevocations(self._call)
        self.after_write: Callable[[], None] = lambda: None
        self.after_extend: Callable[[], None] = lambda: None

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        self.before_call.pop(name, lambda: None)()
        when, error = self.fail.pop(name, ("", None))
        if when == "before" and error is not None:
            raise error
        yield
        if when == "after" and error is not None:
            raise error

    def reset(self) -> None:
        """A TPM reset: power off and on."""
        self.pcr22 = ONES

    # the anchor

    def anchor_free_index(self) -> int:
        with self._call("anchor_free_index"):
            return next(index for index in range(FIRST_INDEX, FIRST_INDEX + 256) if index not in self.indices)

    def anchor_plan(self, index: int) -> AnchorInfo:
        return AnchorInfo(index, b"\x00\x0b" + hashlib.sha256(index.to_bytes(4)).digest())

    def anchor_define(self, index: int, auth: bytes) -> AnchorInfo:
        with self._call("anchor_define"):
            self._as_owner("define an index")
            if index in self.indices:
                raise AnchorExists(index)
            self.indices[index] = auth, None
            return self.anchor_plan(index)

    def anchor_undefine(self, info: AnchorInfo) -> None:
        with self._call("anchor_undefine"):
            self._as_owner("remove an index")
            if info.index not in self.indices:
                raise AnchorMissing(info.index, "it does not exist")
            del self.indices[info.index]

    def anchor_read(self, info: AnchorInfo, auth: bytes) -> bytes:
        with self._call("anchor_read"):
            known, content = self._index(info)
            if content is None:
                raise AnchorMissing(info.index, "it was never written")
            if known != auth:
                raise AnchorDenied(info.index, "read it")
            return content

    def anchor_write(self, info: AnchorInfo, auth: bytes, digest: bytes, *, first: bool = False) -> None:
        with self._call("anchor_write"):
            known, content = self._index(info)
            if content is None and not first:
                raise AnchorMissing(info.index, "it was never written")
            if known != auth:
                raise AnchorDenied(info.index, "write it")
            assert len(digest) == 32
            self.indices[info.index] = auth, digest
            self.nv_writes += 1
            self.after_write()

    def _index(self, info: AnchorInfo) -> tuple[bytes, bytes | None]:
        if info.index not in self.indices:
            raise AnchorMissing(info.index, "it does not exist")
        return self.indices[info.index]

    # PCR 22

    def pcr22_read(self) -> bytes:
        with self._call("pcr22_read"):
            return self.pcr22

    def pcr22_extend(self, digest: bytes) -> None:
        with self._call("pcr22_extend"):
            self.pcr22 = hashlib.sha256(self.pcr22 + digest).digest()
            self.after_extend()

    # the rest

    def check_locality(self) -> LocalityReport:
        return LocalityReport(2, refused_at_zero=True, weaker=False)

    def provision_srk(self) -> bytes:
        with self._call("provision_srk"):
            return self.srk

    def open_srk(self, pinned_name: bytes) -> None:
        if pinned_name != self.srk:
            raise SrkChanged(0x81000001, pinned_name, self.srk)

    def pcr_read(self, selection: Any) -> dict[int, bytes]:
        return {index: self.pcrs.get(index, ONES) for index in selection}

    def pcr_read_together(self, selection: Any) -> dict[int, bytes]:
        with self._call("pcr_read_together"):
            return {index: self.pcrs[index] for index in selection}

    def pcr_values_to_seal(self, selection: Any) -> dict[int, bytes]:
        return {index: self.pcrs[index] for index in selection}

    def seal(self, secret: bytes, policy: SealPolicy) -> SealedBlob:
        with self._call("seal"):
            handle = os.urandom(16)
            self.sealed[handle] = secret, policy
            return SealedBlob(b"public", handle, policy)

    def unseal(self, blob: SealedBlob) -> bytes:
        with self._call("unseal"):
            if blob.private not in self.sealed:
                raise SealDamaged("it is not an object of this TPM")
            secret, policy = self.sealed[blob.private]
            if policy.approver_point is not None:
                open_approved(blob, self.pcrs, self.revocations)
                return secret
            bound = [dict(branch.values) for branch in policy.branches if isinstance(branch, PcrBranch)]
            differing = [{i: (v, self.pcrs[i]) for i, v in values.items() if self.pcrs[i] != v} for values in bound]
            if bound and all(differing):
                raise PolicyMismatch("unseal", differing[0])
            return secret

    def unseal_with_recovery(self, blob: SealedBlob, sign: Callable[[bytes], bytes]) -> bytes:
        with self._call("unseal_with_recovery"):
            if blob.private not in self.sealed:
                raise SealDamaged("it is not an object of this TPM")
            secret, policy = self.sealed[blob.private]
            if policy.recovery_point is None:
                raise RecoveryRefused("it was sealed without one")
            key, statement = (
                EllipticCurvePublicKey.from_encoded_point(SECP256R1(), policy.recovery_point),
                os.urandom(32),
            )
            try:
                key.verify(sign(statement), statement, ECDSA(Prehashed(SHA256())))
            except InvalidSignature as error:
                raise RecoveryRefused("another key signed") from error
            return secret

    # hierarchy passwords

    def properties(self) -> TpmProperties:
        return TpmProperties(
            manufacturer="MODL",
            vendor="model",
            firmware="0.0.0.1",
            owner_auth_set=bool(self.auths.get("owner")),
            endorsement_auth_set=bool(self.auths.get("endorsement")),
            lockout_auth_set=bool(self.auths.get("lockout")),
            in_lockout=False,
            lockout_counter=0,
            max_auth_fail=3,
            lockout_interval=1000,
            lockout_recovery=1000,
        )

    def use_hierarchy_auths(self, owner: bytes, endorsement: bytes) -> None:
        self.used = {"owner": owner, "endorsement": endorsement}

    def change_hierarchy_auth(self, hierarchy: str, old: bytes, new: bytes) -> None:
        with self._call(f"change_hierarchy_auth {hierarchy}"):
            if self.auths.get(hierarchy, b"") != old:
                raise HierarchyAuthRefused(hierarchy)
            self.auths[str(hierarchy)] = new
            if hierarchy in self.used:
                self.used[str(hierarchy)] = new

    def _as_owner(self, doing: str) -> None:
        if self.auths.get("owner", b"") != self.used["owner"]:
            raise OwnerAuthWanted(doing)

    def random(self, count: int) -> bytes:
        with self._call("random"):
            return os.urandom(count)


def as_tpm(model: ModelTpm) -> HardwareTpm:
    """Say that the model is enough of a hardware TPM for this test."""
    return cast("HardwareTpm", model)


def hardware(model: ModelTpm) -> Hardware:
    return Hardware(as_tpm(model))


def lost_answer() -> TpmTransport:
    """The TPM's answer got lost: whether it obeyed is not known."""
    return TpmTransport("do it", "the answer was lost")


class SnapshotDisk(MemoryDisk):
    """Keeps the image as of every flush, and cuts the power at the `cut`-th write from now, leaving it torn."""

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        self.on_flush: Callable[[bytes], None] = lambda _image: None
        self.cut: int | None = None

    def pwrite(self, data: Bytes, offset: int) -> int:
        if self.cut is not None:
            self.cut -= 1
            if self.cut <= 0:
                super().pwrite(bytes(data)[: len(data) // 2], offset)
                raise PowerCutError
        return super().pwrite(data, offset)

    def fdatasync(self) -> None:
        self.on_flush(bytes(self.content))


def initialised(
    directory: Path, model: ModelTpm, pcrs: str = "none", recovery: RecoveryPrivate | None = None
) -> tuple[Layout, Config]:
    """Make an installation on the model, by default without PCRs and recovery key."""
    layout = Layout(directory / "state", directory / "run")
    layout.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    public = None
    if recovery is not None:
        public = directory / "recovery.pub"
        public.write_bytes(recovery.public.to_pem())
    options = InitOptions(tcti="embedded", locality=2, pcrs=pcrs, recovery=public, store_size=256 * 1024)
    initialise(layout, options, as_tpm(model))
    return layout, Config.load(layout.config)


class RunningDaemon:
    """A manager in this process, with a real keeper and real instances, on the model TPM."""

    def __init__(self, layout: Layout, config: Config, opened: Opened, model: ModelTpm, base: Path) -> None:
        self.layout, self.config, self.opened, self.model, self.base = layout, config, opened, model, base
        self.daemon = Daemon(layout, config, opened, hardware(model))

    async def ask(self, verb: str, **arguments: Any) -> list[dict[str, Any]]:
        """Ask as a command does; raises RemoteError."""
        path = str(self.layout.admin_socket)
        return await trio.to_thread.run_sync(lambda: request(path, verb, arguments))

    @property
    def attachments(self) -> Attachments:
        return self.daemon._attachments

    @property
    def registry(self) -> Registry:
        return self.daemon._registry

    def stop(self) -> None:
        self.daemon._stop_requested.set()


@contextmanager
def installation(
    model: ModelTpm, pcrs: str = "none", recovery: RecoveryPrivate | None = None
) -> Iterator[tuple[Path, Layout, Config]]:
    """A state directory with a short name, initialised on the model; removed afterwards."""
    base = Path(tempfile.mkdtemp(prefix="vt"))
    try:
        yield base, *initialised(base, model, pcrs, recovery)
    finally:
        shutil.rmtree(base)


@asynccontextmanager
async def running_daemon(
    model: ModelTpm, place: tuple[Path, Layout, Config], *, stop: bool = True
) -> AsyncIterator[RunningDaemon]:
    """Run a manager until the block ends; with `stop` it then stops cleanly."""
    base, layout, config = place
    make_runtime_directory(layout)
    with locked_store(layout) as descriptor:
        layout.admin_socket.unlink(missing_ok=True)
        opened = open_store(descriptor, as_tpm(model), config)
        running = RunningDaemon(layout, config, opened, model, base)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.daemon.run)
            with trio.fail_after(30):
                while not layout.admin_socket.exists():  # noqa: ASYNC110 - the daemon tells systemd only
                    await trio.sleep(0.005)
            yield running
            if stop:
                running.stop()
            else:
                nursery.cancel_scope.cancel()
