"""A front end in user space, for domains without a guest's driver: `xen_front_client.py [--device N] COMMAND...`.

Each command is hexadecimal, `LOCALITY:HEX` at another locality than 0, `+HEX` with room for an answer in extra pages,
or one of the words `cancel` (submits TPM2_CreatePrimary and gives it up), `hostile` (scribbles over the head), `wait`
(2 s). The answers are printed one a line. Needs gntalloc, evtchn and xenstore of Xen; dom0 can be its own guest.
"""

import argparse
import struct
import sys

import trio

from frontend_backend.errors import RingError
from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrantOffers
from frontend_backend.xen_front_node_trio import device_path
from frontend_backend.xen_front_trio import XenFront
from frontend_backend.xs_trio import open_xenstore

SECONDS = 60.0  # for the connection, and for each answer
# TPM2_CreatePrimary(owner, empty sensitive, RSA-2048 restricted decryption key): takes long enough to be given up
CREATE_PRIMARY = (
    "80020000004300000131400000010000000940000009000000000000040000000000"
    "1a0001000b00030072000000060080004300100800000000000000000000"
)


def submit_hostile(front: XenFront) -> str:
    """Say that 4 GiB are submitted, with 255 extra pages, from locality 255."""
    offered = front._offered
    assert offered is not None
    offered.pages.page[:8] = struct.pack("<IBBBB", 0xFFFF_FFFF, 1, 255, 0, 255)
    front._notify(offered)
    return "scribbled"


async def run(front: XenFront, word: str) -> str:
    if word == "wait":
        await trio.sleep(2)
        return "waited"
    if word == "hostile":
        return submit_hostile(front)
    if word == "cancel":
        with trio.move_on_after(0.02) as given_up:
            await front.transact(bytes.fromhex(CREATE_PRIMARY))
        return "cancelled" if given_up.cancelled_caught else "answered before it was given up"
    locality, _, packet = word.rpartition(":")
    with trio.fail_after(SECONDS):
        long = packet.startswith("+")
        return (await front.transact(bytes.fromhex(packet.lstrip("+")), int(locality or 0), roomy=long)).hex()


async def main(device: int, words: list[str]) -> int:
    channels, offers = DeviceEventChannels.open(), DeviceGrantOffers.open()
    async with open_xenstore() as xs, trio.open_nursery() as nursery:
        front = XenFront(xs, channels, offers, device_path(await xs.own_domain(), device), extra_pages=1)
        await nursery.start(front.run)
        with trio.fail_after(SECONDS):
            await front.until_connected()
        wrong = 0
        for word in words:
            try:
                print(await run(front, word), flush=True)
            except (RingError, trio.TooSlowError) as error:
                print(f"error: {error}", flush=True)
                wrong = 1
        nursery.cancel_scope.cancel()
    channels.close()
    offers.close()
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("words", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    sys.exit(trio.run(main, options.device, options.words))
