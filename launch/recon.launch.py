"""Run the reconstruction node, and optionally RViz and the replay of a bag.

ros2 launch speed3r_ros recon.launch.py image:=/camera/image_raw    # and camera_info beside it
ros2 launch speed3r_ros recon.launch.py bag:=/path/to/bag image:=/camera/image_raw rviz:=true
"""

import os

from launch import LaunchContext, LaunchDescription
from launch.action import Action
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterFile
from launch_ros.substitutions import FindPackageShare

PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")  # to Jazzy, from Kilted on
# Arguments that set a parameter of the node when they are given; without them params_file decides.
PARAMETERS = {
    "model": "engine.model",
    "attention": "engine.attention",
    "image_transport": "input.image_transport",
    "base_frame": "frames.base",
    "odom_frame": "frames.odom",
    "map_frame": "frames.map",
    "publish_tf": "tf.publish",
}
DISPLAYED = ("points", "map_points", "path", "odometry", "depth/image")  # by config/recon.rviz, under absolute names


def share(*parts: str) -> PathJoinSubstitution:
    """Path of an installed file of this package."""
    return PathJoinSubstitution([FindPackageShare("speed3r_ros"), *parts])


def arguments() -> list[DeclareLaunchArgument]:
    """Every argument; an empty default means that something else decides, as its description says."""
    flag = ["true", "false"]
    optional_flag = ["", "true", "false"]
    kept = "empty = as in params_file"
    return [
        DeclareLaunchArgument(
            "params_file", default_value=share("config", "recon.yaml"), description="YAML file of the node's parameters"
        ),
        DeclareLaunchArgument("image", default_value="image", description="camera image topic, without /compressed"),
        DeclareLaunchArgument(
            "camera_info", default_value="", description="topic of the intrinsics; empty = camera_info beside `image`"
        ),
        DeclareLaunchArgument("model", default_value="", description=f"network, see params_file; {kept}"),
        DeclareLaunchArgument("attention", default_value="", description=f"attention across frames; {kept}"),
        DeclareLaunchArgument(
            "image_transport",
            default_value="",
            choices=["", "raw", "compressed"],
            description=f"raw reads `image`, compressed reads `image`/compressed; {kept}",
        ),
        DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and of its TF"),
        DeclareLaunchArgument(
            "use_sim_time",
            default_value="",
            choices=optional_flag,
            description="take the time from /clock; empty = true when a bag is replayed, else as in params_file",
        ),
        DeclareLaunchArgument("base_frame", default_value="", description=f"robot body frame; {kept}"),
        DeclareLaunchArgument("odom_frame", default_value="", description=f"odometry frame; {kept}"),
        DeclareLaunchArgument("map_frame", default_value="", description=f"map frame; {kept}"),
        DeclareLaunchArgument(
            "publish_tf", default_value="", choices=optional_flag, description=f"publish map -> odom -> base; {kept}"
        ),
        DeclareLaunchArgument("rviz", default_value="false", choices=flag, description="open RViz"),
        DeclareLaunchArgument("bag", default_value="", description="bag to replay with --clock; empty = live camera"),
        DeclareLaunchArgument("bag_rate", default_value="1.0", description="speed of the replay"),
        DeclareLaunchArgument(
            "bag_delay",
            default_value="10.0",
            description="seconds that the replay waits while the node loads its model",
        ),
        DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=["debug", "info", "warn", "error", "fatal"],
            description="of the node",
        ),
        DeclareLaunchArgument(
            "fastdds_profile",
            default_value=share("config", "fastdds.xml"),
            description="Fast DDS profile when the environment sets none; empty = Fast DDS's own",
        ),
    ]


def environment(context: LaunchContext) -> list[Action]:
    """The shared-memory profile for everything started here, unless the user has chosen one."""
    profile = LaunchConfiguration("fastdds_profile").perform(context)
    if not profile or any(os.environ.get(name) for name in PROFILE_VARIABLES):
        return []
    return [SetEnvironmentVariable(name, profile) for name in PROFILE_VARIABLES]


def nodes(context: LaunchContext) -> list[Action]:
    """The node with what its arguments set, RViz and the bag."""

    def given(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    bag, image = given("bag"), given("image")
    decided = given("use_sim_time") or ("true" if bag else "")
    sim_time = [{"use_sim_time": decided == "true"}] if decided else []
    chosen = {parameter: given(name) for name, parameter in PARAMETERS.items() if given(name)}
    if "tf.publish" in chosen:
        chosen["tf.publish"] = chosen["tf.publish"] == "true"

    remappings = [
        ("image", image),
        ("image/compressed", f"{image}/compressed"),  # remapping `image` leaves this name alone
        ("camera_info", given("camera_info") or "/".join([*image.split("/")[:-1], "camera_info"])),
    ]
    relative_tf = [("/tf", "tf"), ("/tf_static", "tf_static")]
    started: list[Action] = [
        Node(
            package="speed3r_ros",
            executable="recon_node",
            name="speed3r",
            namespace=given("namespace"),
            parameters=[
                ParameterFile(given("params_file"), allow_substs=True),
                *sim_time,
                *([chosen] if chosen else []),
            ],
            remappings=remappings + relative_tf,
            arguments=["--ros-args", "--log-level", given("log_level")],
            output="screen",
            emulate_tty=True,
            sigterm_timeout="10",  # the frame that is being computed is finished first
        ),
        Node(
            package="rviz2",
            executable="rviz2",
            namespace=given("namespace"),
            arguments=["-d", share("config", "recon.rviz")],
            parameters=sim_time,
            remappings=[("/image", image)] + [(f"/{topic}", topic) for topic in DISPLAYED] + relative_tf,
            condition=IfCondition(given("rviz")),
        ),
    ]
    if bag:
        play = [
            "ros2",
            "bag",
            "play",
            "--clock",
            "100",
            "--rate",
            given("bag_rate"),
            "--delay",
            given("bag_delay"),
            bag,
        ]
        started.append(ExecuteProcess(cmd=play, output="screen"))
    return started


def generate_launch_description() -> LaunchDescription:
    """All declared arguments, then the environment, then what runs in it."""
    return LaunchDescription(
        [*arguments(), OpaqueFunction(function=environment), OpaqueFunction(function=nodes)],
    )
