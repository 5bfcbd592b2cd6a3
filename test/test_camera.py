"""Rectification against OpenCV's projection model and closed forms."""

import re

import cv2
import numpy as np
import pytest

from speed3r_ros.camera import Camera

K = np.array([[180.0, 0, 99.5], [0, 185.0, 74.5], [0, 0, 1]])


def dots(points: np.ndarray) -> np.ndarray:
    """White discs with sub-pixel centres (N, 2) on black, 150 x 200."""
    v, u = np.mgrid[0:150, 0:200]
    image = sum(255 * np.exp(-((u - x) ** 2 + (v - y) ** 2) / 4.5) for x, y in points)
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def centre(image: np.ndarray, near: np.ndarray) -> np.ndarray:
    v, u = np.mgrid[0:150, 0:200]
    weight = image[..., 0].astype(float) * (np.hypot(u - near[0], v - near[1]) < 7)
    return np.array([(u * weight).sum(), (v * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("model, D", [("plumb_bob", [-0.2, 0.05, 0.001, -0.002, 0.0]), ("rational_polynomial", [0.1, -0.1, 0, 0, 0.01, 0.05, 0, 0]),
                                      ("equidistant", [0.05, -0.01, 0.002, 0.0])])  # fmt: skip
def test_rectified_points_lie_where_a_pinhole_sees_them(model, D):
    rng = np.random.default_rng()
    rays = np.column_stack([rng.uniform(-0.35, 0.35, 4), rng.uniform(-0.28, 0.28, 4), np.ones(4)])
    rays[:, :2] = np.array([[-0.3, -0.2], [0.3, -0.2], [-0.3, 0.2], [0.3, 0.2]]) + rng.uniform(-0.03, 0.03, (4, 2))
    if model == "equidistant":
        seen = cv2.fisheye.projectPoints(rays[:, None], np.zeros(3), np.zeros(3), K, np.array(D))[0][:, 0]
    else:
        seen = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), K, np.array(D))[0][:, 0]
    image, K_new = Camera(K, np.array(D), model, 200, 150).rectify(dots(seen))
    for ray in rays:
        expected = (K_new @ ray)[:2]
        assert np.abs(centre(image, expected) - expected).max() < 0.2


def test_without_distortion_nothing_changes():
    image = np.random.default_rng().integers(0, 255, (150, 200, 3), dtype=np.uint8)
    rectified, K_new = Camera(K, np.zeros(5), "plumb_bob", 200, 150).rectify(image)
    assert rectified is image
    np.testing.assert_array_equal(K_new, K)


@pytest.mark.parametrize("model", ["plumb_bob", "rational_polynomial", "equidistant", "fisheye", "none"])
@pytest.mark.parametrize("count", range(16))
def test_every_number_of_coefficients_rectifies_or_is_refused(model, count):
    """No camera_info ends in an error of OpenCV, which says neither the value nor the remedy."""
    rng = np.random.default_rng()
    image = rng.integers(0, 255, (150, 200, 3), dtype=np.uint8)
    assert Camera(K, np.zeros(count), model, 200, 150).rectify(image)[0] is image
    if not count:
        return
    D = rng.uniform(-0.01, 0.01, count)
    fisheye = model in ("equidistant", "fisheye")
    if fisheye and count > 4:
        assert Camera(K, np.append(D[:4], np.zeros(count - 4)), model, 200, 150).rectify(image)[0].shape == image.shape
    if count in ({4} if fisheye else {4, 5, 8, 12, 14} if model != "none" else ()):
        assert Camera(K, D, model, 200, 150).rectify(image)[0].shape == image.shape
    else:
        with pytest.raises(ValueError, match=re.escape(str(D[0])) if model != "none" else "'none'"):
            Camera(K, D, model, 200, 150)


@pytest.mark.parametrize(
    "change, says",
    [(dict(K=np.diag([0.0, 1, 1])), "focal lengths"), (dict(K=np.full((3, 3), np.inf)), "finite"), (dict(D=np.array([np.nan])), "D = "),
     (dict(model="magic", D=K[0]), "'magic'"), (dict(width=0), "0 x 150"), (dict(K=np.diag([9.0, 9, 0])), "the last value 1"),
     *[(dict(D=np.full(n, 0.01), model=m), f"{m} takes .* coefficients, not {n};") for m, n in
       (("plumb_bob", 3), ("rational_polynomial", 6), ("plumb_bob", 1), ("equidistant", 2), ("fisheye", 14))]],
)  # fmt: skip
def test_impossible_cameras_are_refused_in_one_line(change, says):
    with pytest.raises(ValueError, match=says) as error:
        Camera(**(dict(K=K, D=np.zeros(5), model="plumb_bob", width=200, height=150) | change))
    assert "\n" not in str(error.value)


def test_another_resolution_is_refused():
    with pytest.raises(ValueError, match="200 x 150 pixels, the image has 60 x 50"):
        Camera(K, np.zeros(5), "plumb_bob", 200, 150).rectify(np.zeros((50, 60, 3), np.uint8))
