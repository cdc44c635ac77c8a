"""An agent of the drill as the drill sees it: a process on its node, and its event log."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import tenacity

from spotguard.errors import LabError
from spotguard.lab.nodes import LAB_ADDRESS, Node, children
from spotguard.pki import Identity

CONTROL_PORT = 9711


class AgentProcess:
    """The agent of one node, started anew when it was killed."""

    def __init__(self, node: Node, log: Path, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        """`on_event` hears the node's name and every entry of the agent's event log."""
        self.node = node
        self._log = log
        self._on_event = on_event
        self._process: subprocess.Popen[str] | None = None
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start it; its log is appended."""
        with self._log.open("a") as output:
            self._process = self.node.popen(
                ["python3", "-m", "spotguard", "agent", "--config", "/etc/spotguard/agent.toml"], output=output
            )
        self._reader = asyncio.create_task(self._read(), name=f"events of {self.node.name}")

    def kill(self) -> None:
        """Kill the agent itself, without warning, and nothing that it has started."""
        if self._process is None:
            raise LabError("the agent was never started")
        for pid in children(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def restart(self) -> None:
        """Kill it and start it again, as a DaemonSet does."""
        self.kill()
        if self._reader is not None:
            self._reader.cancel()
        self.start()

    async def stop(self) -> None:
        """Stop listening to it; the node ends the process."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def check(self) -> None:
        """Raise LabError with its last words when it has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            words = self._log.read_text(errors="replace")[-1500:]
            raise LabError(f"the agent of {self.node.name} ended with {code}:\n{words}")

    async def _read(self) -> None:
        socket = Path(f"/proc/{self.node.pid}/root/run/spotguard/agent.sock")
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((OSError, aiohttp.ClientError)), wait=tenacity.wait_fixed(0.05)
        )
        async for attempt in retrying:
            with attempt:
                async with (
                    aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
                    session.get("http://agent/v1/events", timeout=aiohttp.ClientTimeout(total=None)) as answer,
                ):
                    with suppress(aiohttp.ClientError):  # it was killed
                        async for line in answer.content:
                            self._on_event(self.node.name, json.loads(line))


def write_settings(
    node: Node, identity: Identity, *, peers: Mapping[str, str], imds: str, store: str, transfer: Mapping[str, Any]
) -> None:
    """Write the node's agent.toml and certificate into its folder."""
    for name, path in (("node.crt", identity.cert), ("node.key", identity.key), ("ca.crt", identity.ca)):
        target = node.etc / name
        target.write_bytes(path.read_bytes())
        target.chmod(0o600)
    lines = [
        f'[node]\nname = "{node.name}"\naddress = "{node.address}"\nstate_dir = "/var/lib/spotguard/state"',
        '[tls]\ncert = "/etc/spotguard/node.crt"\nkey = "/etc/spotguard/node.key"\nca = "/etc/spotguard/ca.crt"',
        f'[owner_store]\nurl = "{store}"',
        f'[imds]\nendpoint = "{imds}"',
        f'[runtime]\ncgroup = "{node.cgroup}"',
        '[metrics]\nlisten = "127.0.0.1"',
        "[peers]\n" + "\n".join(f'{name} = "{address}"' for name, address in peers.items()),
        "[transfer]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in transfer.items()),
    ]
    (node.etc / "agent.toml").write_text("\n\n".join(lines) + "\n")


def store_url(port: int) -> str:
    """Give the owner store's address, as the nodes reach it."""
    return f"https://{LAB_ADDRESS}:{port}"
