"""Threads between the executor and the engine: newest frame wins, and nothing waits for anything slower."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """A bounded queue between two threads; when it is full the oldest item makes room and is counted."""

    def __init__(self, size: int = 1) -> None:
        self._items: deque[Any] = deque()
        self._size = size
        self._ready = threading.Condition()
        self._open = True
        self.dropped = 0

    def put(self, item: Any) -> None:
        """Add an item, without ever waiting."""
        with self._ready:
            if len(self._items) >= self._size:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._ready.notify()

    def get(self) -> Any:
        """The oldest item; waits for one. None once closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or not self._open)
            return self._items.popleft() if self._items and self._open else None

    def clear(self) -> None:
        """Discard what waits, without counting it."""
        with self._ready:
            self._items.clear()

    def close(self) -> None:
        """Wake the reader for the last time."""
        with self._ready:
            self._open = False
            self._ready.notify_all()


class Worker:
    """A thread that handles the items of a mailbox; an exception in one item goes to `on_error`, and it goes on."""

    def __init__(
        self, name: str, size: int, handle: Callable[[Any], None], on_error: Callable[[Exception], None]
    ) -> None:
        self.mailbox = Mailbox(size)
        self._handle, self._on_error = handle, on_error
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self.mailbox.get()) is not None:
            try:
                self._handle(item)
            except Exception as error:  # one bad frame must not stop a robot
                self._on_error(error)

    def stop(self, seconds: float = 4.0) -> None:
        """Finish the item in hand and end."""
        self.mailbox.close()
        self._thread.join(seconds)
