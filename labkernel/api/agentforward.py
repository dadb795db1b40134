"""The client's ssh agents (`docker build --ssh`) as sockets here, for RUN --mount=type=ssh.

Each connection to such a socket is one call over the session, in which the agent's bytes go both ways; what a command
may ask of the agent is the builder's business. Source: BuildKit, "sshforward".
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..building.agents import Listener
from . import protobuf
from .errors import ClientGone
from .session import CallFailed, Session, Stream

CHECK = "/moby.sshforward.v1.SSH/CheckAgent"
FORWARD = "/moby.sshforward.v1.SSH/ForwardAgent"
PIECE_BYTES = 32 << 10
_MOUNT = re.compile(r"--mount=(\S*\btype=ssh\b\S*)")
_ID = re.compile(r"(?:^|,)id=([^,]+)")


def wanted_agents(dockerfile: str) -> set[str]:
    """The ids of the ssh mounts in a Dockerfile."""
    found = (_ID.search(words) for words in _MOUNT.findall(dockerfile))
    return {match[1] if match else "default" for match in found}


@contextmanager
def forwarded_agents(session: Session, ids: set[str], folder: Path) -> Iterator[dict[str, str]]:
    """The path of a socket below `folder` for each of the `ids` the client has an agent for, while the block runs."""
    with ExitStack() as stack:
        found = {}
        for number, id in enumerate(sorted(ids)):
            if FORWARD in session.methods and _is_there(session, id):
                path = folder / f"a{number}"
                found[id] = str(path)
                stack.callback(_Forward(session, id, path).close)
        yield found


def _is_there(session: Session, id: str) -> bool:
    try:
        session.call(CHECK, protobuf.encode([(1, id)]))
    except CallFailed as err:
        if "unset ssh forward key" in err.brief:
            return False
        raise
    return True


class _Forward(Listener):
    """Each client is a call over the session, with a thread for either direction."""

    def __init__(self, session: Session, id: str, path: Path) -> None:
        self._session = session
        self._id = id
        super().__init__(path)

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                if self._held(client):
                    self._pass_on(client)
            except (OSError, ClientGone, CallFailed):
                pass  # one of the two has gone
            finally:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)  # for the thread that reads it
                self._let_go(client)

    def _pass_on(self, client: socket.socket) -> None:
        stream = self._session.open(FORWARD, [("buildkit.ssh.id", self._id)])
        threading.Thread(target=self._up, args=(client, stream), name="ssh agent, asked", daemon=True).start()
        while (data := stream.receive()) is not None:
            client.sendall(protobuf.data(protobuf.decode(data), 1))

    def _up(self, client: socket.socket, stream: Stream) -> None:
        with suppress(OSError, ClientGone):
            while data := client.recv(PIECE_BYTES):
                stream.send(protobuf.encode([(1, data)]))
        stream.close()
