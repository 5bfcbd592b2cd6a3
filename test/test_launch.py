"""The launch file: what it starts, with which parameters, names and environment."""

import ast
import json
import os
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch" / "recon.launch.py"
TREE = ast.parse(LAUNCH.read_text())
ARGUMENTS = {
    "model",
    "attention",
    *("params_file", "image", "camera_info", "image_transport", "namespace", "use_sim_time", "rviz", "bag", "bag_rate"),
    *("bag_delay", "base_frame", "odom_frame", "map_frame", "publish_tf", "log_level", "fastdds_profile"),
}
# A program that notes how it was started: the node's, RViz's and ros2's stand-in.
STAND_IN = """#!{python}
import json, os, sys
files = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--params-file"]
note = dict(argv=sys.argv[1:], files=[open(path).read() for path in files], profiles=[
    os.environ.get(name) for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")])
with open({folder!r} + "/" + os.path.basename(sys.argv[0]) + ".json", "w") as file:
    json.dump(note, file)
"""
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
arguments = [tuple(item.split(":=", 1)) for item in sys.argv[2:]]
service = LaunchService(noninteractive=True)
service.include_launch_description(LaunchDescription(
    [IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments)]))
sys.exit(service.run())
"""


def calls(name):
    """Calls of a function in the launch file."""
    return [n for n in ast.walk(TREE) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name]


def test_arguments_are_declared_described_and_used():
    declared = calls("DeclareLaunchArgument")
    assert {call.args[0].value for call in declared} == ARGUMENTS and len(declared) == len(ARGUMENTS)
    for call in declared:
        assert {"default_value", "description"} <= {keyword.arg for keyword in call.keywords}, call.args[0].value
    used = {
        call.args[0].value
        for call in calls("given") + calls("LaunchConfiguration")
        if call.args[0].__class__ is ast.Constant
    }
    used |= set(parameters())
    assert used == ARGUMENTS


def parameters():
    """PARAMETERS of the launch file: the node's parameter that an argument sets."""
    (value,) = (n.value for n in TREE.body if isinstance(n, ast.Assign) and n.targets[0].id == "PARAMETERS")
    return ast.literal_eval(value)


def settings():
    """Dotted names and values of config/recon.yaml."""
    (node,) = yaml.safe_load((ROOT / "config" / "recon.yaml").read_text()).values()

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(flat(node["ros__parameters"]))


def test_arguments_set_parameters_that_exist():
    assert set(parameters().values()) <= set(settings())


def test_rviz_shows_topics_of_the_node():
    rviz = yaml.safe_load((ROOT / "config" / "recon.rviz").read_text())["Visualization Manager"]
    shown = {display["Topic"]["Value"] for display in rviz["Displays"] if "Topic" in display} - {"/image"}
    (displayed,) = (n.value for n in TREE.body if isinstance(n, ast.Assign) and n.targets[0].id == "DISPLAYED")
    assert {f"/{topic}" for topic in ast.literal_eval(displayed)} == shown
    record = pytest.importorskip("speed3r_ros.record", reason="waits for rclpy")
    assert shown <= {f"/{topic}" for topic in record.TOPICS}


def test_fastdds_profile_has_shared_memory_for_images_and_udp_for_other_hosts():
    space = {"p": "http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles"}
    root = ElementTree.parse(ROOT / "config" / "fastdds.xml").getroot()
    found = {t.findtext("p:type", "", space): t for t in root.iterfind(".//p:transport_descriptor", space)}
    assert set(found) == {"SHM", "UDPv4"}
    assert int(found["SHM"].findtext("p:segment_size", "0", space)) >= 16 * 2**20
    used = {t.text for t in root.iterfind(".//p:userTransports/p:transport_id", space)}
    assert used == {t.findtext("p:transport_id", "", space) for t in found.values()}


@pytest.fixture
def launched(tmp_path):
    """A function that launches with arguments and returns the notes of the programs that were started."""
    pytest.importorskip("launch_ros", reason="waits for launch_ros, which only a ROS 2 installation has")
    prefix, notes = tmp_path / "prefix", tmp_path / "notes"
    notes.mkdir()
    for package, program in (("speed3r_ros", "recon_node"), ("rviz2", "rviz2"), ("bin", "ros2")):
        path = prefix / "lib" / package / program
        path.parent.mkdir(parents=True)
        path.write_text(STAND_IN.format(python=sys.executable, folder=str(notes)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        marker = prefix / "share/ament_index/resource_index/packages" / package
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    share = prefix / "share" / "speed3r_ros"
    share.mkdir()
    for name in ("config", "launch"):
        (share / name).symlink_to(ROOT / name)

    def launch(*arguments, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTRTPS_", "FASTDDS_"))}
        env["AMENT_PREFIX_PATH"] = f"{prefix}:{env.get('AMENT_PREFIX_PATH', '')}"
        env["PATH"] = f"{prefix / 'lib' / 'bin'}:{env['PATH']}"
        command = [sys.executable, "-c", RUN, str(LAUNCH), *arguments]
        done = subprocess.run(command, env=env | environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done, {path.stem: json.loads(path.read_text()) for path in notes.glob("*.json")}

    return launch


def names(note):
    """Remapped names of a started node."""
    return dict(word.split(":=", 1) for word in note["argv"] if ":=" in word)


def values(note):
    """Parameters of a started node, later files over earlier ones."""
    found = {}
    for text in note["files"]:
        for tree in yaml.safe_load(text).values():
            found |= tree["ros__parameters"]
    return found


def test_live_camera(launched):
    done, notes = launched(
        "image:=/cam/image", "camera_info:=/cam/info", "image_transport:=compressed", "log_level:=warn"
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert set(notes) == {"recon_node"}
    node = notes["recon_node"]
    assert names(node)["image"] == "/cam/image" and names(node)["image/compressed"] == "/cam/image/compressed"
    assert names(node)["camera_info"] == "/cam/info" and names(node)["/tf"] == "tf"
    assert values(node)["input.image_transport"] == "compressed" and "use_sim_time" not in values(node)
    assert "frames.base" not in values(node), "an argument that was not given must not hide params_file"
    assert node["argv"][node["argv"].index("--log-level") + 1] == "warn"
    assert {Path(path).resolve() for path in node["profiles"]} == {ROOT / "config" / "fastdds.xml"}


@pytest.mark.parametrize("given, expected", [("", True), ("false", False), ("true", True)])
def test_params_file_sets_the_clock_unless_the_argument_does(launched, tmp_path, given, expected):
    (tmp_path / "mine.yaml").write_text("/**: {ros__parameters: {use_sim_time: true, frames: {map: world}}}")
    done, notes = launched(f"params_file:={tmp_path}/mine.yaml", f"use_sim_time:={given}", "rviz:=true")
    assert done.returncode == 0, done.stderr + done.stdout
    found = values(notes["recon_node"])
    assert found["use_sim_time"] is expected and found["frames"] == {"map": "world"}
    assert values(notes["rviz2"]) == ({"use_sim_time": expected} if given else {})


@pytest.mark.parametrize(
    "image, expected",
    [
        ("/cam/left/image_raw", "/cam/left/camera_info"),
        ("/image", "/camera_info"),
        ("front/image", "front/camera_info"),
    ],
)
def test_intrinsics_are_beside_the_image(launched, image, expected):
    done, notes = launched(f"image:={image}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert names(notes["recon_node"])["camera_info"] == expected


def test_bag_runs_on_its_clock(launched):
    done, notes = launched("bag:=/data/a bag", "bag_rate:=0.5", "bag_delay:=0", "rviz:=true", "image:=/cam/image")
    assert done.returncode == 0, done.stderr + done.stdout
    assert set(notes) == {"recon_node", "rviz2", "ros2"}
    play = notes["ros2"]["argv"]
    assert play[:2] == ["bag", "play"] and play[-1] == "/data/a bag" and "--clock" in play
    assert play[play.index("--rate") + 1] == "0.5"
    assert values(notes["recon_node"])["use_sim_time"] is True is values(notes["rviz2"])["use_sim_time"]
    assert names(notes["rviz2"])["/image"] == "/cam/image"
    assert Path(notes["rviz2"]["argv"][1]).resolve() == ROOT / "config" / "recon.rviz"
    assert None not in notes["ros2"]["profiles"], "the sender's profile is the one that matters"


def test_frames_namespace_and_switches(launched):
    done, notes = launched(
        *("namespace:=robot1", "base_frame:=robot1/base", "odom_frame:=robot1/odom", "map_frame:=world"),
        *("publish_tf:=false", "use_sim_time:=true"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    node = notes["recon_node"]
    assert names(node)["__ns"] == "/robot1" and names(node)["/tf_static"] == "tf_static"
    found = {name: values(node)[parameter] for name, parameter in parameters().items() if parameter in values(node)}
    assert found == {
        "base_frame": "robot1/base",
        "odom_frame": "robot1/odom",
        "map_frame": "world",
        "publish_tf": False,
    }
    assert values(node)["use_sim_time"] is True


@pytest.mark.parametrize("variable", ["FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"])
def test_the_users_profile_stays(launched, variable):
    _, notes = launched(**{variable: "/mine.xml"})
    assert sorted(notes["recon_node"]["profiles"], key=str) == ["/mine.xml", None]


def test_no_profile_on_request(launched):
    _, notes = launched("fastdds_profile:=")
    assert notes["recon_node"]["profiles"] == [None, None]


def test_wrong_choice_is_refused(launched):
    done, notes = launched("image_transport:=theora")
    assert done.returncode != 0 and notes == {}
    assert "theora" in done.stderr + done.stdout and "compressed" in done.stderr + done.stdout
