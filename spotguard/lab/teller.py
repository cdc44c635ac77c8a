"""Tells a run's story on the terminal as it happens."""

import time
from collections.abc import Mapping
from typing import Any, TextIO


class Teller:
    """Turns what a run and its agents say into lines for a person."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._deadline: float | None = None

    def headline(self, text: str) -> None:
        """Begin a new chapter."""
        self._deadline = None
        print(f"\n== {text}", file=self._stream, flush=True)

    def hear(self, what: str, fields: Mapping[str, Any]) -> None:
        """Take note of one thing."""
        if what == "notice":
            self._deadline = time.monotonic() + float(fields["left_s"])
        if what == "client" and fields["event"] == "progress":
            return
        left = "        " if self._deadline is None else f"T-{self._deadline - time.monotonic():6.2f}"
        print(left, what, dict(fields), file=self._stream, flush=True)
