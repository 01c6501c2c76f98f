"""The hardware TPM as the rest of the manager sees it: asynchronous, one command sequence at a time."""

from manager.hwtpm import HardwareTpm
from manager.tpm_lane import TpmLane


class Hardware:
    """A hardware TPM and its lane."""

    def __init__(self, tpm: HardwareTpm) -> None:
        """Own `tpm` from now on: nobody else may call it."""
        self.tpm = tpm
        self.lane = TpmLane()

    async def pcrs(self, selection: tuple[int, ...]) -> tuple[bytes, ...]:
        """Return the SHA-256 PCRs of this selection, as they were at one time; raises TpmError."""
        values = await self.lane.run(self.tpm.pcr_read_together, selection)
        return tuple(values[pcr] for pcr in selection)

    async def random(self, count: int) -> bytes:
        """Return `count` bytes from the hardware TPM's generator; raises TpmError."""
        return await self.lane.run(self.tpm.random, count)
