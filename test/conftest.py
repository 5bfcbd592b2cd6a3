"""Tests interrupt processes; a shell that runs this suite in the background would have them ignore it."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
