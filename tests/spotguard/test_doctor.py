"""Each check against a made-up machine; the real probes once on this one."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from spotguard import doctor, doctor_checks
from spotguard.doctor_checks import Check
from spotguard.doctor_host import Ran, ThisHost

STATUS = "Name:\tpython\nCapEff:\t{:016x}\nCapBnd:\t0\n"
GOOD_FILES = {
    "/proc/self/status": STATUS.format(2**41 - 1),
    "/proc/sys/vm/unprivileged_userfaultfd": "0\n",
    "/proc/self/mounts": "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,relatime 0 0\n",
    "/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
    "/sys/class/net/lo/flags": "0x9\n",
    "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "/proc/cpuinfo": "processor : 0\nflags\t\t: fpu sse xsave\nprocessor : 1\nflags : fpu\n",
}
GOOD_PROGRAMS = {
    "criu": Ran(0, "Version: 4.2.1\nGitID: v4.2.1\n"),
    "runc": Ran(0, "runc version 1.3.6+ds1\ncommit: x\n"),
    "unshare": Ran(0, "Looks good.\n"),
    "iptables-restore": Ran(0, ""),
    "ip": Ran(0, ""),
    "nft": Ran(0, ""),
}


@dataclass(frozen=True)
class FakeHost:
    """A machine where all is well, but for what a test changes."""

    user: int = 0
    kernel: str = "6.18.44-generic"
    architecture: str = "x86_64"
    files: Mapping[str, str] = field(default_factory=lambda: GOOD_FILES)
    programs: Mapping[str, Ran] = field(default_factory=lambda: GOOD_PROGRAMS)
    modules: tuple[str, ...] = ("pycriu",)
    xsave: int | None = 2696
    freezer_trouble: str = ""
    tracking: tuple[bool, str] = (True, "the self-test passed")

    def euid(self) -> int:
        return self.user

    def release(self) -> str:
        return self.kernel

    def machine(self) -> str:
        return self.architecture

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def run(self, *command: str) -> Ran | None:
        return self.programs.get(command[0])

    def has_module(self, name: str) -> bool:
        return name in self.modules

    def xsave_size(self) -> int | None:
        return self.xsave

    def freezer(self, mount: str) -> str:
        assert mount == "/sys/fs/cgroup"
        return self.freezer_trouble

    def write_tracking(self) -> tuple[bool, str]:
        return self.tracking

    def with_file(self, path: str, text: str | None) -> "FakeHost":
        files = {name: value for name, value in self.files.items() if name != path}
        return replace(self, files=files if text is None else {**files, path: text})

    def with_program(self, name: str, ran: Ran | None) -> "FakeHost":
        programs = {key: value for key, value in self.programs.items() if key != name}
        return replace(self, programs=programs if ran is None else {**programs, name: ran})


GOOD = FakeHost()


def finding(host: FakeHost, name: str) -> Check:
    (check,) = [check for check in doctor_checks.examine(host) if check.name == name]
    return check


def without(*bits: int) -> str:
    return STATUS.format((2**41 - 1) & ~sum(1 << bit for bit in bits))


def test_all_is_well() -> None:
    checks = doctor_checks.examine(GOOD)
    assert {check.level for check in checks} == {"ok"}
    assert not any(check.remedy for check in checks)
    assert doctor_checks.verdict(checks) == "live"


UNIFIED = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
SWAPPING = GOOD_FILES["/proc/swaps"] + "/dev/sda2 partition 1 0 -2\n"


@pytest.mark.parametrize(
    ("host", "name", "level", "words"),
    [
        (replace(GOOD, user=1000), "root", "missing", "user 1000"),
        (GOOD.with_file("/proc/self/status", without(12)), "capabilities", "missing", "NET_ADMIN"),
        (GOOD.with_file("/proc/self/status", without(21, 19)), "capabilities", "missing", "SYS_PTRACE"),
        (GOOD.with_file("/proc/self/status", without(24)), "capabilities", "ok", "SYS_RESOURCE"),
        (GOOD.with_file("/proc/self/status", without(40)), "capabilities", "ok", "CHECKPOINT_RESTORE"),
        (GOOD.with_file("/proc/self/status", None), "capabilities", "missing", "/proc"),
        (replace(GOOD, kernel="5.10.0"), "kernel", "missing", "5.10.0"),
        (replace(GOOD, kernel="6.1.0-eks"), "kernel", "limited", "6.1.0"),
        (replace(GOOD, kernel="6.9.1", architecture="aarch64"), "kernel", "limited", "aarch64"),
        (replace(GOOD, kernel="6.10.0", architecture="aarch64"), "kernel", "ok", "aarch64"),
        (replace(GOOD, architecture="riscv64"), "kernel", "missing", "riscv64"),
        (GOOD.with_file("/proc/sys/vm/unprivileged_userfaultfd", None), "userfaultfd", "missing", "none"),
        (GOOD.with_file("/proc/sys/kernel/yama/ptrace_scope", "3\n"), "ptrace", "missing", "forbids"),
        (GOOD.with_file("/proc/sys/kernel/yama/ptrace_scope", "2\n"), "ptrace", "ok", "2"),
        (replace(GOOD, tracking=(False, "mremap keeps")), "write tracking", "limited", "mremap keeps"),
        (GOOD.with_program("iptables-restore", None), "tool iptables-restore", "missing", "PATH"),
        (GOOD.with_program("ip", None), "tool ip", "limited", "PATH"),
        (GOOD.with_program("criu", None), "CRIU version", "missing", "no CRIU"),
        (GOOD.with_program("criu", Ran(0, "Version: 4.1.1\n")), "CRIU version", "missing", "4.1.1"),
        (GOOD.with_program("criu", Ran(1, "segfault\n")), "CRIU version", "missing", "segfault"),
        (
            replace(GOOD, kernel="6.12.30").with_program("criu", Ran(0, "Version: 4.1.1\n")),
            "CRIU version",
            "ok",
            "4.1.1",
        ),
        (GOOD.with_program("unshare", Ran(1, "Warn\nError: no clone3\n")), "criu check", "missing", "no clone3"),
        (GOOD.with_program("unshare", Ran(124, "")), "criu check", "missing", "124"),
        (GOOD.with_program("unshare", None), "criu check", "missing", "unshare"),
        (replace(GOOD, modules=()), "pycriu", "limited", "imported"),
        (GOOD.with_program("runc", None), "runc version", "missing", "no runc"),
        (GOOD.with_program("runc", Ran(0, "runc version 1.2.5")), "runc version", "limited", "1.2.5"),
        (GOOD.with_program("runc", Ran(0, "runc version 1.0.0-rc9")), "runc version", "missing", "1.0.0"),
        (GOOD.with_program("unshare", Ran(1, "Error: Not supported\n")), "network hold", "missing", "Not supported"),
        (
            GOOD.with_program("unshare", Ran(127, "no nft")).with_program("nft", None),
            "network hold",
            "limited",
            "not tried",
        ),
        (GOOD.with_file("/sys/class/net/lo/flags", "0x8\n"), "loopback", "missing", "down"),
        (GOOD.with_file("/proc/self/mounts", ""), "cgroup v2", "missing", "not mounted"),
        (GOOD.with_file("/proc/self/mounts", UNIFIED), "cgroup v2", "missing", "/sys/fs/cgroup/unified"),
        (replace(GOOD, freezer_trouble="read-only"), "cgroup v2", "missing", "read-only"),
        (GOOD.with_file("/sys/fs/cgroup/cgroup.controllers", "cpu\n"), "memory limits", "limited", "no memory"),
        (
            GOOD.with_file("/sys/fs/cgroup/cgroup.controllers", "").with_file("/proc/self/mounts", UNIFIED),
            "memory limits",
            "ok",
            "version 1",
        ),
        (GOOD.with_file("/proc/swaps", SWAPPING), "swap", "limited", "/dev/sda2"),
        (
            GOOD.with_file("/proc/swaps", SWAPPING).with_file("/sys/fs/cgroup/cgroup.controllers", ""),
            "swap",
            "missing",
            "/dev/sda2",
        ),
        (GOOD, "CPU", "ok", "3 features"),
        (GOOD, "CPU", "ok", "xsave size 2696"),
        (replace(GOOD, xsave=None), "CPU", "limited", "unknown"),
        (GOOD.with_file("/proc/cpuinfo", "Features : fp asimd\n"), "CPU", "ok", "2 features"),
        (GOOD.with_file("/proc/cpuinfo", None), "CPU", "limited", "cannot"),
    ],
)
def test_findings(host: FakeHost, name: str, level: str, words: str) -> None:
    check = finding(host, name)
    assert check.level == level
    assert words in check.found
    assert bool(check.remedy) == (level != "ok")


@pytest.mark.parametrize(
    ("host", "moves"),
    [
        (replace(GOOD, user=1), "none"),
        (replace(GOOD, tracking=(False, "old")), "stop-and-copy"),
        (replace(GOOD, modules=()), "live"),
    ],
)
def test_verdict(host: FakeHost, moves: str) -> None:
    assert doctor_checks.verdict(doctor_checks.examine(host)) == moves


def test_without_privileges_nothing_is_called_broken_that_was_not_tried() -> None:
    checks = {check.name: check for check in doctor_checks.examine(replace(GOOD, user=1000))}
    for name in ("criu check", "write tracking", "network hold", "cgroup v2"):
        assert checks[name].level == "limited"
        assert "not tried" in checks[name].found


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(parse(), replace(GOOD, user=1000)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=2) == ["MISSING", "root", "runs as user 1000"]
    assert lines[1].strip().startswith("-> run it as root")
    assert "cannot be moved" in lines[-1]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(parse("--output", "json"), replace(GOOD, modules=())) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["moves"] == "live"
    assert {"name", "level", "found", "remedy"} == set(report["checks"][0])


@pytest.mark.kernel
def test_the_real_probes(tmp_path: Path) -> None:
    host = ThisHost()
    assert host.release() == os.uname().release
    assert host.read("/proc/self/status")
    assert host.read(str(tmp_path / "absent")) is None
    assert host.run("sh", "-c", "echo out; echo err >&2; exit 3") == Ran(3, "out\nerr\n")
    assert host.run("no-such-program") is None
    assert host.has_module("json")
    assert not host.has_module("no_such_module")
    assert host.freezer(str(tmp_path)) == "control groups have no cgroup.freeze"
    assert host.freezer(str(tmp_path / "absent")).startswith("cannot make a control group")
    assert list(tmp_path.iterdir()) == []
    size = host.xsave_size()
    assert size is None or 512 + 64 <= size < 64 * 1024


@pytest.mark.criu
def test_criu_is_asked_without_leaving_its_cache() -> None:
    cache = Path("/run/criu.kdat")
    before = cache.stat() if cache.exists() else None
    assert doctor_checks.check_criu_check(ThisHost()).level == "ok"
    assert (cache.stat() if cache.exists() else None) == before


@pytest.mark.kernel
def test_write_tracking_is_really_tried() -> None:
    sound, found = ThisHost().write_tracking()
    assert found
    assert sound == ("passed" in found)


@pytest.mark.kernel
def test_the_hold_and_the_freezer_are_really_tried() -> None:
    assert doctor_checks.check_hold(ThisHost()).level == "ok"
    assert doctor_checks.check_cgroup(ThisHost()).level == "ok"
    assert not list(Path("/sys/fs/cgroup").glob("spotguard-doctor-*"))
