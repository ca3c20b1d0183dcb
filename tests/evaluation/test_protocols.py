from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

from udas.config import Config
from udas.errors import ConfigError, RunError
from udas.evaluation.protocols import PROTOCOLS, SUBSETS, ProtocolConfig, probabilities
from udas.taxonomy import load_taxonomy
from udas.validation import validate

CITYSCAPES = load_taxonomy("cityscapes19").classes


def pointwise(image):
    """Logits that depend on the pixel alone, so that they turn and move with the picture."""
    return torch.cat([3 * image, image[:, :1] * image[:, 1:2]], 1)


class Levels:
    """Two outputs; calling it gives the main one."""

    def __call__(self, image):
        return self.levels(image)[0]

    def levels(self, image):
        return 4 * image, 2 * image.flip(1)


def picture(height=24, width=40, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def protocol(**keys):
    return validate(ProtocolConfig, keys, "protocol")


def test_whole_picture_is_the_softmax_of_the_network():
    image = picture()
    assert torch.equal(probabilities(pointwise, image, PROTOCOLS["whole"]), pointwise(image).softmax(1))


def test_flips_of_an_equivariant_network_change_nothing():
    image = picture()
    plain = probabilities(pointwise, image, protocol())
    assert torch.allclose(probabilities(pointwise, image, protocol(flips=True)), plain)


def test_flips_average_the_mirrored_picture_of_other_networks():
    ramp = torch.linspace(0, 1, 40)

    def model(image):
        return pointwise(image) * ramp

    image = picture()
    mirrored = model(image.flip(-1)).softmax(1).flip(-1)
    expected = (model(image).softmax(1) + mirrored) / 2
    assert torch.allclose(probabilities(model, image, protocol(flips=True)), expected)


def test_scales_of_a_constant_picture_change_nothing():
    image = picture(1, 1).expand(-1, -1, 24, 40)
    plain = probabilities(pointwise, image, protocol())
    assert torch.allclose(
        probabilities(pointwise, image, protocol(scales=[0.5, 1, 1.75], flips=True)), plain, atol=1e-6
    )


def test_network_sees_the_input_size_at_every_scale():
    seen = []

    def model(image):
        seen.append(tuple(image.shape[-2:]))
        return pointwise(image)

    found = probabilities(model, picture(), protocol(input=[12, 20], scales=[1, 1.5]), (48, 80))
    assert seen == [(12, 20), (18, 30)]
    assert found.shape == (2, 4, 48, 80)
    assert torch.allclose(found.sum(1), torch.ones(2, 48, 80))


@pytest.mark.parametrize("corners", [False, True])
def test_logits_are_enlarged_before_the_softmax_unless_told_otherwise(corners):
    image, size = picture(), (31, 50)
    logits = F.interpolate(pointwise(image), size, mode="bilinear", align_corners=corners).softmax(1)
    shares = F.interpolate(pointwise(image).softmax(1), size, mode="bilinear", align_corners=corners)
    assert torch.equal(probabilities(pointwise, image, protocol(align_corners=corners), size), logits)
    upsampled = protocol(align_corners=corners, upsample="probabilities")
    assert torch.equal(probabilities(pointwise, image, upsampled, size), shares)


@pytest.mark.parametrize(
    ("window", "stride"), [((8, 8), (8, 8)), ((10, 12), (4, 7)), ((24, 40), (1, 1)), ((99, 9), (5, 9))]
)
def test_sliding_windows_of_a_pointwise_network_equal_the_whole_picture(window, stride):
    image = picture()
    slide = protocol(mode="slide", window=window, stride=stride)
    assert torch.allclose(
        probabilities(pointwise, image, slide), probabilities(pointwise, image, protocol()), atol=1e-6
    )


def test_sliding_windows_have_their_size_and_cover_every_pixel():
    visits = torch.zeros(1, 1, 23, 37)
    places = torch.arange(23 * 37, dtype=torch.float32).view(1, 1, 23, 37)

    def model(image):
        assert image.shape[-2:] == (10, 12)
        for place in image.flatten():
            visits.view(-1)[int(place)] += 1
        return image.expand(-1, 2, -1, -1)

    probabilities(model, places, protocol(mode="slide", window=[10, 12], stride=[7, 12]))
    assert visits.min() >= 1


def test_overlapping_windows_are_averaged_as_logits():
    image = torch.zeros(1, 1, 1, 3)
    answers = iter([torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]]), torch.tensor([[[[4.0, 5.0]], [[0.0, 0.0]]]])])
    found = probabilities(lambda _: next(answers), image, protocol(mode="slide", window=[1, 2], stride=[1, 1]))
    expected = torch.tensor([[[[1.0, 3.0, 5.0]], [[0.0, 0.0, 0.0]]]]).softmax(1)
    assert torch.allclose(found, expected)


def test_levels_are_fused_by_their_weights():
    image = picture()
    fused = probabilities(Levels(), image, protocol(fusion=[1, 0.5]))
    assert torch.allclose(fused, (4 * image + image.flip(1)).softmax(1))
    assert torch.allclose(probabilities(Levels(), image, protocol()), (4 * image).softmax(1))


def test_fusing_more_outputs_than_there_are_is_refused():
    with pytest.raises(RunError, match="fuses 2 outputs, this network has 1"):
        probabilities(pointwise, picture(), PROTOCOLS["seg_uncertainty"])


@pytest.mark.parametrize("upsample", ["logits", "probabilities"])
def test_excluded_classes_are_never_chosen(upsample):
    keys = {"upsample": upsample, "scales": [1, 0.5], "flips": True}
    found = probabilities(pointwise, picture(), protocol(**keys), (48, 80), excluded=[0, 2])
    assert found[:, [0, 2]].abs().max() == 0
    assert torch.allclose(found.sum(1), torch.ones(2, 48, 80))


def test_no_gradient_is_kept():
    image = picture().requires_grad_()
    assert not probabilities(pointwise, image, protocol(scales=[1, 2])).requires_grad


def test_every_preset_runs_and_says_what_it_does():
    for name, preset in PROTOCOLS.items():
        small = preset.model_copy(update={"input": (16, 32)})
        assert probabilities(Levels(), picture(), small, (32, 64)).shape == (2, 3, 32, 64), name
        assert preset.describe(CITYSCAPES).startswith(f"{name}: ")


def test_published_settings():
    assert PROTOCOLS["hrda"].window == (1024, 1024)
    assert PROTOCOLS["hrda"].stride == (512, 512)
    assert PROTOCOLS["hrda"].input == (1024, 2048)
    assert PROTOCOLS["dacs"].compare == (512, 1024)
    assert PROTOCOLS["adaptsegnet"].input == (512, 1024)
    assert PROTOCOLS["adaptsegnet"].align_corners
    assert not PROTOCOLS["daformer"].align_corners
    assert PROTOCOLS["fda"].input == (576, 1344)
    assert PROTOCOLS["fda"].upsample == PROTOCOLS["seg_uncertainty"].upsample == "probabilities"
    assert PROTOCOLS["proda"].reading == "ignore"
    assert PROTOCOLS["proda"].restrict
    assert PROTOCOLS["seg_uncertainty"].scales == (1.0, 1.25)
    assert PROTOCOLS["seg_uncertainty"].flips
    assert PROTOCOLS["seg_uncertainty"].fusion == (1.0, 0.5)


def test_synthia_subsets_are_the_published_train_ids():
    ids = {name: [CITYSCAPES.index(c) for c in protocol(subset=name).scored(CITYSCAPES)] for name in SUBSETS}
    assert ids["synthia16"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18]
    assert ids["synthia13"] == [0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18]


def test_the_reading_is_said():
    subset = protocol(preset="daformer", subset="synthia16").describe(CITYSCAPES)
    ignore = protocol(preset="proda", subset="synthia13").describe(CITYSCAPES)
    assert "16 of 19 classes, reading 'subset': pixels of the others count as errors" in subset
    assert "13 of 19 classes, reading 'ignore': pixels of the others are dropped" in ignore
    assert subset.startswith("daformer, changed: ")


def test_a_class_that_the_label_space_lacks_is_named():
    with pytest.raises(ConfigError, match=r"no class 'raod'.*did you mean 'road'"):
        protocol(subset=["raod"]).scored(CITYSCAPES)


class Holder(Config):
    protocol: ProtocolConfig = Field(ProtocolConfig())


def test_configurations_take_a_name_or_a_changed_preset():
    assert validate(Holder, {"protocol": "mic"}, "run").protocol == PROTOCOLS["mic"]
    changed = validate(Holder, {"protocol": {"preset": "mic", "flips": True}}, "run").protocol
    assert changed.flips
    assert changed.window == (1024, 1024)
    assert validate(Holder, {"protocol": changed.model_dump(mode="json")}, "run").protocol == changed


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("dafomer", "no protocol 'dafomer'; did you mean 'daformer'?"),
        ({"mode": "slide"}, "`mode: slide` needs `window` and `stride`"),
        ({"window": [8, 8]}, "`window` and `stride` belong to `mode: slide`"),
        ({"mode": "slide", "window": [8, 8], "stride": [9, 8]}, "`stride` is larger than `window`"),
        ({"flipps": True}, "unknown key; did you mean 'flips'?"),
        ({"scales": []}, "scales"),
        ({"scales": [0]}, "scales"),
    ],
)
def test_mistakes_are_readable(raw, message):
    with pytest.raises(ConfigError) as error:
        validate(Holder, {"protocol": raw}, "run.yaml")
    assert message in str(error.value)


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(RunError, match="output is not finite"):
        probabilities(lambda image: image / 0 - image / 0, picture(), PROTOCOLS["whole"])
