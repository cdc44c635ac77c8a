"""What the driver has to do, as data.

How the driver performs the tuple that one `step` returns:
- in order, one at a time per machine; after the commands that are still in its queue. Only `Cancel` overtakes.
- a command that has a result (`Command.answers`) always sends exactly one event that carries its name, at the latest
  at its deadline: `Done`, `Failed`, or its own event (`Checked`, `RoundCopied`, `TargetAnswered`, `OwnerAnswer`).
- when the result is sent, nothing of the command is under way any more: no thread, no helper, no child process.
- `Persist` reports only its failure; the driver then drops what followed it in the same tuple.
- every command is idempotent: after a crash it may be performed again on what is half done or wholly done.
"""

from dataclasses import dataclass
from typing import ClassVar

from spotguard.core.state import Mode, Outcome, Record


@dataclass(frozen=True, slots=True)
class Command:
    """Base of all commands."""

    answers: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Return the name that the result's event carries."""
        return type(self).__name__


@dataclass(frozen=True, slots=True)
class Timed(Command):
    """A command with a result, at the latest at `deadline`."""

    deadline: float


@dataclass(frozen=True, slots=True)
class Silent(Command):
    """A command without a result."""

    answers: ClassVar[bool] = False


# --- both sides ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Persist(Silent):
    """Write the record and make it durable before anything that follows; `Failed` when that is impossible."""

    record: Record


@dataclass(frozen=True, slots=True)
class Wake(Silent):
    """Send `TimeReached(tag)` at `at`."""

    at: float
    tag: str


@dataclass(frozen=True, slots=True)
class Note(Silent):
    """Log it: something worth knowing that changes nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Cancel(Silent):
    """Ask the running command of that name to end early; its result still comes (`Failed`, CANCELLED, or a success)."""

    command: str


@dataclass(frozen=True, slots=True)
class Finished(Silent):
    """The machine is done; the journal may forget it."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class ReadOwnership(Timed):
    """Read the owner record -> OwnerAnswer."""


@dataclass(frozen=True, slots=True)
class VerifySound(Timed):
    """Look whether the frozen processes are whole: none traced, none dead, no parasite left, pager alive.

    `Failed(GIVE_UP)`: they are not. Any other kind: could not be told.
    """


@dataclass(frozen=True, slots=True)
class ReleaseNetwork(Timed):
    """End the hold and play the kept frames in."""


@dataclass(frozen=True, slots=True)
class ThawProcesses(Timed):
    """Let the processes run."""


@dataclass(frozen=True, slots=True)
class CleanUp(Timed):
    """Remove files, descriptors, helpers, and the sandbox if no process may live in it any more."""


# --- source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preflight(Timed):
    """Find out whether and how it can be moved -> Checked."""


@dataclass(frozen=True, slots=True)
class CreateOwnership(Timed):
    """Create the owner record as `source` -> OwnerAnswer."""


@dataclass(frozen=True, slots=True)
class OfferTarget(Timed):
    """Ask the target to prepare; `Done` when it is ready to receive.

    `version`: the owner record's, for the target's swap. `expires`: when the target may throw it all away.
    """

    expires: float
    version: str


@dataclass(frozen=True, slots=True)
class AttachTracker(Timed):
    """Start tracking writes; `Failed(TRACKER_UNAVAILABLE)` leads to stop-and-copy."""


@dataclass(frozen=True, slots=True)
class CopyRound(Timed):
    """Copy what was written since the last round; all, in round 0 -> RoundCopied."""

    number: int


@dataclass(frozen=True, slots=True)
class HoldNetwork(Timed):
    """Hold the network both ways, then let the application drain what it has."""


@dataclass(frozen=True, slots=True)
class FreezeProcesses(Timed):
    """Freeze, and see that no accept queue holds data (else thaw, drain and freeze again)."""


@dataclass(frozen=True, slots=True)
class DumpAndSend(Timed):
    """Last scan, dump, last pages, images, files, END; `Done` on END's acknowledgement.

    END must not be sent before the dump has succeeded. `mode` STOP_AND_COPY: no page counts as already copied.
    """

    mode: Mode


@dataclass(frozen=True, slots=True)
class RequestRestore(Timed):
    """Ask the target to restore, take ownership and resume -> TargetAnswered, or Failed (the answer was lost)."""


@dataclass(frozen=True, slots=True)
class StayFrozen(Timed):
    """Close what a failed dump or a crash may have left open: hold the network again, freeze again.

    After a crash an earlier agent's dump may still run: it has to be ended first.
    """


@dataclass(frozen=True, slots=True)
class ReclaimOwnership(Timed):
    """Swap `source` -> `reclaimed` -> OwnerAnswer."""

    version: str


@dataclass(frozen=True, slots=True)
class ForwardFrames(Timed):
    """Send the frames held here to the new owner."""


@dataclass(frozen=True, slots=True)
class DestroySource(Timed):
    """Kill the frozen original, its network held to the end."""


@dataclass(frozen=True, slots=True)
class DetachTracker(Timed):
    """Stop tracking writes."""


@dataclass(frozen=True, slots=True)
class AbortTarget(Timed):
    """Tell the target that it will not be asked; best effort."""


# --- target -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrepareSandbox(Timed):
    """Make sandbox (network held from the start), bundle and receiver."""


@dataclass(frozen=True, slots=True)
class AnswerOffer(Silent):
    """Answer the source's waiting offer, if it still waits."""

    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class RestoreProcesses(Timed):
    """Restore from what the receiver holds; they come up frozen."""


@dataclass(frozen=True, slots=True)
class KeepPager(Timed):
    """Tell receiver and pager to outlive this agent."""


@dataclass(frozen=True, slots=True)
class TakeOwnership(Timed):
    """Swap `source` -> `target` -> OwnerAnswer."""

    version: str


@dataclass(frozen=True, slots=True)
class MoveRoute(Timed):
    """Bring the pod's address here and announce it."""


@dataclass(frozen=True, slots=True)
class AnswerSource(Silent):
    """Answer the source's waiting request to restore, if it still waits."""

    resumed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class AwaitFill(Timed):
    """Wait until the pager has filled every page; asked again after `deadline`."""


@dataclass(frozen=True, slots=True)
class DestroyRestored(Timed):
    """Kill the restored copy, and a restore that an earlier agent left running; network held to the end."""


# --- node ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cordon(Silent):
    """Keep new pods off this node."""


@dataclass(frozen=True, slots=True)
class Uncordon(Silent):
    """Undo `Cordon`."""


@dataclass(frozen=True, slots=True)
class ListPods(Silent):
    """Find what is to be moved from here -> PodsListed."""


@dataclass(frozen=True, slots=True)
class StartMove(Silent):
    """Start a source machine for this workload -> MoveFinished at its end."""

    workload: str
    target: str
    deadline: float
    mode: Mode


@dataclass(frozen=True, slots=True)
class TightenMove(Silent):
    """Send `DeadlineMoved` to the workload's machine."""

    workload: str
    deadline: float


@dataclass(frozen=True, slots=True)
class WithdrawMove(Silent):
    """Send `NoticeWithdrawn` to the workload's machine."""

    workload: str
