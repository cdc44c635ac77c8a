"""What a tracker of writes is, whatever mechanism of the kernel it uses."""

from typing import Protocol

from criu_transfer.proctree import Process
from criu_transfer.ranges import RangeSet


class Tracker(Protocol):
    """Follows the writes to one process's private anonymous memory.

    A page is clean only when it lies in `tracked`, no scan since its copy has returned it, and the copy was made
    after the scan that did. Everything else is for CRIU's own live list to decide.
    """

    @property
    def tracked(self) -> RangeSet:
        """Ranges that the last scan covered."""
        ...

    def attach(self, process: Process, deadline: float) -> None:
        """Start tracking; raises TrackerUnavailable, and then the process runs as before."""
        ...

    def scan(self, *, frozen: bool = False) -> list[tuple[int, int]]:
        """Return the present ranges written since the previous scan (the first: all), sorted, and protect them again.

        `frozen`: nothing of the tree runs, a tracker need not stop it. A page dropped meanwhile is in no scan.
        Raises TrackerUnavailable when the process has exited or runs another program now.
        """
        ...

    def detach(self) -> None:
        """Stop tracking and give everything back; harmless when repeated, or when the process is gone."""
        ...
