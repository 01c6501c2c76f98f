"""The instance's part of deep quotes: for its guest (a vendor command), and for the manager (the order QUOTE).

The vTPM's evidence is made here, between two commands of the guest; the manager has the hardware TPM sign over it. A
guest that asks waits for that, and only it: everybody else's instance is another process.
"""

from typing import Final

from frontend_backend import messages_instance as m
from frontend_backend.deep_quote import DeepQuoteCommand, success
from frontend_backend.errors import MessageError
from frontend_backend.tpmhdr import TpmFamily, error_response
from vtpm_instance.errors import ManagerError, ManagerRefusedError, ManagerSilentError, QuoteRefusedError
from vtpm_instance.journal import note
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.vtpm import Vtpm

GUEST_TIMEOUT: Final = 30.0  # seconds; a manager that is there answers within 15. No reset is obeyed meanwhile
TASK_TIMEOUT: Final = 5.0  # seconds; the manager answers these without its hardware TPM

# TPM 2.0 Part 2, 6.6.3: TPM_RC_SIZE, TPM_RC_RETRY, TPM_RC_DISABLED; TPM 1.2 Part 2, 16: TPM_BAD_PARAMETER, TPM_RETRY,
# TPM_DISABLED_CMD.
_MALFORMED: Final = {TpmFamily.TPM_2_0: 0x095, TpmFamily.TPM_1_2: 0x003}
_LATER: Final = {TpmFamily.TPM_2_0: 0x922, TpmFamily.TPM_1_2: 0x800}
_REFUSED: Final = {TpmFamily.TPM_2_0: 0x120, TpmFamily.TPM_1_2: 0x008}


class Quoter:
    """Makes evidence of one vTPM; `emulator` names the program that is the vTPM."""

    def __init__(self, vtpm: Vtpm, link: ManagerLink, emulator: str) -> None:
        """Serve `vtpm`'s guest from now on."""
        self._vtpm, self._link, self._emulator = vtpm, link, emulator
        vtpm.deep_quote = self.answer

    def answer(self, command: bytes) -> bytes:
        """Answer the guest's framed command; never raises for what it sends, or the manager refuses."""
        family = self._vtpm.family
        try:
            wish = DeepQuoteCommand.unpack(command, family)
        except MessageError:
            return error_response(family, _MALFORMED[family])
        try:
            evidence = self._vtpm.attest(wish.nonce, wish.selection, self._emulator)
            reply = self._link.ask(m.Quote(wish.nonce, evidence.pack()), GUEST_TIMEOUT)
        except QuoteRefusedError as error:
            return error_response(family, error.code or _REFUSED[family])
        except ManagerError as error:
            return error_response(family, self._code(error))
        if not isinstance(reply, m.QuoteReply):
            note(f"no quote for the guest: the manager answered {type(reply).__name__}")
            return error_response(family, _REFUSED[family])
        return success(family, reply.bundle)

    def _code(self, error: ManagerError) -> int:
        """Return what a guest is told where the manager gave no bundle."""
        if isinstance(error, ManagerRefusedError):
            codes = _LATER if error.code == m.RefusalCode.LIMIT.value else _REFUSED
        else:
            note(f"no quote for the guest: {error}")
            codes = _LATER if isinstance(error, ManagerSilentError) else _REFUSED
        return codes[self._vtpm.family]

    def serve(self) -> None:
        """Obey the order QUOTE: ask what for, make the evidence, and send it, or say why there is none."""
        try:
            task = self._link.ask(m.QuoteTask(), TASK_TIMEOUT)
            if isinstance(task, m.QuoteTaskReply) and task.ticket:
                self._link.ask(self._made(task), TASK_TIMEOUT)
        except ManagerError as error:
            note(f"no quote for the manager: {error}")

    def _made(self, task: m.QuoteTaskReply) -> m.QuoteMade:
        try:
            evidence = self._vtpm.attest(task.nonce, task.selection, self._emulator)
        except QuoteRefusedError as error:
            return m.QuoteMade(task.ticket, b"", str(error)[:200])
        return m.QuoteMade(task.ticket, evidence.pack())
