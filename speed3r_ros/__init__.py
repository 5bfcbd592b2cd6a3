"""Streaming monocular 3D reconstruction for ROS 2."""

import os

# OpenMP's threads spin while they wait for one another. On a machine whose cores are all busy, as a robot's are, that
# makes a network's step tens of times slower; with a short spin it is as fast alone, and bears company. Read when torch
# is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
