"""One run of the drill: two nodes up, workloads filled and under load, a notice, the moves, the check."""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlers.errors import HandlerError
from handlers.network import netns, routes
from handlers.owner import HttpOwnerStore, OwnerRecord, follow
from spotguard.errors import LabError
from spotguard.lab.agent_process import CONTROL_PORT, AgentProcess, store_url, write_settings
from spotguard.lab.client_process import ClientProcess
from spotguard.lab.imds_sim import ImdsSimulator, Listen
from spotguard.lab.nodes import LAB_ADDRESS, Fabric, Host, Node
from spotguard.lab.pod import PodOptions
from spotguard.lab.watcher import Watch, Watched
from spotguard.pki import Identity, issue, make_ca, ssl_context

SOURCE, TARGET = "node-a", "node-b"
ADDRESSES = {SOURCE: "10.77.0.11", TARGET: "10.77.0.12", "client": "10.77.0.50"}
STORE_PORT = 9713
READY_SECONDS = 60.0
FILL_SECONDS = 300.0
VERIFY_SECONDS = 300.0
AFTER_SECONDS = 2.0  # of load on the new node before the check
DROPPED_PAGES = 4


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one run does. `mode`: live or stop-and-copy. `link`: tc's words for a rate, None for no shaping.

    `warm_seconds`: load before the notice. `faults`: drop-page, double-run. `kills`: (node, phase) pairs: when the
    node's agent enters that phase of its machine for the first time, it is killed and started again.
    """

    pods: tuple[PodOptions, ...]
    mode: str = "auto"
    link: str | None = None
    action: str = "terminate"
    time_left_s: float = 120.0
    warm_seconds: float = 3.0
    faults: tuple[str, ...] = ()
    kills: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class PodResult:
    """What was seen of one workload. `client`: the client's result; `watched`: when each side ran."""

    options: PodOptions
    client: dict[str, Any] = field(default_factory=dict)
    watched: Watched | None = None


@dataclass(slots=True)
class RunResult:
    """All that a run has seen; `entries`: the agents' event logs in order of time, each with its `node`."""

    options: RunOptions
    notice_at: float = 0.0
    deadline: float = 0.0
    source_gone_at: float = 0.0
    entries: list[dict[str, Any]] = field(default_factory=list)
    pods: dict[str, PodResult] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)


class Run:
    """Does one run. `tell` hears of everything as it happens: (what, fields)."""

    def __init__(self, options: RunOptions, directory: Path, tell: Callable[[str, Mapping[str, Any]], None]) -> None:
        """`directory`: for logs and ledgers; emptied files of an earlier run are overwritten."""
        self._options = options
        self._directory = directory
        self._tell = tell
        self._result = RunResult(options)
        self._news = asyncio.Event()
        self._agents: dict[str, AgentProcess] = {}
        self._clients: dict[str, ClientProcess] = {}
        self._kills = set(options.kills)

    async def execute(self) -> RunResult:
        """Do it. Raises LabError when the lab itself fails; what went wrong with a move is in the result."""
        self._directory.mkdir(parents=True, exist_ok=True)
        secrets = Path(f"/tmp/spotguard-drill-{os.getpid()}")  # noqa: S108 - a tmpfs of this drill's own
        secrets.mkdir(mode=0o700, exist_ok=True)
        with Fabric(secrets, rate=self._options.link) as fabric:
            async with AsyncExitStack() as stack:
                nodes = {name: fabric.node(name, ADDRESSES[name]) for name in (SOURCE, TARGET)}
                client = fabric.client("client", ADDRESSES["client"])
                sims = await self._services(secrets, nodes, stack)
                await self._start_pods(nodes, client)
                with ExitStack() as watching:
                    watches = self._watch(nodes, watching)
                    await self._load(client)
                    await self._interrupt(sims[SOURCE])
                    await self._moves_end(nodes[SOURCE])
                    await asyncio.sleep(AFTER_SECONDS)
                    await self._verify()
                    outcomes = self._outcomes()
                    here = {name for name, outcome in outcomes.items() if outcome.startswith("moved")}
                    self._result.leftovers += leftovers(nodes[TARGET], here)
                    for name, watch in watches.items():
                        self._result.pods[name].watched = watch.stop()
        self._result.entries.sort(key=lambda entry: entry["t"])
        return self._result

    # --- setting up -------------------------------------------------------------------------------------------------

    async def _services(
        self, secrets: Path, nodes: Mapping[str, Node], stack: AsyncExitStack
    ) -> dict[str, ImdsSimulator]:
        """Start certificates, owner store, metadata simulators, agents, and the fabric's own routes."""
        make_ca(secrets)
        identities = {
            name: issue(secrets, name, [address])
            for name, address in {**ADDRESSES, "owner-store": LAB_ADDRESS, "fabric": LAB_ADDRESS}.items()
        }
        await self._start_store(secrets, identities["owner-store"], stack)
        sims = {}
        for name, node in nodes.items():
            listen = Listen(host=LAB_ADDRESS, control_socket=secrets / f"imds-{name}.sock")
            sims[name] = await stack.enter_async_context(ImdsSimulator(listen=listen))
            peers = {other: f"{ADDRESSES[other]}:{CONTROL_PORT}" for other in nodes if other != name}
            write_settings(
                node,
                identities[name],
                peers=peers,
                imds=sims[name].endpoint,
                store=store_url(STORE_PORT),
                transfer=self._transfer_settings(),
            )
            agent = AgentProcess(node, self._directory / f"{name}.log", self._heard)
            agent.start()
            stack.push_async_callback(agent.stop)
            self._agents[name] = agent
        await self._until(lambda: self._ready(nodes), READY_SECONDS, "the agents to be ready")
        await self._follow_owners(identities["fabric"], stack)
        return sims

    def _transfer_settings(self) -> dict[str, Any]:
        faults = self._options.faults
        return {
            "mode": self._options.mode,
            "fault_drop_pages": DROPPED_PAGES if "drop-page" in faults else 0,
            "fault_double_run": "double-run" in faults,
        }

    async def _start_store(self, secrets: Path, identity: Identity, stack: AsyncExitStack) -> None:
        with (self._directory / "owner-store.log").open("w") as log:
            store = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "spotguard", "owner-store",
                "--tls-cert", str(identity.cert), "--tls-key", str(identity.key), "--tls-ca", str(identity.ca),
                "--serve-listen", LAB_ADDRESS, "--serve-port", str(STORE_PORT),
                "--serve-journal", str(secrets / "owners"),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

        async def end() -> None:
            if store.returncode is None:
                store.terminate()
            await store.wait()

        stack.push_async_callback(end)

    async def _follow_owners(self, identity: Identity, stack: AsyncExitStack) -> None:
        """Keep the client's routes as its own node's agent would: every pod's address goes to its owner's node."""
        context = ssl_context(identity, server_side=False)
        store = await stack.enter_async_context(HttpOwnerStore(store_url(STORE_PORT), context, "owner-store"))

        async def apply(record: OwnerRecord) -> None:
            owner = record.target if record.owner == "target" else record.source
            await self._route(record.address, ADDRESSES[owner])

        task = asyncio.create_task(follow(store, apply), name="client's routes")

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(end)

    @staticmethod
    async def _route(address: str, via: str) -> None:
        try:
            await asyncio.to_thread(routes.point, routes.Route(address, via=via), node=netns.path_of("client"))
        except HandlerError as error:
            raise LabError(f"the client's route to {address}: {error}") from error

    async def _start_pods(self, nodes: Mapping[str, Node], client: Host) -> None:
        for number, options in enumerate(self._options.pods):
            name = options.name
            address = pod_address(number)
            self._result.pods[name] = PodResult(options)
            self._tell("pod", {"workload": name, "node": SOURCE})
            await asyncio.to_thread(
                nodes[SOURCE].run,
                "python3", "-m", "spotguard.lab.pod", *options.arguments(), "--address", address,
                "--config", "/etc/spotguard/agent.toml",
            )  # fmt: skip
            await self._route(address, ADDRESSES[SOURCE])
            workload = options.workload()
            self._clients[name] = await ClientProcess.start(
                client,
                [*workload.client, "--address", address, "--port", str(workload.port),
                 "--ledger", str(self._directory / f"{name}.ledger")],
                name=name,
                log=self._directory / f"{name}-client.log",
                on_event=lambda entry, name=name: self._tell("client", {"workload": name, **entry}),  # type: ignore[misc]  # bound now
            )  # fmt: skip

    def _watch(self, nodes: Mapping[str, Node], stack: ExitStack) -> dict[str, Watch]:
        """Watch every workload from here: outside both nodes."""
        return {
            name: stack.enter_context(Watch({node.name: node.pod_cgroup(name) for node in nodes.values()}))
            for name in self._result.pods
        }

    # --- the run ----------------------------------------------------------------------------------------------------

    async def _load(self, client: Host) -> None:
        deadline = time.monotonic() + FILL_SECONDS
        for running in self._clients.values():
            await running.wait_for("ready", deadline)
        self._tell("load", {"host": client.name})
        await asyncio.sleep(self._options.warm_seconds)

    async def _interrupt(self, sim: ImdsSimulator) -> None:
        options = self._options
        sim.interrupt(options.action, seconds=options.time_left_s)
        self._result.notice_at = time.monotonic()
        self._result.deadline = self._result.notice_at + options.time_left_s
        self._tell("notice", {"action": options.action, "left_s": options.time_left_s, "node": SOURCE})

    async def _moves_end(self, node: Node) -> None:
        """Wait until the source is done with every pod, then take its node away, as AWS will."""
        left = self._result.deadline - time.monotonic()
        try:
            await self._until(self._moves_ended, left, "the moves to end")
        except LabError as late:
            self._tell("late", {"reason": str(late)})
        moved = sum(str(outcome).startswith("moved") for outcome in self._outcomes().values())
        self._result.leftovers += leftovers(node, set() if moved == len(self._clients) else set(self._clients))
        if moved == len(self._clients):
            node.die()
            self._result.source_gone_at = time.monotonic()
            self._tell("node-gone", {"node": node.name})
        await self._until(lambda: self._resumed() >= moved, FILL_SECONDS, "the pagers to fill all pages")

    async def _verify(self) -> None:
        for running in self._clients.values():
            await running.order("stop")
        for name, running in self._clients.items():
            deadline = time.monotonic() + VERIFY_SECONDS
            await running.wait_for("stopped", deadline)
            await running.order("verify")
            self._result.pods[name].client = await running.wait_for("result", deadline)
            await running.end()

    # --- hearing ----------------------------------------------------------------------------------------------------

    def _heard(self, node: str, entry: dict[str, Any]) -> None:
        self._result.entries.append({"node": node, **entry})
        self._tell("agent", {"node": node, **entry})
        self._news.set()
        if entry["event"] == "phase" and (node, entry["phase"]) in self._kills:
            self._kills.discard((node, entry["phase"]))
            self._tell("kill", {"node": node, "phase": entry["phase"]})
            self._agents[node].restart()

    def _ready(self, nodes: Sequence[str] | Mapping[str, Node]) -> bool:
        for name in nodes:
            self._agents[name].check()
        return len({entry["node"] for entry in self._result.entries if entry["event"] == "ready"}) == len(nodes)

    def _outcomes(self) -> dict[str, str]:
        """Give the last outcome of every workload; a killed agent's try may be followed by another."""
        ends = [e for e in self._result.entries if e["event"] == "finished" and e["side"] == "source"]
        return {e["workload"]: str(e["outcome"]) for e in ends}

    def _moves_ended(self) -> bool:
        """Tell whether the source's agent, the one that runs now, has nothing left to move."""
        news = [e for e in self._result.entries if e["node"] == SOURCE and e["event"] in {"ready", "moves-ended"}]
        return bool(news) and max(news, key=lambda e: float(e["t"]))["event"] == "moves-ended"

    def _resumed(self) -> int:
        ends = [e for e in self._result.entries if e["event"] == "finished" and e["side"] == "target"]
        return len({e["workload"] for e in ends if e["outcome"] == "resumed"})

    async def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for news until `done`. Raises LabError when the time is over."""
        end = time.monotonic() + seconds
        while not done():
            self._news.clear()
            if time.monotonic() >= end:
                raise LabError(f"waited {seconds:.0f} s for {what}")
            try:
                async with asyncio.timeout(min(1.0, max(0.0, end - time.monotonic()))):
                    await self._news.wait()
            except TimeoutError:
                continue


def leftovers(node: Node, pods: set[str]) -> list[str]:
    """Find what a finished migration has left on a node where only `pods` should be: a line each."""
    root = Path(f"/proc/{node.pid}/root")
    places = {
        "transfer files": [*root.glob("run/spotguard/source/*"), *root.glob("run/spotguard/target/*")],
        "journal": list(root.glob("var/lib/spotguard/state/journal/*.json")),
        "receiver": list(node.cgroup.glob("receivers/*/")),
        "parked CRIU": list(node.cgroup.glob("parking/*/")),
        "worker": list(node.cgroup.glob("workers/*/")),
        "network": [path for path in root.glob("run/netns/*") if path.name.removeprefix("pod-") not in pods],
        "pod": [path for path in root.glob("var/lib/spotguard/pods/*") if path.name not in pods],
        "container": [path for path in node.cgroup.glob("pods/*/") if path.name not in pods],
    }
    found = [f"{node.name}: {what} {path.name}" for what, paths in places.items() for path in paths]
    rules = node.run("nft", "list", "tables").split("\n")
    return found + [f"{node.name}: {line}" for line in rules if "spotguard-hold" in line]


def pod_address(number: int) -> str:
    """Give the address of the pod that was started as number `number`."""
    return f"10.77.1.{10 + number}"
