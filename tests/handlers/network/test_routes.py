import itertools
import socket
import struct
import subprocess
import threading

import pytest

from handlers.errors import GiveUp
from handlers.network import netns, routes
from handlers.network.routes import Route

pytestmark = pytest.mark.kernel

POD = "10.77.1.10"


def shown(where: str) -> str:
    return subprocess.run(["ip", "-n", where, "route", "get", POD], capture_output=True, text=True, check=False).stdout


def test_a_route_is_set_replaced_listed_and_removed(lab):
    here = lab.client
    routes.point(Route(POD, via="10.77.0.1"), node=here)
    assert "via 10.77.0.1" in shown("client")
    routes.point(Route(POD, via="10.77.0.2"), node=here)
    assert "via 10.77.0.2" in shown("client")
    assert routes.entries(node=here) == [Route(POD, via="10.77.0.2")]
    routes.point(Route(POD, dev="eth0"), node=here)
    assert routes.entries(node=here) == [Route(POD, dev="eth0")]
    routes.remove(POD, node=here)
    routes.remove(POD, node=here)
    assert routes.entries(node=here) == []
    assert POD not in shown("client")


def test_a_pods_own_route_is_replaced_when_it_has_moved_away(lab):
    box = lab.pod("one", "node-a")
    routes.point(Route(POD, via="10.77.0.2"), node=box.node)
    assert "via 10.77.0.2" in shown("node-a")
    routes.point(Route(POD, dev=box.host_dev), node=box.node)
    assert box.host_dev in shown("node-a")
    routes.remove(POD, node=box.node)
    assert box.host_dev not in shown("node-a")


def test_ipv6_host_routes_work_alike(lab):
    here = lab.client
    routes.point(Route("fd00::0a", dev="eth0"), node=here)
    assert routes.entries(node=here) == [Route("fd00::a", dev="eth0")]
    routes.remove("fd00::a", node=here)
    assert routes.entries(node=here) == []


@pytest.mark.parametrize("route", [Route(POD, via="192.0.2.1"), Route(POD, dev="nowhere"), Route(POD)])
def test_a_way_that_does_not_exist_is_refused(lab, route):
    with pytest.raises(GiveUp, match=POD):
        routes.point(route, node=lab.client)


def test_replacing_leaves_no_instant_without_a_route(lab):
    vias = [Route(POD, via="10.77.0.1"), Route(POD, via="10.77.0.2")]
    routes.point(vias[0], node=lab.client)
    done = threading.Event()
    with netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_DGRAM) as sender:

        def swap() -> None:
            for route in itertools.islice(itertools.cycle(vias), 40):
                routes.point(route, node=lab.client)
            done.set()

        thread = threading.Thread(target=swap)
        thread.start()
        sent = 0
        while not done.is_set():
            sender.sendto(struct.pack("I", sent), (POD, 9))  # ENETUNREACH if there were none
            sent += 1
        thread.join()
    assert sent > 100
