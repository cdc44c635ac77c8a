import errno
import socket
from contextlib import closing

import pytest

from handlers.network import netns
from handlers.network.backlog import Backlog, undelivered
from handlers.network.hold import Hold

pytestmark = pytest.mark.kernel

POD, PORT = "10.77.1.10", 7000


@pytest.fixture
def listening(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with netns.open_socket(box.netns, socket.AF_INET6, socket.SOCK_STREAM) as listener:
        listener.bind(("::", PORT))
        listener.listen()
        yield lab, box, listener


def test_connections_that_nobody_accepted_are_counted(listening):
    lab, box, listener = listening
    assert not undelivered(box.netns)
    with (
        netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_STREAM) as one,
        netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_STREAM) as two,
    ):
        one.connect((POD, PORT))
        two.connect((POD, PORT))
        assert undelivered(box.netns) == Backlog(unaccepted=2, handshakes=0)
        for _ in range(2):
            listener.accept()[0].close()
        assert not undelivered(box.netns)


def test_a_handshake_that_the_hold_has_cut_is_counted(listening):
    lab, box, _ = listening
    with (
        netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_STREAM) as client,
        closing(Hold.prepare(box)) as hold,
    ):
        hold.engage()
        client.setblocking(False)
        assert client.connect_ex((POD, PORT)) == errno.EINPROGRESS
        hold._play_in(hold.take())  # its SYN came just before the hold; the answer does not get out
        assert undelivered(box.netns) == Backlog(unaccepted=0, handshakes=1)
        hold.release()
        client.settimeout(5)
        client.connect((POD, PORT))
        assert undelivered(box.netns) == Backlog(unaccepted=1, handshakes=0)
