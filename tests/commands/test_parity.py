"""Corners of docker's output: widths, sizes, ps options, exit codes of filters and templates."""

from __future__ import annotations

import shutil

import pytest

from labkernel.commands.container import filters_of
from labkernel.commands.template import render
from labkernel.commands.views import container_view
from labkernel.display import table_text
from labkernel.engine import Engine
from labkernel.errors import UsageError


def test_widths_are_those_of_gos_tabwriter() -> None:
    text = table_text(["CONTAINER ID", "IMAGE", "PORTS", "NAMES"], [["0123456789ab", "busybox", "", "a"]])
    # from docker ps
    assert text.splitlines() == [
        "CONTAINER ID   IMAGE     PORTS     NAMES",
        "0123456789ab   busybox             a",
    ]


@pytest.mark.parametrize("text", ["{{.Nope}}", "{{", "{{.Names.X}}"])
def test_a_templates_error_is_1(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        render(text, {"Names": "n"})
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("filter", ["foo=bar", "status=x", "exited=x", "health=x"])
def test_a_filters_error_is_1(engine: Engine, filter: str) -> None:
    with pytest.raises(UsageError, match="invalid filter") as caught:
        engine.containers.list(filters=filters_of([filter]))
    assert caught.value.exit_code == 1
    with pytest.raises(UsageError, match="invalid filter") as caught:
        engine.images.list(filters={"x": "y"})
    assert caught.value.exit_code == 1


def test_sizes(engine: Engine) -> None:
    container = engine.containers.create("busybox", ["sh", "-c", "head -c 20000 /dev/zero > /f"])
    container.start()
    container.wait()
    own, everything = container.sizes()
    if engine.driver.overlay != "copy":
        assert 20000 <= own < 200_000
        assert everything - own == container.image.size_bytes
    shown = container_view(container, sizes=True)["Size"]
    assert "kB (virtual " in shown or engine.driver.overlay == "copy"
    assert container_view(container)["Size"] == "0B"


def test_ps_options(engine: Engine) -> None:
    if shutil.which("ps") is None:
        pytest.skip("no ps")
    container = engine.containers.run("busybox", ["sleep", "1000"], detach=True)
    answer = container.top(ps_args="-o pid,args -e")
    assert answer["Titles"] == ["PID", "COMMAND"]
    assert answer["Processes"] == [[str(container.pid), "sleep 1000"]]
    with pytest.raises(UsageError, match="Couldn't find PID field"):
        container.top(ps_args="-e -o args")
    with pytest.raises(UsageError, match=r"^ps: "):
        container.top(ps_args="--no-such-option")


def test_load_and_save_are_events(engine: Engine) -> None:
    import io
    import time

    before = time.time()
    out = io.BytesIO()
    engine.images.save(["lab/busybox"], out)
    engine.images.load(out.getvalue())
    found = engine.events(since=before, until=time.time(), decode=True, filters={"type": "image"})
    assert [event["Action"] for event in found][-2:] == ["save", "load"]
