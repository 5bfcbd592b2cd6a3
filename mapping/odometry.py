"""Poses refined by tracked image features: the network says how deep, the features say where.

A network's poses are right to about its patches; tracked corners are right to a fraction of a pixel. So corners get
their first depth from the network, are tracked from frame to frame, and give every frame's pose; a bundle adjustment of
the last keyframes then frees them from the network's errors of depth, of scale between frames and, for cameras that are
not calibrated, of focal length. Where few or none can be tracked (views far apart, blur, darkness, no texture, a jump),
matched keypoints help; where these fail, too, the network's motion stands alone until features return, unless dense optical
flow contradicts it. Tracking by features with geometry from a multi-view
network: HyVGGT-VO, ScaRF-SLAM (2026).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from speed3r_ros.mapping.bundle import Observations, Scene, adjust, focal_information
from speed3r_ros.mapping.geometry import inverse, rotation_angle
from speed3r_ros.model.types import Estimate, Tracking, resize_intrinsics

WIDTH = 640  # pixels of the longer side at most: more costs time and gains little
REACH = 3.0  # pixels of reprojection error that a landmark may have
YOUNG = 3.0  # times that, while its depth is still the network's
LEAST = 20  # landmarks that determine a pose; fewer may agree by chance
AGREE = 0.4  # share of tracked landmarks that must agree with a pose
SPARSE = 0.3  # share of the last landmarks below which too few are tracked to trust them alone: views far apart
SPACING = 10  # pixels between corners
QUALITY = 0.003  # of a corner, relative to the best of the image
TRUSTED = 0.02  # confidence above which the network's depth may start a landmark; the adjustment sees to the rest
TURNOVER = 0.7  # a keyframe is due when fewer of the last one's landmarks are left
FLOW = 25.0  # ... or when they have moved by more pixels than this
PATIENCE = 10  # ... or after as many frames
DOUBTFUL = 0.7  # share of landmarks found again below which a change of the exposure may be why,
EXPOSURE = 0.02  # ... if brightness has changed by so much
STILL = 0.4  # pixels, root mean square, by which a camera that stands still may seem to have moved the image,
SIGNIFICANT = 3.0  # ... or so many standard errors of that motion,
STILL_MEDIAN = 1.2  # ... pixels by which noise may have moved its median landmark, and
STILL_SPREAD = 3.0  # ... times that, or times a quarter of a pixel if it is less, by which 85 % of them may have moved
STILL_LEFT = 0.4  # share of the keyframe's landmarks below which even a camera that stands still gets a new one
SIGMA_DEPTH = 4.0  # of the logarithm of the network's depth: a start, not a measurement
JUMP = math.log(1.25)  # of the scale of the network's depth: it has changed its unit
FOCAL_NETWORK = 0.17  # sigma of the logarithm of the network's focal length: mostly off by 4 to 12 %, once by 22
FOCAL_USUAL = 0.2  # sigma of the same of cameras on robots and in phones, about a field of view of
USUAL_FOV = math.radians(65.0)
FOCAL_TURN = math.radians(15.0)  # turn within a window that shows the focal length; shifts alone hardly do
FOCAL_SHARE = 0.02  # of a window's information on the focal length that is new: windows overlap
FOCAL_FLOOR = 0.01  # sigma below which the focal length is not believed to be known
FIXED = 3  # oldest keyframes of the window that an adjustment does not move
EDGES = 600  # pixels of the strongest edges, one in each cell of
CELL = 8  # ... so many pixels a side, and
EDGE = 25.0  # ... of at least this gradient, whose dense optical flow is looked at without landmarks and keypoints
ROUND_TRIP = 1.5  # pixels by which the flow forwards and backwards may differ
COARSE = 6.0  # pixels of reprojection error that this flow may have at the network's depth
MAJORITY = 0.5  # share of these pixels that must agree with a pose
CONTRADICTION = math.radians(5.0)  # between that pose and the network's: the flow's is the coarser one, but never wild
RECENT = 3  # keyframes that keypoints are matched with
KEYPOINTS = 800
DISTINCT = 0.8  # Lowe's ratio

TRACKER = dict(
    winSize=(17, 17),
    maxLevel=4,
    criteria=(cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 0.03),
    flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
)


@dataclass
class View:
    """A grey image with the network's depth, and what is known of its camera.

    Where there was no time for the network, T_network is None, and the depth, if any, is carried over from another view.
    """

    number: int
    grey: np.ndarray  # (H, W) uint8
    calibrated: bool
    K: np.ndarray  # (3, 3), of `grey`
    T_world_cam: np.ndarray
    scale: float  # of the depth
    T_network: np.ndarray | None = None  # camera-to-world
    depth: np.ndarray | None = None  # (h, w)
    confidence: np.ndarray | None = None  # (h, w)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # landmarks seen, ascending
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    keypoints: tuple[np.ndarray, np.ndarray] | None = None
    still: bool = False  # at the last keyframe's pose

    def network_depth(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unscaled depth (M,), NaN where it has none, and confidence (M,) of the network at pixels (M, 2) of `grey`."""
        (height, width), (h, w) = self.grey.shape, self.depth.shape
        x, y = ((pixels + 0.5) * [w / width, h / height] - 0.5).round().astype(int).T.clip(0, [[w - 1], [h - 1]])
        depth = self.depth[y, x].astype(np.float64)
        depth[~np.isfinite(depth) | (depth <= 0)] = np.nan
        return depth, self.confidence[y, x]

    def unproject(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points (M, 3) of pixels (M, 2) at the network's depth, and which of them can be trusted."""
        depth, confidence = self.network_depth(pixels)
        ray = (pixels - self.K[:2, 2]) / [self.K[0, 0], self.K[1, 1]]
        camera = np.concatenate([ray, np.ones((len(ray), 1))], 1) * (depth * self.scale)[:, None]
        trusted = (confidence >= TRUSTED) & np.isfinite(depth)
        return camera @ self.T_world_cam[:3, :3].T + self.T_world_cam[:3, 3], trusted

    def carry_depth(self, source: View) -> None:
        """Take over the depth of another view, seen from here; what that did not see gets the depth next to it."""
        (height, width), (h, w) = source.grey.shape, source.depth.shape
        y, x = np.mgrid[0:h:2, 0:w:2].reshape(2, -1)
        pixels = (np.stack([x, y], 1) + 0.5) * [width / w, height / h] - 0.5
        points, trusted = source.unproject(pixels)
        T_cam_world = inverse(self.T_world_cam)
        camera = points @ T_cam_world[:3, :3].T + T_cam_world[:3, 3]
        h, w = h // 4, w // 4  # twice as coarse as the points, so that they leave no holes
        with np.errstate(all="ignore"):
            pixels = camera[:, :2] / camera[:, 2:] * [self.K[0, 0], self.K[1, 1]] + self.K[:2, 2]
            cell = np.floor((pixels + 0.5) * [w / width, h / height])
        seen = np.flatnonzero(trusted & (camera[:, 2] > 0) & ((cell >= 0) & (cell < [w, h])).all(1))
        seen = seen[np.argsort(-camera[seen, 2], kind="stable")]  # what is nearer comes last and stays
        u, v = cell[seen].astype(int).T
        self.depth, self.confidence = np.full((h, w), np.nan), np.zeros((h, w))
        self.depth[v, u] = camera[seen, 2] / self.scale
        self.confidence[v, u] = source.confidence[y[seen], x[seen]]
        holes = np.isnan(self.depth)  # where the camera turned to; without landmarks there it would lose track
        if not holes.all():
            _, nearest = cv2.distanceTransformWithLabels(
                holes.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
            )
            source_of = np.zeros(nearest.max() + 1, int)
            source_of[nearest[~holes]] = np.flatnonzero(~holes)
            self.depth, self.confidence = (z.reshape(-1)[source_of[nearest]] for z in (self.depth, self.confidence))

    def observe(self, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Add landmarks that this view sees."""
        self.ids, self.pixels = np.concatenate([self.ids, ids]), np.concatenate([self.pixels, pixels])
        order = np.argsort(self.ids)
        self.ids, self.pixels = self.ids[order], self.pixels[order]

    def forget(self, ids: np.ndarray) -> None:
        """Remove landmarks."""
        left = ~np.isin(self.ids, ids)
        self.ids, self.pixels = self.ids[left], self.pixels[left]


class Odometry:
    """Refines the estimates of one camera's stream, in bounded memory. Deterministic.

    features: landmarks tracked at most. window: keyframes that are adjusted together.
    """

    def __init__(self, features: int = 300, window: int = 7) -> None:
        self.features, self.window = features, window
        self._sift = cv2.SIFT_create(KEYPOINTS)
        self._dense_flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.reset()

    def reset(self) -> None:
        """Forget the past: the next estimate's pose is taken as it is."""
        self._ids = np.zeros(0, np.int64)  # landmarks, ascending
        self._points = np.zeros((0, 3))  # ... in the world
        self._next_id = 0
        self._keyframes: list[View] = []
        self._keyframe_count = 0
        self._last: View | None = None
        self._last_estimated: View | None = None
        self._number = 0
        self._motion = np.eye(4)  # of the camera, from the view before the last to the last
        self._scale = 1.0
        self._K: np.ndarray | None = None  # of an uncalibrated camera, at the size of the grey images
        self._focal_information = FOCAL_NETWORK**-2 + FOCAL_USUAL**-2
        self._unconfirmed = np.zeros(2)  # sigma of translation and rotation that unconfirmed poses have left behind
        self.tracked = 0  # landmarks that agreed with the last pose

    def refine(self, image: np.ndarray, estimate: Estimate, calibrated: bool) -> Estimate:
        """The estimate of rectified image (H, W, 3) uint8 RGB with a better pose, K when not calibrated, and depth in the
        scale of the past; WEAK, and with more doubt for good, where no features confirm the pose. An estimate without a pose
        is returned as it is."""
        if estimate.T_world_cam is None:
            return estimate
        grey, last = grey_image(image), self._last
        opens = last is None
        K = resize_intrinsics(estimate.K, estimate.depth.shape, grey.shape)
        T = estimate.T_world_cam
        view = View(self._number, grey, calibrated, K, T, self._scale, T, estimate.depth, estimate.confidence)
        if last is not None:
            view.T_world_cam = self._by_network(self._last_estimated, view)
            if last.grey.shape != view.grey.shape or last.calibrated != calibrated:  # another camera, so to speak
                unconfirmed = self._unconfirmed
                self.reset()
                self._scale, self._unconfirmed, last = view.scale, unconfirmed, None
                view.number = self._number
        if not calibrated:
            self._K = view.K = self._likely(view) if last is None else self._K
        if last is None:
            self._add_keyframe(view)
        else:
            self.tracked = 0
            tracked = self._track(last, view)
            few = not tracked or (self.tracked < SPARSE * len(last.ids) and not view.still)
            matched = few and self._match(view)
            if not tracked and not matched:
                self._contradict(last, view)
            if matched or not tracked or self._is_due(view):
                self._add_keyframe(view)
        self._last_estimated = view
        self._go_on(view)
        h, w = estimate.depth.shape
        sigma, tracking = estimate.pose_sigma * [self._scale, 1.0], estimate.tracking
        if not opens and not self.tracked:
            self._unconfirmed = np.hypot(self._unconfirmed, sigma)
            tracking = Tracking.WEAK if tracking is Tracking.TRACKING else tracking
        return replace(
            estimate,
            tracking=tracking,
            T_world_cam=view.T_world_cam,
            depth=estimate.depth * np.float32(self._scale),
            K=estimate.K if calibrated else resize_intrinsics(view.K, view.grey.shape, (h, w)),
            pose_sigma=np.hypot(sigma, self._unconfirmed),
        )

    def follow(self, image: np.ndarray, K: np.ndarray | None) -> np.ndarray | None:
        """Camera-to-world pose (4, 4) of a rectified image (H, W, 3) uint8 RGB that the network has no time for, from the
        landmarks alone; K (3, 3) is the camera's if calibrated. None when they do not suffice: nothing has changed then."""
        last, grey = self._last, grey_image(image)
        if last is None or last.grey.shape != grey.shape or last.calibrated != (K is not None):
            return None
        K = last.K if K is None else resize_intrinsics(K, image.shape[:2], grey.shape)
        view = View(self._number, grey, last.calibrated, K, last.T_world_cam @ self._motion, self._scale)
        if not self._track(last, view, self._shift(last, view)):
            return None
        if self._is_due(view):
            view.carry_depth(self._last_estimated)
            self._add_keyframe(view)
        self._go_on(view)
        return view.T_world_cam

    def _go_on(self, view: View) -> None:
        self._motion = np.eye(4) if self._last is None else inverse(self._last.T_world_cam) @ view.T_world_cam
        self._last = self._keyframes[-1] if view.still else view  # so that errors of tracking do not add up
        self._number += 1

    @staticmethod
    def _likely(view: View) -> np.ndarray:
        """The network's K, drawn towards the focal length of usual lenses."""
        usual = view.grey.shape[1] / 2 / math.tan(USUAL_FOV / 2) / view.K[0, 0]
        factor = usual ** (FOCAL_USUAL**-2 / (FOCAL_NETWORK**-2 + FOCAL_USUAL**-2))
        return view.K * np.array([[factor, 1, 1], [1, factor, 1], [1, 1, 1]])

    def _by_network(self, last: View, view: View) -> np.ndarray:
        """The pose that continues the last one that the network has seen by the network's motion."""
        motion = inverse(last.T_network) @ view.T_network
        motion[:3, 3] *= self._scale
        return last.T_world_cam @ motion

    def _points_of(self, ids: np.ndarray) -> np.ndarray:
        return self._points[np.searchsorted(self._ids, ids)]

    def _shift(self, last: View, view: View) -> np.ndarray:
        """How far (M, 2) the last view's landmarks move in the image if the view's guessed pose is right."""
        points, pixels = self._points_of(last.ids), []
        for T_world_cam in (last.T_world_cam, view.T_world_cam):
            T = inverse(T_world_cam)
            camera = points @ T[:3, :3].T + T[:3, 3]
            ray = camera[:, :2] / np.where(camera[:, 2:] > 0, camera[:, 2:], np.nan)
            pixels.append(ray * [view.K[0, 0], view.K[1, 1]])
        shift = pixels[1] - pixels[0]
        wild = ~(np.abs(shift) < view.grey.shape[1] / 4).all(1)
        shift[wild] = 0 if wild.all() else np.median(shift[~wild], axis=0)
        return shift

    def _track(self, last: View, view: View, shift: np.ndarray | float = 0.0) -> bool:
        """Follow the last view's landmarks, which have moved by about `shift` pixels, into this one and solve its pose;
        False when that fails."""
        if len(last.ids) < LEAST:
            return False
        pixels, good = flow(last, view.grey, shift)
        if good.mean() < DOUBTFUL and abs((ratio := brightness_ratio(last.grey, view.grey)) - 1) > EXPOSURE:
            others, found = flow(last, cv2.convertScaleAbs(view.grey, alpha=ratio), shift)
            pixels, good = (others, found) if found.mean() > max(AGREE, good.mean()) else (pixels, good)
        ids, pixels = last.ids[good], pixels[good]
        keyframe = self._keyframes[-1]
        _, mine, theirs = np.intersect1d(ids, keyframe.ids, assume_unique=True, return_indices=True)
        if stands_still(keyframe.pixels[theirs], pixels[mine]):
            view.still, view.T_world_cam, self.tracked = True, keyframe.T_world_cam, len(mine)
            view.observe(ids[mine], pixels[mine])
            if self._jumps(view):
                self._scale = view.scale = self._measured_scale(view)
            return True
        # corners that no second keyframe has confirmed may be at a wrong depth, and are yet good corners
        confirmed = np.isin(ids, np.concatenate([k.ids for k in self._keyframes[:-1]] or [ids[:0]]))
        solved = solve_pose(self._points_of(ids), pixels, view.K, np.where(confirmed, REACH, YOUNG * REACH))
        if solved is None or solved[1].sum() < AGREE * len(ids):
            return False
        view.T_world_cam, agree = solved
        self.tracked = int(agree.sum())
        view.observe(ids[agree], pixels[agree])
        return True

    def _match(self, view: View) -> bool:
        """Find recent keyframes' keypoints in the view and solve its pose by them; False when no more of them agree than
        landmarks were tracked, of which otherwise those stay that agree as well."""
        pixels, descriptors = self._keypoints(view)
        for keyframe in self._keyframes[: -RECENT - 1 : -1]:
            theirs, their_descriptors = self._keypoints(keyframe)
            if min(len(pixels), len(theirs)) < LEAST:
                continue
            pairs = cv2.BFMatcher().knnMatch(descriptors, their_descriptors, k=2)
            pairs = [p[0] for p in pairs if len(p) == 2 and p[0].distance < DISTINCT * p[1].distance]
            mine = pixels[[p.queryIdx for p in pairs]]
            theirs = theirs[[p.trainIdx for p in pairs]]
            points, trusted = keyframe.unproject(theirs)
            solved = solve_pose(points[trusted], mine[trusted], view.K, np.full(trusted.sum(), YOUNG * REACH))
            if solved is None or solved[1].sum() <= self.tracked:
                continue
            view.T_world_cam, agree = solved
            stays = reprojection_error(view.T_world_cam, view.K, self._points_of(view.ids), view.pixels) < YOUNG * REACH
            view.forget(view.ids[~stays])
            ids = self._new_landmarks(points[trusted][agree])
            keyframe.observe(ids, theirs[trusted][agree])
            view.observe(ids, mine[trusted][agree])
            self.tracked = len(view.ids)
            return True
        return False

    def _contradict(self, last: View, view: View) -> None:
        """Without landmarks: take the pose that dense optical flow of the last view's edges gives, if the network's turn is far
        from it. Where views look alike from several sides, as a bare box does, a network mistakes one for another."""
        theirs = edge_pixels(last.grey)
        if last.depth is None or len(theirs) < LEAST:
            return
        forwards = self._dense_flow.calc(last.grey, view.grey, None)
        backwards = self._dense_flow.calc(view.grey, last.grey, None)
        mine = theirs + forwards[theirs[:, 1], theirs[:, 0]]
        height, width = view.grey.shape
        inside = ((mine >= 0) & (mine.round() < [width, height])).all(1)
        theirs, mine = theirs[inside], mine[inside]
        x, y = mine.round().astype(int).T
        found = np.abs(mine + backwards[y, x] - theirs).max(1) < ROUND_TRIP
        points, trusted = last.unproject(theirs[found])
        solved = solve_pose(points[trusted], mine[found][trusted], view.K, np.full(trusted.sum(), COARSE))
        if solved is None or solved[1].sum() < MAJORITY * trusted.sum():
            return
        if rotation_angle(solved[0][:3, :3].T @ view.T_world_cam[:3, :3]) > CONTRADICTION:
            view.T_world_cam = solved[0]

    def _keypoints(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        if view.keypoints is None:
            found, descriptors = self._sift.detectAndCompute(view.grey, None)
            pixels = np.array([p.pt for p in found], np.float32).reshape(-1, 2)
            view.keypoints = pixels, np.zeros((0, 128), np.float32) if descriptors is None else descriptors
        return view.keypoints

    def _new_landmarks(self, points: np.ndarray) -> np.ndarray:
        ids = np.arange(self._next_id, self._next_id + len(points))
        self._next_id += len(points)
        self._ids, self._points = np.concatenate([self._ids, ids]), np.concatenate([self._points, points])
        return ids

    def _is_due(self, view: View) -> bool:
        last = self._keyframes[-1]
        _, mine, theirs = np.intersect1d(view.ids, last.ids, assume_unique=True, return_indices=True)
        if view.still:
            return len(mine) < STILL_LEFT * len(last.ids)
        if len(mine) < TURNOVER * len(last.ids) or view.number - last.number >= PATIENCE or self._jumps(view):
            return True
        return bool(np.median(np.linalg.norm(view.pixels[mine] - last.pixels[theirs], axis=1)) > FLOW)

    def _add_keyframe(self, view: View) -> None:
        self._keyframes.append(view)
        self._keyframe_count += 1
        if self._jumps(view):
            view.scale = self._measured_scale(view)
        self._adjust(view.calibrated)
        self._scale = view.scale = self._measured_scale(view)
        free = self.features - len(view.ids)
        if free > 0:
            mask = np.full(view.grey.shape, 255, np.uint8)
            for x, y in view.pixels.astype(int).tolist():
                cv2.circle(mask, (x, y), SPACING, 0, -1)
            corners = cv2.goodFeaturesToTrack(view.grey, free, QUALITY, SPACING, mask=mask, blockSize=5)
            if corners is not None:
                points, trusted = view.unproject(corners[:, 0])
                view.observe(self._new_landmarks(points[trusted]), corners[trusted, 0])
        if len(self._keyframes) > self.window:
            self._keyframes.pop(0)
        seen = np.unique(np.concatenate([k.ids for k in self._keyframes]))
        self._points, self._ids = self._points_of(seen), seen

    def _measured_scale(self, view: View) -> float:
        """What brings the network's depth to the landmarks that the view shares with earlier keyframes; the scale that it
        has if they are too few."""
        T_cam_world = inverse(view.T_world_cam)
        z = self._points_of(view.ids) @ T_cam_world[2, :3] + T_cam_world[2, 3]
        depth, confidence = view.network_depth(view.pixels)
        usable = (z > 0) & np.isfinite(depth) & (confidence >= TRUSTED)
        return float(np.median(z[usable] / depth[usable])) if usable.sum() >= LEAST else view.scale

    def _jumps(self, view: View) -> bool:
        return view.depth is not None and abs(math.log(self._measured_scale(view) / view.scale)) > JUMP

    def _tied(self) -> np.ndarray:
        """Indices (M,), ascending, of the keyframes that LEAST landmarks each tie to the newest, directly or through others."""
        ids = np.unique(np.concatenate([k.ids for k in self._keyframes]))
        sees = np.stack([np.isin(ids, k.ids, assume_unique=True) for k in self._keyframes]).astype(int)
        shares = sees @ sees.T >= LEAST
        tied = np.arange(len(sees)) == len(sees) - 1
        for _ in sees:
            tied |= shares[tied].any(0)
        return np.flatnonzero(tied)

    def _adjust(self, calibrated: bool) -> None:
        tied = self._tied()
        keyframes = [self._keyframes[i] for i in tied]
        ids, counts = np.unique(np.concatenate([k.ids for k in keyframes]), return_counts=True)
        ids = ids[counts > 1]
        if len(ids) < LEAST:
            return
        which = [np.isin(k.ids, ids) for k in keyframes]
        seen = Observations(
            np.repeat(np.arange(len(keyframes)), [m.sum() for m in which]),
            np.searchsorted(ids, np.concatenate([k.ids[m] for k, m in zip(keyframes, which)])),
            np.concatenate([k.pixels[m] for k, m in zip(keyframes, which)]).astype(np.float64),
            np.concatenate([k.scale * k.network_depth(k.pixels[m])[0] for k, m in zip(keyframes, which)]),
        )
        # at first, and after a gap that no landmarks bridge, all but the pose of the first is a guess
        fixed = 1 if self._keyframe_count <= self.window else max(1, int((tied < FIXED).sum()))
        R = np.stack([k.T_world_cam[:3, :3] for k in keyframes])
        calibrated = calibrated or rotation_angle(R[0].T @ R).max() < FOCAL_TURN
        K, information = keyframes[-1].K, np.inf if calibrated else self._focal_information
        scene = Scene(inverse(np.stack([k.T_world_cam for k in keyframes])), self._points_of(ids), K, information)
        scene, error = adjust(scene, seen, fixed, SIGMA_DEPTH)
        self._points[np.searchsorted(self._ids, ids)] = scene.points
        wrong = error > 2 * REACH
        for i, (keyframe, T_world_cam) in enumerate(zip(keyframes, inverse(scene.T_cam_world))):
            keyframe.T_world_cam = T_world_cam
            keyframe.forget(ids[seen.point[wrong & (seen.view == i)]])
        if not calibrated:
            gained = FOCAL_SHARE * focal_information(scene, seen, fixed, SIGMA_DEPTH)
            self._focal_information = min(self._focal_information + gained, FOCAL_FLOOR**-2)
            self._K = scene.K
            for keyframe in self._keyframes:
                keyframe.K = scene.K


def grey_image(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (h, w) uint8, shrunk to WIDTH if it is larger."""
    shrink = min(1.0, WIDTH / max(image.shape[:2]))
    if shrink < 1:
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def edge_pixels(grey: np.ndarray) -> np.ndarray:
    """Columns and rows (N, 2) int of the strongest edges of an image (h, w) uint8, at most EDGES, spread over its cells."""
    smooth = cv2.GaussianBlur(grey, (0, 0), 1.0)
    gradient = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    rows, columns = (side // CELL for side in grey.shape)
    cells = gradient[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL).swapaxes(1, 2)
    cells = cells.reshape(rows * columns, CELL * CELL)
    best, strength = cells.argmax(1), cells.max(1)
    chosen = np.argsort(-strength, kind="stable")[:EDGES]
    chosen = chosen[strength[chosen] > EDGE]
    row, column = (index * CELL + within for index, within in zip(divmod(chosen, columns), divmod(best[chosen], CELL)))
    return np.stack([column, row], 1)


def flow(last: View, grey: np.ndarray, shift: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Where the last view's landmarks, which have moved by about `shift` pixels, are in an image (h, w) uint8: pixels (N, 2),
    and which of them (N,) are found, the same forwards and backwards."""
    guess = (last.pixels + shift).astype(np.float32)
    pixels, found, _ = cv2.calcOpticalFlowPyrLK(last.grey, grey, last.pixels, guess, **TRACKER)
    guess = (pixels - shift).astype(np.float32)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(grey, last.grey, pixels, guess, **TRACKER)
    height, width = grey.shape
    good = (found[:, 0] > 0) & (found_back[:, 0] > 0) & (np.abs(back - last.pixels).max(1) < 0.7)
    good &= (pixels >= 2).all(1) & (pixels < [width - 3, height - 3]).all(1)
    return pixels, good


def brightness_ratio(grey: np.ndarray, other: np.ndarray) -> float:
    """How much brighter `grey` (h, w) uint8 is than `other`, by the median ratio of pixels in the same place: the tracker takes
    a feature's brightness for constant, which a camera's automatic exposure does not keep."""
    a, b = (x[::4, ::4].astype(np.float32) + 1 for x in (grey, other))
    return float(np.median(a / b))


def stands_still(before: np.ndarray, now: np.ndarray) -> bool:
    """Whether pixels (N, 2) are where they were, as far as noise lets tell, by the shift, turn and zoom that fit most of them.

    False for fewer than LEAST pixels, and where they disagree.
    """
    if len(before) < LEAST:
        return False
    median, most = np.percentile(np.linalg.norm(now - before, axis=1), (50, 85))
    if median > STILL_MEDIAN or most > STILL_SPREAD * max(median, 0.25):  # near landmarks move while far ones stay
        return False
    cv2.setRNGSeed(0)
    similarity, agree = cv2.estimateAffinePartial2D(before, now, ransacReprojThreshold=STILL_MEDIAN)
    if similarity is None or agree.sum() < max(LEAST, AGREE * len(before)):
        return False
    before, now = (x[agree[:, 0] > 0] for x in (before, now))
    fitted = before @ similarity[:, :2].T + similarity[:, 2]
    moved = np.square(fitted - before).sum(1).mean()
    noise = 4 * np.square(fitted - now).sum() / (2 * len(now) - 4) / len(now)  # what four parameters take of it
    return bool(moved < max(STILL**2, SIGNIFICANT**2 * noise))


def solve_pose(
    points: np.ndarray, pixels: np.ndarray, K: np.ndarray, reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Camera-to-world pose (4, 4) from points (N, 3) in the world seen at pixels (N, 2), and which of them (N,) agree within
    reach (N,) pixels; None when fewer than LEAST do. RANSAC on minimal samples, then SQPnP (Terzakis and Lourakis, ECCV 2020)
    and least squares on the inliers."""
    if len(points) < LEAST:
        return None
    pixels = pixels.astype(np.float64)
    cv2.setRNGSeed(0)
    try:
        found, _, _, inliers = cv2.solvePnPRansac(
            points, pixels, K, None, iterationsCount=150, reprojectionError=float(np.median(reach)),
            confidence=0.999, flags=cv2.SOLVEPNP_AP3P,
        )  # fmt: skip
        if not found:
            return None
        inliers = inliers[:, 0]
        # not the pose that comes with them: that is EPnP's, which is far off for one in ten planes
        _, r, t = cv2.solvePnP(points[inliers], pixels[inliers], K, None, flags=cv2.SOLVEPNP_SQPNP)
        for refine in (True, True, False):
            T_cam_world = np.eye(4)
            T_cam_world[:3, :3], T_cam_world[:3, 3] = cv2.Rodrigues(r)[0], t[:, 0]
            agree = reprojection_error(inverse(T_cam_world), K, points, pixels) < reach
            if agree.sum() < LEAST:
                return None
            if refine:
                r, t = cv2.solvePnPRefineLM(points[agree], pixels[agree], K, None, r, t)
    except cv2.error:  # degenerate points
        return None
    return (inverse(T_cam_world), agree) if np.isfinite(T_cam_world).all() else None


def reprojection_error(T_world_cam: np.ndarray, K: np.ndarray, points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Distance (N,) in pixels between pixels (N, 2) and where a camera (4, 4), camera-to-world, sees points (N, 3) of the
    world; infinite behind it."""
    T_cam_world = inverse(T_world_cam)
    camera = points @ T_cam_world[:3, :3].T + T_cam_world[:3, 3]
    z = np.maximum(camera[:, 2:], 1e-9)
    error = np.linalg.norm(camera[:, :2] / z * [K[0, 0], K[1, 1]] + K[:2, 2] - pixels, axis=1)
    return np.where(camera[:, 2] > 0, error, np.inf)
