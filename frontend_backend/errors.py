"""Errors of the contracts. Each says who is at fault: we (Local...), the other side (Peer...), or neither."""


class RingError(Exception):
    """Something about a ring or its messages is not as the contract says."""


class IllegalTransitionError(RingError):
    """Our fault: the ring's state does not allow this step (see ring.TRANSITIONS)."""

    def __init__(self, state: object, event: object) -> None:
        super().__init__(f"the ring is in state {state} where {event} is not allowed")
        self.state, self.event = state, event


class PeerError(RingError):
    """The other side's fault: what it wrote on the page or sent breaks the contract."""


class PageError(PeerError):
    """The shared page's head cannot be what it says: unknown state, or a length beyond the page."""


class NotARingError(PeerError):
    """The descriptors that were handed over are not a sealed one-page memfd and a doorbell."""


class RingCancelledError(RingError):
    """The back end took the request back without an answer (state IDLE): it was cancelled."""

    def __init__(self) -> None:
        super().__init__("the back end cancelled the request")


class RingTimeoutError(RingError):
    """Nobody's proven fault: no answer came in time. The request has been marked cancelled."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer from the back end within {seconds:g} s; the request was cancelled")
        self.seconds = seconds


class RingClosedError(RingError):
    """The other side of the doorbell is gone."""

    def __init__(self) -> None:
        super().__init__("the other side of the ring has gone away")


class HeaderError(PeerError):
    """These bytes are no TPM command or response header."""


class MessageError(PeerError):
    """A message does not have the form its kind and version prescribe."""


class MessageVersionError(MessageError):
    """The peer speaks another version of the messages."""

    def __init__(self, theirs: object, ours: int) -> None:
        super().__init__(f"message of version {theirs}; this side speaks version {ours}: upgrade the older side")
        self.theirs, self.ours = theirs, ours


class MessageTruncatedError(MessageError):
    """A datagram or its descriptors were larger than the receiver allows."""


class ChannelClosedError(RingError):
    """The other side of a message socket has closed it."""

    def __init__(self) -> None:
        super().__init__("the other side closed the connection")


class BlobError(Exception):
    """The fault of whoever kept it: a state blob cannot be taken."""


class BlobFormatError(BlobError):
    """These bytes are no state blob, or one of a version that cannot be read."""


class BlobDamagedError(BlobError):
    """A state blob, or its header, is not as it was made, or not by whom it says."""
