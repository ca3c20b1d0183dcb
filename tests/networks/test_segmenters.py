import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from udas.config import NetworkConfig
from udas.errors import ConfigError
from udas.networks.encoders import batch_norms
from udas.networks.segmenters import SEGMENTERS, build_segmenter
from udas.networks.segnet import SegNet, unpool

SMALL = "test_resnet"  # half a million parameters, in timm for tests
RESNET = "resnet26"  # the smallest of timm's ResNets with plain stem and bottlenecks
CLASSES = 5


def build(name="deeplabv3plus", classes=CLASSES, **settings):
    torch.manual_seed(0)
    return build_segmenter(NetworkConfig(**{"name": name, "encoder": SMALL, "weights": None, **settings}), classes)


def picture(batch=1, height=65, width=97):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_trains_on_one_picture_of_an_odd_size(name):
    # pan halves the last features three times: a smaller picture would leave a single pixel to its batch norm
    height, width = (65, 150) if name == "pan" else (65, 97)
    network = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(picture(height=height, width=width))
    assert logits.shape == (1, CLASSES, height, width)
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    first = next(p for p in network.encoder_parameters() if p.requires_grad)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert torch.isfinite(first.grad).all()


@pytest.mark.parametrize("name", ["fcn", "deeplabv2", "deeplabv3plus", "deeplabv3", "pan", "unet"])
def test_representation_and_features_cover_the_picture(name):
    network, image = build(name).eval(), picture(2, 130, 194)
    with torch.no_grad():
        representation, features = network.representation(image), network.features(image)
    assert representation.shape[:2] == (2, network.decoder.channels)
    for entry in (representation, *features):
        height, width = entry.shape[-2:]
        stride = round(130 / height)
        assert height in (130 // stride, -(-130 // stride))
        assert width in (194 // stride, -(-194 // stride))


@pytest.mark.parametrize(
    ("name", "encoder", "entries"),
    [
        ("deeplabv3plus", SMALL, [1, 2, 3, 4, 5]),
        ("unet", "vgg11_bn", [0, 1, 2, 3, 4, 5]),  # features at the picture's size
        ("unet", "test_convnext", [2, 3, 4, 5]),  # nothing at stride 2
        ("segnet", SMALL, [5]),
    ],
)
def test_features_are_neither_the_picture_nor_gaps_nor_pooling_positions(name, encoder, entries):
    network = build(name, encoder=encoder)
    with torch.no_grad():
        pyramid = network.encode(picture(2, 64, 64))
    assert len(pyramid) == 6
    assert network.feature_entries(pyramid) == entries


def test_parameters_are_split_without_rest():
    network = build()
    split = [*network.encoder_parameters(), *network.decoder_parameters()]
    assert {id(p) for p in split} == {id(p) for p in network.parameters()}
    assert len(split) == len(list(network.parameters()))


def test_library_network_equals_the_library_on_sizes_it_accepts():
    import segmentation_models_pytorch as smp

    network, image = build("unet").eval(), picture(1, 64, 96)
    whole = smp.Unet(f"tu-{SMALL}", encoder_weights=None, classes=CLASSES).eval()
    whole.encoder.load_state_dict(network.encoder.state_dict())
    whole.decoder.load_state_dict(network.decoder.body.state_dict())
    whole.segmentation_head[0].load_state_dict(network.decoder.classifier.state_dict())
    torch.testing.assert_close(network(image), whole((image - network.mean) / network.std))


def test_padding_does_not_reach_the_result_at_multiples():
    network = build("unet").eval()
    with torch.no_grad():
        assert network.representation(picture(1, 64, 96)).shape[-2:] == (64, 96)
        assert network.representation(picture(1, 33, 70)).shape[-2:] == (33, 70)


# ------------------------------------------------------------------------------------------------ output stride


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride(stride):
    features = build("deeplabv2", encoder="tf_efficientnet_lite0", output_stride=stride).features(picture(2, 64, 128))
    strides = [min(2 ** (k + 1), stride) for k in range(5)]
    assert [tuple(f.shape) for f in features] == [
        (2, channels, 64 // s, 128 // s) for channels, s in zip((16, 24, 40, 112, 320), strides, strict=True)
    ]


@pytest.mark.parametrize(("name", "stride"), [("fcn", 32), ("deeplabv2", 8), ("deeplabv3plus", 16), ("unet", 32)])
def test_output_stride_left_open_is_the_published_one(name, stride):
    assert build(name).config.output_stride == stride


def test_dilations_of_deeplabv3plus_follow_the_stride():
    def dilations(stride):
        modules = build(output_stride=stride).decoder.context.modules()
        return sorted({m.dilation[0] for m in modules if isinstance(m, nn.Conv2d) and m.dilation[0] > 1})

    assert dilations(16) == [6, 12, 18]
    assert dilations(8) == [12, 24, 36]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "deeplabv3pluss"}, "network.name: no network 'deeplabv3pluss'; did you mean 'deeplabv3plus'?"),
        ({"name": "unet", "output_stride": 16}, "network.output_stride: unet works at 32, not at 16"),
        ({"encoder": "resnet19"}, "network.encoder: timm has no model 'resnet19'; did you mean 'resnet18'?"),
        ({"encoder": "vgg11_bn", "output_stride": 16}, "vgg11_bn cannot be built at output stride 16"),
        ({"encoder": "resnet18.nobody"}, "Invalid pretrained tag"),
        ({"encoder": "resnet18", "style": "caffe"}, "network.style: caffe is for timm's ResNets with bottlenecks"),
    ],
)
def test_what_cannot_be_built_says_so(settings, message):
    with pytest.raises(ConfigError) as error:
        build(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- DeepLab v2


def test_every_branch_of_deeplabv2_counts():
    """Several releases return from inside the branch loop, so that only two of four branches are summed."""
    network, image = build("deeplabv2").eval(), picture()
    before = network(image)
    for branch in network.decoder.main.branches[2:]:
        nn.init.zeros_(branch.weight)
    assert not torch.allclose(before, network(image))


@pytest.mark.parametrize(
    ("name", "dilations", "levels"),
    [
        ("deeplabv2", [6, 12, 18, 24], 1),
        ("deeplabv2_2branch", [6, 12], 1),
        ("deeplabv2_multi", [6, 12, 18, 24], 2),
        ("deeplabv2_2branch_multi", [6, 12], 2),
    ],
)
def test_deeplabv2_is_the_sum_of_its_branches(name, dilations, levels):
    network, image = build(name).eval(), picture(1, 64, 64)
    features = network.features(image)
    heads = [network.decoder.main, network.decoder.second][:levels]
    logits = network.levels(image)
    assert len(logits) == levels
    for level, head, maps in zip(logits, heads, (features[-1], features[-2]), strict=False):
        assert len(head.branches) == len(dilations)
        total = sum(
            F.conv2d(maps, b.weight, b.bias, padding=d, dilation=d)
            for b, d in zip(head.branches, dilations, strict=True)
        )
        torch.testing.assert_close(level, F.interpolate(total, size=(64, 64), mode="bilinear"))
    torch.testing.assert_close(network(image), logits[0])


def test_deeplabv2_head_starts_small():
    main = build("deeplabv2", classes=19).decoder.main
    for branch in main.branches:
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert branch.bias.abs().max() == 0


def test_align_corners_is_a_setting():
    network, image = build("deeplabv2", align_corners=True).eval(), picture(1, 64, 64)
    coarse = network.decoder(network.encode(image))
    expected = F.interpolate(coarse, size=(64, 64), mode="bilinear", align_corners=True)
    torch.testing.assert_close(network(image), expected)
    assert not torch.allclose(expected, F.interpolate(coarse, size=(64, 64), mode="bilinear"))


# -------------------------------------------------------------------------------------------------- batch norm


def statistics(network):
    return [norm.running_mean.clone() for norm in batch_norms(network.encoder)]


@pytest.mark.parametrize(
    ("mode", "statistics_move", "affine_learns"),
    [("train", True, True), ("affine_frozen", True, False), ("frozen", False, False)],
)
def test_batch_norm_modes(mode, statistics_move, affine_learns):
    network = build("deeplabv2", norm=mode)
    before = statistics(network)
    logits = network.eval().train()(picture())
    moved = [not torch.equal(a, b) for a, b in zip(before, statistics(network), strict=True)]
    assert all(moved) if statistics_move else not any(moved)
    assert {p.requires_grad for n in batch_norms(network.encoder) for p in n.parameters()} == {affine_learns}
    uses_batch = not torch.allclose(logits, network.eval()(picture()))
    assert uses_batch == statistics_move


def test_frozen_norm_survives_the_mode_of_a_parent():
    parent = nn.Sequential(build(norm="frozen"))
    parent.train()
    assert parent[0].training
    assert not any(norm.training for norm in batch_norms(parent[0].encoder))
    assert all(norm.training for norm in batch_norms(parent[0].decoder))
    assert not any(norm.training for norm in batch_norms(copy.deepcopy(parent).train()[0].encoder))


# ------------------------------------------------------------------------------------------------------- Caffe


def test_caffe_style_puts_the_stride_on_the_first_convolution():
    network = build("deeplabv2", encoder=RESNET, style="caffe")
    net = network.encoder.model
    for stage, stride, dilation in (("layer2", 2, 1), ("layer3", 1, 2), ("layer4", 1, 4)):
        first = net[stage][0]
        assert first.conv1.stride == first.downsample[0].stride == (stride, stride)
        assert first.conv2.stride == (1, 1)
        for block in net[stage]:
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)


@pytest.mark.parametrize(
    ("style", "eps", "expected"), [("caffe", None, 1e-5), ("caffe", 0.001, 1e-3), ("timm", 0.1, 0.1)]
)
def test_epsilon_of_the_encoders_batch_norm(style, eps, expected):
    network = build("deeplabv2", encoder=RESNET, style=style, norm_eps=eps)
    assert {norm.eps for norm in batch_norms(network.encoder)} == {expected}
    assert 0.1 not in {norm.eps for norm in batch_norms(network.decoder)}


def test_caffe_style_pools_to_65_of_512():
    network = build("deeplabv2", encoder=RESNET, style="caffe").eval()
    with torch.no_grad():
        assert network.representation(picture(1, 64, 128)).shape[-2:] == (9, 17)  # 512 x 1024 gives 65 x 129


def test_caffe_style_keeps_the_keys():
    plain, caffe = (build(encoder=RESNET, style=style).encoder.state_dict() for style in ("timm", "caffe"))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in caffe.items()}


class Recorder(nn.Module):
    """Stands for the encoder and keeps what it is given."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, image):
        self.seen = image
        return self.encoder(image)


def seen_by_encoder(network, image):
    network.encoder = Recorder(network.encoder)
    with torch.no_grad():
        network.eval()(image)
    return network.encoder.seen


def test_caffe_style_normalises_to_bgr_minus_mean():
    image = picture(1, 64, 64)
    seen = seen_by_encoder(build("deeplabv2", encoder=RESNET, style="caffe"), image)
    mean_bgr = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(1, 3, 1, 1)
    torch.testing.assert_close(seen, image[:, [2, 1, 0]] * 255 - mean_bgr, rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "resnet18"])
def test_normalisation_is_that_of_timm(encoder):
    image, known = picture(1, 64, 64), timm.get_pretrained_cfg(encoder)
    seen = seen_by_encoder(build(encoder=encoder), image)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (known.mean, known.std))
    torch.testing.assert_close(seen, (image - mean) / std)
    assert (known.mean == (0.5, 0.5, 0.5)) == (encoder == "tf_efficientnet_lite0")


# ------------------------------------------------------------------------------------------------------ SegNet


@pytest.mark.parametrize("size", [(8, 12), (7, 13)])
def test_unpool_is_max_unpool(size):
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    pooled, indices = F.max_pool2d(maps, 2, return_indices=True)
    expected = F.max_unpool2d(pooled, indices, 2, output_size=size)
    assert torch.equal(unpool(pooled, indices, like=maps), expected)
    kept = expected != 0
    assert torch.equal(expected[kept], maps[kept])


@pytest.fixture
def narrow():
    """SegNet's decoder with few channels, and a pyramid of an odd picture as VGG gives it."""
    torch.manual_seed(0)
    channels, sizes = (4, 6, 8, 8, 8, 8), ((67, 97), (33, 48), (16, 24), (8, 12), (4, 6))
    maps = [torch.rand(2, width, *size) for width, size in zip(channels, sizes, strict=False)]
    return SegNet(channels, CLASSES), [*maps, F.max_pool2d(maps[-1], 2)]


def test_segnet_unpools_to_where_its_encoder_pooled(narrow):
    decoder, pyramid = narrow
    seen = []
    for stage in decoder.stages:
        stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert decoder(pyramid).shape == (2, CLASSES, 67, 97)
    for unpooled, maps in zip(seen, reversed(pyramid[:-1]), strict=True):
        assert unpooled.shape == maps.shape
        assert not unpooled[maps != spread(F.max_pool2d(maps, 2), maps)].any()
    assert torch.equal(F.max_pool2d(seen[0], 2), pyramid[-1])


def spread(pooled, like):
    """Every pooled value over its window; infinite in rows and columns outside all windows."""
    result = torch.full_like(like, float("inf"))
    repeated = pooled.repeat_interleave(2, -1).repeat_interleave(2, -2)
    result[..., : repeated.shape[-2], : repeated.shape[-1]] = repeated
    return result


def test_segnet_runs_in_deterministic_mode(narrow):
    decoder, pyramid = narrow
    torch.use_deterministic_algorithms(True)
    try:
        decoder(pyramid).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


# --------------------------------------------------------------------------------------------------------- FCN


def test_fcn_sums_the_scores_of_three_levels():
    network, image = build("fcn").eval(), picture(1, 64, 96)
    decoder, (_, _, f3, f4, f5) = network.decoder, network.features(image)
    score = decoder.score(decoder.fully(f5))
    for skip, features in zip(decoder.skips, (f4, f3), strict=True):
        score = F.interpolate(score, scale_factor=2, mode="bilinear") + F.conv2d(features, skip.weight, skip.bias)
    torch.testing.assert_close(network(image), F.interpolate(score, scale_factor=8, mode="bilinear"))
