"""A throw-away certificate authority for drills and tests, and the TLS rules of every SpotGuard connection.

An identity is one URI in the certificate's subjectAltName: `spiffe://spotguard/node/NAME`. NAME is there as a DNS name
too, because that is what TLS libraries check inside the handshake, before the first byte of a request is sent.
"""

import re
import ssl
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotguard.errors import ConfigError, SpotGuardError, Unsupported

URI_PREFIX = "spiffe://spotguard/node/"
# A DNS name in lower case: it has to stand in a URI and in a DNS entry alike.
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\Z")
_DAYS = "1"  # the shortest that the openssl command knows


class BadIdentity(SpotGuardError):  # noqa: N818 - named after the finding
    """The peer's certificate does not say, exactly once, which node it is."""


@dataclass(frozen=True)
class Identity:
    """The three PEM files with which a process proves who it is and checks others."""

    cert: Path
    key: Path
    ca: Path


def valid_name(name: str) -> bool:
    """Tell whether `name` can be a node's name: a DNS name in lower case, at most 253 characters."""
    return _NAME.match(name) is not None


def make_ca(directory: Path) -> Path:
    """Make an EC P-256 authority, valid for a day, in `directory` (ca.crt, ca.key mode 0600); return the certificate.

    Raises Unsupported when there is no openssl command.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    crt, key = directory / "ca.crt", directory / "ca.key"
    extensions = {
        "basicConstraints": "critical,CA:TRUE,pathlen:0",
        "keyUsage": "critical,keyCertSign,cRLSign",
        "subjectKeyIdentifier": "hash",
    }
    _certificate(crt, key, "SpotGuard throw-away CA", extensions)
    return crt


def issue(directory: Path, name: str, addresses: Iterable[str] = ()) -> Identity:
    """Issue a certificate for node `name` by the authority in `directory`; files NAME.crt and NAME.key (mode 0600).

    `addresses`: IP addresses to name beside it. Raises ValueError for a name that is no lower-case DNS name.
    """
    if not valid_name(name):
        raise ValueError(f"'{name}' cannot be a node's name: use a DNS name in lower case")
    ca = directory / "ca.crt"
    names = [f"URI:{URI_PREFIX}{name}", f"DNS:{name}", *(f"IP:{address}" for address in addresses)]
    extensions = {
        "basicConstraints": "critical,CA:FALSE",
        "keyUsage": "critical,digitalSignature",
        "extendedKeyUsage": "serverAuth,clientAuth",
        "subjectKeyIdentifier": "hash",
        "authorityKeyIdentifier": "keyid",
        "subjectAltName": ",".join(names),
    }
    crt, key = directory / f"{name}.crt", directory / f"{name}.key"
    # The common name holds 64 characters at most and nobody reads it.
    _certificate(crt, key, name[:64], extensions, "-CA", str(ca), "-CAkey", str(directory / "ca.key"))
    return Identity(cert=crt, key=key, ca=ca)


def _certificate(crt: Path, key: Path, common_name: str, extensions: Mapping[str, str], *signer: str) -> None:
    # A configuration of our own: the system's would add its extensions to ours.
    lines = ["[req]", "distinguished_name=dn", "x509_extensions=ext", "prompt=no", "[dn]", f"CN={common_name}", "[ext]"]
    lines += [f"{name}={value}" for name, value in extensions.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".cnf") as config:
        config.write("\n".join(lines) + "\n")
        config.flush()
        command = ["openssl", "req", "-x509", "-config", config.name, "-days", _DAYS, "-nodes", *signer]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", str(key), "-out", str(crt)]
        try:
            # umask: the key is never readable by others, not even while it is written.
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, umask=0o077)
        except FileNotFoundError as error:
            raise Unsupported("there is no openssl command", remedy="install the package openssl") from error
    if done.returncode:
        raise SpotGuardError(f"openssl could not make {crt.name}: {done.stderr.strip()}")


def ssl_context(identity: Identity, *, server_side: bool) -> ssl.SSLContext:
    """Build a TLS 1.3 context that proves `identity` and demands a certificate of the same authority from the peer.

    A client checks in the handshake that the server is who was meant: give the node's name as `server_hostname`.
    A server learns who called by `peer_name`. Raises ConfigError when a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = not server_side
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cafile=identity.ca)
        context.load_cert_chain(identity.cert, identity.key)
    except OSError as error:  # of which ssl.SSLError is one
        files = f"{identity.ca}, {identity.cert} or {identity.key}"
        raise ConfigError([f"a file of TLS cannot be used ({files}): {error}"]) from error
    return context


def peer_name(peer: ssl.SSLObject | ssl.SSLSocket | Mapping[str, Any] | None) -> str:
    """Read the peer's node name out of a verified connection, or of what its `getpeercert()` returned.

    Raises BadIdentity unless the certificate has exactly one URI and that is a node's.
    """
    certificate = peer.getpeercert() if isinstance(peer, ssl.SSLObject | ssl.SSLSocket) else peer
    if not certificate:
        raise BadIdentity("the peer showed no certificate")
    uris = _uris(certificate)
    if len(uris) != 1:
        raise BadIdentity(f"the peer's certificate has {len(uris)} URIs; exactly one must name the node")
    name = uris[0].removeprefix(URI_PREFIX)
    if name == uris[0] or not valid_name(name):
        raise BadIdentity(f"the peer's certificate names '{uris[0][:200]}', which is no {URI_PREFIX}NAME")
    return name


def _uris(certificate: Mapping[str, Any]) -> list[str]:
    return [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
