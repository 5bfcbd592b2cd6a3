"""What all tests share: whole signals, an interpreter for kernels without a GPU, and peace among processes side by side."""

import os
import signal

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs this suite in the background ignores it
if not torch.cuda.is_available():  # before anything imports Triton, which decides by it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nodes of one worker's tests hear one another only. Domains above 214 are for tests; scripts/demo.sh stays below.
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
os.environ["ROS_DOMAIN_ID"] = str(215 + (os.getppid() + worker) % 18)
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def fp8_by_definition(monkeypatch):
    """FP8 runs on any device: its products by their definition."""
    from speed3r_ros.model import engine, quantised

    for module in (engine, quantised):
        monkeypatch.setattr(module, "require_fp8_units", lambda device, setting: None)
