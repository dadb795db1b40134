"""Progress of pulls and pushes, layer by layer: bars in a terminal, elements in a notebook, lines elsewhere.

Real transfers from a scripted registry, which sends the half of a layer and waits until that has been shown.
"""

from __future__ import annotations

import os
import re
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any

from registries import Answer, MadeImage, scripted

from labkernel.engine import Engine
from labkernel.imaging.pushes import Pushes
from labkernel.widgets.transfers import Transfer

DEADLINE_S = 120
BAR = re.compile(r"^([0-9a-f]{12}): Downloading \[(=+>?)( *)\] +(\S+)/(\S+)$")
ELEMENT = re.compile(r'<progress value="(\d+)" max="(\d+)" aria-label="layer ([0-9a-f]{12}): ([A-Z][a-z ]+)">')


def half_at_first(image: MadeImage, digest: str, shown: threading.Event) -> Any:
    """A rule: the layer's first half, then the rest when it has been `shown`."""
    blob = image.blobs[digest]

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(blob[: len(blob) // 2])
        handler.wfile.flush()
        shown.wait(DEADLINE_S)
        handler.wfile.write(blob[len(blob) // 2 :])

    answer = Answer(send=send, Content_Length=str(len(blob)))
    return lambda handler: answer if handler.path.endswith(digest) else None


def test_each_layer_has_a_bar_in_a_terminal_and_an_element_in_a_notebook(fresh_engine: Engine) -> None:
    image = MadeImage({"small": b"s"}, {"large": os.urandom(2_000_000)})
    large = max(image.layers, key=lambda digest: len(image.blobs[digest]))
    size, shown, drawn = len(image.blobs[large]), threading.Event(), list[tuple[str, str]]()

    def redraw(text: str, html: str | None) -> None:
        drawn.append((text, html or ""))
        if any(BAR.match(line) for line in text.splitlines()):
            shown.set()

    with scripted() as fake:
        fake.hold(image)
        fake.rules.append(half_at_first(image, large, shown))
        fresh_engine.pulls.pull(f"{fake.domain}/web", watch=Transfer(redraw, lambda line: None))
    assert shown.is_set(), drawn
    text, html = next(each for each in drawn if "[=" in each[0])
    (found,) = [match for line in text.splitlines() if (match := BAR.match(line))]
    assert found[1] == large[7:19]
    assert len(found[2] + found[3]) == 30
    elements = {id: (int(value), int(most), status) for value, most, id, status in ELEMENT.findall(html)}
    assert set(elements) == {digest[7:19] for digest in image.layers}
    value, most, status = elements[large[7:19]]
    assert (most, status) == (size, "Downloading")
    assert 0 < value <= size // 2
    text, html = drawn[-1]
    assert text.splitlines() == [f"{digest[7:19]}: Pull complete" for digest in image.layers]
    assert [(value, most) for value, most, _, _ in ELEMENT.findall(html)] == [
        (str(len(image.blobs[digest])),) * 2 for digest in image.layers
    ]


def test_elsewhere_each_change_is_a_line(fresh_engine: Engine) -> None:
    image = MadeImage({"one": b"1"}, {"two": b"2"})
    with scripted() as fake:
        fake.hold(image)
        pulled, pushed = list[str](), list[str]()
        done = fresh_engine.pulls.pull(f"{fake.domain}/web", watch=Transfer(None, pulled.append))
        fake.rules.append(_take)
        fresh_engine.images.tag(done.image.id, f"{fake.domain}/other")
        Pushes(fresh_engine.images, fresh_engine.pulls).push(
            f"{fake.domain}/other", watch=Transfer(None, pushed.append)
        )
        quiet = list[str]()
        fresh_engine.pulls.pull(f"{fake.domain}/web", watch=Transfer(None, quiet.append, quiet=True))
    for digest in image.layers:
        states = [line.partition(": ")[2] for line in pulled if line.startswith(digest[7:19])]
        assert (states[0], states[-1]) == ("Pulling fs layer", "Pull complete")
        assert len(states) == len(set(states))
        states = [line.partition(": ")[2] for line in pushed if line.startswith(digest[7:19])]
        assert (states[0], states[-1]) == ("Preparing", "Pushed")
    assert quiet == []


def _take(handler: BaseHTTPRequestHandler) -> Answer | None:
    """A push of anything."""
    if handler.command == "HEAD" and "/blobs/" in handler.path:
        return Answer(b"", 404)
    if handler.command == "POST":
        return Answer(b"", 202, Location="/v2/other/blobs/uploads/1")
    return Answer(b"", 201) if handler.command == "PUT" else None
