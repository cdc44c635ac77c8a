"""What a client reports at its end; the field names are those of the drill's report (docs/report.md)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spotguard.lab.ledger import Gap, GapRecorder, Verdict


@dataclass(frozen=True)
class TcpSummary:
    """One connection as the kernel saw it; `total_retransmits` counts segments of the client's side."""

    local_port: int
    total_retransmits: int
    worst_backoff: int
    rtt_us: int


@dataclass(frozen=True)
class Result:
    """The client's findings. `checked_values` of the filled data set were compared byte for byte.

    `complete` is False if the check itself could not be finished: then every acknowledged write counts as lost,
    for none is proven to be there.
    """

    verdict: Verdict
    gaps: GapRecorder
    latency: Sequence[float]  # seconds, any order
    connections: int
    connections_lost: int
    tcp: Sequence[TcpSummary]
    faults: Sequence[str]
    checked_values: int
    complete: bool = True

    @property
    def sound(self) -> bool:
        """Tell whether every promise was kept on every connection."""
        return self.complete and self.verdict.sound and not self.connections_lost and not self.faults

    def fields(self) -> dict[str, Any]:
        """Return the fields of the event `result`; times in ms, but for `gap_at` and starts: monotonic seconds."""
        longest = self.gaps.longest
        ordered = sorted(self.latency)
        return {
            **asdict(self.verdict),
            "sound": self.sound,
            "complete": self.complete,
            "checked_values": self.checked_values,
            "requests": len(ordered),
            "connections": self.connections,
            "connections_lost": self.connections_lost,
            "longest_gap_ms": ms(longest.seconds if longest else 0.0),
            "gap_at": round(longest.start, 6) if longest else None,
            "gap_per_connection": {str(i): ms(gap.seconds) for i, gap in sorted(self.gaps.per_connection.items())},
            "gaps": [_gap(gap) for gap in self.gaps.top],
            "latency_ms": {"p50": ms(percentile(ordered, 0.5)), "p99": ms(percentile(ordered, 0.99))},
            "tcp": [asdict(summary) for summary in self.tcp],
            "faults": list(self.faults),
        }


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Return the value that `fraction` of `ordered` does not exceed (nearest rank); 0 if there is none."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def ms(seconds: float) -> float:
    """Return milliseconds, to the microsecond."""
    return round(seconds * 1e3, 3)


def _gap(gap: Gap) -> dict[str, Any]:
    return {"connection": gap.connection, "start": round(gap.start, 6), "ms": ms(gap.seconds)}
