"""The one connection to the hardware TPM: opening, locality, sessions, handles, and making it anew after a failure.

Everything here belongs to one owner (TpmLane); a second thread inside an operation is a bug and raises. What a command
means is the business of the modules above; what its failure is called is the business of hwtpm_rc.
"""

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tpm2_pytss import ESAPI, ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SE, TPMA_SESSION, TSS2_Exception

from manager.hwtpm_errors import (
    BadSetting,
    TpmBusy,
    TpmFailureMode,
    TpmTransport,
    TpmUnavailable,
    TpmWasReset,
    WrongLocality,
)
from manager.hwtpm_rc import RC_HANDLE, RC_NEEDS_TEST, RC_TESTING, context_survives, meaning, translate
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.hwtpm_tcti import Tcti, open_transport
from manager.hwtpm_transport import HEADER, Transport

_BUSY_ERRNOS: Final = frozenset({errno.EBUSY, errno.ECONNREFUSED, errno.EAGAIN})
_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 0.5
_CC_FLUSH_CONTEXT: Final = 0x165
# Part 2, 7.2: first handles of loaded transient objects and of loaded HMAC and policy sessions.
TRANSIENT_FIRST: Final = 0x80000000
LOADED_SESSION_FIRST: Final = 0x02000000
POLICY_SESSION_KIND: Final = 0x03
SALTED_CIPHER: Final = "aes128cfb"
_ALL_FLAGS: Final = 0xFF


class TpmLink:
    """Owns transport, TCTI and ESAPI context. `operation` is the only way to the TPM.

    open_seconds: how long to wait for a busy TPM when connecting. command_seconds: deadline of one command; a
    discrete chip may take 9 s for an RSA key and 19 s when contended (reference hardware-tpm.md section 6).
    """

    def __init__(
        self,
        setting: TctiSetting,
        *,
        locality: int,
        open_seconds: float,
        command_seconds: float,
        owner_auth: bytes,
    ) -> None:
        if setting.kind is TctiKind.EMBEDDED:
            raise BadSetting("The embedded TPM is not running", "Start EmbeddedTpm and open the setting it returns.")
        if locality not in {0, 2}:
            raise BadSetting(f"Locality {locality} cannot be used", "Use 2, or 0 as the weaker mode.")
        self.setting = setting
        self.locality = locality
        self.connections = 0
        self._open_seconds = open_seconds
        self._command_seconds = command_seconds
        self._owner_auth, self._endorsement_auth = owner_auth, b""
        self._busy = threading.Lock()
        self._closed = False
        self._sent_before = 0
        self._transport: Transport | None = None
        self._tcti: Any = None
        self._esapi: Any = None

    @property
    def commands_sent(self) -> int:
        """Return the commands put on the wire since the link was made, retries included."""
        return self._sent_before + (0 if self._tcti is None else int(self._tcti.commands_sent))

    @property
    def localities(self) -> tuple[int, ...]:
        """Return the localities the transport can ask for; empty while not connected."""
        return () if self._transport is None else self._transport.localities

    def close(self) -> None:
        """Give the TPM back when the operation under way is done; idempotent. Later ones raise TpmUnavailable."""
        with self._busy:
            self._closed = True
            self._drop()

    @contextmanager
    def operation(self, doing: str, *, locality: int | None = None) -> Iterator[Any]:
        """Give the ESAPI context, connected and at our locality, for the commands of one operation.

        doing: completes "refused to ..." in messages. locality: only for probing another one.
        Raises the errors of hwtpm_errors and nothing of the TSS. After a failure below the TPM the context is
        thrown away and the next operation connects anew.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(f"two threads use the hardware TPM at once (to {doing}); go through TpmLane")
        try:
            esapi = self._connected()
            self._be_at(self.locality if locality is None else locality, self._command_seconds)
            yield esapi
        except TSS2_Exception as error:
            failure = None if self._tcti is None else self._tcti.failure
            if failure is not None or not context_survives(error):
                self._drop()
            if failure is not None:
                raise failure from error
            raise translate(error, doing) from error
        finally:
            self._busy.release()

    def _connected(self) -> Any:
        if self._closed:
            raise TpmUnavailable("it was closed by this process", "Open it again.")
        if self._esapi is None:
            self._connect()
        return self._esapi

    def _connect(self) -> None:
        deadline = time.monotonic() + self._open_seconds
        self._transport = self._open_transport(deadline)
        try:
            self._tcti = Tcti(self._transport, min(self._command_seconds, self._open_seconds))
            self._esapi = ESAPI(self._tcti)
            self.connections += 1
            self._be_at(self.locality, self._open_seconds)
            self._check_health()
            if self._transport.owns_handles:
                self._flush_strays()
            self._set_auths()
            self._tcti.command_seconds = self._command_seconds
        except BaseException as error:
            failure = None if self._tcti is None else self._tcti.failure
            self._drop()
            if failure is not None:
                raise failure from error
            raise

    def use_auth(self, *, owner: bytes | None = None, endorsement: bytes | None = None) -> None:
        """Use these passwords of the hierarchies from the next operation on; None leaves one as it is."""
        with self._busy:
            self._owner_auth = self._owner_auth if owner is None else owner
            self._endorsement_auth = self._endorsement_auth if endorsement is None else endorsement
            if self._esapi is not None:
                self._set_auths()

    def _set_auths(self) -> None:
        self._esapi.tr_set_auth(ESYS_TR.OWNER, self._owner_auth)
        self._esapi.tr_set_auth(ESYS_TR.ENDORSEMENT, self._endorsement_auth)

    def _open_transport(self, deadline: float) -> Transport:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return open_transport(self.setting, deadline)
            except OSError as error:
                reason = f"{self.setting.text}: {error.strerror or error}"
                waited_out = time.monotonic() + pause >= deadline
                if error.errno not in _BUSY_ERRNOS and not isinstance(error, TimeoutError):
                    raise TpmUnavailable(
                        reason,
                        "Check that the TPM (or swtpm) runs, that `--tcti` names it, and that we may open it.",
                    ) from error
                if waited_out:
                    raise TpmBusy("open it", self._open_seconds, reason) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _be_at(self, locality: int, seconds: float) -> None:
        assert self._transport is not None, "set by _connect"
        if locality not in self._transport.localities:
            raise WrongLocality(locality, f"{self.setting.text} gives locality {self._transport.localities[0]} only")
        try:
            self._transport.set_locality(locality, time.monotonic() + seconds)
        except TimeoutError:
            self._drop()
            raise TpmBusy("set the locality", seconds, "its control channel does not answer") from None
        except OSError as error:
            self._drop()
            raise TpmTransport("set the locality", error.strerror or str(error)) from error

    def _check_health(self) -> None:
        """Refuse a TPM in failure mode; let one that has not tested itself yet do so. Part 3, 10.4."""
        doing = "check its self-test"
        try:
            result = self._test_result()
            if result == RC_NEEDS_TEST:
                self._esapi.self_test(False)
                result = self._test_result()
        except TSS2_Exception as error:
            raise translate(error, doing) from error
        if result == RC_TESTING:
            raise TpmBusy(doing, self._open_seconds, "it still tests itself")
        if result not in {0, RC_NEEDS_TEST}:
            raise TpmFailureMode(doing, f"test result 0x{result:x}")

    def _test_result(self) -> int:
        """Return how the self-test stands; one that runs is waited for. Part 3, 10.4."""
        deadline, pause = time.monotonic() + self._open_seconds, _FIRST_PAUSE_SECONDS
        while True:
            _, result = self._esapi.get_test_result()
            if int(result) != RC_TESTING or time.monotonic() + pause > deadline:
                return int(result)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _flush_strays(self) -> None:
        """Free what an owner left behind that died: three objects or sessions are all a chip has."""
        for handle in (*self.handles(self._esapi, TRANSIENT_FIRST), *self.handles(self._esapi, LOADED_SESSION_FIRST)):
            response = self._tcti.exchange(HEADER.pack(0x8001, HEADER.size + 4, _CC_FLUSH_CONTEXT) + handle.to_bytes(4))
            code = HEADER.unpack_from(response)[2]
            if code:
                raise TpmTransport("free handles of an earlier owner", f"0x{handle:08x}: 0x{code:x}")

    def _drop(self) -> None:
        esapi, tcti, transport = self._esapi, self._tcti, self._transport
        self._esapi = self._tcti = self._transport = None
        if tcti is not None:
            self._sent_before += tcti.commands_sent
        if esapi is not None:
            esapi.close()
        if transport is not None:
            transport.close()

    @staticmethod
    def handles(esapi: Any, first: int) -> tuple[int, ...]:
        """Return the handles in use from this one on, in its handle range (at most 254 of them)."""
        _, data = esapi.get_capability(TPM2_CAP.HANDLES, first, 254)
        # Loaded sessions are asked for as HMAC sessions and answered with policy sessions among them.
        kinds = {first >> 24, POLICY_SESSION_KIND} if first == LOADED_SESSION_FIRST else {first >> 24}
        return tuple(int(handle) for handle in data.data.handles if int(handle) >> 24 in kinds)

    @contextmanager
    def session(self, esapi: Any, salt: Any, *, policy: bool = False) -> Iterator[Any]:
        """Start a session salted with `salt` (an ESYS_TR, the SRK) that encrypts both directions; flushed at the end.

        salt ESYS_TR.NONE gives an unsalted one without encryption, for what has to be done before there is an SRK.
        """
        salted = salt != ESYS_TR.NONE
        handle = esapi.start_auth_session(
            salt,
            ESYS_TR.NONE,
            TPM2_SE.POLICY if policy else TPM2_SE.HMAC,
            SALTED_CIPHER if salted else None,
            TPM2_ALG.SHA256,
        )
        encryption = TPMA_SESSION.ENCRYPT | TPMA_SESSION.DECRYPT if salted else TPMA_SESSION(0)
        with flushed(esapi, handle):
            esapi.trsess_set_attributes(handle, TPMA_SESSION.CONTINUESESSION | encryption, _ALL_FLAGS)
            yield handle


@contextmanager
def flushed(esapi: Any, handle: Any) -> Iterator[Any]:
    """Flush a transient object or session on every way out, except where the context is dead.

    Then flushing would only hide the failure; connecting anew frees the handles.
    """
    try:
        yield handle
    except TSS2_Exception as error:
        if context_survives(error):
            _flush(esapi, handle)
        raise
    except BaseException:
        _flush(esapi, handle)
        raise
    _flush(esapi, handle)


def _flush(esapi: Any, handle: Any) -> None:
    with meaning({RC_HANDLE: lambda: TpmWasReset("go on with it")}):
        esapi.flush_context(handle)
