"""CycleGAN against its step written a second time, with one summed loss and frozen critics."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equivalence.small import naive_cross_entropy
from equivalence.small import task as small_task
from equivalence.stepping import advance, assert_same_weights, lend_engine, turns
from udas.data.batch import Batch, Block
from udas.data.sampling import seed_of
from udas.errors import ConfigError, DataError
from udas.losses import squared_distance
from udas.methods.base import Task
from udas.methods.cyclegan import CycleGAN, CycleGANConfig, ImagePool, critic_loss
from udas.networks.generators import Translator, load_translator
from udas.networks.segmenters import Segmenter
from udas.validation import validate

SMALL = {"generator": {"width": 4, "blocks": 1}, "critic_width": 4, "pool": 2}


def make(**settings):
    torch.manual_seed(0)
    task = Task(taxonomy=None, segmenter=None, streams=CycleGAN.needs, steps=3, teacher=opinionated)
    return CycleGAN(validate(CycleGANConfig, SMALL | settings, "test"), task)


def opinionated():
    """A segmenter whose batch norms have seen pictures, and that finds every class in them."""
    network = small_task(CycleGAN.needs).segmenter()
    with torch.no_grad():
        for step in range(10):
            network(block(step).image)
        network.decoder.score.bias -= network.eval()(block(0).image).mean((0, 2, 3))
    return network


def block(seed, height=24, width=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)
    return Block(image, None, None, (2 * seed, 2 * seed + 1), ("a", "b"))


def batch(step, **form):
    return Batch(source=block(2 * step, **form), unlabelled=block(2 * step + 1, **form))


class Naive:
    """Two players in turn, requires_grad switched by hand, pools as lists."""

    def __init__(self, method, lr, betas, lambda_a, lambda_b, lambda_idt, pool):
        self.G, self.F, self.D_X, self.D_Y = (copy.deepcopy(m) for m in (method.G, method.F, method.D_X, method.D_Y))
        chain = itertools.chain
        self.adam_g = torch.optim.Adam(chain(self.G.parameters(), self.F.parameters()), lr, betas)
        self.adam_d = torch.optim.Adam(chain(self.D_X.parameters(), self.D_Y.parameters()), lr, betas)
        self.lambdas, self.size, self.kept_x, self.kept_y = (lambda_a, lambda_b, lambda_idt), pool, [], []
        self.swaps = set()
        self.semantic = lambda original, translation: 0

    def step(self, batch):
        a, b, i = self.lambdas
        x, y = batch.source.image * 2 - 1, batch.unlabelled.image * 2 - 1
        for p in [*self.D_X.parameters(), *self.D_Y.parameters()]:
            p.requires_grad = False
        fake_y, fake_x = self.G(x), self.F(y)
        gan = torch.mean((self.D_Y(fake_y) - 1) ** 2) + torch.mean((self.D_X(fake_x) - 1) ** 2)
        cycle = a * nn.functional.l1_loss(self.F(fake_y), x) + b * nn.functional.l1_loss(self.G(fake_x), y)
        identity = b * i * nn.functional.l1_loss(self.G(y), y) + a * i * nn.functional.l1_loss(self.F(x), x)
        semantic = self.semantic(x, fake_y) + self.semantic(y, fake_x)
        self.adam_g.zero_grad()
        (gan + cycle + identity + semantic).backward()
        self.adam_g.step()
        for p in [*self.D_X.parameters(), *self.D_Y.parameters()]:
            p.requires_grad = True
        old_y = self.query(self.kept_y, fake_y.detach(), batch.source.seeds)
        old_x = self.query(self.kept_x, fake_x.detach(), batch.unlabelled.seeds)
        loss_y = 0.5 * (torch.mean((self.D_Y(y) - 1) ** 2) + torch.mean(self.D_Y(old_y) ** 2))
        loss_x = 0.5 * (torch.mean((self.D_X(x) - 1) ** 2) + torch.mean(self.D_X(old_x) ** 2))
        self.adam_d.zero_grad()
        (loss_x + loss_y).backward()
        self.adam_d.step()
        return (gan + cycle + identity + semantic).item(), (loss_x + loss_y).item()

    def query(self, kept, fresh, seeds):
        shown = []
        for picture, seed in zip(fresh, seeds, strict=True):
            choice = random.Random(seed_of(seed, "pool"))
            if len(kept) < self.size:
                kept.append(picture)
                shown.append(picture)
                continue
            self.swaps.add(swap := choice.random() < 0.5)
            slot = choice.randrange(self.size)
            shown.append(kept[slot] if swap else picture)
            kept[slot] = picture if swap else kept[slot]
        return torch.stack(shown)


@pytest.mark.parametrize("lambda_idt", [0.5, 0.0])
def test_step_is_the_formula(lambda_idt):
    constant = {"schedule": "constant"}
    method = make(lambda_a=9.0, lambda_b=7.0, lambda_idt=lambda_idt, generators=constant, discriminators=constant)
    method = method.double()
    naive = Naive(method, 2e-4, (0.5, 0.999), 9.0, 7.0, lambda_idt, 2)
    engine = lend_engine(method)
    for step in range(3):
        seen = batch(step, dtype=torch.float64)
        losses = advance(engine, method, seen, step)
        generators, discriminators = naive.step(seen)
        critics = losses["D_X"] + losses["D_Y"]
        assert sum(losses.values()) - critics == pytest.approx(generators, rel=1e-6)  # logged in float32
        assert critics == pytest.approx(discriminators, rel=1e-6)
    for name in ("G", "F", "D_X", "D_Y"):
        assert_same_weights(getattr(method, name), getattr(naive, name), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(method.pool_x.pictures, torch.stack(naive.kept_x), rtol=0, atol=1e-10)
    torch.testing.assert_close(method.pool_y.pictures, torch.stack(naive.kept_y), rtol=0, atol=1e-10)
    assert naive.swaps == {True, False}  # the three steps show both fresh and old pictures


def test_each_player_moves_alone():
    method = make()
    engine = lend_engine(method)
    players = {
        "generators": [*method.G.parameters(), *method.F.parameters()],
        "discriminators": [*method.D_X.parameters(), *method.D_Y.parameters()],
    }
    seen = turns(engine, players)
    advance(engine, method, batch(0))
    assert seen == [
        ("generators", {"generators": {True}, "discriminators": {False}}),
        ("discriminators", {"generators": {False}, "discriminators": {True}}),
    ]


def test_identity_generators_have_no_cycle_and_no_identity_loss():
    method = make()
    method.G, method.F = Shift(0.0), Shift(0.0)
    engine = lend_engine(method)
    seen = batch(0)
    adversarial = squared_distance(method.D_Y(2 * seen.source.image - 1), 1.0).item()
    losses = advance(engine, method, seen)
    assert losses["identity of G"] == losses["identity of F"] == 0
    assert losses["GAN of G"] == adversarial
    assert losses["cycle of G"] == losses["cycle of F"] == 0


def test_lambdas_weigh_their_terms():
    method = make(lambda_a=3.0, lambda_b=5.0, lambda_idt=0.5)
    method.G, method.F = Shift(0.25), Shift(0.5)
    method.D_X, method.D_Y = Constant(1.0), Constant(1.0)
    losses = advance(lend_engine(method), method, batch(0))
    assert losses == pytest.approx(
        {
            "GAN of G": 0,
            "GAN of F": 0,
            "cycle of G": 3.0 * 0.75,
            "cycle of F": 5.0 * 0.75,
            "identity of G": 0.5 * 5.0 * 0.25,
            "identity of F": 0.5 * 3.0 * 0.5,
            "D_Y": 0.5,
            "D_X": 0.5,
        }
    )


def test_discriminators_see_every_picture_through_noise():
    method, seen = make(noise=0.5), {"D_X": [], "D_Y": []}
    method.G, method.F = Shift(0.0), Shift(0.0)
    for name, pictures in seen.items():
        getattr(method, name).register_forward_pre_hook(lambda _, given, pictures=pictures: pictures.append(given[0]))
    given = batch(0, height=64, width=64)
    advance(lend_engine(method), method, given)
    x, y = 2 * given.source.image - 1, 2 * given.unlabelled.image - 1
    for name, shown in {"D_Y": [x, y, x], "D_X": [y, x, y]}.items():  # translation, picture, translation from the pool
        for picture, clean in zip(seen[name], shown, strict=True):
            assert (picture - clean).mean().item() == pytest.approx(0, abs=0.02)
            assert (picture - clean).std().item() == pytest.approx(0.5, abs=0.02)


class Shift(nn.Module):
    """A generator that adds a constant."""

    def __init__(self, by):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x + self.by


class Constant(nn.Module):
    """A critic without an opinion."""

    def __init__(self, score):
        super().__init__()
        self.score = nn.Parameter(torch.tensor(score))

    def forward(self, x):
        return self.score + 0 * x.mean((1, 2, 3))


@pytest.mark.parametrize(("real", "fake", "loss"), [(1, 0, 0), (0, 1, 1), (0.5, 0.5, 0.25), (3, -1, 2.5)])
def test_critic_loss_by_hand(real, fake, loss):
    verdict = {"real": torch.full((2, 1, 3, 3), float(real)), "fake": torch.full((2, 1, 3, 3), float(fake))}
    assert critic_loss(verdict.__getitem__, "real", "fake").item() == loss


# -------------------------------------------------------------------------------------------- semantic consistency


class Seen:
    """CyCADA's L_sem as its paper has it: labels that f_S gives the originals, cross-entropy on the translations."""

    def __init__(self, method, weight):
        self.f_S = copy.deepcopy(method.f_S.network).eval()
        self.weight = weight

    def __call__(self, original, translation):
        classes = torch.stack([scores.argmax(0) for scores in self.f_S((original + 1) / 2).detach()])
        return self.weight * naive_cross_entropy(self.f_S((translation + 1) / 2), classes)


def test_semantic_term_is_the_formula(monkeypatch):
    monkeypatch.setattr(  # logits stay in double precision
        Segmenter, "enlarge", lambda _, logits, image: F.interpolate(logits, image.shape[-2:], mode="bilinear")
    )
    constant = {"schedule": "constant"}
    method = make(semantic=2.0, generators=constant, discriminators=constant).double()
    naive = Naive(method, 2e-4, (0.5, 0.999), 10.0, 10.0, 0.5, 2)
    naive.semantic = Seen(method, 2.0)
    assert len(method.f_S(block(0, dtype=torch.float64).image).argmax(1).unique()) == 3
    engine = lend_engine(method)
    for step in range(2):
        seen = batch(step, dtype=torch.float64)
        losses = advance(engine, method, seen, step)
        generators, _ = naive.step(seen)
        assert sum(losses.values()) - losses["D_X"] - losses["D_Y"] == pytest.approx(generators, rel=1e-6)
    for name in ("G", "F", "D_X", "D_Y"):
        assert_same_weights(getattr(method, name), getattr(naive, name), rtol=1e-8, atol=1e-10)


def test_f_s_stays_as_it_was_and_is_seen_in_evaluation():
    method = make(semantic=1.0)
    before = copy.deepcopy(method.f_S.state_dict())
    method.eval()
    method.train()
    assert not any(module.training for module in method.f_S.modules())
    advance(lend_engine(method), method, batch(0))
    assert all(torch.equal(value, before[key]) for key, value in method.f_S.state_dict().items())  # and its statistics
    assert not any(parameter.requires_grad for parameter in method.f_S.parameters())
    assert any(key.startswith("f_S.") for key in method.state_dict())


def test_semantic_term_by_hand():
    """With an f_S that reads colours as classes: a repainted class costs, a kept one hardly does."""
    method = make(semantic=2.0)
    method.f_S.network = Colours()
    red, blue = (torch.full((1, 3, 4, 4), -1.0) for _ in range(2))
    red[:, 0], blue[:, 2] = 1.0, 1.0
    kept = math.log(1 + 2 * math.exp(-4))
    assert method._semantic("semantic", red, red)["semantic"].item() == pytest.approx(2 * kept, rel=1e-5)
    assert method._semantic("semantic", red, blue)["semantic"].item() == pytest.approx(2 * (4 + kept), rel=1e-5)


class Colours(nn.Module):
    """Red, green, blue as classes, with scores from 0 to 4."""

    def forward(self, image):
        return 4 * image


def test_the_semantic_term_pulls_translations_back_to_their_classes():
    method = make(semantic=1.0)
    picture = 2 * batch(0).source.image - 1
    translation = (0.5 * picture).requires_grad_()
    before = method._semantic("semantic", picture, translation)["semantic"]
    before.backward()
    moved = translation - 0.02 * translation.grad.sign()
    assert method._semantic("semantic", picture, moved)["semantic"] < before


def test_semantic_without_a_teacher_is_a_mistake():
    task = Task(taxonomy=None, segmenter=None, streams=CycleGAN.needs, steps=3)
    with pytest.raises(ConfigError, match="teacher: missing"):
        CycleGAN(validate(CycleGANConfig, SMALL | {"semantic": 1.0}, "test"), task)
    assert make().f_S is None


# ------------------------------------------------------------------------------------------------------ image pool


def coloured(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def values(pictures):
    return pictures[:, 0, 0, 0].tolist()


def seeds(swaps, slots=2):
    """Seeds whose decision is the wanted one: None = return the fresh picture, k = swap with slot k."""

    def decision(seed):
        choice = random.Random(seed_of(seed, "pool"))
        return choice.randrange(slots) if choice.random() < 0.5 else None

    return tuple(next(seed for seed in itertools.count() if decision(seed) == swap) for swap in swaps)


def test_pool_fills_then_swaps():
    pool = ImagePool(2)
    assert values(pool(coloured(1, 2), (0, 1))) == [1, 2]
    assert values(pool(coloured(3, 4, 5, 6), seeds([None, 1, 1, 0]))) == [3, 2, 4, 1]
    assert values(pool.pictures) == [6, 5]


def test_pool_does_not_depend_on_how_pictures_are_batched():
    whole, parts = ImagePool(3), ImagePool(3)
    order = tuple(range(100, 112))
    expected = values(whole(coloured(*range(12)), order))
    found = [v for i in range(0, 12, 2) for v in values(parts(coloured(i, i + 1), order[i : i + 2]))]
    assert found == expected
    assert values(parts.pictures) == values(whole.pictures)


def test_pool_returns_old_pictures_half_of_the_time():
    pool = ImagePool(50)
    pool(coloured(*[-1] * 50), tuple(range(50)))
    old = sum(value != i for i in range(400) for value in values(pool(coloured(i), (1000 + i,))))
    assert 160 < old < 240


def test_pool_keeps_copies_and_leaves_its_input_alone():
    pool = ImagePool(1)
    pool(coloured(1), (0,))
    fresh = coloured(2).requires_grad_()
    shown = pool(fresh, seeds([0], slots=1))
    assert values(shown) == [1]
    assert not shown.requires_grad
    assert values(fresh) == [2]
    shown.zero_()
    assert values(pool.pictures) == [2]


def test_pool_of_none_shows_the_fresh_pictures():
    assert values(ImagePool(0)(coloured(*range(20)), tuple(range(20)))) == list(range(20))


def test_pool_of_another_size_is_an_error():
    pool = ImagePool(2)
    pool(coloured(1), (0,))
    with pytest.raises(DataError, match="pictures of 4 x 8 after pictures of 4 x 4: set a crop"):
        pool(torch.zeros(1, 3, 4, 8), (1,))


# ------------------------------------------------------------------------------------------- state, settings, model


def test_stopped_and_resumed_is_bit_identical():
    through, first, second = make(), make(), make()
    engine, early, late = (lend_engine(method) for method in (through, first, second))
    losses = [advance(engine, through, batch(step), step) for step in range(4)]
    for step in range(2):
        advance(early, first, batch(step), step)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    late.load(copy.deepcopy(early.state()))
    assert [advance(late, second, batch(step), step) for step in range(2, 4)] == losses[2:]
    assert all(
        torch.equal(a, b) for a, b in zip(through.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_changed_learning_rate_keeps_the_rest_of_the_paper():
    config = validate(CycleGANConfig, {"generators": {"lr": 1e-4}}, "test")
    for optimiser in (config.generators, config.discriminators):
        assert (optimiser.name, optimiser.betas, optimiser.weight_decay) == ("adam", (0.5, 0.999), 0)
        assert (optimiser.schedule, optimiser.decay_from) == ("linear", 0.5)
    assert (config.generators.lr, config.discriminators.lr) == (1e-4, 2e-4)
    assert (config.lambda_a, config.lambda_b, config.lambda_idt, config.pool) == (10, 10, 0.5, 50)


def test_generators_and_discriminators_have_optimisers_of_their_own():
    engine = lend_engine(make(generators={"lr": 1e-3}, discriminators={"lr": 5e-4}))
    assert engine.learning_rates() == {"generators": 1e-3, "discriminators": 5e-4}


def test_preview_shows_both_ways_in_the_range_of_pictures():
    method = make()
    pictures = method.preview(batch(0, height=25, width=31))
    assert list(pictures) == ["x", "G(x)", "F(G(x))", "y", "F(y)"]
    for picture in pictures.values():
        assert picture.shape == (2, 3, 25, 31)
        assert not picture.requires_grad
        assert 0 <= picture.min() <= picture.max() <= 1
    assert torch.equal(pictures["G(x)"], method.model()(pictures["x"]))
    back = Translator(method.F)
    assert torch.equal(pictures["F(G(x))"], back(pictures["G(x)"]))
    assert torch.equal(pictures["F(y)"], back(pictures["y"]))


def test_model_is_g_and_outlives_the_training(tmp_path):
    method = make()
    method.save_model(tmp_path / "model.safetensors")
    image = batch(0).source.image
    assert torch.equal(load_translator(tmp_path / "model.safetensors")(image), method.model()(image))
    assert torch.equal(method.model()(image), (method.G(2 * image - 1) + 1) / 2)
