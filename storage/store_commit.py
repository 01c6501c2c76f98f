"""A checked commit becomes one frame in the log and, once that is durable, what memory holds."""

from storage import store_format as fmt
from storage.errors import CommitTooLarge
from storage.store_checkpoint import checkpoint, ensure_room
from storage.store_crypto import seal_part
from storage.store_frame import Frame, GroupChange, frame_bytes
from storage.store_plan import Plan
from storage.store_state import State, drop_groups, put_groups


def max_commit_bytes(state: State) -> int:
    """Say what one commit may take in the log."""
    return (state.log.units - 1) * fmt.UNIT


def make_durable(state: State, plan: Plan) -> int:
    """Write the frame of a commit and flush; return its sequence. A checkpoint comes first when the log is full.

    Raises: CommitTooLarge, StorageFull, with nothing changed; DeviceError.
    """
    changes: list[GroupChange] = [*plan.puts, *plan.drops]
    size = frame_bytes(changes, [len(part.plaintext) for part in plan.parts])
    if not state.log.fits(size):
        raise CommitTooLarge(size, max_commit_bytes(state))
    ensure_room(state, plan.new_entries(state.groups))
    unit = state.log.place(size)
    if unit is None:
        checkpoint(state, size)
        unit = state.log.place(size)
        assert unit is not None, "an empty log takes any frame that fits it"
    store, sequence = state.store, state.sequence + 1
    parts = [(part.group, seal_part(part.key, store, part.group, sequence, part.plaintext)) for part in plan.parts]
    state.log.write(Frame(sequence, state.log.head, state.carried, changes, parts), unit, state.key, store)
    state.flush()
    return sequence


def apply(state: State, plan: Plan, sequence: int) -> None:
    """Take what the log holds now into memory."""
    state.sequence = sequence
    if plan.puts:
        put_groups(state, plan.puts, plan.keys)
    for part in plan.parts:
        table = part.table if part.table is not None else state.groups[part.group].table
        assert table is not None, "the plan lets only open groups pass"
        table.apply(part.plaintext)
    if plan.drops:
        drop_groups(state, plan.drops)
    state.commits += 1
