"""`vtpm-manager run`: opens the installation, serves rings and administrators, stops cleanly.

SIGTERM and SIGINT: clean stop of everything. SIGHUP: step down; instances go on and wait for the next manager.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from dataclasses import asdict
from typing import Any
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.release import RELEASE
from manager import admin_server, confinement, migration_wire, xen_server
from manager.admin_server import AdminServer
from manager.anchor import Standing
from manager.anchoring import Anchoring
from manager.approvals import Approvals
from manager.attachment_epochs import adopt_older_rows, refuse_any_stale
from manager.attachments import Attachments
from manager.attestation import Attestation
from manager.blob_events import BlobEvents
from manager.capacity import Capacity, descriptors_in_use, raise_descriptor_limit
from manager.catalogue_place import place_of, shown_place
from manager.committer import Committer
from manager.config import Config, Layout
from manager.config_check import refuse_unusable
from manager.errors import ConfigurationError, ConflictError
from manager.event_retention import keep_events
from manager.exports import Exports
from manager.frequent_events import FrequentEvents
from manager.group_rows import follow_store
from manager.groups import Groups
from manager.hardware import Hardware
from manager.hibernation import Hibernation
from manager.imports import Imports
from manager.instances import Instances
from manager.keepers import Keepers
from manager.keys import catalogue_key, state_blob_key
from manager.migration import Migration
from manager.migration_box import MigrationBox
from manager.migration_wire import MigrationServer, parse_address
from manager.notify import notify
from manager.opening import Opened, integrity, locked_store, open_store, open_tpm
from manager.quoting import Quotes
from manager.registry import Registry
from manager.restores import Restores
from manager.ring_server import RingServer
from manager.running import Running
from manager.services import Services
from manager.sleepers import Sleepers
from manager.supervision import Supervision
from manager.tombstones import Tombstones
from manager.upgrade import Command, ask_installed
from manager.verb_table import SCHEMA_VERSION
from manager.verbs import timestamp, uptime
from manager.xen_events import XenEvents
from manager.xen_remote import Elsewhere
from manager.xen_server import XenServer
from storage.catalogue import Catalogue

_log = logging.getLogger("vtpm.manager")
READY: str = "Waiting for commands from vTPMs"


class Daemon:
    """One running manager: made of its parts, wired here and nowhere else."""

    def __init__(
        self, layout: Layout, config: Config, opened: Opened, hardware: Hardware, command: Command | None = None
    ) -> None:
        """Build the parts that need no task yet; `command` is how the process was started, for an upgrade in place."""
        self._layout, self._config, self._opened, self._hardware = layout, config, opened, hardware
        self._started = time.monotonic()
        self._stop_requested = trio.Event()
        self._keep_instances = self._upgrading = False
        self._command, self._run_id = command, secrets.token_hex(8)
        self._closing = contextlib.ExitStack()
        self._keepers: Keepers
        self._committer = Committer(opened.store, self._group_committed)
        self._anchoring = Anchoring(
            self._committer,
            hardware,
            opened.boot.anchor,
            opened.secret.anchor_auth,
            volatile=hardware.tpm.locality == 2,
            strict=config.anchor.strict,
        )
        store_uuid = opened.store.uuid
        key = catalogue_key(opened.secret.store_key, store_uuid)
        with contextlib.ExitStack() as failed, integrity():
            self._catalogue = Catalogue.open(place_of(layout, config), key, store_uuid)
            failed.callback(self._catalogue.close)
            refuse_any_stale(opened.store, self._catalogue)
            self._catalogue.take_possession(store_uuid)
            for done in follow_store(self._catalogue, opened.store):
                _log.warning("the catalogue did not agree with the store: %s", done)
            failed.pop_all()
        self._tombstones = Tombstones(self._committer, config.store.tombstone_days)
        self._registry = Registry(
            self._committer,
            self._catalogue,
            self._anchoring,
            layout.state_images,
            self._tombstones,
            config.quota.vtpms_per_group,
            opened.closed,
        )
        self._approvals = Approvals(
            opened, self._committer, self._catalogue, self._anchoring, hardware, config.tpm.pcrs
        )
        self._groups = Groups(
            opened, self._committer, self._catalogue, self._anchoring, hardware, config.tpm.pcrs, self._approvals
        )
        self._attestation = Attestation(self._groups, hardware, store_uuid)
        self._restores = Restores(self._registry)
        self._quotes = Quotes(self._registry, self._groups, hardware, config.attestation.pcrs)
        self._attachments: Attachments
        self._supervision: Supervision
        self._hibernation: Hibernation
        self._exports: Exports
        self._moves: Migration
        self._descriptor_limit = raise_descriptor_limit()  # before a keeper is started, which inherits it

    def _group_committed(self) -> None:
        self._anchoring.group_committed()

    async def run(self) -> bool:
        """Serve until told to stop; returns whether the installed code is to take this process over."""
        managers = self._listen_for_managers()  # before anything that would have to be undone
        unclean = self._opened.standing is not Standing.CLEAN
        if unclean:
            _log.warning("the last stop was not clean; the store is the newest one all the same")
        await self._anchoring.write_opening(unclean=unclean)
        self._keepers = await Keepers.connect(self._layout, self._config.instance)
        try:
            # a dead manager's: keepers serve us, so none lives in this directory, which may have another store
            self._layout.admin_socket.unlink(missing_ok=True)
            async with trio.open_nursery() as nursery:
                await self._serve(nursery, self._keepers, managers)
                nursery.cancel_scope.cancel()
        finally:
            self._closing.close()
            self._keepers.close()
            self._catalogue.close()
            self._opened.store.close()
            self._opened.secret.wipe()
        return self._upgrading

    async def _serve(self, nursery: trio.Nursery, keepers: Keepers, managers: socket.socket | None) -> None:
        config = self._config
        rings = RingServer(self._committer, self._hardware, nursery, config.instance.commit_timeout)
        self._closing.callback(rings.close)
        rings.on_quote = self._quotes.for_guest
        blob_events = FrequentEvents(self._catalogue)
        imports = rings.blobs = self._imports(blob_events)
        instances = Instances(keepers, rings, nursery, config.instance, self._ended)
        self._closing.callback(instances.close)
        hibernation = self._lives(instances, keepers, nursery)
        rings.on_boot = self._attachments.boots.begin
        nursery.start_soon(self._committer.run)
        nursery.start_soon(self._tombstones.run)
        nursery.start_soon(rings.run)
        nursery.start_soon(self._anchoring.run_volatile)
        nursery.start_soon(self._anchoring.run_interval, config.anchor.interval_seconds)
        nursery.start_soon(self._signals)
        nursery.start_soon(keep_events, self._catalogue, config.catalogue)
        migration = self._moves = self._migration(instances)
        imports.claimer = migration.arrivals
        await adopt_older_rows(self._committer, self._catalogue)
        await migration.settle()
        await self._supervision.take_over(await keepers.list(), hibernation)
        hibernation.listen()
        nursery.start_soon(hibernation.run_idle)
        nursery.start_soon(hibernation.events.run)
        nursery.start_soon(blob_events.run)
        xen = self._xen(instances, nursery, hibernation)
        await self._approvals.raise_used()  # from here on the platform has come up: what is older is revoked
        nursery.start_soon(migration.arrivals.run)
        nursery.start_soon(xen.run, self._listen_for_xen())
        if managers is not None:
            server = MigrationServer(migration.server_context, migration.knows, migration.handle)
            nursery.start_soon(server.run, managers)
            _log.info("other managers are answered at %s", config.migration.listen)
        await self._administer(nursery, self._services(hibernation, imports, migration))
        await self._wind_up(keepers)

    def _lives(self, instances: Instances, keepers: Keepers, nursery: trio.Nursery) -> Hibernation:
        """Make what starts, stops, watches and hibernates instances."""
        config = self._config
        sleepers = Sleepers(self._registry, instances, keepers, self._layout.sockets, config.instance)
        capacity = Capacity.found(config.quota.running, self._descriptor_limit, config.instance.per_keeper)
        self._attachments = Attachments(
            self._registry, instances, self._layout, config, self._opened.store.uuid, capacity, sleepers
        )
        self._supervision = Supervision(self._registry, self._attachments, instances, nursery, config.instance)
        self._hibernation = Hibernation(
            self._registry, self._attachments, instances, keepers, nursery, self._supervision.later
        )
        return self._hibernation

    def _services(self, hibernation: Hibernation, imports: Imports, migration: Migration) -> Services:
        return Services(
            self._registry,
            self._attachments,
            self._layout.sockets,
            self._status,
            self._stop_requested.set,
            self._layout,
            self._config,
            self._groups,
            self._start_group,
            self._approvals,
            self._attestation,
            self._quotes,
            self._upgrade,
            hibernation,
            self._restores,
            imports,
            migration,
        )

    async def _administer(self, nursery: trio.Nursery, services: Services) -> None:
        """Answer administrators until told to stop."""
        with admin_server.listen(self._layout.admin_socket, self._config.admin) as listener:
            nursery.start_soon(AdminServer(services, self._config.admin).run, listener)
            _log.info(READY)
            notify("READY=1")
            await self._stop_requested.wait()
            trio.lowlevel.notify_closing(listener)  # its number may soon be another descriptor's
            # of a service that says it stops systemd expects that it ends
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}" if self._upgrading else "STOPPING=1")
            self._layout.admin_socket.unlink(missing_ok=True)

    def _imports(self, notes: FrequentEvents) -> Imports:
        store, events = self._opened.store, BlobEvents(notes)
        self._exports = Exports(store, state_blob_key(self._opened.secret.store_key, store.uuid), events)
        return Imports(self._registry, self._exports, self._restores, events)

    def _xen(self, instances: Instances, nursery: trio.Nursery, hibernation: Hibernation) -> XenServer:
        elsewhere = Elsewhere(self._registry, self._attachments, instances, nursery)
        events = XenEvents(hibernation.events)
        return XenServer(self._registry, self._attachments, elsewhere, events, self._layout.sockets)

    def _listen_for_xen(self) -> socket.socket:
        """Return where vtpm-xen asks. Raises OSError."""
        listener = xen_server.listen(self._layout.xen_socket)
        self._closing.callback(listener.close)
        self._closing.callback(self._layout.xen_socket.unlink, missing_ok=True)
        return listener

    def _migration(self, instances: Instances) -> Migration:
        opened = self._opened
        box = MigrationBox(self._layout.state_dir, opened.secret.store_key, opened.store.uuid, self._approvals)
        self._closing.callback(box.close)
        if box.problem is not None:
            _log.error("migration is not possible: %s", box.problem)
        return Migration(box, self._registry, self._attachments, instances, self._exports.unwrap)

    def _listen_for_managers(self) -> socket.socket | None:
        """Return where other managers connect, None where nobody may. Raises UsageError, ConfigurationError."""
        if not self._config.migration.listen:
            return None
        listener = migration_wire.listen(parse_address(self._config.migration.listen))
        self._closing.callback(listener.close)
        return listener

    async def _start_group(self, group: UUID) -> int:
        async with self._approvals.changing:  # it writes a group's record back as it read it
            await adopt_older_rows(self._committer, self._catalogue)
        await self._moves.settle()  # what may have left of it is not started
        self._groups.settled(group)
        self._tombstones.buried()  # the group's, too, have a time that is waited for now
        return await self._supervision.start_group(group, self._hibernation)

    async def _ended(self, running: Running, status: int | None) -> None:
        await self._supervision.ended(running, status)

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            async for number in received:
                if number != signal.SIGHUP:
                    self._keep_instances = False
                elif not self._stop_requested.is_set():
                    self._keep_instances = True
                self._upgrading = False  # who sends a signal wants this process to end
                _log.info(
                    "%s: %s", signal.Signals(number).name, "stepping down" if self._keep_instances else "stopping"
                )
                self._stop_requested.set()

    async def _upgrade(self) -> dict[str, Any]:
        """Step down for the installed code, if that can take over; see `manager.upgrade`.

        Raises:
            ConflictError: it cannot. TpmError: the durable anchor cannot be written. Nothing was changed.

        """
        if self._command is None:
            raise ConflictError("this manager was not started by its command, so it cannot be upgraded in place")
        release = await ask_installed(self._command)
        await self._anchoring.write_durable()
        if self._stop_requested.is_set():
            raise ConflictError("the manager is stopping; it was not upgraded")
        _log.info("stepping down for release %s", release)
        self._keep_instances = self._upgrading = True
        self._stop_requested.set()
        return {
            "schema": SCHEMA_VERSION,
            "state": "upgrading",
            "pid": os.getpid(),
            "from_release": RELEASE,
            "release": release,
            "run": self._run_id,
        }

    async def _wind_up(self, keepers: Keepers) -> None:
        """Stop instances (unless they are to go on), write the last anchor, end the keepers."""
        if self._keep_instances:
            await self._anchoring.write_durable()
        if self._keep_instances:  # unless a stop of everything was asked for meanwhile
            _log.info("instances go on without a manager; their saves wait for the next one")
        else:
            unclean = await self._attachments.stop_all()
            if unclean:
                _log.error("%d instances did not stop cleanly; what they acknowledged is durable", unclean)
            await keepers.ask(k.Stop())
            await self._anchoring.write_final()
            _log.info("stopped; the hardware TPM's anchor stands for the store as it is now")

    def _status(self) -> dict[str, Any]:
        store = self._opened.store
        anchors = self._anchoring.statistics()
        commits = self._committer.statistics()
        return {
            "schema": SCHEMA_VERSION,
            "pid": os.getpid(),
            "release": RELEASE,
            "run": self._run_id,
            "upgrade_failed": self._command.failed if self._command else None,
            "keeper_pid": self._keepers.first.pid,
            "keepers": len(self._keepers.all),
            "keepers_hold": self._keepers.describe(),
            "uptime_seconds": uptime(self._started),
            "state_dir": str(self._layout.state_dir),
            "store": str(store.uuid),
            "vtpms": self._catalogue.count_vtpms(),
            "catalogue": shown_place(self._layout, self._config),
            **confinement.summary(self._config.instance, self._keepers.confinement),
            "running": self._attachments.count,
            "hibernated": len(self._attachments.sleepers.asleep),
            "hibernated_bytes_freed": self._attachments.sleepers.freed,
            "running_most": self._attachments.capacity.most,
            "vtpms_per_group_most": self._config.quota.vtpms_per_group or None,
            "commands_per_second": self._config.quota.commands_per_second or None,
            "saves_per_second": self._config.quota.saves_per_second or None,
            "nv_bytes": self._config.quota.nv_bytes or None,
            "descriptors": descriptors_in_use(),
            "descriptors_most": self._descriptor_limit,
            "closed_groups": ", ".join(sorted(map(self._registry.group_name, self._opened.closed))) or None,
            "tpm": self._config.tpm.tcti,
            "locality": self._hardware.tpm.locality,
            "tpm_commands": self._hardware.tpm.commands_sent,
            "pcrs": self._config.tpm.pcrs,
            "recovery_key": bool(self._opened.boot.recovery),
            "anchor_mode": "strict"
            if self._config.anchor.strict
            else f"every {self._config.anchor.interval_seconds:g} s",
            "anchor_written": timestamp(anchors.last_durable),
            "anchor_writes": anchors.durable_writes,
            "anchor_index": f"0x{self._opened.boot.anchor.index:08x}",
            "pcr22_extends": anchors.volatile_extends,
            "tpm_resets": anchors.resets,
            "group_commits": commits.groups,
            "commits": commits.entries,
            **{f"store_{name}": value for name, value in asdict(store.statistics()).items() if name != "vtpms"},
        }


def run(layout: Layout, config: Config, command: Command | None = None) -> bool:
    """Run a manager until it is told to stop; returns whether the installed code is to take this process over.

    Raises:
        ManagerError: it could not start, or could not stop cleanly.

    """
    layout.check()
    refuse_unusable(layout, config)
    make_runtime_directory(layout)
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        opened = open_store(descriptor, tpm, config)
        return trio.run(Daemon(layout, config, opened, Hardware(tpm), command).run)


def make_runtime_directory(layout: Layout) -> None:
    """Make the runtime directories: others may pass through to the sockets they own, not look around.

    Raises:
        ConfigurationError: one belongs to somebody else.

    """
    for path in (layout.runtime_dir, layout.sockets):
        path.mkdir(parents=True, exist_ok=True)
        owner = path.stat().st_uid
        if owner not in (0, os.geteuid()):
            raise ConfigurationError(
                f"{path} belongs to user {owner}, who could put sockets of his own in place of ours; nothing was "
                f"started. Name another --runtime-dir, or give it to the manager's user"
            )
        path.chmod(0o711)
