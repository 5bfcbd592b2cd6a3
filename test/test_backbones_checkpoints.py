"""Published checkpoints: key sets equal to the manifests, and one clear line for every way in which a file can be wrong."""

import pytest
import torch
from goldens import manifest, published, tiny
from safetensors.torch import save_file

from speed3r_ros.model.backbones.da3 import Da3, Da3Config
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config
from speed3r_ros.model.backbones.registry import BACKBONES, build_backbone, load_backbone, load_into, read
from speed3r_ros.model.backbones.tracker import TrackerConfig
from speed3r_ros.model.backbones.vggt import Vggt, VggtConfig

MANIFESTS = {
    "pi3": "pi3", "pi3x": "pi3x", "speed3r-pi3": "speed3r_pi3",
    "vggt-1b": "vggt_1b", "vggt-1b-commercial": "vggt_1b", "streamvggt": "streamvggt",
    "da3-small": "da3_small", "da3-base": "da3_base", "da3-large": "da3_large", "da3-giant": "da3_giant",
    "da3-nested": "da3nested_giant_large", "da3-metric": "da3metric_large", "da3-mono": "da3mono_large",
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_keys_and_shapes_equal_the_manifest(name):
    model = build_backbone(name, "meta")
    keys = {
        k: tuple(s) for k, s in manifest(MANIFESTS[name])[0].items() if not k.startswith(getattr(model, "UNUSED", ()))
    }
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == keys


def tiny_pi3():
    return Pi3(Pi3Config(128, 2, 2, 5, 6, 5, 2, 64))


@pytest.fixture(scope="module")
def state():
    return published(*tiny("pi3_tiny"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_round_trip(tmp_path, state, suffix):
    (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"model{suffix}")
    with torch.device("meta"):
        model = tiny_pi3()
    model = load_into(model, tmp_path, "")
    assert not model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def refused(path, says):
    with pytest.raises(ValueError, match=says) as error:
        load_into(tiny_pi3(), path, "do this")
    assert "\n" not in str(error.value)


def renamed(state):
    state["aaa.weight"] = state.pop("camera_head.fc_t.bias")


def missing(state):
    del state["camera_head.fc_t.bias"]


def reshaped(state):
    state["camera_head.fc_t.bias"] = torch.zeros(7)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "change, says",
    [
        (renamed, r"'aaa.weight' is \(3,\) in the file but unknown in the network; do this"),
        (missing, r"'camera_head.fc_t.bias' is missing in the file but \(3,\) in the network; do this"),
        (reshaped, r"'camera_head.fc_t.bias' is \(7,\) in the file but \(3,\) in the network; do this"),
    ],
)
def test_first_differing_key_is_named_with_both_shapes(tmp_path, state, suffix, change, says):
    state = dict(state)
    change(state)
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    refused(path, says)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_truncated_file(tmp_path, state, suffix, kept):
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refused(path, f"model{suffix}: truncated")


@pytest.mark.parametrize("kept", [1.0, 0.6])
def test_files_of_old_pytorch_load_too(tmp_path, state, kept):
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    if kept < 1:
        return refused(path, "model.pt: truncated")
    loaded = load_into(tiny_pi3(), path, "do this").state_dict()
    for key, value in loaded.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert all(value.is_meta and value.shape == state[key].shape for key, value in read(path, "meta").items())


def test_other_files(tmp_path):
    refused(tmp_path, "0 checkpoints .*expected one; do this")
    refused(tmp_path / "absent", "absent: does not exist; do this")
    torch.save({"model": {}}, tmp_path / "model.pt")
    refused(tmp_path, "not a plain table of tensors")
    torch.save({0: torch.zeros(1)}, tmp_path / "model.pt")
    refused(tmp_path, "not a plain table of tensors")
    torch.save(tiny_pi3(), tmp_path / "model.pt")
    refused(tmp_path, "truncated or not a checkpoint of tensors")
    (tmp_path / "model.pth").touch()
    refused(tmp_path, "2 checkpoints")
    (tmp_path / "model.bin").touch()
    refused(tmp_path / "model.bin", "model.bin: not one of .safetensors, .pt, .pth; do this")
    with pytest.raises(ValueError, match="~nobody-here/pi3.pt: there is no such home folder"):
        load_backbone("pi3", "~nobody-here/pi3.pt")
    with pytest.raises(ValueError, match="hal9000.*choose one of pi3, "):
        load_backbone("hal9000", tmp_path)


def test_a_tensor_that_modules_share_may_be_stored_once(tmp_path):
    keys, aliases = tiny("da3_tiny")
    state = published(keys, aliases)
    assert not aliases.keys() & state.keys()
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Da3(Da3Config(128, 2, 8, 2, (3, 5, 6, 7), 64, (32, 48, 64, 64), table=5))
    loaded = load_into(model, tmp_path, "").state_dict()
    for alias, key in aliases.items():
        torch.testing.assert_close(loaded[alias], state[key], rtol=0, atol=0)
    del state[key]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="output_conv2_aux.0.2.(weight|bias)' is missing"):
        load_into(model, tmp_path, "")


def test_keys_of_parts_that_are_not_run_are_passed_over(tmp_path):
    state = published(*tiny("vggt_tiny"))
    torch.save(state, tmp_path / "model.pt")
    with torch.device("meta"):
        tracker = TrackerConfig(32, 64, 4, 2, 2)
        model = Vggt(VggtConfig(128, 2, 2, 5, 4, 4, 2, 4, 64, (32, 48, 64, 64), (0, 1, 2, 3), tracker))
    loaded = load_into(model, tmp_path, "").state_dict()
    assert state.keys() - loaded.keys() == {"aggregator.patch_embed.mask_token"} and loaded.keys() < state.keys()
