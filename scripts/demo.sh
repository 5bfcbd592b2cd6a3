#!/usr/bin/env bash
# Reconstruct a recording live: a ROS 2 node, fed in real time by a second process and recorded by a third.
#   scripts/demo.sh [INPUT] [--out DIR] [--rate R] [--model NAME] [--attention NAME] [NODE ARGUMENT...]
# INPUT   a ROS 2 bag (sqlite3 or mcap), a video, or a folder of images; default: the sample bag
# --out   folder of report.html, trajectory.tum, map.ply and the recorded bag; default: out
# --rate  speed of the playback; default: 1, real time. Slower loses fewer frames on a slow machine
# --model      the network; default: compact. Others need their weights: speed3r weights fetch NAME
# --attention  how frames attend to one another: auto, dense or speed3r; default: auto
# What follows goes to the node, e.g. -p engine.window:=8
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
say() { printf 'demo: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

input=
out=out
rate=1
model=
node_arguments=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --out) out=${2:?"--out needs a folder"}; shift ;;
    --out=*) out=${1#--out=} ;;
    --rate) rate=${2:?"--rate needs a number"}; shift ;;
    --rate=*) rate=${1#--rate=} ;;
    --model) model=${2:?"--model needs a name"}; shift ;;
    --model=*) model=${1#--model=} ;;
    --attention) node_arguments+=(-p "engine.attention:=${2:?"--attention needs a name"}"); shift ;;
    --attention=*) node_arguments+=(-p "engine.attention:=${1#--attention=}") ;;
    -p | -r | --params-file) node_arguments+=("$1" "${2:?"$1 needs a value"}"); shift ;;
    -*) usage >&2; die "unknown option $1" ;;
    *) [[ -z $input ]] || die "one INPUT at a time: $input or $1"; input=$1 ;;
  esac
  shift
done

root=$(cd "$(dirname "$0")/.." && pwd)
input=${input:-$root/resource/sample_bag}
[[ -e $input ]] || die "no such input: $input"
[[ $rate =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $rate =~ [1-9] ]] || die "--rate must be a number above 0, not $rate"
mkdir -p "$out" 2> /dev/null && [[ -w $out ]] || die "cannot write into $out"
out=$(cd "$out" && pwd)
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"

if [[ -n $model ]]; then
  # Absent weights are said before anything starts, unless the node is told of others.
  if [[ $model != compact && ! ${node_arguments[*]} =~ engine\.weights:=|--params-file ]]; then
    problem=$(python -m speed3r_ros.cli weights path "$model" 2>&1 > /dev/null) || die "${problem#speed3r weights: }"
  fi
  node_arguments+=(-p "engine.model:=$model")
fi

# Nothing of a robot on this network is heard or disturbed.
export ROS_DOMAIN_ID=$((RANDOM % 100 + 1))
export PYTHONUNBUFFERED=1

# Large shared-memory segments need room; a container often has 64 MB.
room=$(df --output=avail --block-size=1M /dev/shm 2> /dev/null | tail -n 1 || echo 0)
if [[ -n ${FASTRTPS_DEFAULT_PROFILES_FILE:-}${FASTDDS_DEFAULT_PROFILES_FILE:-} ]]; then
  say "Fast DDS profile of the environment is kept"
elif ((room < 160)); then
  say "/dev/shm has ${room// /} MB: Fast DDS keeps its small segments (docker run --shm-size=512m makes it faster)"
else
  export FASTRTPS_DEFAULT_PROFILES_FILE=$root/config/fastdds.xml  # Humble, Jazzy
  export FASTDDS_DEFAULT_PROFILES_FILE=$root/config/fastdds.xml  # Kilted and later
fi

processes=()
cleanup() {
  trap - EXIT
  trap '' INT TERM
  for pid in "${processes[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
  for _ in {1..50}; do
    kill -0 "${processes[@]}" 2> /dev/null || break
    sleep 0.2
  done
  for pid in "${processes[@]}"; do kill -KILL "$pid" 2> /dev/null || true; done
  wait 2> /dev/null || true
}
trap cleanup EXIT
trap 'say interrupted; exit 130' INT TERM

# start LOG COMMAND...: run in the background and give its process id in `pid`.
start() {
  local log=$1
  shift
  "$@" > "$log" 2>&1 &
  pid=$!
  processes+=("$pid")
}
alive() { kill -0 "$1" 2> /dev/null; }
failed() {
  tail -n 15 "$2" >&2
  die "$1 ended early; its log is $2"
}

rm -rf "$out/recorded" "$out/sent.csv"
idle=$(awk "BEGIN { print 5 / ($rate < 1 ? $rate : 1) }")  # seconds without a pose after which all are there
start "$out/record.log" python -m speed3r_ros.record "$out/recorded" --until-idle "$idle"
record=$pid
# No TF tree comes with a recording: the camera looks forward from the body's origin (REP-103 optical axes).
start "$out/node.log" python -m speed3r_ros.recon_node --ros-args -p "frames.base_to_camera:=0 0 0 -0.5 0.5 -0.5 0.5" \
  -p tf.publish_base_to_camera:=true "${node_arguments[@]}"
node=$pid
say "node $node and recorder $record run in ROS domain $ROS_DOMAIN_ID"

say "playing $input at $rate x real time"
python -m speed3r_ros.play "$input" --rate "$rate" --wait 120 --log "$out/sent.csv" &
play=$!
processes+=("$play")
while alive "$play"; do
  alive "$node" || failed "the node" "$out/node.log"
  alive "$record" || failed "the recorder" "$out/record.log"
  sleep 0.3
done
wait "$play" || die "the input could not be played (see above)"

say "all played; waiting for the last poses"
for _ in {1..100}; do
  alive "$record" || break
  alive "$node" || failed "the node" "$out/node.log"
  sleep 0.3
done
kill -TERM "$record" 2> /dev/null || true  # a run without any pose does not end by itself
wait "$record" || failed "the recorder" "$out/record.log"
kill -TERM "$node" 2> /dev/null || true
wait "$node" || say "the node did not end cleanly; its log is $out/node.log"

say "writing the report"
python -m speed3r_ros.cli report --recorded "$out/recorded" --source "$input" --sent "$out/sent.csv" --out "$out"
say "report: $out/report.html"
