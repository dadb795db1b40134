"""`metrics`: figures of what runs as a table, CSV, JSON or Prometheus text, once, over a while, or served."""

from __future__ import annotations

import io
import json
import threading
from typing import Any

import click

from ..display import human_memory, human_size
from ..errors import UsageError
from .grammar import Entry, LabGroup, command, host_of, option, words
from .host import Host
from .values import Listing, Text

FORMATS = ("table", "csv", "json", "prometheus")
_HEADER = ("NAME", "CPU TIME", "THROTTLED", "WORKING SET", "CACHE", "PEAK", "BLOCK I/O", "NET I/O", "PIDS", "PRESSURE")


@command("show", "[OPTIONS] [NAME...]")
@option("--format", "form", metavar="string", help="table, csv, json or prometheus", default="table")
@option("--seconds", metavar="float", type=click.FloatRange(0.1, 3600), help="Follow for so long (csv, json: samples)")
@option("--hz", metavar="float", type=click.FloatRange(0.1, 20), default=5.0, help="Samples a second (with --seconds)")
@words("names")
@click.pass_context
def show(ctx: click.Context, /, names: tuple[str, ...], form: str, seconds: float | None, hz: float) -> Any:
    """Print the figures of running containers and machines: the kernel's own counters, in one reading."""
    if form not in FORMATS:
        raise UsageError(f"no such format: {form}", resolution=f"one of {', '.join(FORMATS)}")
    host = host_of(ctx)
    metrics = host.engine.metrics
    if form == "prometheus":
        return Text(metrics.prometheus(*names).rstrip("\n"))
    if form == "table" and not seconds:
        return _table(host, names)
    sampler = metrics.sampler(*metrics.find(*names), hz=hz, net=True)
    if seconds:
        with sampler:
            threading.Event().wait(seconds)
    else:
        sampler.tick()
        sampler.stop()
    if form == "csv":
        text = io.StringIO(newline="")
        sampler.to_csv(text)
        return Text(text.getvalue().replace("\r\n", "\n").rstrip("\n"))
    rows = [{name: None if value != value else value for name, value in row.items()} for row in sampler.rows()]
    return Text(json.dumps(rows)) if form == "json" else sampler


def _table(host: Host, names: tuple[str, ...]) -> Listing:
    rows = []
    for reading in host.engine.metrics.readings(*names):
        s = reading.sample
        stalled = [
            f"{word} {usec / 1e6:.1f} s"
            for word, usec in (
                ("cpu", s.cpu_pressure_usec),
                ("mem", s.memory_pressure_usec),
                ("io", s.io_pressure_usec),
            )
            if usec is not None
        ]
        rows.append(
            (
                reading.labels["name"],
                f"{s.cpu_usec / 1e6:.2f} s",
                "-" if s.throttled_usec is None else f"{s.throttled_usec / 1e6:.2f} s",
                human_memory(s.memory_bytes),
                _said(s.memory_cache_bytes, human_memory),
                _said(s.memory_peak_bytes, human_memory),
                _said(s.io_bytes, human_size),
                _said(s.net_bytes, human_size),
                _said(s.pids, str),
                ", ".join(stalled) or "-",
            )
        )
    return Listing(rows, header=_HEADER, rows=rows)


def _said(value: int | None, say: Any) -> str:
    return "-" if value is None else say(value)


@command("serve", "[OPTIONS] [NAME...]")
@option("--listen", metavar="host:port", default="127.0.0.1:9323", help="Where to listen")
@words("names")
@click.pass_context
def serve(ctx: click.Context, /, names: tuple[str, ...], listen: str) -> None:
    """Serve the figures for Prometheus at /metrics, in the foreground until SIGTERM."""
    host = host_of(ctx)
    server = host.engine.metrics.serve(listen, *names)
    host.note(f"figures at http://{server.address}/metrics")
    try:
        server.serve()
    except KeyboardInterrupt:
        pass


metrics = LabGroup(
    "metrics",
    help="Figures of what runs: the kernel's own counters.",
    entries={
        "show": Entry("metrics:show", "Print the figures of what runs: table, csv, json, prometheus"),
        "serve": Entry("metrics:serve", "Serve the figures for Prometheus"),
    },
)
