"""Trainings and evaluations side by side: a pool of worker processes that lives as long as the run."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from deepfusion import progress
from deepfusion.errors import InputError

_pool: ProcessPoolExecutor | None = None
_relay: progress.Relay | None = None  # of the pool
_pool_workers = 0


def default_workers() -> int:
    """One process per core on CPU, where small models gain little from threads; one where a GPU does the work."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def run_jobs(function: Callable[..., Any], jobs: list[dict[str, Any]], workers: int | None) -> list[Any]:
    """Call the module-level `function` once per dict of keyword arguments; results in order.

    Where there are several jobs each gets one thread, also with one worker, in this process: results do not depend
    on how many run side by side. A single job runs in this process and gets all threads.

    Raises:
        InputError: a worker was ended from outside, or could not start (`worker-died`).
    """
    workers = workers or default_workers()
    if len(jobs) == 1:
        return [function(**jobs[0])]
    if workers == 1:
        return [_one_thread(function, job) for job in jobs]
    pool = _shared_pool(workers)
    with _uninterrupted():
        futures = [pool.submit(_in_worker, progress.attached(), function, job) for job in jobs]
    try:
        results = [future.result() for future in futures]
        if _relay is not None:
            _relay.empty()
        return results
    except BrokenProcessPool:
        close_pool()
        raise InputError(
            "a worker process has died, most often for lack of memory", where="jobs",
            fix="--set jobs=1; in a program of your own, call run and fuse below if __name__ == \"__main__\":",
            code="worker-died",
        ) from None  # fmt: skip
    except BaseException:
        close_pool()
        raise


def close_pool() -> None:
    """End the workers now, whatever they do."""
    global _pool, _relay  # noqa: PLW0603 - one pool a process
    if _pool is not None:
        workers = list((_pool._processes or {}).values())
        _pool.shutdown(wait=False, cancel_futures=True)
        for process in workers:
            process.kill()
        _pool = None
        if _relay is not None:
            _relay.close()
            _relay = None


def _shared_pool(workers: int) -> ProcessPoolExecutor:
    global _pool, _pool_workers, _relay  # noqa: PLW0603 - one pool a process
    if _pool is not None and _pool_workers != workers:
        close_pool()
    if _pool is None:
        quiet = logging.lastResort.level if logging.lastResort is not None else logging.WARNING
        context = get_context("spawn")
        _relay = progress.Relay(context.Pipe(duplex=False))
        start = partial(_start_worker, list(warnings.filters), quiet, _relay.arguments)
        _pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start)
        _pool_workers = workers
        atexit.register(close_pool)
    return _pool


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that start here never see Ctrl-C, which reaches all of a terminal: their parent does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(filters: list[Any], quiet: int, relay: tuple[Connection, int]) -> None:
    progress.relay_to(*relay)
    warnings.filters[:] = filters  # type: ignore[index]  # as in the process that started this one
    if logging.lastResort is not None:
        logging.lastResort.setLevel(quiet)
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        # A worker that outlived a killed run would write into the folder that the next run continues. The run may
        # have died while this process still started, so its id says nothing.
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(folder: Path | None, function: Callable[..., Any], job: dict[str, Any]) -> Any:
    progress.attach(folder)
    return function(**job)


def _one_thread(function: Callable[..., Any], job: dict[str, Any]) -> Any:
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        return function(**job)
    finally:
        torch.set_num_threads(threads)
