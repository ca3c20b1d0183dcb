"""Views are the policy's, come back where they were, and depend on nothing but (seed, picture, k)."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment
from torchvision.transforms.v2 import functional as tv

from udas.data import views as module
from udas.data.views import PHOTOMETRIC, SIGNED_RANGE, View, compose, draw_views, look, map_back, strength

SIZE = (48, 64)
GEOMETRIC = [
    ("ShearX", 0.3),
    ("ShearX", -0.3),
    ("ShearY", 0.2),
    ("TranslateX", 0.25),
    ("TranslateY", -0.25),
    ("Rotate", 30.0),
    ("Rotate", -14.0),
]


def smooth(size: tuple[int, int] = SIZE, channels: int = 3) -> Tensor:
    """A picture, uint8 [3, H, W], that hardly changes from pixel to pixel, so that resampling loses little."""
    y, x = torch.meshgrid(torch.linspace(0, 3, size[0]), torch.linspace(0, 4, size[1]), indexing="ij")
    waves = [torch.sin(x + k) * torch.cos(y - 0.5 * k) for k in range(channels)]
    return ((torch.stack(waves) + 1) * 127).byte()


def pointwise(image: Tensor) -> Tensor:
    """A model that looks at single pixels: [B, 3, H, W] -> probabilities [B, 4, H, W]."""
    weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.conv2d(image, weight).softmax(1)


def seen(view: View) -> Tensor:
    """[H, W] bool: pixels of the picture that the view shows."""
    return map_back(torch.ones(1, 1, *SIZE), [view])[0, 0] > 0


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("operation", GEOMETRIC, ids=str)
def test_a_pointwise_model_says_the_same_of_every_geometric_view(operation: tuple[str, float], mirror: bool) -> None:
    view = compose([operation], SIZE, mirror)
    plain = pointwise(smooth()[None] / 255)
    back = map_back(pointwise(look(smooth(), [view])), [view])
    shown = seen(view)
    assert 0.3 < shown.float().mean() < 1
    assert (back - plain)[0, :, shown].abs().max() < 0.02
    assert (back[0, :, ~shown] == 0).all()


def test_several_operations_come_back_together() -> None:
    view = compose([("Rotate", 20.0), ("ShearX", 0.2), ("TranslateY", 0.1)], SIZE, mirror=True)
    plain = pointwise(smooth()[None] / 255)
    back = map_back(pointwise(look(smooth(), [view])), [view])
    assert (back - plain)[0, :, seen(view)].abs().max() < 0.02


def test_operations_follow_each_other_in_their_order() -> None:
    first, second = compose([("Rotate", 30.0)], SIZE), compose([("TranslateX", 0.2)], SIZE)
    both = compose([("Rotate", 30.0), ("TranslateX", 0.2)], SIZE)
    one_by_one = look((look(smooth(), [first])[0] * 255).round().byte(), [second])
    inner = (..., slice(18, 30), slice(24, 40))
    torch.testing.assert_close(look(smooth(), [both])[inner], one_by_one[inner], atol=0.02, rtol=0)


def test_geometry_is_that_of_torchvision() -> None:
    """Inside the picture, rotation and shear about the centre are what torchvision calls by these names."""
    image, inner = smooth(), (..., slice(16, 32), slice(20, 44))
    bilinear = tv.InterpolationMode.BILINEAR
    turned = tv.rotate(image, 30.0, bilinear) / 255
    torch.testing.assert_close(
        look(image, [compose([("Rotate", 30.0)], SIZE)])[0][inner], turned[inner], atol=0.02, rtol=0
    )
    moved = tv.affine(image, 0.0, [8, -6], 1.0, [0.0, 0.0], bilinear) / 255
    shift = compose([("TranslateX", -8 / 64), ("TranslateY", 6 / 48)], SIZE)
    torch.testing.assert_close(look(image, [shift])[0][inner], moved[inner], atol=1e-3, rtol=0)


def test_a_mirror_is_exact() -> None:
    image, view = torch.randint(256, (3, *SIZE), dtype=torch.uint8), compose([], SIZE, mirror=True)
    torch.testing.assert_close(look(image, [view])[0], image.flip(-1) / 255, atol=1e-4, rtol=0)
    torch.testing.assert_close(map_back(image[None] / 255, [view])[0], image.flip(-1) / 255, atol=1e-4, rtol=0)


def test_the_identity_view_is_the_picture_bit_for_bit() -> None:
    image = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
    views = draw_views(6, seed=3, name="a", size=SIZE)
    assert torch.equal(look(image, views)[0], image.float() / 255)
    maps = torch.rand(6, 2, *SIZE)
    assert torch.equal(map_back(maps, views)[0], maps[0])


@pytest.mark.parametrize("name", sorted(PHOTOMETRIC))
def test_photometric_operations_leave_geometry_alone(name: str) -> None:
    view = compose([(name, strength(name, 5, 1))], SIZE)
    assert not view.geometric
    image = smooth()
    changed = look(image, [view])[0]
    assert not torch.equal(changed, image / 255)
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_strengths_are_those_of_the_library() -> None:
    space = AutoAugment()._augmentation_space(10, SIZE)
    for name, (magnitudes, signed) in space.items():
        if magnitudes.ndim == 0:
            continue
        assert signed == (name in SIGNED_RANGE)
        scale = {"TranslateX": SIZE[1], "TranslateY": SIZE[0]}.get(name, 1)
        own = [strength(name, level, 1) * scale for level in range(10)]
        assert own == pytest.approx(magnitudes.tolist(), abs=1e-3), name


def test_every_operation_of_the_policy_can_be_drawn() -> None:
    for policy in AutoAugment().policies:
        for name, _, level in policy:
            compose([(name, strength(name, level, -1))], SIZE)


def described(views: list[View]) -> list[tuple[object, ...]]:
    return [(view.photometric, view.matrix.tolist()) for view in views]


def test_views_depend_on_seed_name_and_number_only() -> None:
    views = described(draw_views(8, 1, "town/a", SIZE))
    assert views == described(draw_views(8, 1, "town/a", SIZE))
    assert views[:3] == described(draw_views(3, 1, "town/a", SIZE))
    assert views != described(draw_views(8, 2, "town/a", SIZE))
    assert views != described(draw_views(8, 1, "town/b", SIZE))
    assert views[0] == ((), torch.eye(3).tolist())
    assert len({str(view) for view in views}) > 3


def test_draws_use_the_chances_of_the_policy() -> None:
    """Half of the views are mirrored; over many draws both colours and geometry occur, each sign as well."""
    views = [view for number in range(200) for view in draw_views(2, 0, str(number), SIZE)[1:]]
    mirrored = sum(bool(torch.linalg.det(view.matrix) < 0) for view in views)
    assert 70 < mirrored < 130
    turns = [float(view.matrix[1, 0]) for view in views if view.matrix[1, 0] != 0]
    assert min(turns) < 0 < max(turns)
    assert {name for view in views for name, _ in view.photometric} >= {"Equalize", "Posterize", "Solarize", "Color"}


def test_operations_of_a_policy_come_with_chances_and_signs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = (("Brightness", 0.5, 9), ("Color", 0.8, 9))
    monkeypatch.setattr(module, "AutoAugment", lambda: SimpleNamespace(policies=[policy]))
    found = [draw_views(2, 0, str(number), SIZE)[1].photometric for number in range(1000)]
    counts = Counter(tuple(name for name, _ in operations) for operations in found)
    expected = {(): 100, ("Brightness",): 100, ("Color",): 400, ("Brightness", "Color"): 400}
    assert all(abs(counts[names] - count) < 60 for names, count in expected.items())  # standard deviations 9 to 15
    pairs = [operations for operations in found if len(operations) == 2]
    assert 0.4 < sum(one[1] == other[1] for one, other in pairs) / len(pairs) < 0.6
