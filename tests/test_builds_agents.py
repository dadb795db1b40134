"""The agent for keys as files, and the socket that a RUN sees, with the programs of OpenSSH on both sides."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from labkernel.building.agents import answering, open_agents
from labkernel.errors import UsageError

pytestmark = pytest.mark.skipif(shutil.which("ssh-add") is None, reason="no openssh-client on this machine")


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)], check=True)
    return str(path)


def ask(socket: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@pytest.mark.usefixtures("user_name")
def test_keys_are_listed_and_sign_and_nothing_else_is_answered(tmp_path: Path) -> None:
    first, second = make_key(tmp_path / "first"), make_key(tmp_path / "second", kind="ecdsa")
    os.chmod(first, 0o644)  # as on a volume that knows no modes
    deep = tmp_path / ("d" * 60) / ("e" * 60)  # longer than a socket's name may be
    deep.mkdir(parents=True)
    message = tmp_path / "message"
    message.write_text("signed by whoever holds the key\n")
    with open_agents({"default": [first, second]}) as found:
        agent = found["default"]
        with answering(agent, deep / "seen"):
            link = tmp_path / "l"
            link.symlink_to(deep)
            place = link / "seen"
            listed = ask(place, "ssh-add", "-l")
            assert [line.split()[2] for line in listed.stdout.splitlines()] == ["first", "second"]
            signed = ask(place, "ssh-keygen", "-Y", "sign", "-n", "file", "-f", f"{first}.pub", str(message))
            assert signed.returncode == 0, signed.stderr
            assert "BEGIN SSH SIGNATURE" in Path(f"{message}.sig").read_text()
            for words in (["-D"], ["-x"], [make_key(tmp_path / "third")]):
                assert ask(place, "ssh-add", *words).returncode != 0
            assert ask(place, "ssh-add", "-l").stdout == listed.stdout
        assert ask(place, "ssh-add", "-l").returncode == 2  # nobody answers there any more
        assert ask(agent, "ssh-add", "-l").stdout == listed.stdout
    assert not os.path.exists(os.path.dirname(agent))


@pytest.mark.usefixtures("user_name")
def test_a_socket_is_taken_as_it_is(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    with open_agents({"one": key}) as found, open_agents({"two": found["one"]}) as again:
        assert again == {"two": found["one"]}
        with pytest.raises(UsageError, match="a socket and keys"), open_agents({"both": [found["one"], key]}):
            pass


@pytest.mark.parametrize(
    ("name", "words"), [("absent", "no such file"), ("locked", "passphrase"), ("text", "cannot be loaded")]
)
@pytest.mark.usefixtures("user_name")
def test_what_is_no_key_is_refused(tmp_path: Path, name: str, words: str) -> None:
    make_key(tmp_path / "locked", passphrase="secret")
    (tmp_path / "text").write_text("no key\n")
    with pytest.raises(UsageError, match=words), open_agents({"default": str(tmp_path / name)}):
        pass
