"""Makes moving processes between cgroups quick while a container is restored.

Every move takes the kernel's cgroup_threadgroup_rwsem for writing, and the first one after some idle milliseconds
waits for an RCU grace period (5 to 20 ms; kernel/rcu/sync.c). In a restore runc moves CRIU in and our script moves it
out again, each after such a pause. Moves that follow one another within that time cost 0.1 ms; so somebody else makes
moves meanwhile: of itself, to where it is.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_EVERY = 0.004  # seconds: less than a grace period


def own_cgroup() -> Path | None:
    """Find this process's cgroup v2 directory; None where it is not below the usual mount."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::/")), "")
    directory = Path("/sys/fs/cgroup") / path.lstrip("/")
    return directory if path and (directory / "cgroup.procs").exists() else None


@contextmanager
def quick_moves() -> Iterator[None]:
    """Keep moves quick for the length of a `with` block; where that cannot be done they are only slower."""
    group = own_cgroup()
    ended = threading.Event()
    if group is None:
        yield
        return
    thread = threading.Thread(target=_move_to, args=(group, ended), name="quick moves")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _move_to(group: Path, ended: threading.Event) -> None:
    with suppress(OSError), (group / "cgroup.procs").open("wb", buffering=0) as procs:
        while not ended.is_set():
            procs.write(b"0")
            ended.wait(_EVERY)
