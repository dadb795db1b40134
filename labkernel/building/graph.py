"""In what order the stages of a build are made: only those that are needed, independent ones side by side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise


def needed_stages(needs: Mapping[int, set[int]], target: int) -> list[int]:
    """The stages `target` is made of, each after those it needs. The graph has no cycle (`verify`)."""
    order: list[int] = []
    done: set[int] = set()
    stack = [(target, False)]
    while stack:
        index, ready = stack.pop()
        if index in done:
            continue
        if ready:
            order.append(index)
            done.add(index)
            continue
        stack.append((index, True))
        stack += [(below, False) for below in sorted(needs[index], reverse=True)]
    return order


def is_chain(order: Sequence[int], needs: Mapping[int, set[int]]) -> bool:
    """Whether every stage has to wait for the one before it, so that nothing can run side by side."""
    return all(before in needs[index] for before, index in pairwise(order))


def carry_out(
    order: Sequence[int],
    needs: Mapping[int, set[int]],
    make: Callable[[int], None],
    stop: Callable[[], None],
) -> None:
    """Call `make` for each stage after those it needs, in threads where several are ready at once.

    The first failure (also a KeyboardInterrupt, here or in a thread) is raised when everything has ended; `stop` is
    called to end what still runs.
    """
    if is_chain(order, needs):
        for index in order:
            make(index)
        return
    _Crew(order, needs, make, stop).work()


class _Crew:
    def __init__(
        self,
        order: Sequence[int],
        needs: Mapping[int, set[int]],
        make: Callable[[int], None],
        stop: Callable[[], None],
    ) -> None:
        self._waiting = list(order)
        self._needs = needs
        self._make = make
        self._stop = stop
        self._done: set[int] = set()
        self._failures: list[BaseException] = []
        self._running = 0
        self._changed = threading.Condition()
        self._width = max(2, min(8, (os.cpu_count() or 1) + 1))

    def work(self) -> None:
        try:
            with self._changed:
                while self._waiting or self._running:
                    self._start_ready()
                    if not self._running and self._failures:
                        break
                    self._changed.wait()
        except BaseException as err:
            self._failures.insert(0, err)
            self._end()
        if self._failures:
            raise self._failures[0]

    def _start_ready(self) -> None:
        if self._failures:
            self._waiting.clear()
            return
        wanted = set(self._waiting)
        for index in list(self._waiting):
            if self._running < self._width and not (self._needs[index] & wanted) and self._needs[index] <= self._done:
                self._waiting.remove(index)
                self._running += 1
                threading.Thread(target=self._one, args=(index,), name=f"stage {index}", daemon=True).start()

    def _one(self, index: int) -> None:
        failure: BaseException | None = None
        try:
            self._make(index)
        except BaseException as err:
            failure = err
        with self._changed:
            self._running -= 1
            self._done.add(index)
            first = failure is not None and not self._failures
            if failure is not None:
                self._failures.append(failure)
            self._changed.notify_all()
        if first:
            self._stop()

    def _end(self) -> None:
        """After an interrupt of the waiting thread: nothing new, and all that runs comes to its end."""
        self._stop()
        with self._changed:
            self._waiting.clear()
            while self._running:
                self._changed.wait()
