from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from labkernel.errors import StoreError
from labkernel.store.locks import Locks

spawn = multiprocessing.get_context("spawn")


def test_one_exclusive_holder_at_a_time_also_among_threads(tmp_path: Path) -> None:
    locks, inside, worst = Locks(tmp_path), 0, 0

    def work() -> None:
        nonlocal inside, worst
        for _ in range(200):
            with locks.exclusive("x"):
                inside += 1
                worst = max(worst, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1
    assert os.listdir(tmp_path) == []


def test_shared_holders_keep_an_exclusive_one_out(tmp_path: Path) -> None:
    locks = Locks(tmp_path)
    with locks.shared("x"), locks.shared("x"):
        with locks.try_exclusive("x") as alone:
            assert not alone
        with pytest.raises(StoreError, match="the store is busy"), locks.exclusive("x", timeout_s=0.05):
            pass
    with locks.try_exclusive("x") as alone:
        assert alone


def hold(directory: str, ready: object, go: object) -> None:
    with Locks(Path(directory)).exclusive("x"):
        ready.set()  # type: ignore[attr-defined]
        go.wait()  # type: ignore[attr-defined]


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    ready, go = spawn.Event(), spawn.Event()
    child = spawn.Process(target=hold, args=(str(tmp_path), ready, go))
    child.start()
    ready.wait()
    with Locks(tmp_path).try_exclusive("x") as alone:
        assert not alone
    child.kill()
    child.join()
    with Locks(tmp_path).exclusive("x", timeout_s=10):
        pass


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x" * 300])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError), Locks(tmp_path).exclusive(name):
        pass
