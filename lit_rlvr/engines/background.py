"""Threads that do not keep a process alive."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Self


class Background:
    """Makes calls in threads that end with the process, whatever they wait for.

    Python waits for the threads of ``concurrent.futures`` as it ends, and a server that hangs would keep a run that has
    failed alive for hours. As a context it cancels at its end what has not begun, and waits for nothing.

    Args:
        threads: Most calls at a time.
    """

    def __init__(self, threads: int) -> None:
        self._limit, self._threads = threads, list[Thread]()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, do: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        """Call something as soon as a thread is free."""
        future: Future[Any] = Future()
        self._calls.put((future, partial(do, *arguments, **named)))
        if len(self._threads) < self._limit:
            self._threads.append(Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, do = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(do())
                except BaseException as error:
                    future.set_exception(error)
            del call, future, do  # what they hold is not held until the next one comes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        with suppress(Empty):
            while (waiting := self._calls.get_nowait()) is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
