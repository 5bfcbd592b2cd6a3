"""Threads between the executor and the engine: newest frame wins, and nothing waits for anything slower."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Mailbox:
    """A bounded queue between two threads; when it is full the oldest item makes room and is counted.

    spread: not the oldest makes room, but the one whose neighbours stand closest, so that what is left stays evenly spread
    from the item that was taken last to the newest.
    """

    def __init__(self, size: int = 1, spread: bool = False) -> None:
        self._items: list[tuple[int, Any]] = []  # numbered
        self._count = 0
        self._taken = 0  # number of the last item taken
        self._size, self._spread = size, spread
        self._ready = threading.Condition()
        self._open = True
        self.dropped = 0

    def put(self, item: Any) -> None:
        """Add an item, without ever waiting."""
        with self._ready:
            self._count += 1
            self._items.append((self._count, item))
            if len(self._items) > self._size:
                numbers = [self._taken, *(number for number, _ in self._items)]
                gaps = [after - before for before, after in zip(numbers, numbers[2:])]
                self._items.pop(gaps.index(min(gaps)) if self._spread else 0)
                self.dropped += 1
            self._ready.notify()

    def get(self) -> Any:
        """The oldest item; waits for one. None once closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or not self._open)
            if not (self._items and self._open):
                return None
            self._taken, item = self._items.pop(0)
            return item

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._items)

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
        self,
        name: str,
        mailbox: Mailbox,
        handle: Callable[[Any], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.mailbox = mailbox
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
