from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from udas.errors import ConfigError, DataError, WeightsError
from udas.networks.generators import (
    GeneratorConfig,
    ResnetGenerator,
    Translator,
    load_translator,
    save_translator,
)
from udas.validation import validate

UPSAMPLE = ["transposed", "bilinear"]


def generator(upsample="transposed", width=4, blocks=1, residual=False):
    torch.manual_seed(0)
    return ResnetGenerator(GeneratorConfig(width=width, blocks=blocks, upsample=upsample, residual=residual))


def naive(network, picture):
    """The generator written out: c7s1-w, d2w, d4w, R4w, u2w, uw, c7s1-3."""
    x = picture
    weights = iter([p for p in network.parameters() if p.dim() == 4])
    bilinear = network.config.upsample == "bilinear"

    def norm(x):
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    def same(x, pad):
        return F.conv2d(F.pad(x, (pad, pad, pad, pad), mode="reflect"), next(weights))

    def up(x):
        if bilinear:
            return same(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), 1)
        return F.conv_transpose2d(x, next(weights), stride=2, padding=1, output_padding=1)

    x = norm(same(x, 3)).relu()
    for _ in range(2):
        x = norm(F.conv2d(x, next(weights), stride=2, padding=1)).relu()
    for _ in range(network.config.blocks):
        x = x + norm(same(norm(same(x, 1)).relu(), 1))
    for _ in range(2):
        x = norm(up(x)).relu()
    painted = same(x, 3) + network.layers[-1].bias[:, None, None]
    return picture + painted if network.config.residual else torch.tanh(painted)


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("residual", [False, True])
def test_generator_is_the_formula(upsample, residual):
    network = generator(upsample, blocks=2, residual=residual).double()
    torch.nn.init.normal_(network.layers[-1].bias)
    image = torch.rand(2, 3, 24, 16, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(network(image), naive(network, image))


def test_generator_is_the_published_network():
    published = 11_378_179  # parameters, of which the biases before the norms have no effect
    without_effect = 64 + 128 + 256 + 9 * 2 * 256 + 128 + 64
    assert sum(p.numel() for p in ResnetGenerator(GeneratorConfig()).parameters()) == published - without_effect


def test_generator_begins_small():
    network = generator(width=32, blocks=4)
    weights = torch.cat([p.flatten() for p in network.parameters() if p.dim() > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=1e-2)
    assert not network.layers[-1].bias.any()


def test_what_a_residual_generator_painted_white_can_be_unlearnt():
    network = generator(residual=True)
    network(torch.ones(1, 3, 16, 16)).sum().backward()
    assert network.layers[-1].bias.grad.tolist() == [256] * 3


@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_same_picture_alone_or_in_a_batch_in_training_or_not(upsample):
    network = generator(upsample)
    images = torch.rand(3, 3, 16, 16)
    together = network(images)
    torch.testing.assert_close(network.eval()(images[1:2]), together[1:2])


def test_bilinear_has_no_checkerboard():
    """Upsampling constant features: the plain convolution keeps them constant, the transposed one makes a grid."""
    spread = {}
    for upsample in UPSAMPLE:
        torch.manual_seed(0)
        up = next(
            m for m in generator(upsample).layers if isinstance(m, torch.nn.ConvTranspose2d | torch.nn.Sequential)
        )
        spread[upsample] = up(torch.ones(1, 16, 8, 8))[..., 2:-2, 2:-2].std((2, 3)).max().item()
    assert spread["bilinear"] < 1e-6 < 1e-2 < spread["transposed"]


@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 31), (4, 32)])
def test_generator_refuses_sides_it_would_change(height, width):
    with pytest.raises(DataError, match=f"{height} x {width}.*multiples of 4 and at least 8"):
        generator()(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 50), (31, 47), (5, 64), (8, 8)])
def test_translator_keeps_size_and_range(upsample, residual, height, width):
    network = generator(upsample, residual=residual)
    torch.nn.init.normal_(network.layers[-1].weight, 0, 10)  # saturates the tanh
    result = Translator(network)(torch.rand(2, 3, height, width))
    assert result.shape == (2, 3, height, width)
    assert result.dtype == torch.float32
    assert 0 <= result.min() < 0.01
    assert 0.99 < result.max() <= 1


def test_translator_refuses_what_it_cannot_reflect():
    with pytest.raises(DataError, match="a picture of 4 x 64: a translator needs sides of at least 5"):
        Translator(generator())(torch.zeros(1, 3, 4, 64))


@pytest.mark.parametrize("shape", [(32, 48), (33, 50)])
def test_translator_of_an_unchanging_generator_changes_nothing(shape):
    translator = Translator(generator())
    translator.generator = torch.nn.Identity()
    image = torch.rand(1, 3, *shape)
    torch.testing.assert_close(translator(image), image)


def test_translator_continues_pictures_by_reflection():
    seen = []
    translator = Translator(generator())
    translator.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 30, 33)
    translator(image)
    assert seen[0].shape == (1, 3, 32, 36)
    expected = 2 * torch.cat([image, image[..., 29:32].flip(-1)], -1) - 1
    torch.testing.assert_close(seen[0][..., :30, :], expected)
    torch.testing.assert_close(seen[0][..., 30:, :], seen[0][..., [28, 27], :])


def test_mixed_precision_stays_close_and_trains():
    torch.manual_seed(0)
    network = generator(width=16, blocks=4)
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(image)
        loss = (rough - image).abs().mean()
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
    network.zero_grad()
    exact = network(image)
    (exact - image).abs().mean().backward()
    true = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05
    assert torch.cosine_similarity(gradients, true, dim=0) > 0.98


@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_flat_pictures_are_finite_in_mixed_precision(fill):
    """Instance norm divides by a variance of zero here."""
    network = generator()
    with torch.autocast("cpu", torch.bfloat16):
        result = Translator(network)(torch.full((1, 3, 32, 32), fill))
    result.sum().backward()
    assert result.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_save_and_load(tmp_path, upsample):
    path = tmp_path / "model.safetensors"
    translator = Translator(generator(upsample, width=6, blocks=2)).to(memory_format=torch.channels_last)
    save_translator(path, translator)
    loaded = load_translator(path)
    image = torch.rand(1, 3, 18, 20)
    assert loaded.generator.config == translator.generator.config
    torch.testing.assert_close(loaded(image), translator(image))
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["generator"])
    assert settings == translator.generator.config.model_dump()


def test_load_names_what_is_wrong(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(WeightsError, match="no such file"):
        load_translator(path)
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_translator(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="not a translator"):
        load_translator(path)
    save_file({"w": torch.zeros(1)}, path, {"format": "udas-translator-1", "generator": '{"width": 4}'})
    with pytest.raises(WeightsError, match="do not fit"):
        load_translator(path)


def test_config_names_the_nearest_setting():
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        validate(GeneratorConfig, {"block": 6}, "test")


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_do_not_depend_on_the_memory_format(count):
    """PyTorch's instance norm gives a wrong one for a single picture whose gradient is in channels_last."""
    image, found = torch.rand(count, 3, 16, 16), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = generator().to(memory_format=memory_format)
        network(image.contiguous(memory_format=memory_format)).square().mean().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for plain, last in zip(*found, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


def test_equal_translators_are_equal_files(tmp_path):
    translator = Translator(generator())
    for name in "abcdef":
        save_translator(tmp_path / name, translator)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
