"""Recorded sequences as training batches: every layout, written with known geometry, against definitions in float64."""

import json
import os

import cv2
import numpy as np
import pytest
import recordings
import torch

from speed3r_ros.model.types import resize_intrinsics
from speed3r_ros.training.losses import losses, relative_poses, sequence_scale
from speed3r_ros.training.sequences import SequenceDataset, open_recording

COUNT, SIZE = 5, (56, 112)
LAYOUTS = ("ours", "tum", "seven-scenes", "seven-scenes-registered", "scannetpp")


@pytest.fixture
def rng():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def write_layout(layout, folder, rng):
    if layout == "ours":
        return recordings.write_listing(folder, rng, COUNT, (96, 128))
    if layout == "tum":
        return recordings.write_listing(folder, rng, COUNT, (480, 640), layout="tum")
    if layout == "scannetpp":
        return recordings.write_scannetpp(folder, rng, COUNT)
    return recordings.write_seven_scenes(folder, rng, COUNT, layout.endswith("registered"))


def depth_through_the_lens(raw, unit, K_depth, D, K_to, size):
    """Depth (h, w) in metres seen by an ideal camera, and which pixels do not lie between two pixels of the raw image."""
    v, u = np.mgrid[: size[0], : size[1]].astype(float)
    x, y = (u - K_to[0, 2]) / K_to[0, 0], (v - K_to[1, 2]) / K_to[1, 1]
    if D:
        k1, k2, p1, p2, k3 = D
        r = x * x + y * y
        radial = 1 + k1 * r + k2 * r**2 + k3 * r**3
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x),
            y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y,
        )
    u, v = x * K_depth[0, 0] + K_depth[0, 2], y * K_depth[1, 1] + K_depth[1, 2]
    sure = (np.abs(u - np.floor(u) - 0.5) > 0.02) & (np.abs(v - np.floor(v) - 0.5) > 0.02)
    column, row = np.rint(u).astype(int), np.rint(v).astype(int)
    inside = (column >= 0) & (column < raw.shape[1]) & (row >= 0) & (row < raw.shape[0])
    depth = raw[row.clip(0, raw.shape[0] - 1), column.clip(0, raw.shape[1] - 1)] * unit
    return np.where(inside, depth, 0), sure


@pytest.mark.parametrize("layout", LAYOUTS)
def test_geometry_is_what_was_written(layout, tmp_path, rng):
    folder = tmp_path / "rgbd_freiburg1_test"
    poses, depths, K_depth, D = write_layout(layout, folder, rng)
    recording = open_recording(folder)
    assert len(recording) == COUNT and np.allclose(recording.poses, poses, atol=1e-6)
    data = SequenceDataset([recording], "cpu", 3, 2)
    seed = str(rng.integers(2**31))
    batch, (_, index) = data.batch(data.begin([seed], 3, SIZE)), data.window(seed, 3)
    image = cv2.imread(str(recording.images[0]))
    K_to = resize_intrinsics(recording.K[0], image.shape[:2], SIZE)
    fx, fy, cx, cy, k1 = batch["K"][0].tolist()
    assert np.allclose([fx, fy, cx, cy, k1], [K_to[0, 0], K_to[1, 1], K_to[0, 2], K_to[1, 2], 0], rtol=1e-5)

    if layout == "scannetpp":  # depth is smaller than the image and shares its view
        K_depth = resize_intrinsics(K_depth, image.shape[:2], depths[0].shape)
    unit = 0.0002 if layout in ("ours", "tum") else 0.001
    expected, sure = zip(*(depth_through_the_lens(depths[i], unit, K_depth, D, K_to, SIZE) for i in index))
    expected, sure = np.stack(expected), np.stack(sure)
    valid = (expected > 0.1) & (expected < 10)
    assert 0.3 < valid.mean() < 0.95
    assert (batch["valid"][0].numpy() == valid)[sure].all()
    scale = float(expected[valid].mean())
    both = sure & valid
    assert sure.mean() > 0.6 and np.allclose(batch["depth"][0].numpy()[both] * scale, expected[both], rtol=5e-3)
    assert (batch["depth"][~batch["valid"]] == 1).all()

    relative = np.linalg.inv(poses[index[0]]) @ poses[index]
    R, t = relative_poses(batch["R"].double(), batch["t"].double())
    assert np.allclose(R[0, 0], relative[:, :3, :3], atol=1e-5)
    assert np.allclose(t[0, 0] * scale, relative[:, :3, 3], rtol=5e-3, atol=1e-5)


def test_colours_are_those_of_the_images(tmp_path, rng):
    recordings.write_scannetpp(tmp_path, rng, 2)
    recording = open_recording(tmp_path)
    data = SequenceDataset([recording], "cpu", 2, 1)
    batch, (_, index) = data.batch(data.begin(["a"], 2, SIZE)), data.window("a", 2)
    for image, i in zip(batch["img"][0], index):
        file = cv2.imread(str(recording.images[i]))[..., ::-1]
        expected = cv2.resize(file, SIZE[::-1], interpolation=cv2.INTER_AREA) / 255
        assert np.allclose(image.permute(1, 2, 0), expected, atol=1e-6)


def test_windows_repeat_by_their_seed_and_differ_otherwise(tmp_path, rng):
    recordings.write_listing(tmp_path / "a", rng, 5, (96, 128))
    recordings.write_listing(tmp_path / "b", rng, 9, (96, 128))
    data = SequenceDataset([open_recording(tmp_path / name) for name in "ab"], "cpu", 3, 3)
    windows = [(r.name, i) for r, i in (data.window(str(seed), 3) for seed in range(300))]
    assert windows == [(r.name, i) for r, i in (data.window(str(seed), 3) for seed in range(300))]
    steps = {i[1] - i[0] for _, i in windows}
    assert steps == {-3, -2, -1, 1, 2, 3} and all(i[2] - i[1] == i[1] - i[0] for _, i in windows)
    assert {name for name, _ in windows} == {"a", "b"} and {i[0] for n, i in windows if n == "b"} == set(range(9))


def test_poses_without_depth(tmp_path, rng):
    """No mask, a unit from the poses, and losses that the poses alone drive."""
    from speed3r_ros.model.network import Prediction

    recordings.write_listing(tmp_path, rng, COUNT, (96, 128), with_depth=False)
    data = SequenceDataset([open_recording(tmp_path)], "cpu", 4, 1)
    batch = data.batch(data.begin(["x", "y"], 4, SIZE))
    assert not batch["valid"].any() and not batch["judged"].any()
    assert torch.allclose(torch.stack([torch.pdist(t).mean() for t in batch["t"]]), torch.tensor(0.5))
    depth = torch.rand(2, 4, *SIZE) + 0.5
    points = torch.cat([batch["ray"][:, None] * depth[..., None], depth[..., None]], -1).permute(0, 1, 4, 2, 3)
    zeros = torch.zeros(2, 4, *SIZE)

    def figures(t):
        out = Prediction(points, zeros, batch["R"], t, torch.zeros(2, 4, 2), torch.zeros(2, 4, 32, 8))
        return losses(out, batch, 1)[1]

    good = figures(batch["t"] * 0.3)
    assert good["points"] < 1e-4 and good["rot_deg"] < 0.1 and good["translation"] < 1e-2 and good["matching"] == 0
    assert figures(batch["t"] * torch.tensor([0.3, -0.3, 0.3]))["translation"] > 0.05
    assert all(torch.isfinite(value) for value in good.values())


def test_unknown_depth_has_no_say(rng):
    """Figures and gradients do not depend on what stands where depth is unknown, and confidence is not taught there."""
    from speed3r_ros.model.network import Prediction
    from speed3r_ros.training.render import SceneDataset

    batch = SceneDataset("cpu", int(rng.integers(2**31)), *SIZE, samples=1, textures_per_family=1).batch(2, 3)
    valid = torch.rand(2, 3, *SIZE) > 0.4
    confidence = torch.randn(2, 3, *SIZE, requires_grad=True)
    out = Prediction(
        torch.rand(2, 3, 3, *SIZE) + 0.5, confidence, batch["R"], batch["t"] * 1.1,
        torch.zeros(2, 3, 2), torch.randn(2, 3, 32, 8),
    )  # fmt: skip
    found = []
    for filling in (torch.tensor(1.0), torch.rand(2, 3, *SIZE) + 1, torch.tensor(torch.inf)):
        filled = batch | dict(valid=valid, judged=valid, depth=batch["depth"].where(valid, filling))
        total, figures = losses(out, filled, 1)
        confidence.grad = None
        total.backward()
        assert torch.isfinite(confidence.grad).all() and torch.equal(confidence.grad != 0, valid)
        found.append(figures)
    assert all(torch.equal(figures[name], found[0][name]) for figures in found for name in found[0])


def test_scale_is_the_median_ratio_or_that_of_the_paths():
    z, z_true = torch.rand(3, 3, *SIZE) + 1, torch.rand(3, 3, *SIZE) + 1
    valid = torch.rand(3, 3, *SIZE) > torch.tensor([0.4, 0.6, 1.0]).view(3, 1, 1, 1)
    t = torch.randn(3, 3, 3, 3)
    stride = z[0].numel() // 4096 | 1
    scale = sequence_scale(z, z_true, valid, t * 0.2, t)
    for got, x, y, m in zip(scale[:2], z, z_true, valid):
        x, y, m = (value.flatten()[::stride] for value in (x, y, m))
        assert torch.equal(got, (y / x)[m].median())
    torch.testing.assert_close(scale[2], torch.tensor(5.0))


def refused(path, says):
    with pytest.raises(ValueError, match=says) as error:
        open_recording(path)
    assert "\n" not in str(error.value)


def rewrite(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_what_is_wrong_is_said_on_entry(tmp_path, rng):
    refused(tmp_path / "nowhere", "nowhere: not a folder")
    refused(tmp_path, "no sequence; expected rgb.txt")

    ours = tmp_path / "ours"
    recordings.write_listing(ours, rng, COUNT, (96, 128))
    with pytest.raises(ValueError, match="5 images with a pose, fewer than the longest .* --set longest=5"):
        SequenceDataset([open_recording(ours)], "cpu", 6, 1)
    settings = (ours / "intrinsics.json").read_text()
    for change, says in (
        (dict(depth_scale_m=5000), "depth_scale_m = 5000.0"),
        (dict(depth_max_m=0), "depth_max_m = 0.0"),
        (dict(depth_scale_m="mm"), "depth_scale_m and depth_max_m must be numbers"),
        (dict(width=640), "is for 640 x 96 pixels"),
        (dict(fx=-1), "focal lengths must be positive"),
    ):
        (ours / "intrinsics.json").write_text(json.dumps(json.loads(settings) | change))
        refused(ours, says)
    (ours / "intrinsics.json").unlink()
    refused(ours, "no intrinsics; add intrinsics.json")
    (ours / "intrinsics.json").write_text(settings)
    write = cv2.imwrite
    assert write(str(ours / "depth/000.png"), np.zeros((4, 4), np.uint8))
    refused(ours, r"000.png: uint8 \(4, 4\); expected a depth image of 16 bits")
    (ours / "depth/002.png").unlink()
    refused(ours, "002.png: missing")
    (ours / "depth.txt").write_text("1.0\n")
    refused(ours, "depth.txt: expected `timestamp file`")
    (ours / "depth.txt").unlink()
    (ours / "poses.txt").write_text("1.0 0 0 0 0 0 0 1\n")
    refused(ours, "0 images with a pose")
    (ours / "poses.txt").unlink()
    refused(ours, "no poses; expected groundtruth.txt")

    small = tmp_path / "freiburg2_small"
    recordings.write_listing(small, rng, 2, (240, 320), layout="tum")
    refused(small, "those of freiburg2 are taken, which are for 640 x 480 pixels")

    seven = tmp_path / "seven"
    recordings.write_seven_scenes(seven, rng, 2, True)
    first = seven / "frame-000000.color.png"
    full = first.read_bytes()
    assert write(str(first), np.zeros((240, 320, 3), np.uint8))
    refused(seven, "the intrinsics of 7-Scenes are for 640 x 480 pixels")
    first.write_bytes(full)
    rewrite(seven / "frame-000001.pose.txt", (seven / "frame-000001.pose.txt").read_text(), "1 0 0\n")
    refused(seven, "000001.pose.txt: expected 16 numbers, found '1 0 0'")
    (seven / "frame-000001.pose.txt").write_text("nan " * 16)
    refused(seven, "the pose of frame-000001.color.png is not a rotation")
    (seven / "frame-000001.pose.txt").unlink()
    refused(seven, "pose.txt: missing")

    phone = tmp_path / "phone"
    recordings.write_scannetpp(phone, rng, 2)
    rewrite(phone / "iphone/pose_intrinsic_imu.json", "aligned_pose", "pose")
    refused(phone, "expected aligned_pose")
    (phone / "iphone/pose_intrinsic_imu.json").write_text("{}")
    refused(phone, "no rgb/frame_")


def test_a_broken_image_is_named(tmp_path, rng):
    recordings.write_listing(tmp_path, rng, 2, (96, 128))
    data = SequenceDataset([open_recording(tmp_path)], "cpu", 2, 1)
    (tmp_path / "rgb/000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="000.png: not a readable image"):
        data.batch(data.begin(["1"], 2, SIZE))
