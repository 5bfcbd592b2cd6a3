"""Streaming monocular 3D reconstruction for ROS 2: camera frames in; poses, depth and point clouds out."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for one another. Where all cores are busy, as on a robot, that makes a network's
# step tens of times slower; with a short spin a step alone takes no longer (docs/benchmarks.md). Read when torch is first
# imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# NumPy's matrices are small here: threads of their own take a third of a core and save no time. Read when numpy is.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
