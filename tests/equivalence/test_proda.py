"""ProDA's steps against the paper written a second time, and what its networks and prototypes must never do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.randaugment import draw_strong, unchanged
from udas.errors import ConfigError
from udas.methods.distil import Distil, DistilConfig
from udas.methods.proda import ProDA, ProDAConfig, masked
from udas.networks.segmenters import Outputs
from udas.pipeline.models import Reweighted
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
UDA, ALL = (Stream.SOURCE, Stream.UNLABELLED), (Stream.SOURCE, Stream.UNLABELLED, Stream.LABELLED)
C = len(CLASSES.classes)


def earlier(given, seed=11):
    """The task with a teacher of other weights, and prototypes."""

    def teacher():
        network = given.segmenter()
        torch.manual_seed(seed)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return network

    channels = given.segmenter().decoder.channels
    vectors = torch.randn(C, channels, generator=torch.Generator().manual_seed(seed))
    return replace(given, teacher=teacher, prototypes=vectors)


def proda(streams=UDA, network="deeplabv2", vectors=None, **settings):
    config = {"optimiser": SGD, "minimum": 3, "decay": 0.7, "momentum": 0.6, "temperature": 0.5} | settings
    given = earlier(task(streams, network, STEPS))
    if vectors is not None:
        given = replace(given, prototypes=vectors(given.prototypes))
    torch.manual_seed(3)
    return ProDA(validate(ProDAConfig, config, "test"), given)


def distil(streams, network="deeplabv2", **settings):
    torch.manual_seed(3)
    config = validate(DistilConfig, {"optimiser": SGD} | settings, "test")
    return Distil(config, earlier(task(streams, network, STEPS)))


def batch(step, streams):
    return Batch(
        source=block(10 * step),
        labelled=block(10 * step + 1) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, labelled=False) if Stream.UNLABELLED in streams else None,
        pseudo=block(10 * step + 3) if Stream.PSEUDO in streams else None,
    )


def softmax(scores):
    return scores.exp() / scores.exp().sum(1, keepdim=True)


def supervised(net, seen, share):
    """Every output against the labels."""
    main, *others = net.levels(seen.image)
    return naive_cross_entropy(main, seen.label) + share * sum(naive_cross_entropy(o, seen.label) for o in others)


class NaiveProDA:
    """Class by class and picture by picture; one backward of the sum."""

    def __init__(self, method):
        self.c, self.net = method.config, copy.deepcopy(method.segmenter)
        self.slow, self.warm = copy.deepcopy(self.net), copy.deepcopy(method.warm_up.network).eval()
        self.eta = [row.clone() if row.any() else None for row in method.prototypes.vectors]
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        c, image = self.c, batch.unlabelled.image
        self.slow.train(c.averaged_norm == "batch")
        with torch.no_grad():
            slow = self.slow.outputs(image)
            near, y = self.nearness(slow.representation), self.believed(image, slow)
        terms = {"source": supervised(self.net, batch.source, c.auxiliary)}
        if batch.labelled is not None:
            terms["labelled"] = c.labelled * supervised(self.net, batch.labelled, c.auxiliary)
        terms |= self.target(batch.unlabelled, near, y)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        self.move(slow)
        for old, new in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            old.data = c.momentum * old.data + (1 - c.momentum) * new.data
        for old, new in zip(self.slow.buffers(), self.net.buffers(), strict=True):
            old.copy_(new)
        return {name: term.item() for name, term in terms.items()}

    def nearness(self, features):
        """exp(-tau d) over its sum, over the classes that have a prototype."""
        parts = []
        for eta in self.eta:
            if eta is None:
                parts.append(torch.zeros_like(features[:, 0]))
            else:
                distance = ((features - eta[:, None, None]) ** 2).sum(1).sqrt()
                parts.append(torch.exp(-self.c.temperature * distance))
        return torch.stack(parts, 1) / sum(parts)[:, None]

    def believed(self, image, slow):
        p = softmax(self.warm(image) if self.c.soft_label == "fixed" else slow.levels[0])
        if self.c.reweight == "prototypes":
            p = p * F.interpolate(self.nearness(slow.representation), size=image.shape[-2:], mode="bilinear")
        if self.c.reweight == "prediction":
            p = p * softmax(slow.levels[0])
        return p / p.sum(1, keepdim=True)

    def target(self, seen, near, y):
        c, image = self.c, seen.image
        if c.target == "hard":
            y = torch.stack([(y.argmax(1) == k).float() for k in range(C)], 1)
        p = softmax(self.net(image))
        ce = sum(-y[:, k] * p[:, k].log() for k in range(C)).mean()
        rce = sum(-p[:, k].clamp(min=1e-7) * y[:, k].clamp(min=1e-4).log() for k in range(C)).mean()
        reg, pseudo = -p.log().mean(), c.alpha * ce + c.beta * rce
        there = torch.ones(near[:, 0].shape, dtype=bool)
        if c.strong:
            views = draw_strong(image, seen.seeds)
            image, (near, there) = views.picture(image), views.maps(near)
        else:
            image = (image * 255).round() / 255
        student = self.nearness(self.net.outputs(image).representation)
        known = [k for k in range(C) if self.eta[k] is not None]
        kl = sum(near[:, k][there] * (near[:, k] / student[:, k])[there].log() for k in known).mean() / C
        return {"pseudo": pseudo, "structure": c.structure * kl, "regularisation": c.regularisation * reg}

    def move(self, slow):
        features = slow.representation
        label = F.interpolate(slow.levels[0], size=features.shape[-2:], mode="bilinear").argmax(1)
        for b in range(len(features)):
            for k in range(C):
                here = label[b] == k
                if here.sum() >= self.c.minimum:
                    mean, old = features[b][:, here].mean(1), self.eta[k]
                    self.eta[k] = mean if old is None else self.c.decay * old + (1 - self.c.decay) * mean


CASES = {
    "as published": (UDA, {}),
    "real labels": (ALL, {"labelled": 0.5}),
    "soft, moving": (UDA, {"target": "soft", "soft_label": "moving"}),
    "by prediction": (UDA, {"reweight": "prediction", "averaged_norm": "running"}),
    "plain self-training": (UDA, {"reweight": "none", "strong": False, "structure": 0}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "auxiliary": 0.3}),
    "two levels, by prediction": (
        UDA,
        {"network": "deeplabv2_multi", "reweight": "prediction", "soft_label": "moving", "target": "soft"},
    ),
    "a class never seen": (UDA, {"vectors": lambda rows: rows * torch.tensor([[1.0], [0.0], [1.0]])}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_of_proda_is_the_formula(case):
    streams, settings = CASES[case]
    method = proda(streams, **settings)
    naive, engine = NaiveProDA(method), lend_engine(method, STEPS)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=5e-5)
    for ours, theirs in ((method.segmenter, naive.net), (method.averaged.module, naive.slow)):
        assert_same_weights(ours, theirs, rtol=1e-4, atol=5e-5)
    for k, eta in enumerate(naive.eta):
        expected = torch.zeros_like(method.prototypes.vectors[k]) if eta is None else eta
        torch.testing.assert_close(method.prototypes.vectors[k], expected, rtol=1e-4, atol=1e-5)
        assert method.prototypes.seen[k] == (eta is not None)


@pytest.mark.parametrize("method", [proda(), distil((Stream.SOURCE, Stream.PSEUDO))], ids=["proda", "distil"])
def test_the_teacher_stays_as_it_is(method):
    """No gradient, no running statistics, no dropout; whatever mode the method is put into."""
    method.train()
    teacher = method.warm_up if isinstance(method, ProDA) else method.teacher
    before = copy.deepcopy(teacher.state_dict())
    advance(lend_engine(method), method, batch(0, method.task.streams))
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    optimised = {id(p) for group in method.optimised()["segmenter"].groups for p in group["params"]}
    assert optimised == {id(p) for p in method.segmenter.parameters()}


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_the_mode_of_the_averaged_network(mode):
    method = proda(averaged_norm=mode)
    for training in (True, False, True):
        method.train(training)
        assert method.averaged.module.training == (training and mode == "batch")
        assert method.segmenter.training == training


def test_black_borders_teach_nothing_and_move_no_prototype():
    """What a zoom leaves black gives the same loss and prototypes whatever is believed there."""
    method, framed = proda(regularisation=0, structure=0, decay=0.5), batch(0, UDA)
    framed.unlabelled.image[:, :, :, 24:] = 0
    inside = torch.ones(framed.unlabelled.image[:, 0].shape, dtype=bool)
    inside[:, :, 24:] = False
    classes = torch.rand(len(inside), C, *inside.shape[1:])
    other = torch.where(inside[:, None], classes, torch.rand_like(classes))
    found = []
    for believed in (classes, other):
        torch.manual_seed(0)
        found.append(method._denoise(framed.unlabelled.image, believed, inside)["pseudo"])
    assert found[0] == found[1]
    label = torch.arange(2).view(2, 1, 1).expand(2, 4, 6)
    assert (masked(label, inside) == IGNORE).tolist() == [[[False] * 3 + [True] * 3] * 4] * 2


def test_a_step_moves_prototypes_by_what_is_inside_the_picture():
    method, framed, given = proda(), batch(0, UDA), []
    framed.unlabelled.image[:, :, :, 24:] = 0
    method.prototypes.update = lambda features, label: given.append(label == IGNORE)
    advance(lend_engine(method), method, framed)
    width = given[0].shape[-1] // 2
    assert given[0][..., width + 1 :].all()
    assert not given[0][..., :width].any()


@pytest.mark.parametrize("align_corners", [True, False])
def test_weights_are_enlarged_as_the_network_enlarges_its_logits(align_corners):
    """In training and for labels; every class is as likely, so that the weights decide."""
    method, image = proda(soft_label="moving"), torch.rand(2, 3, 33, 48)
    features = torch.randn(2, method.prototypes.vectors.shape[1], 5, 6)
    said = Outputs((torch.zeros(2, C, 33, 48),), features, align_corners)
    like = {"size": (33, 48), "mode": "bilinear", "align_corners": align_corners}
    expected = F.interpolate(method.prototypes.weights(features), **like)
    torch.testing.assert_close(method._believe(image, said).classes, expected)
    network = torch.nn.Identity()
    network.outputs = lambda _: said
    log = F.interpolate(method.prototypes.log_weights(features), **like)
    torch.testing.assert_close(Reweighted(network, method.prototypes)(image), log)


def test_black_borders_have_no_structure():
    """L_kl counts no place of a view that shows what a zoom left black, whatever is believed there."""
    method, target = proda(), batch(0, UDA).unlabelled
    height, width = method.segmenter.representation(target.image).shape[-2:]
    inside = torch.ones(target.image[:, 0].shape, dtype=bool)
    inside[:, :, target.image.shape[-1] // 2 :] = False
    structure = torch.rand(len(inside), C, height, width).softmax(1)
    other = structure.clone()
    other[..., -(-width // 2) :] = torch.rand_like(other[..., -(-width // 2) :]).softmax(1)
    everything = torch.ones_like(inside)
    found = [method.eval()._compare(target, *given) for given in ((structure, inside), (other, inside))]
    assert found[0] == found[1]
    assert method._compare(target, structure, everything) != method._compare(target, other, everything)


def test_the_student_is_handed_on_and_starts_the_average():
    method = proda()
    assert method.model() is method.segmenter
    for a, b in zip(method.averaged.module.parameters(), method.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_prototypes_that_never_move():
    method = proda(decay=1)
    before = method.prototypes.vectors.clone()
    advance(lend_engine(method), method, batch(0, UDA))
    assert torch.equal(method.prototypes.vectors, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "teacher: missing"),
        ({"prototypes": None}, "prototypes: missing"),
        ({"prototypes": torch.ones(C, 5)}, "3 classes with 5 features were collected, but .* 3 classes with 96"),
        ({"prototypes": torch.ones(C + 1, 96)}, "4 classes with 96 features"),
    ],
)
def test_earlier_stages_that_are_missing_or_do_not_fit(change, message):
    given = earlier(task(UDA, "deeplabv2"))
    with pytest.raises(ConfigError, match=message):
        ProDA(ProDAConfig(), replace(given, **change))


# --------------------------------------------------------------------------------------------------- distillation


class NaiveDistil:
    """The three terms, with the divergence written out pixel by pixel."""

    def __init__(self, method):
        self.c, self.net = method.config, copy.deepcopy(method.segmenter)
        self.teacher = copy.deepcopy(method.teacher.network).eval()
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        c = self.c
        terms = {"source": supervised(self.net, batch.source, c.auxiliary)}
        if batch.labelled is not None:
            terms["labelled"] = c.labelled * supervised(self.net, batch.labelled, c.auxiliary)
        seen = batch.pseudo
        views = draw_strong(seen.image, seen.seeds) if c.strong else unchanged(seen.image)
        image, label = views.picture(seen.image), views.label(seen.label)
        logits = self.net(image)
        student, teacher = softmax(logits), softmax(self.teacher(image)).detach()
        kd = sum(teacher[:, k] * (teacher[:, k].log() - student[:, k].log()) for k in range(C)).mean() / C
        terms |= {"pseudo": c.pseudo * naive_cross_entropy(logits, label), "distillation": c.distillation * kd}
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize(
    ("streams", "settings"),
    [
        ((Stream.SOURCE, Stream.PSEUDO), {}),
        ((Stream.SOURCE, Stream.PSEUDO), {"strong": False}),
        ((Stream.SOURCE, Stream.PSEUDO, Stream.LABELLED), {}),
        ((Stream.SOURCE, Stream.PSEUDO, Stream.LABELLED), {"network": "deeplabv2_multi", "auxiliary": 0.3}),
    ],
)
def test_the_step_of_the_distillation_is_the_formula(streams, settings):
    method = distil(streams, pseudo=0.7, distillation=3.0, labelled=0.5, **settings)
    naive, engine = NaiveDistil(method), lend_engine(method, STEPS)
    for step in range(3):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=5e-5)
    assert_same_weights(method.segmenter, naive.net, rtol=1e-4, atol=1e-5)


def test_a_student_that_equals_its_teacher_learns_nothing_from_it():
    method = distil((Stream.SOURCE, Stream.PSEUDO), pseudo=0)
    method.teacher.network.load_state_dict(method.segmenter.state_dict())
    method.segmenter.eval()
    seen = batch(0, method.task.streams)
    assert method._follow_teacher(seen.pseudo)["distillation"].item() == pytest.approx(0, abs=1e-6)


def test_pixels_without_a_pseudo_label_teach_by_distillation_only():
    method = distil((Stream.SOURCE, Stream.PSEUDO))
    seen = batch(0, method.task.streams)
    seen.pseudo.label.fill_(IGNORE)
    losses = advance(lend_engine(method), method, seen)
    assert losses["pseudo"] == 0
    assert losses["distillation"] > 0
