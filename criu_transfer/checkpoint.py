"""Dumps a container with runc and CRIU: everything but the memory that a tracker holds, or all of it."""

import hashlib
import math
import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from criu_transfer import worker
from criu_transfer.errors import DeadlinePassed, DumpFailed

# Cached answers of CRIU about this kernel. Made without the preload library, they would say "no dirty tracking".
KERNEL_CACHE = Path("/run/criu.kdat")
LONGEST_WAIT = 3600.0  # seconds; a deadline may be infinite
AFTERMATH = 5.0  # seconds for a CRIU whose time was up to put the processes in order again
OPTIONS = (
    "--tcp-established",
    # Connections that nobody has accepted yet are dropped: the caller made sure that none of them holds data.
    "--tcp-skip-in-flight",
    "--file-locks",
    "--ext-unix-sk",
    # The container's cgroup is made by runc on the target; letting CRIU walk the hierarchy costs 10 ms of freeze.
    "--manage-cgroups-mode",
    "ignore",
)


@dataclass(frozen=True, slots=True)
class Tools:
    """Where runc keeps its state, and a directory whose `criu` runs CRIU under the preload library.

    `in_cgroup`: our program that runs a command in a cgroup. `worker`: cgroup directory that the commands run in, None
    for ours.
    """

    runc_root: Path
    criu_dir: Path
    in_cgroup: Path
    worker: Path | None = None

    def environment(self) -> dict[str, str]:
        """Give the environment in which runc finds our `criu` first."""
        return {**os.environ, "PATH": f"{self.criu_dir}:{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"}

    def runc(self, *arguments: str) -> list[str]:
        """Give the command line of a runc call."""
        return ["runc", "--root", str(self.runc_root), *arguments]


def build_library(directory: Path) -> Path:
    """Give the preload library, compiled into `directory` if need be; raises DumpFailed with the compiler's words."""
    return _build("criu_preload.c", ".so", directory, "-shared", "-fPIC", "-ldl")


def build_in_cgroup(directory: Path) -> Path:
    """Give the program that runs a command in a cgroup, compiled into `directory` if need be; as `build_library`."""
    return _build("in_cgroup.c", "", directory)


def _build(name: str, suffix: str, directory: Path, *options: str) -> Path:
    """Compile a source of ours unless that has been done.

    The result's name tells its source, so that a newer agent does not take an older one's. The container image has no
    compiler, but what is built, beside its source.
    """
    source = Path(__file__).parent / "native" / name
    target = directory / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}{suffix}"
    for built in (source.with_name(target.name), target):
        if built.exists():
            return built
    partial = target.with_suffix(".partial")
    done = subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(partial), str(source), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DumpFailed(f"cannot compile {source.name}: {done.stderr.strip()}")
    partial.rename(target)
    return target


def prepare_tools(directory: Path, runc_root: Path, library: Path, deadline: float) -> Tools:
    """Write the `criu` wrapper into `directory` and let CRIU learn this kernel under it.

    Called once at the agent's start. Raises DumpFailed when CRIU does not work on this kernel.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wrapper = directory / "criu"
    criu = next(p for p in (Path("/usr/sbin/criu"), Path("/usr/local/sbin/criu"), Path("/usr/bin/criu")) if p.exists())
    wrapper.write_text(f'#!/bin/sh\nLD_PRELOAD={library} exec {criu} "$@"\n')
    wrapper.chmod(0o755)
    KERNEL_CACHE.unlink(missing_ok=True)
    tools = Tools(runc_root, directory, build_in_cgroup(directory))
    run([str(wrapper), "check"], tools, deadline, DumpFailed, "criu check")
    return tools


def run(command: list[str], tools: Tools, deadline: float, error: type[Exception], what: str) -> str:
    """Run a command to its end and give its output.

    Raises `error` with the command's last words, DeadlinePassed when it was killed at the deadline.
    """
    if deadline <= time.monotonic():
        raise DeadlinePassed(f"no time left for {what}")
    if tools.worker is not None:
        tools.worker.mkdir(parents=True, exist_ok=True)
        command = [str(tools.in_cgroup), str(tools.worker), *command]
    # Files, not pipes: a restored container inherits them, and a pipe would wait for its last holder.
    with open(os.memfd_create("output"), "w+b") as output:  # noqa: PTH123 - a descriptor, not a path
        process = subprocess.Popen(
            command, env=tools.environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        code = _wait(process, deadline)
        if code is None:
            # CRIU ends by itself when runc is gone; until then it has the processes in its hands. How much longer
            # one may wait, and then kill it, is the caller's to say.
            if tools.worker is not None:
                worker.wait_empty(tools.worker, time.monotonic() + AFTERMATH)
            raise DeadlinePassed(f"{what} was stopped at the deadline")
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code:
        raise error(f"{what} failed ({code}): {' '.join(text.split())[-300:]}")
    return text


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Wait for a child's end and give its exit status; at the deadline it is killed, and None given.

    Popen's own wait with a timeout looks again in sleeps of up to 50 ms, which would all be part of the freeze.
    """
    fd = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        ready = poll.poll(math.ceil(max(0.0, min(deadline - time.monotonic(), LONGEST_WAIT)) * 1000))
    finally:
        os.close(fd)
        # Reached with the child alive only when time is up, or when we are interrupted.
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode if ready else None


def last_errors(log: Path, lines: int = 5) -> str:
    """Give the last error lines of a CRIU log, for a message; empty when there is no log."""
    if not log.exists():
        return ""
    errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return " | ".join(errors[-lines:])


def dump(container: str, image_dir: Path, *, parent: str | None, tools: Tools, deadline: float) -> None:
    """Dump a frozen container into `image_dir` and leave it frozen.

    `parent`: path of the synthetic parent image, relative to `image_dir` (runc wants it so), or None to dump all
    memory. Raises DumpFailed, DeadlinePassed. After a failure the processes must be checked before they are thawed:
    CRIU may have died with its parasite inside.
    """
    command = tools.runc("checkpoint", "--leave-running", "--image-path", str(image_dir), "--work-path", str(image_dir))
    if parent is not None:
        command += ["--parent-path", parent]
    try:
        run([*command, *OPTIONS, container], tools, deadline, DumpFailed, "runc checkpoint")
    except DumpFailed as failed:
        raise DumpFailed(f"{failed}; CRIU: {last_errors(image_dir / 'dump.log')}") from failed
