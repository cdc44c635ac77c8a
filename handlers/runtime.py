"""runc: starting, looking at, killing and deleting containers. Dump and restore are criu_transfer's."""

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Literal

from handlers.errors import GiveUp

Status = Literal["created", "running", "paused", "stopped", "absent"]


@dataclass(frozen=True, slots=True)
class Container:
    """What runc says of a container; `pid` is 0 unless it has a live process."""

    name: str
    status: Status
    pid: int
    bundle: Path


class Runc:
    """Calls runc with one state directory. Every method raises GiveUp with runc's own words, or at the deadline."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def run(self, name: str, bundle: Path, deadline: float) -> None:
        """Create and start a container, detached, with no descriptor of ours."""
        await self._call("run", "--detach", "--bundle", str(bundle), name, deadline=deadline)

    async def containers(self, deadline: float) -> list[Container]:
        """List all containers of this state directory."""
        if not self.root.exists():  # runc makes it with the first container, and until then refuses to list
            return []
        listed = json.loads(await self._call("list", "--format", "json", deadline=deadline) or "null") or []
        return [Container(c["id"], c["status"], c["pid"], Path(c["bundle"])) for c in listed]

    async def container(self, name: str, deadline: float) -> Container:
        """Look at one container; status "absent" when runc does not know it."""
        found = [c for c in await self.containers(deadline) if c.name == name]
        return found[0] if found else Container(name, "absent", 0, Path())

    async def delete(self, name: str, deadline: float) -> None:
        """Kill and delete a container and runc's record of it; an absent one is no error."""
        await self._call("delete", "--force", name, deadline=deadline)

    async def _call(self, *arguments: str, deadline: float) -> str:
        # Each call has a log of its own, for calls run side by side.
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(prefix=f"{self.root.name}-log-", dir=self.root.parent) as log:
            return await self._run("--log", log.name, "--log-format", "json", *arguments, log=log, deadline=deadline)

    async def _run(self, *arguments: str, log: IO[bytes], deadline: float) -> str:
        # A detached container keeps the descriptors that runc had: output goes to a pipe only where none is started.
        starts = arguments[4] == "run"
        process = await asyncio.create_subprocess_exec(
            "runc",
            "--root",
            str(self.root),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL if starts else asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        what = arguments[4]
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                output, _ = await process.communicate()
        except TimeoutError as late:
            process.kill()
            await process.wait()
            raise GiveUp(f"runc {what} did not end before its deadline") from late
        if process.returncode:
            words = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise GiveUp(f"runc {what} failed ({process.returncode}): {' '.join(words)}")
        return (output or b"").decode(errors="replace")
