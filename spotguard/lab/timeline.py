"""The report's pictures, as inline SVG. Colours are the page's CSS classes; nothing here names a colour."""

from collections.abc import Sequence
from dataclasses import dataclass

from spotguard.lab.report import MOVED, Freeze, Report, WorkloadReport
from spotguard.lab.report_text import e, milliseconds, seconds, size

WIDTH = 1000.0
LABEL = 104.0  # left column
RIGHT = 16.0
LETTER = 6.8  # about the width of one in a bar's label
SMALLEST = 2.0  # a bar narrower than this would not be seen
TICKS = (1, 2, 5, 10, 20, 30, 60, 120, 200, 500, 1000, 2000, 5000, 10000)

STEP_TEXT = {
    "hold": "hold network", "drain": "drain", "freeze": "freeze", "scan": "last scan", "dump": "dump (CRIU)",
    "residual": "last pages", "images": "images", "rewrite": "rewrite", "restore": "restore (CRIU)",
    "owner": "change owner", "thaw": "thaw", "release": "release network",
}  # fmt: skip
SOURCE_STEPS = frozenset({"hold", "drain", "freeze", "scan", "dump", "residual", "images"})


@dataclass(frozen=True)
class Scale:
    """Maps values from 0 to `end` onto the picture's width."""

    end: float
    left: float = LABEL
    right: float = WIDTH - RIGHT

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        return self.left + (self.right - self.left) * min(max(value / self.end, 0.0), 1.0)

    def ticks(self, about: int = 6) -> list[float]:
        """Return round values that divide the scale into `about` parts."""
        step = next(
            (t * unit for unit in (1e-3, 1, 1e3, 1e6) for t in TICKS if self.end / (t * unit) <= about), self.end
        )
        return [step * i for i in range(int(self.end / step * 1.0001) + 1)]


def overview(report: Report) -> str:
    """Return the run against the deadline: one lane a workload, from the notice to the end of the node."""
    end = max(report.notice.time_left_s, 1.0)
    scale = Scale(end * 1.04)
    lanes = list(report.workloads)
    height = 54 + 46 * len(lanes)
    parts = _axis(scale, height - 30, unit="s")
    for i, workload in enumerate(lanes):
        y = 16.0 + 46 * i
        parts.append(_text(LABEL - 12, y + 18, workload.name, "lane end"))
        parts += _move_bars(workload, scale, y, 24.0)
        done = _done(workload)
        if workload.margin_s is not None and done is not None and workload.margin_s > 0:
            parts.append(
                _text((scale.x(done) + scale.x(end)) / 2, y + 16, f"{seconds(workload.margin_s)} to spare", "quiet mid")
            )
    x = scale.x(end)
    parts.append(f'<line class="deadline" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 30:.1f}"/>')
    parts.append(_text(x - 6, height - 36, "node ends", "deadline-text end"))
    return _svg(height, parts, "From the notice to the end of the node")


def move(workload: WorkloadReport, end: float | None = None) -> str:
    """Return one workload's move on its own scale: the rounds, the freeze, the background fill."""
    last = end or _done(workload)
    if not last:
        return ""
    scale = Scale(last * 1.02, left=12)
    parts = _axis(scale, 78, unit="s", top=24)
    parts += _move_bars(workload, scale, 30.0, 32.0)
    for item in workload.rounds:
        text = f"round {item.n}: {size(item.bytes)}"
        start = item.start_s if item.start_s is not None else last
        if scale.x(start + item.seconds) - scale.x(start) > 16 + LETTER * len(text):
            parts.append(_text(scale.x(start) + 8, 51, text, "inbar"))
    if workload.frozen_at_s is not None and workload.pause_ms is not None:
        middle = scale.x(workload.frozen_at_s + workload.pause_ms / 2e3)
        parts.append(_text(middle, 16, f"frozen {milliseconds(workload.pause_ms)}", "hot mid"))
    return _svg(100, parts, f"The move of {workload.name}")


def frozen(freeze: Freeze, name: str) -> str:
    """Return the pause step by step, in ms; steps of source and target in two colours."""
    steps = freeze.steps()
    if not steps:
        return ""
    end = max(start + length for _, start, length in steps)
    scale = Scale(end * 1.12, left=132)
    height = 30 + 22 * len(steps)
    parts = _axis(scale, height - 26, unit="ms")
    for i, (step, start, length) in enumerate(steps):
        y = 4.0 + 22 * i
        kind = "source" if step in SOURCE_STEPS else "target"
        parts.append(_text(122, y + 13, STEP_TEXT[step], "step end"))
        parts.append(
            _bar(scale, (start, start + length), (y + 1, 16), kind, f"{STEP_TEXT[step]}: {milliseconds(length)}")
        )
        parts.append(
            _text(max(scale.x(start + length), scale.x(start) + SMALLEST) + 6, y + 13, milliseconds(length), "value")
        )
    return _svg(height, parts, f"The pause of {name}, step by step")


def compare(workloads: Sequence[WorkloadReport]) -> str:
    """Return the clients' longest gaps as pairs of bars: live against stop-and-copy."""
    pairs = [(w, w.stop_and_copy) for w in workloads if w.stop_and_copy is not None and w.client_gap_ms is not None]
    longest = max((gap for w, c in pairs for gap in (w.client_gap_ms or 0.0, c.client_gap_ms or 0.0)), default=0.0)
    if not longest:
        return ""
    scale = Scale(longest * 1.22)
    height = 66 * len(pairs) + 4
    parts: list[str] = []
    for i, (workload, compared) in enumerate(pairs):
        y = 8.0 + 66 * i
        parts.append(_text(LABEL - 12, y + 28, workload.name, "lane end"))
        for row, (kind, label, gap) in enumerate(
            (
                ("live", "live", workload.client_gap_ms or 0.0),
                ("stopcopy", "stop-and-copy", compared.client_gap_ms or 0.0),
            )
        ):
            parts.append(
                _bar(scale, (0, gap), (y + 24 * row, 19), kind, f"{workload.name}, {label}: {milliseconds(gap)}")
            )
            parts.append(_text(scale.x(gap) + 8, y + 24 * row + 14, f"{milliseconds(gap)} {label}", "value"))
    return _svg(height, parts, "The clients' longest gap, live and stop-and-copy")


def _move_bars(workload: WorkloadReport, scale: Scale, y: float, height: float) -> list[str]:
    parts: list[str] = []
    rows = (y, height)
    frozen_at, resumed_at, filled_at = workload.frozen_at_s, workload.resumed_at_s, workload.filled_at_s
    if resumed_at is not None:
        there, told = ("after", "runs on the target") if workload.outcome == MOVED else ("before", "runs on the source")
        parts.append(_bar(scale, (0, frozen_at or 0.0), rows, "before", "runs on the source"))
        parts.append(_bar(scale, (resumed_at, scale.end), rows, there, told))
    elif workload.outcome != MOVED:
        parts.append(_bar(scale, (0, scale.end), rows, "before", "runs on the source"))
    for item in workload.rounds:
        if item.start_s is not None:
            told = f"round {item.n}: {size(item.bytes)} in {seconds(item.seconds)}"
            span = (item.start_s, item.start_s + item.seconds)
            parts.append(_bar(scale, span, rows, f"round r{item.n % 2}", told))
    if resumed_at is not None and filled_at is not None:
        low = (y + height * 0.62, height * 0.38)
        parts.append(_bar(scale, (resumed_at, filled_at), low, "fill", f"filled in: {seconds(filled_at - resumed_at)}"))
    if frozen_at is not None:
        until = resumed_at if resumed_at is not None else frozen_at
        tall = (y - 4, height + 8)
        parts.append(_bar(scale, (frozen_at, until), tall, "frozen", f"frozen: {seconds(until - frozen_at)}"))
    return parts


def _done(workload: WorkloadReport) -> float | None:
    ends = [round_.start_s + round_.seconds for round_ in workload.rounds if round_.start_s is not None]
    ends += [at for at in (workload.frozen_at_s, workload.resumed_at_s, workload.filled_at_s) if at is not None]
    return max(ends, default=None)


def _axis(scale: Scale, y: float, unit: str, top: float = 0.0) -> list[str]:
    parts = []
    for value in scale.ticks():
        x = scale.x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(x, y + 18, f"{value:g} {unit}" if value else "0", "tick mid"))
    return parts


def _bar(scale: Scale, span: tuple[float, float], rows: tuple[float, float], kind: str, told: str) -> str:
    """Return a bar over `span` of the scale; `rows` is its top and its height, `told` shows under the pointer."""
    x = scale.x(span[0])
    width = max(scale.x(span[1]) - x, SMALLEST)
    place = f'x="{x:.1f}" y="{rows[0]:.1f}" width="{width:.1f}" height="{rows[1]:.1f}" rx="{min(3.0, width / 2):.1f}"'
    return f'<rect class="{e(kind)}" {place}><title>{e(told)}</title></rect>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{e(text)}</text>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{e(title)}">' + "".join(parts) + "</svg>"
    )
