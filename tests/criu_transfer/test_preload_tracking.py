"""The preload library's shortcut for tracked connections: it must never hide one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from criu_transfer import checkpoint

pytestmark = pytest.mark.kernel

# In a network namespace of its own: asks for all tracked connections as CRIU does, before and after there is one.
ASK = """
import ipaddress, json, os, socket, struct
from handlers.network import conntrack
def ask():
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    sock.settimeout(5)
    sock.sendmsg([struct.pack("=IHHIIBBH", 20, 0x101, 0x301, 7, 0, 0, 0, 0)])
    kinds = []
    while 3 not in kinds:
        data = sock.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            kinds.append(kind)
            data = data[length + 3 & ~3:]
    return kinds
before = ask()
here, there = ipaddress.ip_address("10.1.1.1"), ipaddress.ip_address("10.1.1.2")
ends = conntrack.Tuple(here, 1000, there, 2000)
refused = conntrack.recreate([conntrack.Entry(socket.IPPROTO_TCP, ends, ends.reversed(), 60, state=3)])
print(json.dumps({"before": before, "refused": len(refused), "after": ask()}))
"""
DONE, CONNECTION = 3, 0x100


def ask(library: Path | None) -> dict[str, Any]:
    environment = {**os.environ, **({"LD_PRELOAD": str(library)} if library else {})}
    command = ["unshare", "--net", sys.executable, "-c", ASK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_tracked_connection_is_told_and_none_is_made_up(tmp_path: Path) -> None:
    library = checkpoint.build_library(tmp_path)

    plain, answered = ask(None), ask(library)

    if plain["refused"]:
        pytest.skip("this kernel tracks no connections")
    assert plain == {"before": [DONE], "refused": 0, "after": [CONNECTION, DONE]}
    assert answered == plain
