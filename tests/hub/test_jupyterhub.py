"""Two students on a real JupyterHub: each has an engine of their own, without root, and none sees the other's."""

from __future__ import annotations

import asyncio
import json
import pwd
import uuid
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BUILD = """%%dockerfile -t hello
FROM busybox
ENV GREETING="hello from"
RUN echo 'echo "$GREETING $(hostname)"' > /greet.sh
CMD ["sh", "/greet.sh"]
"""


class Notebook:
    """A Container Lab kernel on a student's server, spoken to through the hub's proxy as JupyterLab does."""

    def __init__(self, hub: Any, user: str) -> None:
        self.hub, self.user = hub, user
        self.kernel = hub.ask("POST", f"/user/{user}/api/kernels", {"name": "python3"})["id"]
        self.run("%load_ext labkernel")

    def run(self, code: str) -> list[dict[str, Any]]:
        """The outputs of a cell, as {"type", …content}."""
        return asyncio.run(asyncio.wait_for(self._run(code), 120))

    async def _run(self, code: str) -> list[dict[str, Any]]:
        from tornado.httpclient import HTTPRequest
        from tornado.websocket import websocket_connect

        url = f"{self.hub.url}/user/{self.user}/api/kernels/{self.kernel}/channels".replace("http", "ws", 1)
        socket = await websocket_connect(HTTPRequest(url, headers={"Authorization": f"token {self.hub.token}"}))
        asked = uuid.uuid4().hex
        header = {"msg_id": asked, "msg_type": "execute_request", "session": asked, "username": "", "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        await socket.write_message(json.dumps(message))
        outputs: list[dict[str, Any]] = []
        while True:
            text = await socket.read_message()
            assert text is not None, "the server closed the channel"
            answer = json.loads(text)
            if answer["parent_header"].get("msg_id") != asked:
                continue
            if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
                socket.close()
                return outputs
            outputs.append({"type": answer["msg_type"], **answer["content"]})

    def text(self, code: str) -> str:
        outputs = self.run(code)
        assert not [o for o in outputs if o["type"] == "error"], outputs
        return "".join(o["text"] for o in outputs if o["type"] == "stream" and o["name"] == "stdout")


def test_a_class_on_a_hub(hub: Any, students: list[str]) -> None:
    notebooks = []
    for student in students:
        hub.start_server(student)
        notebooks.append(Notebook(hub, student))
    first, second = notebooks

    # Built and run in the first student's own store, without root.
    assert first.text("import os; print(os.getuid())") == f"{pwd.getpwnam(students[0]).pw_uid}\n"
    assert first.text("print(lab.driver.name)") in ("rootless\n", "proot\n")
    first.text(BUILD)
    assert first.text("%container run --rm --hostname box hello").endswith("hello from box\n")

    # A container left running on purpose is the first student's only; the status item of JupyterLab counts it.
    first.text("c = %container run -d --name kept hello sleep 1000")
    assert "kept" in first.text("print([c.name for c in lab.containers.list()])")
    assert second.text("print([c.name for c in lab.containers.list(all=True)])") == "[]\n"
    assert "hello" not in second.text("print([tag for i in lab.images.list() for tag in i.tags])")
    status = hub.ask("GET", f"/user/{students[0]}/labkernel/status")
    assert (status["running"], status["problem"]) == (1, None)

    # The server goes (culled, or the hub is restarted) and comes back: detached means detached.
    hub.stop_server(students[0])
    hub.start_server(students[0])
    first = Notebook(hub, students[0])
    assert first.text("print([c.name for c in lab.containers.list()])") == "['kept']\n"
    assert (
        first.text("print(lab.containers.get('kept').exec_run(['echo', 'still here']).output)") == "b'still here\\n'\n"
    )
    first.text("lab.containers.get('kept').remove(force=True)")
    for student in students:
        hub.stop_server(student)
