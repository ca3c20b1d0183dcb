"""Strong views: picture, label and maps move alike, the grey square and the outside count nowhere."""

from __future__ import annotations

import pytest
import torch

from udas.data.batch import IGNORE
from udas.data.randaugment import GEOMETRIC, GREY, POOL, StrongViews, _draw, _hole, _relative, draw_strong, unchanged
from udas.data.views import PHOTOMETRIC, compose

HEIGHT, WIDTH = 12, 20


def ramps(height=HEIGHT, width=WIDTH):
    """Picture whose red is x and whose green is y, in (0, 1), and the label that numbers its pixels."""
    x = ((torch.arange(width) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    image = torch.stack([x, y, torch.zeros(height, width)])[None]
    return image, torch.arange(height * width).view(1, height, width)


def geometric(*operations, mirror=False, hole=(0.0, 0.0, 0.0, 0.0)):
    view = compose(operations, (HEIGHT, WIDTH), mirror=mirror)
    return StrongViews(((),), _relative(view.matrix, HEIGHT, WIDTH)[None], torch.tensor([hole]))


MOVES = {
    "mirror": {"mirror": True},
    "rotate": {"operations": [("Rotate", 20.0)]},
    "shear": {"operations": [("ShearX", -0.27)]},
    "translate": {"operations": [("TranslateY", 0.21), ("TranslateX", -0.1)]},
    "rotate a mirror image twice": {"operations": [("Rotate", 12.0), ("Rotate", -27.0)], "mirror": True},
}


@pytest.mark.parametrize("move", MOVES)
def test_picture_label_and_maps_move_alike(move):
    """The label tells each pixel's origin, the picture's ramps too, and so do maps of half the resolution."""
    operations = MOVES[move].get("operations", [])
    views = geometric(*operations, mirror=MOVES[move].get("mirror", False))
    image, number = ramps()
    seen, label = views.picture(image), views.label(number)
    inside = label != IGNORE
    assert inside.float().mean() > 0.5
    row, column = (label // WIDTH + 0.5)[inside], (label % WIDTH + 0.5)[inside]
    x, y = WIDTH * seen[:, 0][inside], HEIGHT * seen[:, 1][inside]
    edge = (row < 1) | (row > HEIGHT - 1) | (column < 1) | (column > WIDTH - 1)  # blends with the grey outside
    assert (((x - column).abs() < 0.6) | edge).all()
    assert (((y - row).abs() < 0.6) | edge).all()
    assert not torch.equal(label, number)

    half, covered = views.maps(ramps(HEIGHT // 2, WIDTH // 2)[0])
    there = inside[:, ::2, ::2] & inside[:, 1::2, 1::2] & inside[:, ::2, 1::2] & inside[:, 1::2, ::2]
    assert (covered | ~there).float().mean() > 0.9
    both = covered & there
    whole = torch.nn.functional.avg_pool2d(torch.stack([label % WIDTH, label // WIDTH], 1).float() + 0.5, 2)
    assert (half[:, 0][both] * WIDTH - whole[:, 0][both]).abs().max() < 2.1  # two fine pixels are one coarse one
    assert (half[:, 1][both] * HEIGHT - whole[:, 1][both]).abs().max() < 2.1


def test_a_known_shift():
    views = geometric(("TranslateX", 0.25))  # looks five pixels to the right
    image, number = ramps()
    assert torch.equal(views.label(number)[..., :15], number[..., 5:])
    assert (views.label(number)[..., 15:] == IGNORE).all()
    torch.testing.assert_close(views.picture(image)[..., :15], image[..., 5:], atol=0.003, rtol=0)
    torch.testing.assert_close(views.picture(image)[..., 15:], torch.full((1, 3, HEIGHT, 5), GREY))
    moved, covered = views.maps(torch.ones(1, 2, 3, 4))
    assert covered[0].tolist() == [[True, True, True, False]] * 3
    assert torch.equal(moved.sum(1), 2 * covered.float())


def test_the_grey_square():
    views = geometric(hole=(0.25, 0.5, 0.1, 0.3))
    image, number = ramps()
    hidden = torch.zeros(1, HEIGHT, WIDTH, dtype=bool)
    hidden[:, 3:6, 2:6] = True
    assert torch.equal(views.label(number) == IGNORE, hidden)
    assert (views.picture(image)[hidden[:, None].expand(-1, 3, -1, -1)] == GREY).all()
    assert torch.equal(~views.maps(image)[1], hidden)
    assert _hole(0.5, 0.5, (30, 60)) == pytest.approx((1 / 3, 2 / 3, 5 / 12, 7 / 12))  # ten by ten pixels
    assert _hole(0.01, 0.99, (30, 60)) == pytest.approx((0, 1 / 3, 0.99 - 1 / 12, 0.99 + 1 / 12))


def test_unchanged_is_the_picture():
    image, number = ramps()
    views = unchanged(image)
    torch.testing.assert_close(views.picture(image), image, atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(views.label(number), number)
    maps, covered = views.maps(image)
    assert torch.equal(maps, image)
    assert covered.all()


def test_void_stays_void_and_nothing_is_changed_in_place():
    image, number = ramps()
    number[0, 3] = IGNORE
    kept = image.clone(), number.clone()
    views = draw_strong(image, [5])
    assert (geometric(mirror=True).label(number)[0, 3] == IGNORE).all()
    views.picture(image), views.label(number), views.maps(image)
    assert torch.equal(image, kept[0])
    assert torch.equal(number, kept[1])


def test_a_view_depends_on_its_pictures_seed_alone():
    image = torch.rand(3, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    together = draw_strong(image, [7, 8, 9]).picture(image)
    torch.manual_seed(99)
    alone = draw_strong(image[1:2], [8]).picture(image[1:2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(draw_strong(image[1:2], [7]).picture(image[1:2]), alone)


def test_every_operation_at_its_strengths():
    """The table of FixMatch, in the units of the views: what the weakest and the strongest draw mean."""
    ends = {name: (POOL[name](1), POOL[name](9)) for name in POOL}
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        assert ends.pop(name) == pytest.approx((0.14 - 1, 0.86 - 1))
    for name in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
        assert ends.pop(name) == pytest.approx((0.03, 0.27))
    assert ends.pop("Rotate") == (3, 27)
    assert ends.pop("Posterize") == (4, 7)
    assert ends.pop("Solarize") == (231, 26)
    assert set(ends) == {"AutoContrast", "Equalize", "Identity"}
    assert set(POOL) - set(PHOTOMETRIC) == {*GEOMETRIC, "Identity"}


def test_how_often_things_happen():
    views = [_draw(seed, (HEIGHT, WIDTH))[0] for seed in range(400)]
    mirrored = sum(torch.linalg.det(view.matrix).item() < 0 for view in views) / 400
    coloured = sum(len(view.photometric) for view in views) / 400
    assert mirrored == pytest.approx(0.5, abs=0.08)
    assert coloured == pytest.approx(2 * 0.5 * 8 / 14, abs=0.1)
    assert {name for view in views for name, _ in view.photometric} == set(POOL) - {*GEOMETRIC, "Identity"}
    turned = [view.matrix[0, 1].item() for view in views]
    assert min(turned) < 0 < max(turned)  # either way
