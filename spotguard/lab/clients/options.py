"""What the drill asks of a client."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The client's arguments: `rate` in MB/s (10^6 bytes), `size` in MiB, `deadline` for connecting (monotonic)."""

    address: str
    port: int
    ledger: Path
    connections: int
    rate: float
    size: float
    seed: int
    deadline: float
