"""The throw-away authority, and who may talk to whom."""

import dataclasses
import socket
import ssl
import threading
from pathlib import Path

import pytest

from spotguard import pki
from spotguard.errors import ConfigError


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ca")
    pki.make_ca(directory)
    return directory


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[str, str | None]:
    """Shake hands over a socket pair; return who the server saw and the protocol, or raise what the client got."""
    left, right = socket.socketpair()
    seen: list[str] = []

    def serve() -> None:
        with left:
            try:
                with server.wrap_socket(left, server_side=True) as secure:
                    seen.append(pki.peer_name(secure))
                    secure.sendall(b"x")
            except (ssl.SSLError, OSError):
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with right, client.wrap_socket(right, server_hostname=name) as secure:
            # With TLS 1.3 the client learns only by reading whether its own certificate was accepted.
            if secure.recv(1) != b"x":
                raise ConnectionError("the server hung up")
            return seen[0], secure.version()
    finally:
        thread.join()


def test_two_nodes_of_one_authority_know_each_other(authority: Path) -> None:
    a, b = pki.issue(authority, "node-a", ["10.0.0.1"]), pki.issue(authority, "node-b.example")
    server, client = pki.ssl_context(a, server_side=True), pki.ssl_context(b, server_side=False)
    assert handshake(server, client, "node-a") == ("node-b.example", "TLSv1.3")
    assert handshake(server, client, "10.0.0.1") == ("node-b.example", "TLSv1.3")


def test_a_server_that_is_somebody_else_is_refused(authority: Path) -> None:
    server = pki.ssl_context(pki.issue(authority, "node-a"), server_side=True)
    client = pki.ssl_context(pki.issue(authority, "node-b"), server_side=False)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server, client, "node-c")


def test_a_foreign_authority_and_no_certificate_are_refused(authority: Path, tmp_path: Path) -> None:
    pki.make_ca(tmp_path)
    server = pki.ssl_context(pki.issue(authority, "node-a"), server_side=True)
    stranger = pki.ssl_context(pki.issue(tmp_path, "node-b"), server_side=False)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, stranger, "node-a")
    stranger.load_verify_locations(cafile=authority / "ca.crt")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, stranger, "node-a")
    nameless = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, nameless, "node-a")


def test_older_tls_is_refused(authority: Path) -> None:
    server = pki.ssl_context(pki.issue(authority, "node-a"), server_side=True)
    client = pki.ssl_context(pki.issue(authority, "node-b"), server_side=False)
    client.minimum_version = ssl.TLSVersion.TLSv1_2
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, client, "node-a")


def test_files_that_cannot_be_used_are_named(authority: Path, tmp_path: Path) -> None:
    identity = pki.issue(authority, "node-a")
    with pytest.raises(ConfigError, match="cannot be used"):
        pki.ssl_context(dataclasses.replace(identity, key=tmp_path / "none"), server_side=True)
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        pki.ssl_context(dataclasses.replace(identity, key=authority / "ca.key"), server_side=True)


def test_keys_are_for_their_owner_only(authority: Path) -> None:
    identity = pki.issue(authority, "node-k")
    assert identity.key.stat().st_mode & 0o777 == 0o600
    assert (authority / "ca.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["", "Node", "a_b", "a/b", "a,URI:spiffe://spotguard/node/b", "-a", "a\n", "a" * 64])
def test_names_that_are_no_dns_names_are_refused(authority: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a node's name"):
        pki.issue(authority, name)


@pytest.mark.parametrize(
    "names",
    [
        [],
        [("DNS", "node-a")],
        [("URI", "spiffe://spotguard/node/a"), ("URI", "spiffe://spotguard/node/b")],
        [("URI", "spiffe://spotguard/node/a"), ("URI", "https://example.org")],
        [("URI", "spiffe://other/node/a")],
        [("URI", "spiffe://spotguard/node/")],
        [("URI", "spiffe://spotguard/node/a/b")],
        [("URI", "spiffe://spotguard/node/A")],
    ],
)
def test_an_identity_is_exactly_one_uri(names: list[tuple[str, str]]) -> None:
    with pytest.raises(pki.BadIdentity):
        pki.peer_name({"subjectAltName": tuple(names)})
    with pytest.raises(pki.BadIdentity):
        pki.peer_name(None)
    assert pki.peer_name({"subjectAltName": (("DNS", "x"), ("URI", "spiffe://spotguard/node/a.b"))}) == "a.b"
