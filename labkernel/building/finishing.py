"""What a step leaves to be done while the next one runs already: making its blob durable, noting it, clearing up.

fsync and removal wait for the disk and not for the processor, so they cost a build nothing when they happen beside it.
Work is done in order, by one thread; a step is remembered only after its blob is safe. `wait` before anything names
what was made.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

Work = Callable[[], object]


class Finisher:
    """A context manager; leaving it waits for all work, and raises the first failure unless another one is under way.

    After a failure what was given still runs, since it may be the removal of something.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def __enter__(self) -> Finisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except BaseException:
            if err is None:
                raise

    def later(self, work: Work) -> None:
        """Do `work` soon. Raises what earlier work has failed with: a full disk should end the build at once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._carry_out, name="build finisher", daemon=True)
                self._thread.start()
            self._work.put(work)
            failure = self._failure
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until all work is done. Raises its first failure."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._work.put(None) if thread is not None else None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _carry_out(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as err:
                self._failure = self._failure or err
