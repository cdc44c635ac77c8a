"""report.html: the drill's result as one page that needs nothing else: no script, font or picture from elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

from spotguard.lab import timeline
from spotguard.lab.report import MOVED, Report, WorkloadReport
from spotguard.lab.report_text import e, milliseconds, number, plural, seconds, size

TEMPLATE = Path(__file__).parent / "report.html"
VERDICTS = {"kept": "every promise kept", "broken": "a promise was broken", "unexpected": "not as expected"}
LEGEND = (
    ("before", "runs on the source"), ("round", "memory copied, running"), ("frozen", "frozen"),
    ("after", "runs on the target"), ("fill", "rest filled in, running"),
)  # fmt: skip
PAUSE = (("source", "on the source"), ("target", "on the target"))
KEY = '<svg viewBox="0 0 12 12" aria-hidden="true"><rect class="{}" width="12" height="12" rx="3"/></svg>'


def write_html(report: Report, path: Path) -> None:
    """Write the page; never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(report), encoding="utf-8")
    partial.replace(path)


def render(report: Report) -> str:
    """Return the page."""
    body = [_header(report), _deadline(report), _compared(report), _table(report)]
    body += [_card(workload) for workload in report.workloads]
    body.append(_footer(report))
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(verdict=e(VERDICTS[report.verdict]), body="\n".join(part for part in body if part))


def _header(report: Report) -> str:
    problems = report.problems()
    listed = "".join(f"<li>{e(problem)}</li>" for problem in problems)
    return (
        f'<header><div class="mark">SpotGuard drill</div><h1>{e(_title(report))}</h1>'
        f'<p class="lead">{e(_lead(report))}</p></header>'
        + (f'<ul class="problems">{listed}</ul>' if problems else "")
        + _figures(report)
    )


def _title(report: Report) -> str:
    if report.verdict == "broken":
        return "A promise was broken."
    if report.verdict == "unexpected":
        return "The run did not end as expected."
    gaps = [w.client_gap_ms for w in report.workloads if w.outcome == MOVED and w.client_gap_ms is not None]
    names = _listed([w.name for w in report.workloads if w.outcome == MOVED])
    if not gaps:
        return "Every workload ended as expected, and nothing was lost."
    return f"{names} moved off a dying node. Clients waited {milliseconds(max(gaps))} at most."


def _lead(report: Report) -> str:
    notice = report.notice
    left = f"The node was to {notice.action} in {seconds(notice.time_left_s)}"
    if report.problems():
        return f"{left}."
    writes = sum(w.acknowledged for w in report.workloads)
    return (
        f"{left}. Nothing restarted: memory, open TCP connections and addresses came along. Each of "
        f"{plural(writes, 'acknowledged write')} is there exactly once."
    )


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""
    return text[:1].upper() + text[1:]


def _figures(report: Report) -> str:
    workloads = report.workloads
    gaps = [w.client_gap_ms for w in workloads if w.client_gap_ms is not None]
    margins = [w.margin_s for w in workloads if w.margin_s is not None]
    connections = sum(w.connections for w in workloads)
    kept = connections - sum(w.connections_lost for w in workloads)
    figures = [
        (milliseconds(max(gaps, default=None)), "longest gap a client saw"),
        (f"{number(kept)} of {number(connections)}", "connections kept open"),
        (number(sum(w.lost + w.doubled + w.wrong for w in workloads)), "writes lost, doubled or wrong"),
        (milliseconds(sum(w.double_run_ms for w in workloads)), "in which two copies ran"),
        (size(sum(w.bytes_moved for w in workloads)), "moved between the nodes"),
    ]
    if margins:
        figures.append((seconds(min(margins)), "left when all had moved"))
    cells = "".join(f"<div><b>{e(value)}</b><span>{e(label)}</span></div>" for value, label in figures)
    return f'<section class="figures">{cells}</section>'


def _deadline(report: Report) -> str:
    return (
        '<h2>From the notice to the end of the node</h2><section class="card">'
        f'<div class="scroll">{timeline.overview(report)}</div>{_legend(LEGEND)}</section>'
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f"<span>{KEY.format(kind)}{e(text)}</span>" for kind, text in entries)
    return f'<div class="legend">{keys}</div>'


def _compared(report: Report) -> str:
    picture = timeline.compare(report.workloads)
    if not picture:
        return ""
    return (
        '<h2>Against stop-and-copy</h2><section class="card">'
        '<p class="soft">The longest time in which a client got no answer. Both ways keep connections and data; '
        "stop-and-copy freezes the workload before it copies the memory.</p>"
        f'<div class="scroll">{picture}</div></section>'
    )


def _table(report: Report) -> str:
    head = (
        "Workload",
        "Outcome",
        "Pause",
        "Client's gap",
        "Acknowledged",
        "Lost",
        "Doubled",
        "Wrong",
        "Connections",
        "Moved",
    )
    rows = []
    for w in report.workloads:
        cells = [e(w.outcome), milliseconds(w.pause_ms), milliseconds(w.client_gap_ms), number(w.acknowledged)]
        marked = [(w.lost, str(w.lost)), (w.doubled, str(w.doubled)), (w.wrong, str(w.wrong))]
        marked.append((w.connections_lost, f"{w.connections - w.connections_lost}/{w.connections}"))
        rows.append(
            f"<tr><th>{e(w.name)}</th>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "".join(f'<td class="bad">{text}</td>' if bad else f"<td>{text}</td>" for bad, text in marked)
            + f"<td>{size(w.bytes_moved)}</td></tr>"
        )
    header = "".join(f"<th>{e(title)}</th>" for title in head)
    return (
        '<h2>Workloads</h2><section class="card scroll"><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _card(w: WorkloadReport) -> str:
    fine = not w.broken() and w.outcome == w.expected
    badge = f'<span class="badge {"good" if fine else "bad"}">{e(w.outcome)}</span>'
    how = e(f"{w.mode}: {w.reason}" if w.reason else w.mode)
    parts = [f'<div class="top"><h3>{e(w.name)}</h3>{badge}<span class="soft">{how}</span></div>', _list(_facts(w))]
    if picture := timeline.move(w):
        parts.append(f'<h4>The move</h4><div class="scroll">{picture}</div>')
    if w.freeze is not None and (picture := timeline.frozen(w.freeze, w.name)):
        parts.append(f'<h4>The pause, step by step</h4><div class="scroll">{picture}</div>{_legend(PAUSE)}')
    if w.rounds:
        parts.append(_rounds(w))
    told = [*w.faults, *w.client_faults]
    if told:
        parts.append("<h4>Faults</h4><ul>" + "".join(f"<li>{e(fault)}</li>" for fault in told) + "</ul>")
    return f'<section class="card">{"".join(parts)}</section>'


def _facts(w: WorkloadReport) -> list[tuple[str, str]]:
    facts = [
        ("Frozen for", milliseconds(w.pause_ms)),
        ("Client's longest gap", milliseconds(w.client_gap_ms)),
        ("Latency, p50 / p99", f"{milliseconds(w.latency_p50_ms)} / {milliseconds(w.latency_p99_ms)}"),
        ("Frames held and played in", number(w.frames_held)),
        ("Client's retransmits", number(w.retransmits)),
        ("Values compared", number(w.checked_values)),
        ("Two copies ran for", f"{milliseconds(w.double_run_ms)} (grain {milliseconds(w.watch_blind_ms)})"),
        ("Write tracker", w.tracker),
    ]
    if w.fill is not None:
        facts.append(("Filled in while running", f"{size(w.fill.bytes)} in {seconds(w.fill.seconds)}"))
        facts.append(("Faults served meanwhile", number(w.fill.faults)))
    if w.unknown:
        facts.append(("Unanswered at the stop", number(w.unknown)))
    if w.margin_s is not None:
        facts.append(("Left before the end", seconds(w.margin_s)))
    return facts


def _rounds(w: WorkloadReport) -> str:
    rows = "".join(
        f"<tr><th>{r.n}</th><td>{size(r.bytes)}</td><td>{seconds(r.seconds)}</td>"
        f"<td>{size(r.bytes / r.seconds) + '/s' if r.seconds else '-'}</td><td>{size(r.written_bytes)}</td></tr>"
        for r in w.rounds
    )
    return (
        '<h4>Rounds while it ran</h4><div class="scroll"><table><thead><tr><th>Round</th><th>Sent</th><th>Took</th>'
        f"<th>Rate</th><th>Written meanwhile</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _list(facts: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{e(name)}</dt><dd>{e(value)}</dd></div>" for name, value in facts) + "</dl>"


def _footer(report: Report) -> str:
    machine, notice = report.machine, report.notice
    tracker = f"{machine.tracker} ({machine.tracker_reason})" if machine.tracker_reason else machine.tracker
    facts = [
        ("Started", report.started), ("SpotGuard", report.version), ("Kernel", machine.kernel),
        ("CPUs", str(machine.cpus)), ("Memory", size(machine.memory_bytes)), ("CRIU", machine.criu),
        ("runc", machine.runc), ("Write tracker", tracker),
        ("Notice", f"{notice.kind}, {notice.action}"), ("Noticed after", milliseconds(notice.detected_ms)),
    ]  # fmt: skip
    notes = "".join(f"<p>{e(note)}</p>" for note in report.notes)
    return f'<h2>This run</h2><section class="card">{_list(facts)}</section><footer>{notes}</footer>'
