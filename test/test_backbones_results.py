"""What every backbone returns: points in the world's frame, nearest rotations."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from speed3r_ros.model.backbones.results import Reconstruction, nearest_rotation, rigid


def test_world_points_need_points_and_poses():
    depth, points = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4, 3)
    R = torch.from_numpy(Rotation.random(2).as_matrix()).float()[None]
    T = rigid(R, torch.randn(1, 2, 3))
    world = Reconstruction(depth, points, T_world_cam=T).world_points()
    torch.testing.assert_close(world[0, 1, 2, 3], T[0, 1, :3, :3] @ points[0, 1, 2, 3] + T[0, 1, :3, 3])
    for out, missing in (
        (Reconstruction(depth), "points and T_world_cam"),
        (Reconstruction(depth, points), "T_world_cam"),
        (Reconstruction(depth, T_world_cam=T), "points"),
    ):
        with pytest.raises(ValueError, match=f"^no world_points without {missing}: take a backbone for several views$"):
            out.world_points()


def test_the_nearest_rotation_is_that_of_scipy():
    m = np.random.default_rng().normal(size=(2, 50, 3, 3))
    expected = [Rotation.align_vectors(x.T, np.eye(3))[0].as_matrix() for x in m.reshape(-1, 3, 3)]
    found = nearest_rotation(torch.from_numpy(m)).reshape(-1, 3, 3)
    torch.testing.assert_close(found, torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-6)
