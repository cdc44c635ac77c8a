"""What SpotGuard needs of a machine. Pure: each check takes a Host and gives its finding with a remedy."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from spotguard.doctor_host import Host

# ok: as it should be. limited: SpotGuard works, with less. missing: containers cannot be moved.
type Level = Literal["ok", "limited", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` is empty when all is well."""

    name: str
    level: Level
    found: str
    remedy: str = ""


# linux/capability.h
_CAPABILITIES = {
    "NET_ADMIN": (12, "routes, nftables and interfaces of containers"),
    "NET_RAW": (13, "keeping the frames of a frozen container"),
    "SYS_PTRACE": (19, "reading the memory of containers"),
    "SYS_ADMIN": (21, "namespaces, mounts, control groups, CRIU"),
}
_CHECKPOINT_RESTORE, _SYS_RESOURCE = 40, 24
_ALL = 'run it privileged (Kubernetes: "privileged: true"; Docker: --privileged), or as root outside a container'

# Whether the product itself starts the program, or only the drill and the tests do.
_TOOLS = (
    ("runc", "missing", "install runc (1.3 or newer)"),
    ("criu", "missing", "install CRIU (4.2 or newer; Debian: sid; else build it from source)"),
    ("iptables-restore", "missing", "install iptables: CRIU locks TCP connections with it"),
    ("unshare", "missing", "install util-linux"),
    ("ip", "limited", "install iproute2: the drill needs it"),
    ("nft", "limited", "install nftables: the tests need it"),
)


def check_root(host: Host) -> Check:
    """Root: CRIU, control groups and namespaces want it."""
    if host.euid() == 0:
        return Check("root", "ok", "runs as root")
    return Check("root", "missing", f"runs as user {host.euid()}", "run it as root, for example with sudo")


def check_capabilities(host: Host) -> Check:
    """The effective capabilities of this process."""
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", host.read("/proc/self/status") or "", re.MULTILINE)
    if not match:
        return Check("capabilities", "missing", "/proc/self/status cannot be read", "mount /proc")
    held = int(match[1], 16)
    lacking = [f"{name} ({use})" for name, (bit, use) in _CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        return Check("capabilities", "missing", f"lacks {', '.join(lacking)}", _ALL)
    extra = [] if held >> _CHECKPOINT_RESTORE & 1 else ["CHECKPOINT_RESTORE is not there, SYS_ADMIN stands for it"]
    if not held >> _SYS_RESOURCE & 1:
        extra.append("SYS_RESOURCE is not there, the preload library answers for it")
    return Check("capabilities", "ok", "; ".join(["all that are needed", *extra]))


def check_kernel(host: Host) -> Check:
    """The kernel's version; what it really can do is tried by the other checks."""
    found = f"Linux {host.release()} on {host.machine()}"
    version = _version(host.release())
    if host.machine() not in {"x86_64", "aarch64"}:
        return Check("kernel", "missing", found, "only x86_64 and aarch64 are supported")
    if version < (5, 14):
        return Check("kernel", "missing", found, "use Linux 5.14 or newer (cgroup.kill, userfaultfd write protection)")
    tracking = (6, 10) if host.machine() == "aarch64" else (6, 7)
    if version < tracking:
        wanted = ".".join(map(str, tracking))
        return Check("kernel", "limited", found, f"live migration wants Linux {wanted} or newer on this architecture")
    return Check("kernel", "ok", found)


def check_userfaultfd(host: Host) -> Check:
    """userfaultfd fills the memory of restored processes; the sysctl is there exactly when the kernel has it."""
    value = host.read("/proc/sys/vm/unprivileged_userfaultfd")
    if value is None:
        return Check("userfaultfd", "missing", "this kernel has none", "use a kernel with CONFIG_USERFAULTFD=y")
    return Check("userfaultfd", "ok", f"there (vm.unprivileged_userfaultfd={value.strip()}, either value will do)")


def check_ptrace(host: Host) -> Check:
    """Yama can forbid ptrace even to root."""
    scope = (host.read("/proc/sys/kernel/yama/ptrace_scope") or "0").strip()
    if scope == "3":
        remedy = "boot without kernel.yama.ptrace_scope=3 (it cannot be lowered at run time)"
        return Check("ptrace", "missing", "kernel.yama.ptrace_scope=3 forbids it to everybody", remedy)
    return Check("ptrace", "ok", f"allowed (kernel.yama.ptrace_scope={scope})")


def check_write_tracking(host: Host) -> Check:
    """Without sound write tracking, containers are moved by stop-and-copy."""
    sound, found = host.write_tracking()
    if sound:
        return Check("write tracking", "ok", found)
    remedy = "everything is moved by stop-and-copy; use a kernel that passes the self-test (6.12.11 or newer)"
    return Check("write tracking", "limited", found, remedy)


def check_tools(host: Host) -> list[Check]:
    """The programs that are started."""
    checks = []
    for name, level, remedy in _TOOLS:
        there = host.run(name, "--version") is not None
        checks.append(Check(f"tool {name}", "ok", "there") if there else _absent(name, level, remedy))
    return checks


def _absent(name: str, level: str, remedy: str) -> Check:
    return Check(f"tool {name}", "missing" if level == "missing" else "limited", "not in PATH", remedy)


def check_criu(host: Host) -> Check:
    """CRIU's version: the kernel since 6.16 needs 4.2, and PAGEMAP_SCAN, which the preload library answers, 4.0."""
    ran = host.run("criu", "--version")
    if ran is None:
        return Check("CRIU version", "missing", "no CRIU", "install CRIU 4.2 or newer")
    match = re.search(r"Version: *(\S+)", ran.output)
    version = _version(match[1]) if match else ()
    if not match or not version:
        return Check("CRIU version", "missing", f"unreadable: {_line(ran.output)}", "install CRIU 4.2 or newer")
    wanted = (4, 2) if _version(host.release()) >= (6, 16) else (4, 0)
    if version < wanted:
        text = ".".join(map(str, wanted))
        return Check("CRIU version", "missing", match[1], f"this kernel needs CRIU {text} or newer")
    return Check("CRIU version", "ok", match[1])


def check_criu_check(host: Host) -> Check:
    """CRIU's own opinion, asked where it cannot see or leave its cache.

    /run/criu.kdat must be made under the preload library, or dirty tracking is refused ever after.
    """
    script = "mount -t tmpfs tmpfs /run && exec criu check"
    ran = host.run("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
    if ran is None:
        return Check("criu check", "missing", "cannot be run: no unshare", "install util-linux")
    if ran.code != 0:
        return Check("criu check", "missing", _line(ran.output) or f"ended with {ran.code}", "run `criu check -v4`")
    return Check("criu check", "ok", _line(ran.output))


def check_pycriu(host: Host) -> Check:
    """pycriu is a second opinion on images, for tests and for people (`crit`)."""
    if host.has_module("pycriu"):
        return Check("pycriu", "ok", "there")
    remedy = "install python3-pycriu for the system's Python; the environment must see system packages"
    return Check("pycriu", "limited", "cannot be imported: tests that compare images are left out", remedy)


def check_runc(host: Host) -> Check:
    """runc's version."""
    ran = host.run("runc", "--version")
    if ran is None:
        return Check("runc version", "missing", "no runc", "install runc 1.3 or newer")
    match = re.search(r"runc version (\S+)", ran.output)
    if not match:
        return Check("runc version", "missing", f"unreadable: {_line(ran.output)}", "install runc 1.3 or newer")
    if _version(match[1]) < (1, 1):
        return Check("runc version", "missing", match[1], "install runc 1.3 or newer")
    if _version(match[1]) < (1, 3):
        return Check("runc version", "limited", match[1], "SpotGuard is tested with runc 1.3: update it")
    return Check("runc version", "ok", match[1])


def check_hold(host: Host) -> Check:
    """Netdev rules of nftables, which hold a container's network, tried in a network namespace of their own."""
    rules = "add table netdev t; add chain netdev t c { type filter hook ingress device lo priority 0; policy drop; }"
    ran = host.run("unshare", "--net", "nft", rules)
    if ran is None:
        return Check("network hold", "missing", "cannot be tried: no unshare", "install util-linux")
    if ran.code == 0:
        return Check("network hold", "ok", "nftables netdev ingress chains work")
    if host.run("nft", "--version") is None:
        return Check("network hold", "limited", "not tried: no nft program", "install nftables to have it tried")
    remedy = "use a kernel with CONFIG_NF_TABLES_NETDEV=y and the module nf_tables"
    return Check("network hold", "missing", _line(ran.output), remedy)


def check_loopback(host: Host) -> Check:
    """CRIU needs the loopback interface up where it starts."""
    flags = host.read("/sys/class/net/lo/flags")
    if flags is not None and int(flags, 16) & 1:
        return Check("loopback", "ok", "up")
    return Check("loopback", "missing", "lo is down", "ip link set lo up")


def check_cgroup(host: Host) -> Check:
    """Version 2 of control groups with its freezer."""
    mounts = [fields[1] for fields in _mounts(host) if fields[2] == "cgroup2"]
    if not mounts:
        remedy = "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        return Check("cgroup v2", "missing", "not mounted", remedy)
    if "/sys/fs/cgroup" not in mounts:
        remedy = "boot with systemd.unified_cgroup_hierarchy=1 (no hybrid)"
        return Check("cgroup v2", "missing", f"at {mounts[0]}, not at /sys/fs/cgroup", remedy)
    trouble = host.freezer("/sys/fs/cgroup")
    if trouble:
        return Check("cgroup v2", "missing", trouble, "mount it writable, on Linux 5.2 or newer")
    return Check("cgroup v2", "ok", "mounted, with freezer")


def check_memory_controller(host: Host) -> Check:
    """Receivers are limited by the memory controller of either version."""
    if "memory" in _controllers(host):
        return Check("memory limits", "ok", "version 2")
    for fields in _mounts(host):
        if fields[2] == "cgroup" and "memory" in fields[3].split(","):
            return Check("memory limits", "ok", f"version 1 at {fields[1]}")
    remedy = "boot without cgroup_disable=memory, and with systemd.unified_cgroup_hierarchy=1"
    return Check("memory limits", "limited", "no memory controller: incoming memory is not limited", remedy)


def check_swap(host: Host) -> Check:
    """Memory images are secrets and must not reach a disk: the receiver refuses to work where they could."""
    lines = (host.read("/proc/swaps") or "").splitlines()[1:]
    devices = [line.split()[0] for line in lines if line.strip()]
    if not devices:
        return Check("swap", "ok", "off")
    found = f"memory of moved containers could reach {', '.join(devices)}: it is not taken in"
    if "memory" in _controllers(host):
        remedy = "swapoff -a, or set memory.swap.max to 0 for SpotGuard's control group"
        return Check("swap", "limited", found, remedy)
    return Check("swap", "missing", found, "swapoff -a")


def check_cpu(host: Host) -> Check:
    """What both nodes of a move must have in common; compare the finding of one with the other's."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", host.read("/proc/cpuinfo") or "", re.MULTILINE)
    features = sorted(set(match[1].split())) if match else []
    if not features:
        return Check("CPU", "limited", "its features cannot be read", "mount /proc")
    digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:12]
    found = f"{len(features)} features (digest {digest})"
    if "xsave" not in features:
        return Check("CPU", "ok", found)
    size = host.xsave_size()
    if size is None:
        return Check("CPU", "limited", f"{found}, xsave size unknown", "allow executable anonymous memory (SELinux)")
    return Check("CPU", "ok", f"{found}, xsave size {size} bytes")


_PLAIN: tuple[Callable[[Host], Check], ...] = (
    check_kernel,
    check_userfaultfd,
    check_ptrace,
    check_criu,
    check_pycriu,
    check_runc,
    check_loopback,
    check_memory_controller,
    check_swap,
    check_cpu,
)
# These try things that only a privileged process may do.
_TRIALS: tuple[tuple[str, Callable[[Host], Check]], ...] = (
    ("criu check", check_criu_check),
    ("write tracking", check_write_tracking),
    ("network hold", check_hold),
    ("cgroup v2", check_cgroup),
)


def examine(host: Host) -> list[Check]:
    """Run all checks; what cannot be tried without privileges is said to be untried, for it may be well."""
    privileges = [check_root(host), check_capabilities(host)]
    findings = [*privileges, *(check(host) for check in _PLAIN), *check_tools(host)]
    for name, check in _TRIALS:
        if any(finding.level == "missing" for finding in privileges):
            findings.append(Check(name, "limited", "not tried: it takes root and all capabilities", "see above"))
        else:
            findings.append(check(host))
    return findings


def verdict(checks: Iterable[Check]) -> str:
    """Tell in which way containers of this machine would be moved: live, stop-and-copy or none."""
    levels = {check.name: check.level for check in checks}
    if "missing" in levels.values():
        return "none"
    return "live" if levels["write tracking"] == "ok" else "stop-and-copy"


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups() if part) if match else ()


def _controllers(host: Host) -> list[str]:
    return (host.read("/sys/fs/cgroup/cgroup.controllers") or "").split()


def _mounts(host: Host) -> list[list[str]]:
    rows = [line.split() for line in (host.read("/proc/self/mounts") or "").splitlines()]
    return [row for row in rows if len(row) >= 4]


def _line(text: str) -> str:
    """Give the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
