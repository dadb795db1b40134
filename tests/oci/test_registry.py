"""Where registries are found, who we are to them, what they ask for: pure parts of the client."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from labkernel.errors import ManifestError, RegistryError, UsageError
from labkernel.oci import manifest as oci
from labkernel.oci.authorization import parse_challenges
from labkernel.oci.connections import check_redirect
from labkernel.oci.credentials import Credentials, Login
from labkernel.oci.endpoints import Settings, find_proxy
from labkernel.oci.platforms import choose, parse_platform, rank


def origins(domain: str, text: str = "") -> list[str]:
    return [endpoint.origin for endpoint in Settings.parse(text, "settings").endpoints(domain)]


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("docker.io", ["https://registry-1.docker.io:443"]),
        ("registry.lan:5000", ["https://registry.lan:5000"]),
        ("localhost:5000", ["http://localhost:5000", "https://localhost:5000"]),
        ("127.3.2.1", ["http://127.3.2.1:80", "https://127.3.2.1:443"]),
        ("[::1]:5000", ["http://[::1]:5000", "https://[::1]:5000"]),
    ],
)
def test_endpoints_of_a_domain(domain: str, expected: list[str]) -> None:
    assert origins(domain) == expected


def test_settings_name_mirrors_insecure_registries_and_authorities() -> None:
    text = """
        insecure = ["old.lan", "10.0.0.0/8"]
        [ca]
        "new.lan" = "/ca.pem"
        [mirrors]
        "docker.io" = ["http://mirror.lan:5001/hub"]
    """
    settings = Settings.parse(text, "settings")
    mirror, own = settings.endpoints("docker.io")
    assert (mirror.origin, mirror.prefix, mirror.mirror) == ("http://mirror.lan:5001", "/hub", True)
    assert own.verify
    assert origins("old.lan", text) == ["https://old.lan:443", "http://old.lan:80"]
    assert origins("10.1.2.3:5000", text) == ["https://10.1.2.3:5000", "http://10.1.2.3:5000"]
    assert not settings.endpoints("old.lan")[0].verify
    assert settings.endpoints("new.lan")[0].ca_files == ("/ca.pem",)
    with pytest.raises(UsageError, match="not a list of strings"):
        Settings.parse('insecure = "all"', "settings")


@pytest.mark.parametrize(
    ("host", "no_proxy", "used"),
    [
        ("registry.lan", "", True),
        ("registry.lan", "lan", False),
        ("registry.lan", ".lan", False),
        ("lan", ".lan", True),
        ("registry.lan", "other.lan,*", False),
        ("registry.lan", "registry.lan:5000", True),
        ("10.1.2.3", "10.0.0.0/8", False),
        ("127.0.0.1", "", False),
        ("localhost", "", False),
    ],
)
def test_proxies_of_the_environment(host: str, no_proxy: str, used: bool) -> None:
    environ = {"HTTPS_PROXY": "http://proxy.lan:3128", "NO_PROXY": no_proxy}
    assert find_proxy("https", host, 443, environ) == ("http://proxy.lan:3128" if used else None)


def test_challenges_in_one_header_and_in_several() -> None:
    both = 'Basic realm="a, b", Bearer realm="https://auth.lan/token",service="reg",scope="repository:x:pull,push"'
    bearer, basic = parse_challenges([both])
    assert bearer.parameters == {
        "realm": "https://auth.lan/token",
        "service": "reg",
        "scope": "repository:x:pull,push",
    }
    assert (basic.scheme, basic.parameters) == ("basic", {"realm": "a, b"})
    assert parse_challenges(["Negotiate", ""]) == []


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "docker").mkdir()
    return {"DOCKER_CONFIG": str(tmp_path / "docker"), "XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_log_ins_of_docker_are_read_and_ours_are_written_elsewhere(home: dict[str, str]) -> None:
    file = Path(home["DOCKER_CONFIG"]) / "config.json"
    entries = {"https://index.docker.io/v1/": {"auth": "YWRhOnNlY3JldA=="}, "lan": {"identitytoken": "t"}}
    file.write_text(json.dumps({"auths": entries}))
    before = file.read_bytes()
    credentials = Credentials(home)
    assert credentials.find("docker.io") == Login("ada", "secret")
    assert credentials.find("lan") == Login("", "", "t")
    assert credentials.find("other") is None
    credentials.store("docker.io", Login("bob", "p:w"))
    assert credentials.find("docker.io") == Login("bob", "p:w")
    assert credentials.erase("docker.io")
    assert credentials.find("docker.io") == Login("ada", "secret")
    assert file.read_bytes() == before
    assert "secret" not in repr(Login("ada", "secret"))


def test_a_credential_helper_is_asked_on_its_stdin(home: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(home["DOCKER_CONFIG"])
    helper = base / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread server\necho "{\\"Username\\": \\"$1\\", \\"Secret\\": \\"$server\\"}"\n')
    helper.chmod(0o755)
    (base / "config.json").write_text(json.dumps({"credHelpers": {"lan": "test", "gone": "missing"}}))
    monkeypatch.setenv("PATH", f"{base}:{os.environ['PATH']}")
    assert Credentials(home).find("lan") == Login("get", "lan")
    with pytest.raises(RegistryError, match=r"docker-credential-missing .* is not installed"):
        Credentials(home).find("gone")


def test_redirects_that_must_not_be_followed() -> None:
    (public,) = Settings().endpoints("registry.example.org")
    check_redirect("https://registry.example.org/x", "https://cdn.example.org/y", public)
    for target, why in (
        ("http://cdn.example.org/y", "TLS to plain"),
        ("https://127.0.0.1/y", "address of this machine"),
        ("https://169.254.169.254/latest", "address of this machine"),
        ("ftp://cdn.example.org/y", "not HTTP"),
    ):
        with pytest.raises(RegistryError, match=why):
            check_redirect("https://registry.example.org/x", target, public)


def test_platforms() -> None:
    arm = parse_platform("linux/arm/v7")
    assert rank(parse_platform("linux/arm/v7"), arm) > rank(parse_platform("linux/arm/v6"), arm) > 0
    assert rank(parse_platform("linux/arm/v8"), arm) == 0
    assert rank(parse_platform("linux/arm64/v8"), parse_platform("arm64")) == 100
    assert rank(parse_platform("x86_64"), parse_platform("linux/amd64")) == 100
    with pytest.raises(UsageError, match="invalid platform"):
        parse_platform("linux/arm/v7/x")
    entry = oci.Descriptor(oci.OCI_MANIFEST, "sha256:" + "1" * 64, 1, platform=arm)
    assert choose(oci.make_index([entry]), arm) == entry
    with pytest.raises(ManifestError, match="no matching manifest for linux/s390x"):
        choose(oci.make_index([entry]), parse_platform("s390x"))
