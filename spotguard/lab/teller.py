"""Turns what a run and its agents say into the story on the terminal."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from spotguard.lab.progress import Story
from spotguard.lab.report_text import milliseconds, size

Fields = Mapping[str, Any]


class Teller:
    """Hears of everything and tells what a person wants to know."""

    def __init__(self, stream: TextIO) -> None:
        self._story = Story(stream, tty=stream.isatty())
        self._notice_at = 0.0
        self._frozen_at: dict[str, float] = {}
        self._rounds_began: dict[tuple[str, int], float] = {}

    def headline(self, text: str) -> None:
        """Begin a new chapter."""
        self._story.deadline = None
        self._story.say(f"\n{text}\n{'─' * len(text)}")

    def close(self) -> None:
        """Leave the terminal in order."""
        self._story.close()

    def hear(self, what: str, fields: Fields) -> None:
        """Take note of one thing; most are not worth a line."""
        tellers: Mapping[str, Callable[[Fields], None]] = {
            "pod": lambda f: self._story.say(f"{f['workload']} starts on {f['node']}"),
            "load": lambda _: self._story.say("every client is connected and writes"),
            "notice": self._notice,
            "node-gone": lambda f: self._story.say(f"{f['node']} is gone; the clients go on"),
            "late": lambda f: self._story.say(str(f["reason"])),
            "kill": lambda f: self._story.say(f"the agent of {f['node']} is killed in phase {f['phase']}"),
            "client": self._client,
            "agent": self._agent,
        }
        if what in tellers:
            tellers[what](fields)

    def _notice(self, fields: Fields) -> None:
        self._notice_at = time.monotonic()
        self._story.deadline = self._notice_at + float(fields["left_s"])
        self._story.say(f"notice: {fields['node']} will {fields['action']} in {fields['left_s']:.0f} s")

    def _client(self, fields: Fields) -> None:
        name = str(fields["workload"])
        match fields:
            case {"event": "ready"}:
                self._story.say(f"{name} is filled with {size(int(fields['bytes']))}")
            case {"event": "progress", "phase": "load"}:
                self._story.client(
                    name, int(fields["acknowledged"]), float(fields["waiting_ms"]), float(fields["longest_gap_ms"])
                )
            case {"event": "result"}:
                lost, gap = fields["lost"], milliseconds(float(fields["longest_gap_ms"]))
                self._story.finish(
                    name, f"checked: {fields['acknowledged']} acknowledged, {lost} lost, longest gap {gap}"
                )
            case _:
                return

    def _agent(self, fields: Fields) -> None:
        name, node = str(fields.get("workload", "")), fields["node"]
        match fields:
            case {"event": "notice"}:
                self._story.say(f"{node} has heard of it after {milliseconds((fields['t'] - self._notice_at) * 1e3)}")
            case {"event": "progress"}:
                self._round(name, int(fields["number"]), int(fields["bytes"]), int(fields["total"]), fields["t"])
            case {"event": "round"}:
                self._round(name, int(fields["number"]), int(fields["bytes"]), int(fields["bytes"]), fields["t"])
            case {"event": "freeze-step", "step": "freeze"}:
                self._frozen_at[name] = float(fields["start"])
                self._story.say(f"{name} is frozen")
            case {"event": "freeze-step", "step": "thaw", "side": "target"}:
                pause = (fields["t"] - self._frozen_at.get(name, fields["t"])) * 1e3
                self._story.say(f"{name} runs on {node}, after a pause of {milliseconds(pause)}")
            case {"event": "filled"}:
                self._story.say(f"{name} has all its memory: {size(int(fields['bytes']))} filled in the background")
            case {"event": "finished", "side": "source"}:
                reason = f": {fields['reason']}" if fields["reason"] else ""
                self._story.say(f"{name}: {fields['outcome']}{reason}")
            case {"event": "restarted"}:
                self._story.say(f"{node} goes on with {fields['side']} phase {fields['phase']}")
            case {"event": "note" | "connections"}:
                self._story.say(f"{node} {name}: {fields['text']}")
            case _:
                return

    def _round(self, name: str, number: int, done: int, total: int, now: float) -> None:
        began = self._rounds_began.setdefault((name, number), now)
        rate = int(done / max(now - began, 0.05))
        self._story.round(name, number, done, total, rate)
