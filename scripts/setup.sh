#!/usr/bin/env bash
# Create or update .venv with all that speed3r_ros needs, then enter it. Run it, or `source` it to stay in the environment.
#   PYTHON=python3.12 scripts/setup.sh     # another interpreter than python3
# With a sourced ROS 2, its rclpy, messages and OpenCV are used; without one, wheels of them are installed.

if [[ ${BASH_SOURCE[0]} == "$0" && ${1:-} =~ ^(-h|--help)$ ]]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0"
  exit 0
fi

_speed3r_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_speed3r_install() (
  set -uo pipefail  # no -e: bash ignores it in a function whose result is tested
  cd "$1" || exit 1
  venv=$1/.venv
  torch=2.13.0
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check -c "$venv/.speed3r_ros.constraints")
  say() { printf 'setup: %s\n' "$*" >&2; }
  die() { say "$*"; exit 1; }
  step() { say "[$1/4] $2"; }
  # On a terminal pip draws its progress bars; in a log a line per download is enough.
  pip_install() {
    local what=$1
    shift
    if [[ -t 1 && -t 2 ]]; then
      "${pip[@]}" "$@"
    else
      "${pip[@]}" --progress-bar off "$@" 2>&1 |
        { grep -E '^ *(Downloading|ERROR)' || true; } >&2
    fi || die "installing $what failed (see above). Is there a network? pip's settings (PIP_INDEX_URL, PIP_FIND_LINKS) are used."
  }

  python=${PYTHON:-python3}
  command -v "$python" > /dev/null || die "no $python: sudo apt install python3 python3-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" -V) is too old: 3.10 or newer is needed; give one with PYTHON=/path/to/python3.x"

  # The wheels of rclpy serve machines without an apt ROS. A sourced ROS keeps its own compiled messages, which need the
  # NumPy and the OpenCV that they were built with, and its pytest plug-ins, which do not run in pytest 9.
  extras=ros,test
  venv_options=()
  constraints=()
  if [[ -n ${ROS_DISTRO:-} ]] && "$python" -c 'import rclpy' 2> /dev/null; then
    extras="test"
    venv_options=(--system-site-packages)
    "$python" -c 'import cv2' 2> /dev/null || extras=opencv,test
    constraints=("pytest<9")
    "$python" -c 'import numpy, sys; sys.exit(numpy.__version__ < "2")' 2> /dev/null || constraints+=("numpy<2")
  fi

  stamp=$venv/.speed3r_ros.stamp
  if [[ -f $stamp && $(head -n 1 "$stamp") != "$extras" ]]; then
    say "ROS was sourced before and is not now, or the reverse: .venv is made anew"
    rm -rf "$venv"
  fi
  if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    "$python" -c 'import ensurepip, venv' 2> /dev/null || die "$python has no venv module: sudo apt install python3-venv"
    step 1 "virtual environment .venv with $("$python" -V)"
    "$python" -m venv --clear "${venv_options[@]}" "$venv" || die "cannot create $venv"
  fi
  if command -v flock > /dev/null; then
    exec 9> "$venv/.speed3r_ros.lock"
    flock 9
  fi

  state=$({ cat setup.py setup.cfg pyproject.toml scripts/*.sh; "$venv/bin/python" -V; pwd; } | sha256sum)
  if [[ -f $stamp && $(< "$stamp") == "$extras"$'\n'"$state" ]]; then
    say "environment is up to date (.venv)"
    exit 0
  fi
  say "installing into .venv (extras: $extras); the first time takes a few minutes"
  printf '%s\n' "${constraints[@]}" > "$venv/.speed3r_ros.constraints"

  if "$venv/bin/python" -c 'import torch' 2> /dev/null; then
    step 2 "torch is there"
  else
    cpu_wheels=https://download.pytorch.org/whl/cpu
    index=()
    if nvidia-smi -L > /dev/null 2>&1; then
      step 2 "torch $torch for the NVIDIA GPU (several GB)"
    elif "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$cpu_wheels/torch/', timeout=5)" 2> /dev/null; then
      step 2 "torch $torch for the CPU"
      index=(--extra-index-url "$cpu_wheels")  # its 2.13.0+cpu sorts above the CUDA build of several GB
    else
      step 2 "torch $torch (no answer from $cpu_wheels, hence the build that pip's settings offer)"
    fi
    pip_install torch "torch==$torch" "${index[@]}"
  fi

  step 3 "speed3r_ros, editable, with its requirements"
  pip_install speed3r_ros -e ".[$extras]"

  if [[ $extras != *ros* ]] || "$venv/bin/python" -c 'import tf2_msgs' 2> /dev/null; then
    step 4 "tf2_msgs is there"
  else
    step 4 "tf2_msgs, for TF on the wire"
    bash scripts/build_tf2_msgs.sh >&2 || say "no tf2_msgs: the node publishes no TF (sudo apt install g++, rm -r .venv, and again)"
  fi
  printf '%s\n' "$extras" "$state" > "$stamp"
  say "done"
)

if ! _speed3r_install "$_speed3r_root"; then
  # shellcheck disable=SC2317  # a sourced script returns, an executed one exits
  return 1 2> /dev/null || exit 1
fi
export VIRTUAL_ENV=$_speed3r_root/.venv
export PATH=$VIRTUAL_ENV/bin:$PATH
# The wheels have their ament index in the environment's own prefix.
if [[ -d $VIRTUAL_ENV/share/ament_index ]]; then
  export AMENT_PREFIX_PATH=$VIRTUAL_ENV
  unset _ROS_WHEELS_BOOTSTRAP_COMPLETE  # set by the python of another environment, it would hide this one's libraries
fi
