"""Restores a container with runc and CRIU so that it comes up frozen."""

import os
from pathlib import Path

from criu_transfer.checkpoint import OPTIONS, Tools, last_errors, run
from criu_transfer.errors import RestoreFailed
from criu_transfer.quickmoves import quick_moves

# CRIU does not gate the resume: a failing hook is only logged. So the script itself freezes the container's cgroup,
# after moving CRIU (which runc put there) and itself out. If it cannot freeze, it kills: a copy that nobody
# owns must not run. `cgroup.kill` needs Linux 5.14; before that the processes are killed one by one.
FREEZE_SCRIPT = """#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = pre-resume ] || exit 0
unset LD_PRELOAD
cgroup={cgroup}
parking={parking}
die() {{
  echo 1 >"$cgroup/cgroup.kill" || kill -9 $(cat "$cgroup/cgroup.procs")
  exit 1
}}
mkdir -p "$parking" && echo $PPID >"$parking/cgroup.procs" && echo $$ >"$parking/cgroup.procs" || die
echo 1 >"$cgroup/cgroup.freeze" || die
"""


def write_criu_settings(directory: Path, *, cgroup: Path, parking: Path) -> Path:
    """Write CRIU's settings for one container (read through the annotation `org.criu.config`) and give their path.

    `cgroup`: the container's cgroup v2 directory; `parking`: another one, for CRIU to go to before the freeze.
    Raises RestoreFailed when the script could not be run from there.
    """
    script = directory / "freeze-at-resume"
    script.write_text(FREEZE_SCRIPT.format(cgroup=cgroup, parking=parking))
    script.chmod(0o755)
    if not os.access(script, os.X_OK):
        raise RestoreFailed(f"{directory} is mounted noexec: CRIU could not run what keeps a restored copy frozen")
    settings = directory / "criu.conf"
    # The network is held by SpotGuard on both sides, longer than CRIU would hold it.
    settings.write_text(f"network-lock skip\naction-script {script}\n")
    return settings


def restore(container: str, bundle: Path, image_dir: Path, *, lazy: bool, tools: Tools, deadline: float) -> None:
    """Restore a container from `image_dir` under the bundle; it is frozen when this returns.

    `lazy`: memory comes from the pager that listens in `image_dir`. Raises RestoreFailed, DeadlinePassed; then the
    caller destroys what may have come up.
    """
    command = tools.runc(
        "restore", "--detach", "--bundle", str(bundle), "--image-path", str(image_dir), "--work-path", str(image_dir)
    )
    if lazy:
        command.append("--lazy-pages")
    options = [option for option in OPTIONS if option != "--tcp-skip-in-flight"]
    try:
        with quick_moves():
            run([*command, *options, container], tools, deadline, RestoreFailed, "runc restore")
    except RestoreFailed as failed:
        raise RestoreFailed(f"{failed}; CRIU: {last_errors(image_dir / 'restore.log')}") from failed
