"""Waiting for one of two things."""

import trio


async def either(one: trio.Event, other: trio.Event) -> None:
    """Wait until one of two events is set, or both."""

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)
