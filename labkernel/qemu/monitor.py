"""The monitor of one machine: a process of the store's supervisor that looks to it like a container's first process.

It starts QEMU, which dies with it; brings the guest up; is the command's stdin, stdout, stderr, signals and exit code;
serves shared directories; and takes requests (another command, figures, a snapshot) on a socket in the machine's
directory. So all that the supervisor does for containers (logs, attaching, waiting, limits by cgroup, going on when it
is killed itself) holds for machines, too.

    DIR/config.json    process, and labkernel.machine: the plan that machine.py made
    DIR/machine.json   what has become of it: pid of QEMU, times (CLOCK_MONOTONIC), figures, problems
    DIR/control.sock   SOCK_SEQPACKET: {"op": …} with descriptors 0 to 2 for "exec"; answers are JSON

The first sign of life has a deadline. Where it passes, the plan's next attempt is made: without template and without
KVM, the two things that may be broken on a machine where QEMU itself works. Where KVM was, later machines are told.
The guest is not trusted: a frame that makes no sense is dropped. Standard library only; one thread.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from labkernel.errors import LabkernelError, VMError
from labkernel.linux import pty

from . import channel
from .cards import Card
from .channel import Frame, Kind, encode
from .command import LATE_CARDS
from .control import Client, listen
from .spawn import Qemu
from .streams import GuestProcess, Link

DEVICE = "/dev/vda"
_POWEROFF_S = 10.0
_FLUSH_S = 10.0
MAX_PROCESSES = 32  # guest/guest.h has as many places
_KILLED = 128 + signal.SIGKILL


def main(config: dict[str, Any], directory: str, told: Any) -> None:
    """Body of the monitor; never returns. `told.started()` or `told.failed(brief, exit_code)` is called once."""
    os.umask(0)
    Monitor(config, directory, told).run()


class Monitor:
    """Brings up the machine, serves it, and ends with its command's exit code."""

    def __init__(self, config: dict[str, Any], directory: str, told: Any) -> None:
        self.config, self.directory, self.told = config, directory, told
        self.plan: dict[str, Any] = config["labkernel"]["machine"]
        self.facts: dict[str, Any] = {"phase": "booting", "warnings": list(self.plan.get("warnings") or [])}
        self.processes: dict[int, GuestProcess] = {}
        self.figures: list[Client] = []
        self.shares: list[Any] = []
        self.wires: dict[str, Any] | None = config["labkernel"].get("wires")  # what it is plugged into
        self.cards: list[Card] = []
        self.rewiring: list[Client] = []
        self.qemu: Qemu | None = None
        self.qmp: Any = None
        self.ready = False
        self.frozen: Callable[[], None] | None = None
        self.leaving: set[int] = set()  # numbers of commands that a restore ends: not free until the guest says so
        self.attempt = -1  # which of the plan's attempts this is
        self._attempt: dict[str, Any] = {}
        self._kvm_failed = ""  # why, once it has
        self._poll = select.poll()
        self._handlers: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self.link: Link | None = None
        self.share_link: Link | None = None
        self._moving: dict[Link, int] = {}
        self._code: int | None = None
        self._serial = 0

    # -- the loop

    def run(self) -> None:
        wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake[1], warn_on_full_buffer=False)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}:
            try:
                signal.signal(number, lambda _number, _frame: None)
            except (OSError, ValueError):
                continue
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self.watch(wake[0], select.POLLIN, lambda _events: self._signalled(wake[0]))
        listen(self)
        for share in self.plan.get("shares") or ():
            from .fileserver import FileServer

            self.shares.append(FileServer(share["source"], writable=share["writable"]))
        if self.plan.get("timeout_s"):
            self._timers["time"] = (time.monotonic() + float(self.plan["timeout_s"]), self._out_of_time)
        self._launch()
        while True:
            soonest = min((when for when, _ in self._timers.values()), default=None)
            wait_ms = None if soonest is None else max(0, int((soonest - time.monotonic()) * 1000) + 1)
            for fd, events in self._events(wait_ms):
                entry = self._handlers.get(fd)
                if entry is not None:
                    entry[1](events)
            for name, (when, call) in list(self._timers.items()):
                if when <= time.monotonic() and self._timers.pop(name, None) is not None:
                    call()

    def _events(self, wait_ms: int | None) -> list[tuple[int, int]]:
        if self.frozen is None:
            return self._poll.poll(wait_ms)
        # Whatever else came now would be half in the snapshot: a command that the guest never heard of, lost input.
        still = select.poll()
        for fd in self._of_qemu():
            if fd in self._handlers:
                still.register(fd, self._handlers[fd][0])
        return still.poll(wait_ms)

    def watch(self, fd: int, events: int, call: Callable[[int], None] | None) -> None:
        """Call `call` when `fd` is ready; without one, or without events, it is not looked at any more."""
        before = self._handlers.pop(fd, None)
        if call is None or not events:
            if before is not None:
                self._poll.unregister(fd)
            return
        self._handlers[fd] = (events, call)
        if before is None or before[0] != events:
            self._poll.register(fd, events)

    def later(self, delay_s: float, call: Callable[[], None], name: str = "") -> None:
        """Call `call` in a while; `forget(name)` takes it back."""
        self._serial += 1
        self._timers[name or f"later{self._serial}"] = (time.monotonic() + delay_s, call)

    def forget(self, name: str) -> None:
        self._timers.pop(name, None)

    def _signalled(self, fd: int) -> None:
        try:
            numbers = set(os.read(fd, 4096))
        except BlockingIOError:
            return
        for number in numbers - {int(signal.SIGCHLD)}:
            main = self.processes.get(0)
            if number == signal.SIGWINCH and main is not None and main.tty:
                main.resize(*pty.size(0))
            elif main is not None and main.started_at is not None:
                main.signal(number)
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                self.finish(128 + number)

    def _out_of_time(self) -> None:
        limit = float(self.plan["timeout_s"])
        self.fail(
            f"the command did not end within {limit:g} s; the machine was stopped", "give it more time: --timeout"
        )

    # -- coming up

    def _launch(self) -> None:
        self.attempt += 1
        self._attempt = attempt = self.plan["attempts"][self.attempt]
        self.qmp = None
        self.facts.update(asked_at=time.monotonic(), start=attempt["start"], accelerator=attempt["accelerator"])
        self.qemu = qemu = Qemu(attempt["argv"], cards=self.plan["cards"])
        self.facts.update(qemu_pid=qemu.pid)
        self.save()
        self.link = Link(qemu.channel, self.watch, self._file)
        self.share_link = Link(qemu.share, self.watch, self._share)
        for fd in (qemu.console.fileno(), qemu.stderr):
            self.watch(fd, select.POLLIN, lambda _events, fd=fd: self._keep(fd))  # type: ignore[misc]
        self.watch(qemu.pidfd, select.POLLIN, lambda _events: self._gone())
        self.cards = [Card(number, sock, self.watch) for number, sock in enumerate(qemu.cards)]
        self.plug()
        self._timers["boot"] = (time.monotonic() + float(attempt["deadline_s"]), self._too_late)
        if attempt.get("incoming") and not self._come_in(attempt["incoming"]):
            return
        if self.plan.get("resume"):
            self._resume(self.plan["resume"])
        elif attempt.get("incoming"):
            self._set_up()  # it said hello in its former life

    def _come_in(self, path: str) -> bool:
        from .qmp import Qmp
        from .snapshot import come_in

        assert self.qemu is not None
        self.qmp = Qmp(self.qemu.qmp)
        try:
            come_in(self.qmp, path)
        except (OSError, LabkernelError) as err:
            self.forget("boot")
            self._failed_attempt(getattr(err, "brief", "") or str(err))
            return False
        return True

    def _keep(self, fd: int) -> None:
        assert self.qemu is not None
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.qemu.keep(data)
        else:
            self.watch(fd, 0, None)

    def _set_up(self) -> None:
        plan = self.plan
        shares = [
            (share["target"], server.is_directory, server.writable)
            for share, server in zip(plan.get("shares") or (), self.shares, strict=True)
        ]
        payload = channel.setup_payload(
            time_s=time.time(),
            entropy=os.urandom(64),
            device=DEVICE,
            hostname=plan.get("hostname"),
            readonly=bool(plan.get("readonly")),
            network=plan.get("network") or "",
            wires=self.wires if plan.get("network") == "wired" else None,
            shares=shares,
        )
        self.send(encode(Kind.SETUP, payload))

    def grow(self) -> None:
        """`plug`, with as many cards as `wires` needs, in the machine that runs. Raises OSError, VMError."""
        assert self.qemu is not None
        needed = max((each["number"] + 1 for each in (self.wires or {"cards": ()})["cards"]), default=0)
        if needed > len(self.cards):
            from .hotplug import add_card
            from .qmp import Qmp

            self.qmp = self.qmp or Qmp(self.qemu.qmp)
            for number in range(len(self.cards), min(needed, LATE_CARDS)):
                self.cards.append(Card(number, add_card(self.qmp, number), self.watch))
        self.plug()
        if needed > len(self.cards):
            raise VMError(f"this machine was started without a network: it can be in {LATE_CARDS}, not in {needed}")

    def plug(self) -> None:
        """Carry frames between the guest's cards and the interfaces that `wires` names. Raises OSError."""
        wanted = {each["number"]: each["name"] for each in (self.wires or {"cards": ()})["cards"]}
        for card in self.cards:
            if card.number not in wanted:
                card.unplug()
            elif not card.plugged:
                card.plug(wanted[card.number])

    def _start_main(self) -> None:
        process, own = self.config["process"], self.config["labkernel"]
        self.add(0, [0, 1, 2], process, user=own.get("user_unresolved") or "", stdin=bool(own.get("stdin_open")))

    def add(self, number: int, fds: list[int], process: dict[str, Any], *, user: str, stdin: bool) -> GuestProcess:
        """Start a command in the guest. Raises ValueError for words that cannot be sent."""
        tty = bool(process.get("terminal"))
        payload = channel.start_payload(
            process["args"],
            env=process.get("env") or (),
            cwd=process.get("cwd") or "/",
            user=user,
            stdin=stdin or tty,
            tty=pty.size(fds[0]) if tty else None,
        )
        made = GuestProcess(number, fds, stdin=stdin, tty=tty, watch=self.watch, send=self.send)
        self.processes[number] = made
        self.send(encode(Kind.START, payload, process=number))
        return made

    def _resume(self, state: dict[str, Any]) -> None:
        """The guest goes on where a snapshot was taken: its command runs, others that ran are ended."""
        for server, saved in zip(self.shares, state["shares"], strict=True):
            server.resume(saved)
        self.thaw()
        self._timers.pop("boot", None)
        process, own = self.config["process"], self.config["labkernel"]
        stdin = bool(own.get("stdin_open")) or bool(process.get("terminal"))
        main = GuestProcess(
            0, [0, 1, 2], stdin=stdin, tty=bool(process.get("terminal")), watch=self.watch, send=self.send
        )
        main.unconsumed = int(state["unconsumed"])
        self.processes[0] = main
        self.leaving = set(state["processes"])
        for number in self.leaving:
            self.send(encode(Kind.SIGNAL, b"9", process=number))
        if self.wires is not None:
            try:
                self.grow()
            except (OSError, LabkernelError) as err:
                self.facts["warnings"].append(f"a network card could not be plugged in: {getattr(err, 'brief', err)}")
            self.send(encode(Kind.NETWORK, channel.network_payload(self.wires)))  # as its networks are now
        self.send(encode(Kind.HOLD, b"0"))  # its output may have been held back for a reader of its former life
        self.ready = True
        self.facts["ready_at"] = time.monotonic()
        self._main_started(main)

    def _too_late(self) -> None:
        self._failed_attempt("the guest did not answer in time")

    def _gone(self) -> None:
        assert self.qemu is not None
        assert self.link is not None
        while self.link.take():  # its last words
            pass
        for fd in (self.qemu.console.fileno(), self.qemu.stderr):
            self._keep(fd)
        if self._code is not None:
            self._bury(waited=True)
        elif self.ready:
            self.fail("the VM ended before its command did", "")
        else:
            self._failed_attempt("the guest ended before it was ready")

    def _failed_attempt(self, brief: str) -> None:
        assert self.qemu is not None
        failed, left = self._attempt, self.plan["attempts"][self.attempt + 1 :]
        if not left:
            self.fail(brief, "")
            return
        self._unwatch()
        self.qemu.end()
        brief = ": ".join([brief, *self.qemu.last_words().splitlines()[-1:]])
        if failed["start"] == "template":
            try:
                os.unlink(failed["incoming"])
            except OSError:
                pass
        if failed["accelerator"] == "kvm":
            self._kvm_failed = brief
        if self._kvm_failed and left[0]["accelerator"] != "kvm":
            self.facts["accelerator_reason"] = f"a start under KVM failed: {self._kvm_failed}"
        self.facts["warnings"].append(f"the {_words(failed)} failed ({brief}); a {_words(left[0])} was tried then")
        self._launch()

    def _refute_kvm(self) -> None:
        """The guest is up: when it is so without KVM and was not with it, KVM was to blame."""
        told = self.plan.get("refuted")
        if told and self._kvm_failed and self._attempt["accelerator"] != "kvm":
            from .kvm import refute

            refute(told["cache"], told["key"], self._kvm_failed)

    def _of_qemu(self) -> tuple[int, ...]:
        assert self.qemu is not None
        qemu = self.qemu
        return qemu.channel.fileno(), qemu.share.fileno(), qemu.console.fileno(), qemu.stderr, qemu.pidfd

    def _unwatch(self) -> None:
        for fd in self._of_qemu():
            self.watch(fd, 0, None)
        for card in self.cards:
            card.close()

    def free_number(self) -> int | None:
        """A number for one more command in the guest; None when there is none."""
        taken = self.processes.keys() | self.leaving
        return next((number for number in range(1, MAX_PROCESSES) if number not in taken), None)

    # -- what the guest says

    def send(self, data: bytes) -> None:
        """Frames for the guest's init."""
        assert self.link is not None
        self.link.send(data)

    def _share(self, frame: Frame) -> None:
        """A request of a shared directory, from the process that serves them in the guest."""
        assert self.share_link is not None
        if frame.kind == Kind.SHARE and frame.process < len(self.shares):
            answer = self.shares[frame.process].handle(frame.payload)
            if answer is not None:
                self.share_link.send(encode(Kind.SHARED, answer, process=frame.process))
        elif frame.kind == Kind.FROZEN:
            self._still(self.share_link)

    def freeze(self, then: Callable[[], None]) -> None:
        """Call `then` when neither side has anything more to say until `thaw`: no frame is on its way."""
        self.frozen = then
        links = [link for link in (self.link, self.share_link if self.shares else None) if link is not None]
        self._moving = dict.fromkeys(links, 0)
        for link in links:
            self._freeze(link)

    def _freeze(self, link: Link) -> None:
        link.send(encode(Kind.FREEZE))
        self._moving[link] = link.sent

    def _still(self, link: Link | None) -> None:
        if self.frozen is None or link not in self._moving or link is None:
            return
        if link.sent != self._moving[link]:
            # What was sent after FREEZE (the answer to a request that came before FROZEN) may not be there yet. The
            # guest answers in the order of what it reads, so once it answers a second FREEZE it has read that, too.
            self._freeze(link)
            return
        del self._moving[link]
        if not self._moving:
            self.frozen()

    def thaw(self) -> None:
        """The clock as it is now, new entropy, and it goes on."""
        frame = encode(Kind.CLOCK, channel.clock_payload(time_s=time.time(), entropy=os.urandom(64)))
        self.send(frame)
        if self.shares and self.share_link is not None:
            self.share_link.send(frame)

    def _file(self, frame: Frame) -> None:
        process = self.processes.get(frame.process)
        if frame.kind == Kind.HELLO:
            self.facts["guest_kernel"] = frame.words().get("kernel", "")
            self._set_up()
        elif frame.kind == Kind.READY and not self.ready:
            self.ready = True
            self._timers.pop("boot", None)
            self.facts["ready_at"] = time.monotonic()
            self._refute_kvm()
            self._start_main()
        elif frame.kind == Kind.FROZEN:
            self._still(self.link)
        elif frame.kind == Kind.FIGURES:
            waiting, self.figures = self.figures, []
            for client in waiting:
                client.answer({"figures": frame.numbers()})
        elif frame.kind == Kind.NETWORKED and self.rewiring:
            problem = frame.payload.decode("utf-8", "replace")
            self.rewiring.pop(0).answer({"error": f"the guest could not {problem}"} if problem else {"done": True})
        elif frame.kind == Kind.FAILED and not self.ready:
            text = frame.payload.decode("utf-8", "replace").partition(" ")[2]
            hint = "`labkernel vm prune` removes kept disks; the next run makes the disk again"
            self.fail(f"the guest could not set itself up: {text}", hint)
        elif process is not None:
            self._about(process, frame)
        elif frame.kind in (Kind.EXITED, Kind.FAILED):
            self.leaving.discard(frame.process)

    def _about(self, process: GuestProcess, frame: Frame) -> None:
        if frame.kind in (Kind.STDOUT, Kind.STDERR):
            process.write(frame.kind, frame.payload)
        elif frame.kind == Kind.CONSUMED:
            process.consumed(frame.numbers().get("bytes", 0))
        elif frame.kind == Kind.STARTED:
            process.started_at = time.monotonic()
            process.listen()
            if process.number == 0:
                self._main_started(process)
            else:
                process.on_change("started", None)
        elif frame.kind == Kind.FAILED:
            code, _, text = frame.payload.decode("utf-8", "replace").partition(" ")
            self._ended(process, "failed", (text, int(code) if code.isdigit() else 125))
        elif frame.kind == Kind.EXITED:
            process.usage = frame.numbers()
            process.exit_code = process.usage.pop("status", 255) & 0xFF
            self._ended(process, "exited", process.exit_code)

    def _main_started(self, process: GuestProcess) -> None:
        process.started_at = time.monotonic()
        process.listen()
        self.facts.update(phase="running", exec_at=process.started_at)
        self.save()
        self.told.started()

    def _ended(self, process: GuestProcess, what: str, value: Any) -> None:
        if process.number:
            del self.processes[process.number]
            process.on_change(what, value)
        elif what == "failed":
            self.told.failed(*value)
            self.finish(value[1])
        else:
            self.facts.update(ended_at=time.monotonic(), inside=process.usage)
            self.finish(int(value))

    # -- the end

    def fail(self, brief: str, hint: str) -> None:
        """End because of what is no doing of the command: told by machine.json."""
        words = self.qemu.last_words() if self.qemu is not None else ""
        self.facts.update(problem=brief, details=words, hint=hint)
        self.save()
        self.told.failed(brief, 125)
        self.finish(_KILLED)

    def finish(self, code: int) -> None:
        """The machine's end: its disk is written out where it is kept, then QEMU ends, then this process."""
        assert self.qemu is not None
        if self._code is not None:
            return
        self._code = code
        self._timers.clear()
        self.qemu.look()
        if self.plan.get("ephemeral") or "problem" in self.facts or not self.ready or self.qemu.exit_status is not None:
            self._bury()
        else:
            self.send(encode(Kind.POWEROFF))
            self._timers["poweroff"] = (time.monotonic() + _POWEROFF_S, self._bury)

    def _bury(self, *, waited: bool = False) -> None:
        assert self.qemu is not None
        code = _KILLED if self._code is None else self._code
        self._unwatch()
        self.qemu.end(wait=not waited)
        self._let_read()
        clean = (
            waited and self.qemu.exit_status == 0 and "problem" not in self.facts and bool(self.facts.get("exec_at"))
        )
        self.facts.update(phase="ended", exit_code=code, clean=clean)
        self.facts.update(cpu_s=self.qemu.cpu_s, rss_bytes=self.qemu.rss_bytes, peak_rss_bytes=self.qemu.peak_rss_bytes)
        try:
            self.facts["overlay_bytes"] = os.stat(self.plan["overlay"]).st_blocks * 512
        except OSError:
            pass
        self.save()
        os._exit(code)

    def _let_read(self) -> None:
        """Give who reads the command's output a while to take the rest."""
        main = self.processes.get(0)
        deadline = time.monotonic() + _FLUSH_S
        while main is not None and main.pending and time.monotonic() < deadline:
            for fd, events in self._poll.poll(100):
                if fd in (1, 2) and fd in self._handlers:
                    self._handlers[fd][1](events)

    def save(self) -> None:
        """Write machine.json, complete or not at all."""
        path = f"{self.directory}/machine.json"
        try:
            fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, json.dumps(self.facts).encode())
            finally:
                os.close(fd)
            os.rename(f"{path}.new", path)
        except OSError:
            pass  # a removed directory, or a full disk: nobody can be told any more


def _words(attempt: dict[str, Any]) -> str:
    how = {"template": "start from the template", "snapshot": "start from the snapshot"}.get(attempt["start"])
    return f"{how or 'cold start'} under {attempt['accelerator'].upper()}"


__all__ = ["Monitor", "main"]
