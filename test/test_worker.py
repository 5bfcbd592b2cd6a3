"""Threads: newest wins, drops are counted, errors do not stop the worker."""

import threading
import time

from speed3r_ros.worker import Mailbox, Worker


def test_newest_wins_and_drops_are_counted():
    mailbox = Mailbox(1)
    for i in range(10):
        mailbox.put(i)
    assert mailbox.get() == 9 and mailbox.dropped == 9
    queue = Mailbox(3)
    for i in range(5):
        queue.put(i)
    assert [queue.get() for _ in range(3)] == [2, 3, 4] and queue.dropped == 2


def test_what_a_slow_reader_misses_is_spread_evenly():
    queue, got = Mailbox(9, spread=True), []
    for first in (0, 36, 72):
        for i in range(first, first + 36):
            queue.put(i)
        assert len(queue) == 9
        got += [queue.get() for _ in range(9)]
    assert queue.dropped == 3 * (36 - 9) and got[8::9] == [35, 71, 107]  # the newest is always there
    assert max(after - before for before, after in zip([-1, *got], got)) <= 6


def test_a_closed_mailbox_releases_its_reader():
    mailbox, got = Mailbox(), []
    thread = threading.Thread(target=lambda: got.append(mailbox.get()))
    thread.start()
    mailbox.close()
    thread.join(5)
    assert got == [None]


def test_put_never_waits_and_errors_are_survived():
    release, handled, errors = threading.Event(), [], []

    def handle(item):
        release.wait(10)
        if item == "bad":
            raise ValueError("bad item")
        handled.append(item)

    worker = Worker("test", Mailbox(2), handle, errors.append)
    worker.mailbox.put("bad")
    deadline = time.monotonic() + 5
    while len(worker.mailbox) and time.monotonic() < deadline:
        time.sleep(0.001)
    for i in range(1000):  # the handler is busy: these return at once
        worker.mailbox.put(i)
    release.set()
    while len(handled) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    worker.stop()
    assert handled == [998, 999] and worker.mailbox.dropped == 998 and [str(e) for e in errors] == ["bad item"]
