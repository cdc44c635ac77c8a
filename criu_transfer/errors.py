"""Errors of a transfer, split by how the caller must react."""


class TransferError(Exception):
    """Base of all errors that criu_transfer raises on purpose."""


class GiveUp(TransferError):  # noqa: N818 - named after the reaction
    """This migration cannot go on: roll back. Nothing on the source was lost."""


class Ambiguous(TransferError):  # noqa: N818 - named after the reaction
    """Nobody knows whether the step took effect: keep everything frozen and look again."""


class ProtocolError(GiveUp):
    """The peer sent bytes that the protocol does not allow."""


class PeerGone(GiveUp):
    """The connection closed, or nothing came before the deadline."""


class DeadlinePassed(GiveUp):
    """There is no time left for this step."""


class TrackerUnavailable(GiveUp):
    """Writes of this process cannot be tracked on this kernel: only stop-and-copy is safe."""


class DumpFailed(GiveUp):
    """CRIU could not dump the process tree; the message carries its own words."""


class RestoreFailed(GiveUp):
    """CRIU could not restore the process tree; the message carries its own words."""


class StoreFull(GiveUp):
    """The peer sent more than it announced, or the store's memory limit is reached."""


class StateMissing(GiveUp):
    """A page that must exist on the target is in no store: resuming would lose memory."""


class Unmovable(GiveUp):
    """The process tree has something that CRIU cannot dump or SpotGuard cannot move.

    `reasons`: one sentence each, naming the cause and the remedy where there is one.
    """

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons
