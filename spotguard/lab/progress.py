"""The drill's story on the terminal while it happens: a countdown, and a bar for each workload's round."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from spotguard.lab.report_text import milliseconds, number, size

BAR = 20  # characters
REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 2.0  # between two lines of one workload where nothing can be redrawn
NAME = 10
UP, CLEAR_BELOW = "\x1b[{}A", "\x1b[J"


@dataclass
class _Row:
    """What is known of a workload: its round, and what its client sees."""

    round: str = ""
    client: str = ""
    told_at: float = float("-inf")

    def text(self, name: str) -> str:
        return f"{name:<{NAME}}" + "  ".join(part for part in (self.round, self.client) if part)


class Story:
    """Writes the story to a stream.

    On a terminal (`tty`) the rows of the workloads stay below the text and are redrawn in place; elsewhere, as in CI,
    a row becomes a line every two seconds and at the end of its round. `deadline` (monotonic seconds) is counted down
    to; without one, lines carry no time. Call `close` at the end. Not for several threads at once.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        tty: bool,
        deadline: float | None = None,
        now: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ) -> None:
        self.deadline = deadline
        self._stream = stream
        self._tty = tty
        self._now = now
        self._columns = columns
        self._rows: dict[str, _Row] = {}
        self._drawn = 0
        self._drawn_at = float("-inf")
        plain = not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
        self._full, self._empty = ("#", "-") if plain else ("━", "─")

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._erase()
        for line in text.splitlines() or [""]:
            self._stream.write(f"{self._countdown()}  {line}\n")
        self._draw()

    def round(self, workload: str, n: int, done: int, total: int, rate: float) -> None:
        """Show how far a round is: bytes done and in total, bytes per second."""
        part = min(done / total, 1.0) if total else 1.0
        full = round(part * BAR)
        bar = self._full * full + self._empty * (BAR - full)
        row = self._row(workload)
        row.round = f"round {n:<2} {bar} {part:4.0%}  {size(done)}/{size(total)}  {size(rate)}/s"
        self._show(workload, row, whole=done >= total)

    def client(self, workload: str, acknowledged: int, waiting_ms: float, longest_gap_ms: float) -> None:
        """Show what a client sees; `waiting_ms` is the gap that goes on now."""
        gap = milliseconds(max(waiting_ms, longest_gap_ms))
        row = self._row(workload)
        row.client = f"{number(acknowledged)} writes  gap {gap}"
        # Without a terminal the client's numbers only ride along with the round's.
        if self._tty:
            self._show(workload, row, whole=False)

    def finish(self, workload: str, text: str) -> None:
        """Take a workload's row away and write what became of it."""
        self._rows.pop(workload, None)
        self.say(f"{workload:<{NAME}}{text}")

    def close(self) -> None:
        """Leave the terminal as lines that stay."""
        self._erase()
        self._rows.clear()
        self._stream.flush()

    def _row(self, workload: str) -> _Row:
        return self._rows.setdefault(workload, _Row())

    def _show(self, workload: str, row: _Row, *, whole: bool) -> None:
        now = self._now()
        if not self._tty:
            if whole or now - row.told_at >= PLAIN_SECONDS:
                row.told_at = now
                self._stream.write(f"{self._countdown()}  {row.text(workload)}\n")
                self._stream.flush()
        elif whole or now - self._drawn_at >= REDRAW_SECONDS:
            self._erase()
            self._draw()

    def _countdown(self) -> str:
        if self.deadline is None:
            return " " * 9
        left = self.deadline - self._now()
        return f"T{'-' if left >= 0 else '+'}{abs(left):.1f} s".rjust(9)

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(UP.format(self._drawn) + CLEAR_BELOW)
            self._drawn = 0

    def _draw(self) -> None:
        if self._tty:
            width = max(self._columns() - 1, 20)  # a full last column would wrap, and the way up be one short
            for name, row in self._rows.items():
                self._stream.write(f"{self._countdown()}  {row.text(name)}"[:width] + "\n")
            self._drawn = len(self._rows)
            self._drawn_at = self._now()
        self._stream.flush()
