"""The story: redrawn in place on a terminal, few plain lines elsewhere."""

import io
import re

from spotguard.lab.progress import Story

MIB = 1 << 20


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def screen(output: str) -> list[str]:
    """Return what a terminal shows after this output (text, cursor up, clear below: all that Story uses)."""
    lines = [""]
    for piece in re.split(r"(\x1b\[\d+A|\x1b\[J|\n)", output):
        if piece == "\n":
            lines.append("")
        elif piece == "\x1b[J":
            pass  # the lines below were cut off by the way up
        elif piece.startswith("\x1b["):
            assert lines[-1] == ""
            lines = [*lines[: -1 - int(piece[2:-1])], ""]
        else:
            lines[-1] += piece
    return lines[:-1]


def test_a_terminal_shows_the_story_and_one_row_per_workload() -> None:
    out, time = io.StringIO(), Time()
    story = Story(out, tty=True, deadline=220.0, now=time, columns=lambda: 100)
    story.say("the notice came")
    for done in range(0, 101, 5):
        time.now += 0.2
        story.round("redis", 0, done * MIB, 100 * MIB, 500.0 * MIB)
        story.round("java", 1, done * MIB // 2, 100 * MIB, 500.0 * MIB)
    story.client("redis", 18423, 12.0, 131.0)
    story.say("redis freezes")
    shown = screen(out.getvalue())
    assert len(shown) == 4
    assert shown[0] == "T-120.0 s  the notice came"
    assert "redis freezes" in shown[1]
    assert re.search(r"redis +round 0 +━{20} 100%  100 MiB/100 MiB  500 MiB/s", shown[2])
    assert "18,423 writes" in shown[2]
    assert re.search(r"java +round 1 +━{10}─{10} +50%", shown[3])
    story.finish("redis", "moved, 118 ms")
    story.finish("java", "moved, 201 ms")
    story.close()
    shown = screen(out.getvalue())
    assert [line.split("  ", 1)[1] for line in shown] == [
        "the notice came", "redis freezes", "redis     moved, 118 ms", "java      moved, 201 ms"
    ]  # fmt: skip


def test_rows_never_wrap() -> None:
    out = io.StringIO()
    story = Story(out, tty=True, deadline=None, now=Time(), columns=lambda: 40)
    story.round("redis", 0, 1, 2, 1.0)
    assert max(map(len, screen(out.getvalue()))) == 39


def test_without_a_terminal_there_are_few_lines_and_no_escapes() -> None:
    out, time = io.StringIO(), Time()
    story = Story(out, tty=False, deadline=104.0, now=time)
    for step in range(101):
        story.round("redis", 0, step * MIB, 100 * MIB, 20.0 * MIB)
        story.client("redis", step, 1.0, 2.0)
        time.now += 0.0625
    story.close()
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert re.findall(r"(\d+)%", out.getvalue()) == ["0", "32", "64", "96", "100"]
    assert lines[0].startswith("  T-4.0 s")
    assert lines[-1].startswith("  T+2.2 s")


def test_a_stream_that_cannot_say_it_gets_plain_bars() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Story(stream, tty=False, now=Time()).round("redis", 0, 1, 2, 1.0)
    assert "##########----------" in raw.getvalue().decode("ascii")


def test_an_empty_round_is_whole() -> None:
    out = io.StringIO()
    Story(out, tty=False, now=Time()).round("redis", 3, 0, 0, 0.0)
    assert "100%" in out.getvalue()
