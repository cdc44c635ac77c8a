import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from criu_transfer.stream import Credentials


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Authority:
    """A throw-away certificate authority made by the openssl command."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.ca, self._key = folder, folder / "ca.pem", folder / "ca.key"
        _openssl("req", "-x509", *_new_key(self._key), "-out", str(self.ca), "-days", "2", "-subj", "/CN=authority")

    def issue(self, node: str, *, names: str | None = None) -> Credentials:
        """Issue a certificate for a node; `names` replaces its subjectAltName."""
        cert, key = self.folder / f"{node}.pem", self.folder / f"{node}.key"
        san = names if names is not None else f"URI:spiffe://spotguard/node/{node}"
        signer = ("-CA", str(self.ca), "-CAkey", str(self._key), "-days", "2", "-subj", f"/CN={node}")
        extra = ("-addext", f"subjectAltName={san}") if san else ()
        _openssl("req", "-x509", *_new_key(key), "-out", str(cert), *signer, *extra)
        return Credentials(cert, key, self.ca)


def _new_key(path: Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    """Return authorities by name, each made once."""
    folder, made = tmp_path_factory.mktemp("pki"), {}

    def get(name: str) -> Authority:
        if name not in made:
            made[name] = Authority(folder / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def nodes(authority: Callable[[str], Authority]) -> tuple[Credentials, Credentials]:
    """Return the credentials of the nodes "source" and "target"."""
    return authority("main").issue("source"), authority("main").issue("target")
