"""The heads with group norm: their layers one by one, what they read, and one forward pass for all there is to know."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from udas.config import NetworkConfig
from udas.errors import ConfigError
from udas.networks.segmenters import SEGMENTERS, build_segmenter

CLASSES = 5
HEADS = {"deeplab_gn": 256, "deeplab_gn_multi": 512}


def build(name, **settings):
    torch.manual_seed(0)
    config = {"name": name, "encoder": "test_resnet", "weights": None, "output_stride": 16, **settings}
    return build_segmenter(NetworkConfig(**config), CLASSES)


def picture(batch=1, height=64, width=64):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def shuffled(network):
    """The network with norms and biases that are not at their neutral start."""
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return network


def group_norm(x, norm):
    """Every picture's groups of channels to mean 0 and variance 1, then scale and shift."""
    groups = x.view(len(x), 32, -1)
    centred = groups - groups.mean(2, keepdim=True)
    unit = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).view(x.shape)
    return unit * norm.weight[:, None, None] + norm.bias[:, None, None]


def head_by_hand(head, x):
    """(features, logits) of an evaluated head."""
    maps = []
    for (conv, norm, _), dilation in zip(head.branches, (1, 6, 12, 18, 24), strict=True):
        size = conv.weight.shape[-1]
        assert size == (1 if dilation == 1 else 3)
        padding = 0 if size == 1 else dilation
        maps.append(group_norm(F.conv2d(x, conv.weight, conv.bias, padding=padding, dilation=dilation), norm).relu())
    together = torch.cat(maps, 1)
    first, _, second, _ = head.attention.factors
    pooled = together.flatten(2).sum(2) / together[0, 0].numel()
    hidden = (pooled @ first.weight.T + first.bias).clamp(min=0)
    factor = 1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias)))
    conv, norm = head.fuse
    features = group_norm(F.conv2d(together * factor[..., None, None], conv.weight, conv.bias, padding=1), norm)
    return features, torch.einsum("bdhw,cd->bchw", features, head.classifier.weight[:, :, 0, 0])


def enlarged(logits, image):
    return F.interpolate(logits, size=image.shape[-2:], mode="bilinear")


@torch.no_grad()
def test_single_head_reads_the_last_stage():
    network, image = shuffled(build("deeplab_gn")).eval(), picture(2)
    features, logits = head_by_hand(network.decoder.main, network.features(image)[-1])
    torch.testing.assert_close(network.representation(image), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(image), enlarged(logits, image), rtol=1e-4, atol=1e-6)
    assert len(network.levels(image)) == 1
    assert features.min() < -0.1, "no ReLU behind the features"


@torch.no_grad()
def test_main_head_reads_two_stages_and_the_auxiliary_one_the_stage_before():
    network, image = shuffled(build("deeplab_gn_multi")).eval(), picture(2)
    before, last = network.features(image)[-2:]
    features, main = head_by_hand(network.decoder.main, torch.cat([last, before], 1))
    _, auxiliary = head_by_hand(network.decoder.second, before)
    for found, expected in zip(network.levels(image), (main, auxiliary), strict=True):
        torch.testing.assert_close(found, enlarged(expected, image), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.representation(image), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_head_has_the_published_form(name):
    network = build(name)
    heads = [network.decoder.main, *([network.decoder.second] if name.endswith("multi") else [])]
    for head in heads:
        assert head.classifier.bias is None
        assert head.classifier.weight.std().item() == pytest.approx(0.001, rel=0.1)
        assert head.classifier.in_channels == network.decoder.channels == HEADS[name]
        assert head.attention.factors[0].out_features == 5 * 256 // 16
        assert head.dropout.p == 0.1
        assert isinstance(head.dropout, nn.Dropout2d)
        assert {m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.decoder.modules())


def test_two_stages_of_different_sizes_are_refused():
    with pytest.raises(ConfigError, match="deeplab_gn_multi works at 8 or 16, not at 32"):
        build("deeplab_gn_multi", output_stride=32)


@pytest.mark.parametrize("name", ["fcn", "deeplabv2_multi", "deeplabv3plus", "unet", "deeplab_gn_multi"])
def test_outputs_is_levels_and_representation(name):
    network, image = build(name, output_stride=SEGMENTERS[name].strides[-1]).eval(), picture(1, 65, 70)
    with torch.no_grad():
        outputs = network.outputs(image)
        torch.testing.assert_close(outputs.levels, network.levels(image))
        torch.testing.assert_close(outputs.representation, network.representation(image))
        torch.testing.assert_close(outputs.levels[0], network(image))


def test_the_classifier_sees_the_representation_with_its_dropout():
    """In training, too: a second pass would drop other channels."""
    network, image = build("deeplab_gn").train(), picture(2)
    (logits,), representation, _ = network.outputs(image)
    assert (representation.flatten(2).abs().amax(2) == 0).any(), "some channels are dropped"
    expected = enlarged(network.decoder.main.classifier(representation), image)
    torch.testing.assert_close(logits, expected)


def test_outputs_is_one_pass_through_the_encoder():
    network, passes = build("deeplab_gn_multi"), []
    network.encoder.register_forward_hook(lambda *_: passes.append(1))
    network.outputs(picture())
    assert len(passes) == 1
