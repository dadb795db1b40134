"""RUN --mount=type=ssh: what may be asked of an ssh agent, and an agent for keys that are files.

A container never sees the agent's own socket. It is given one that this process answers: requests for the list of keys
and for signatures are passed on, all others are refused, so a RUN cannot add, remove or lock keys, and whoever runs in
it (USER, `uid=`) is let through by the mode of that socket, not by the agent, which accepts nobody but its owner. Keys
given as files are loaded into the machine's own ssh-agent, which lives as long as the build. Source: Dockerfile
reference, RUN --mount=type=ssh; draft-miller-ssh-agent.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import UsageError

SSH_AGENT_FAILURE = 5
SSH_AGENTC_REQUEST_IDENTITIES = 11
SSH_AGENTC_SIGN_REQUEST = 13
_PASSED_ON = (SSH_AGENTC_REQUEST_IDENTITIES, SSH_AGENTC_SIGN_REQUEST)
_MAX_MESSAGE_BYTES = 256 << 10


@contextmanager
def open_agents(wanted: Mapping[str, str | Sequence[str]]) -> Iterator[dict[str, str]]:
    """For each id the socket of an agent, while the block runs. What is wanted is the path of such a socket, or one or
    more private keys as files. Raises UsageError for what is neither, and for a key with a passphrase."""
    with ExitStack() as stack:
        found = {}
        for name, given in wanted.items():
            paths = [given] if isinstance(given, str) else list(given)
            if len(paths) == 1 and Path(paths[0]).is_socket():
                found[name] = paths[0]
            else:
                found[name] = stack.enter_context(_agent_with(name, paths))
        yield found


@contextmanager
def _agent_with(name: str, keys: Sequence[str]) -> Iterator[str]:
    """An ssh-agent of our own that holds `keys`: the path of its socket."""
    for key in keys:
        if Path(key).is_socket():
            raise UsageError(f"--ssh {name}: a socket and keys cannot be given together: {key}")
        if not Path(key).is_file():
            raise UsageError(f"--ssh {name}: {key}: no such file", resolution="--ssh ID=SOCKET or --ssh ID=KEY,KEY")
    if shutil.which("ssh-agent") is None or shutil.which("ssh-add") is None:
        raise UsageError(
            f"--ssh {name}: keys as files need the program ssh-agent",
            resolution="install openssh-client, or give the socket of an agent: --ssh default",
        )
    folder = tempfile.mkdtemp(prefix="labkernel-ssh-")  # of mode 0700, and short enough for a socket's name
    try:
        path = f"{folder}/agent"
        with _running_agent(path):
            for key in keys:
                _add(path, name, key)
            yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The shell waits for the end of its standard input, which comes with ours whatever happens to us, and reaps the agent.
_KEEPER = 'ssh-agent -D -a "$0" & exec >/dev/null; cat; kill $!; wait $!'


@contextmanager
def _running_agent(path: str) -> Iterator[None]:
    """An ssh-agent at the socket `path`, which ends with the block and with this process."""
    with subprocess.Popen(
        ["sh", "-c", _KEEPER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Stop of the notebook must not end it before the build has ended
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            if not keeper.stdout.readline():  # it says where it listens as soon as it does
                raise UsageError("ssh-agent does not start", resolution=f"try it: ssh-agent -D -a {path}")
            yield
        finally:
            keeper.stdin.close()


def _add(path: str, name: str, key: str) -> None:
    # By standard input: ssh-add refuses a file that others may read, which a notebook's volume cannot always help.
    environment = {**os.environ, "SSH_AUTH_SOCK": path, "SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"}
    environment.pop("DISPLAY", None)
    try:
        with open(key, "rb") as file:
            done = subprocess.run(
                ["ssh-add", "-q", "-"],
                env=environment,
                stdin=file,
                capture_output=True,
                check=False,
                start_new_session=True,  # without a terminal nobody can be asked for a passphrase
            )
    except OSError as err:
        raise UsageError(f"--ssh {name}: {key}: {(err.strerror or 'unreadable').lower()}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        locked = "passphrase" in said
        why = "it has a passphrase" if locked else said.rpartition("\n")[2] or "ssh-add refuses it"
        raise UsageError(
            f"--ssh {name}: {key} cannot be loaded: {why}",
            resolution="a private key without a passphrase is wanted; with one: ssh-add it, then --ssh default",
        )


# -- what a container sees -------------------------------------------------------------------------------------------


@contextmanager
def answering(agent: str, path: Path) -> Iterator[None]:
    """A socket at `path` that passes requests on to the socket `agent`, while the block runs."""
    relay = _Relay(agent, path)
    try:
        yield
    finally:
        relay.close()


class Listener(ABC):
    """Answers at the socket `path`, which only its owner may use: one thread for it, and one with `_serve` for each
    client. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _bind(self._listener, path)
            self._listener.listen(16)
        except BaseException:
            self._listener.close()
            raise
        threading.Thread(target=self._accept, name="ssh agent listener", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            open_now = [self._listener, *self._open]
        for each in open_now:
            # shutdown wakes a thread that waits in accept or recv, which close alone does not
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), name="ssh agent client", daemon=True).start()

    def _held(self, each: socket.socket) -> bool:
        """Take `each` into what `close` ends; False when it is too late for that."""
        with self._lock:
            if not self._closed:
                self._open.add(each)
            return not self._closed

    def _let_go(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._open.difference_update(sockets)

    @abstractmethod
    def _serve(self, client: socket.socket) -> None:
        """Talk to one client, in a thread of its own."""


class _Relay(Listener):
    """Passes on to an agent what may be asked of it."""

    def __init__(self, agent: str, path: Path) -> None:
        self._agent = agent
        super().__init__(path)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as agent:
            try:
                if self._held(client) and self._held(agent):
                    _connect(agent, self._agent)
                    while (request := _message(client)) is not None:
                        answer = bytes([SSH_AGENT_FAILURE])
                        if request and request[0] in _PASSED_ON:
                            _send(agent, request)
                            found = _message(agent)
                            if found is None:
                                return
                            answer = found
                        _send(client, answer)
            except OSError:
                return  # one of the two has gone
            finally:
                self._let_go(client, agent)


def _message(stream: socket.socket) -> bytes | None:
    """One message without its length; None at the end, and for one that no agent would accept."""
    head = _exactly(stream, 4)
    size = int.from_bytes(head or b"", "big")
    if head is None or size > _MAX_MESSAGE_BYTES:
        return None
    return _exactly(stream, size)


def _exactly(stream: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        more = stream.recv(size - len(data))
        if not more:
            return None
        data += more
    return data


def _send(stream: socket.socket, message: bytes) -> None:
    stream.sendall(len(message).to_bytes(4, "big") + message)


def _bind(listener: socket.socket, path: Path) -> None:
    # A socket's name has at most 107 bytes (man 7 unix), and a store may lie deep: by its directory's descriptor.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.chmod(path.name, 0o600, dir_fd=folder)
    finally:
        os.close(folder)


def _connect(stream: socket.socket, path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        stream.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
