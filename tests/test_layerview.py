"""The layers of real images: what each added, changed, removed; bytes wasted; the text and the HTML of it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from labkernel.engine import Engine
from labkernel.errors import NoSuchImage
from labkernel.imaging.layerview import Change, Layers, differences, explore

TEXT = """\
FROM lab/busybox
RUN mkdir -p /data/deep && head -c 300000 /dev/zero > /data/big && echo one > /data/deep/small && echo gone > /data/gone
COPY <<END /data/note
a <b>note</b>
END
RUN head -c 1000 /dev/zero > /data/big && rm /data/gone && chmod 700 /data/deep
RUN rm -r /data/deep && mkdir /data/deep && echo new > /data/deep/new
"""


@pytest.fixture
def layers(engine: Engine) -> Layers:
    engine.builds.build(TEXT, tags=["lk-test/layers"])
    return engine.layers("lk-test/layers")


def changes(layers: Layers, number: int) -> dict[str, tuple[str, int, int]]:
    found = layers.layers[number - 1].changes
    return {change.path: (change.change, change.size_bytes, change.before_bytes) for change in found}


def test_what_each_layer_does(layers: Layers) -> None:
    base = len(layers.layers) - 4
    first = changes(layers, base + 1)
    assert first["/data"][0] == "added"
    assert first["/data/big"] == ("added", 300000, 0)
    assert first["/data/deep/small"] == ("added", 4, 0)
    assert changes(layers, base + 2) == {"/data/note": ("added", 14, 0)}
    third = changes(layers, base + 3)
    assert third == {
        "/data/big": ("changed", 1000, 300000),
        "/data/gone": ("removed", 0, 5),
        "/data/deep": ("changed", 0, 0),
    }
    fourth = changes(layers, base + 4)
    assert fourth["/data/deep/small"] == ("removed", 0, 4)
    assert fourth["/data/deep/new"] == ("added", 4, 0)
    assert "rm -r /data/deep" in layers.layers[-1].created_by


def test_bytes_wasted(layers: Layers) -> None:
    view = layers.layers[-4]
    assert view.wasted_bytes == 300000 + 5 + 4
    assert layers.wasted_bytes == view.wasted_bytes
    assert layers.wasted[0] == ("/data/big", 300000)
    stored = sum(layer.size_bytes for layer in layers.layers)
    assert layers.size_bytes == stored - layers.wasted_bytes
    assert layers.efficiency == pytest.approx(layers.size_bytes / stored)


def test_text_and_json(layers: Layers) -> None:
    assert "/data/big" in layers.text
    assert "wasted: stored" in layers.text
    assert "WASTED" in repr(layers)
    assert json.loads(json.dumps(layers.to_dict()))["layers"][-1]["added"] >= 1


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_static_and_escaped(layers: Layers) -> None:
    parser = Balanced()
    parser.feed(layers._repr_html_())
    assert parser.open == []
    assert "details" in parser.names
    assert not {"script", "style"} & parser.names
    hostile = Layers("<x>", [], 0, [("/<script>", 5)])._repr_html_()
    assert "<script>" not in hostile
    assert "<x>" not in hostile


def test_every_listing_is_bounded(engine: Engine) -> None:
    many = "mkdir /m && cd /m && i=0; while [ $i -lt 600 ]; do : > f$i; i=$((i+1)); done"
    engine.builds.build(f"FROM lab/busybox\nRUN {many}\n", tags=["lk-test/many"])
    found = explore(engine.images, "lk-test/many")
    assert found.layers[-1].added == 601
    assert "and 201 more" in found.text
    assert "and 201 more" in found._repr_html_()


def test_differences_of_two_images(engine: Engine) -> None:
    base = "FROM lab/busybox\nRUN echo same > /same && echo one > /one && echo aaa > /file\n"
    other = "FROM lab/busybox\nRUN echo same > /same && echo two > /two && echo bbb > /file\nRUN echo bbb > /file\n"
    engine.builds.build(base, tags=["lk-test/a"])
    engine.builds.build(other, tags=["lk-test/b"])
    assert differences(engine.images, "lk-test/a", "lk-test/b") == [
        Change("/file", "changed", "f", 4, 4),
        Change("/one", "removed", "f", 0, 4),
        Change("/two", "added", "f", 4, 0),
    ]
    assert differences(engine.images, "lk-test/a", "lk-test/a") == []


def test_no_such_image(engine: Engine) -> None:
    with pytest.raises(NoSuchImage):
        engine.layers("lk-test/nothing")
