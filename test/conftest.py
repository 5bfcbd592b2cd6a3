"""Tests interrupt processes; a shell that runs this suite in the background would have them ignore it."""

import os
import signal

import torch

signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():  # before anything imports Triton, which decides by it once
    os.environ.setdefault("TRITON_INTERPRET", "1")
