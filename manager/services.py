"""What every verb works with, and the form of its answer. What each verb does: verbs, verbs_*."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from frontend_backend.messages_admin import Note
from manager.approvals import Approvals
from manager.attachments import Attachments
from manager.attestation import Attestation
from manager.config import Config, Layout
from manager.groups import Groups
from manager.hibernation import Hibernation
from manager.imports import Imports
from manager.migration import Migration
from manager.quoting import Quotes
from manager.registry import Registry
from manager.restores import Restores

Document = dict[str, Any]
Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: user id from the kernel, and the descriptors that came with the request (closed after it)."""

    uid: int
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Services:
    """What the verbs work with."""

    registry: Registry
    attachments: Attachments
    sockets: Path
    status: Callable[[], Document]
    stop: Callable[[], None]
    layout: Layout
    config: Config
    groups: Groups
    start_group: Callable[[UUID], Awaitable[int]]  # starts the attached vTPMs of a group that was just opened
    approvals: Approvals
    attestation: Attestation
    quotes: Quotes
    upgrade: Callable[[], Awaitable[Document]]
    hibernation: Hibernation
    restores: Restores
    imports: Imports
    migration: Migration


# A verb answers with all its documents at once, or, where there are many or it takes long, one after the other with
# notes for whoever waits between them.
Answer = Awaitable[list[Document]] | AsyncGenerator[Document | Note]
Handler = Callable[[Services, Caller, Arguments], Answer]
