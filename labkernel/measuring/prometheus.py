"""Figures as Prometheus reads them (the text format, version 0.0.4), under the names that cAdvisor gave them.

Dashboards made for containers elsewhere therefore work. Counters are those of the kernel, so nothing is sampled between
two scrapes and a scrape costs what it reads. A figure that this machine does not tell is left out, never zero.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from ..errors import UsageError
from .samples import Limits, Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Reading(NamedTuple):
    """One target at one moment. `labels` say which: `name`, `id`, `image`, `kind` (container, vm)."""

    labels: Mapping[str, str]
    sample: Sample
    limits: Limits = Limits()


def _less(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else whole - part


def _seconds(usec: int | None) -> float | None:
    return None if usec is None else usec / 1e6


Value = Callable[[Sample, Limits], float | None]
_FAMILIES: tuple[tuple[str, str, str, Value], ...] = (
    ("cpu_usage_seconds_total", "counter", "CPU time used", lambda s, _: s.cpu_usec / 1e6),
    ("cpu_cfs_throttled_seconds_total", "counter", "Time held back by the CPU limit",
     lambda s, _: _seconds(s.throttled_usec)),
    ("memory_working_set_bytes", "gauge", "Memory in use, less what could be dropped at once",
     lambda s, _: s.memory_bytes),
    ("memory_usage_bytes", "gauge", "Memory in use, page cache included", lambda s, _: s.memory_usage_bytes),
    ("memory_cache", "gauge", "Page cache", lambda s, _: s.memory_cache_bytes),
    ("memory_max_usage_bytes", "gauge", "The most memory that was ever in use", lambda s, _: s.memory_peak_bytes),
    ("oom_events_total", "counter", "Processes killed for want of memory", lambda s, _: s.oom_kills),
    ("fs_reads_bytes_total", "counter", "Bytes read from disks", lambda s, _: s.io_read_bytes),
    ("fs_writes_bytes_total", "counter", "Bytes written to disks", lambda s, _: _less(s.io_bytes, s.io_read_bytes)),
    ("network_receive_bytes_total", "counter", "Bytes received", lambda s, _: s.net_rx_bytes),
    ("network_transmit_bytes_total", "counter", "Bytes sent", lambda s, _: _less(s.net_bytes, s.net_rx_bytes)),
    ("tasks", "gauge", "Processes and threads", lambda s, _: s.pids),
    ("pressure_cpu_waiting_seconds_total", "counter", "Time in which a task waited for a CPU",
     lambda s, _: _seconds(s.cpu_pressure_usec)),
    ("pressure_memory_waiting_seconds_total", "counter", "Time in which a task waited for memory",
     lambda s, _: _seconds(s.memory_pressure_usec)),
    ("pressure_io_waiting_seconds_total", "counter", "Time in which a task waited for input or output",
     lambda s, _: _seconds(s.io_pressure_usec)),
    ("spec_memory_limit_bytes", "gauge", "Memory limit", lambda _, limits: limits.memory_bytes),
    ("spec_cpus", "gauge", "CPU limit, in processors", lambda _, limits: limits.cpus),
)  # fmt: skip


def prometheus_text(readings: Iterable[Reading]) -> str:
    """All readings in the text format, families in a fixed order, each with its HELP and TYPE."""
    known = list(readings)
    lines: list[str] = []
    for name, kind, words, value in _FAMILIES:
        found = [(reading.labels, value(reading.sample, reading.limits)) for reading in known]
        told = [f"container_{name}{_labels(labels)} {_number(v)}" for labels, v in found if v is not None]
        if told:
            lines += [f"# HELP container_{name} {words}", f"# TYPE container_{name} {kind}", *told]
    return "\n".join([*lines, f"# TYPE labkernel_targets gauge\nlabkernel_targets {len(known)}"]) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    escaped = {n: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for n, v in labels.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")


class Server:
    """Answers `GET /metrics` with what `scrape` gives at that moment. `address` is HOST:PORT as it is bound."""

    def __init__(self, listen: str, scrape: Callable[[], str]) -> None:
        host, _, port = listen.rpartition(":")
        if not port.isdigit():
            raise UsageError(f"'{listen}' is not an address", resolution="addresses look like 127.0.0.1:9323")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path.split("?")[0] in ("/", "/metrics")
                body = (scrape() if known else "only /metrics is here\n").encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass  # a line for each scrape is nothing a terminal wants

        try:
            self._server = ThreadingHTTPServer((host.strip("[]") or "127.0.0.1", int(port)), Handler)
        except (OSError, OverflowError) as err:
            raise UsageError(f"cannot listen on {listen}: {err}", resolution="choose another port") from err
        self._server.daemon_threads = True
        bound = self._server.server_address
        self.address = f"{bound[0]!s}:{bound[1]}"

    def serve(self) -> None:
        """Until `stop()` is called, or a signal raises in this thread."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def start(self) -> Server:
        """The same in a thread that ends with the interpreter."""
        threading.Thread(target=self.serve, name="labkernel-metrics", daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
