"""Certificates of the tests' own, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def certificates(place: Path) -> None:
    """An authority, and a server and a client it vouches for."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True)

    authority = "req -x509 -newkey rsa:2048 -nodes -subj /CN=authority -keyout ca-key.pem -out ca.pem -days 2"
    openssl(*authority.split())
    (place / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*f"req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}-key.pem -out {name}.csr".split())
        signing = f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out {name}.pem -days 2"
        openssl(*signing.split(), *(("-extfile", "names") if name == "server" else ()))
