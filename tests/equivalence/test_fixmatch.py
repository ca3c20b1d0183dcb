"""FixMatch and UniMatch against their steps written a second time, and what their views and losses must never do."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.masks import sized_boxes
from udas.data.mixing import channel_dropout, strong
from udas.data.sampling import seed_of
from udas.errors import ConfigError
from udas.methods.fixmatch import FixMatch, FixMatchConfig, PseudoLabels, pseudo_labels, pseudo_loss, strong_view
from udas.methods.unimatch import UniMatch, UniMatchConfig
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
SSL = (Stream.LABELLED, Stream.UNLABELLED)
ALL = (*SSL, Stream.SOURCE)
C = len(CLASSES.classes)
OURS = {"name", "optimiser", "source", "auxiliary"}  # what the publications do not give
METHODS = {"fixmatch": (FixMatch, FixMatchConfig), "unimatch": (UniMatch, UniMatchConfig)}
both = pytest.mark.parametrize("name", METHODS)


def make(name, streams=SSL, network="fcn", **settings):
    method, config = METHODS[name]
    torch.manual_seed(3)
    chosen = {"optimiser": SGD, "threshold": 0.38, "cutmix": 0.7} | settings
    return method(validate(config, chosen, "test"), task(streams, network, STEPS)).train()


def batch(step, streams=SSL, count=3):
    seen = Batch(
        source=block(10 * step) if Stream.SOURCE in streams else None,
        labelled=block(10 * step + 1),
        unlabelled=block(10 * step + 2, count, labelled=False),
    )
    seen.unlabelled.image[0, :, :, :10] = 0  # this picture was too small for its crop
    return seen


class Naive:
    """Views pixel by pixel, losses class by class; one backward of the whole sum."""

    def __init__(self, method):
        self.c, self.net = method.config, copy.deepcopy(method.segmenter)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        terms = self.terms(batch)
        self.sgd.zero_grad()
        (sum(terms.values()) / 2).backward()
        self.sgd.step()
        return {name: term.item() / 2 for name, term in terms.items()}

    def source(self, batch):
        if not batch.source:
            return {}
        return {"source": self.c.source * self.cross_entropy(self.net.levels(batch.source.image), batch.source.label)}

    def cross_entropy(self, outputs, label):
        main, *others = (naive_cross_entropy(output, label) for output in outputs)
        return main + self.c.auxiliary * sum(others)

    def pseudo_labels(self, logits):
        p = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
        valid = torch.ones(len(p), *p.shape[2:], dtype=bool)
        valid[0, :, :10] = False
        return p.argmax(1), p.max(1).values, valid

    def view(self, seen, seeds, pseudo):
        """Colours first; then a box of the next picture's colours, labels, confidences and validity."""
        colours = strong(seen.image, seeds)
        planes = [colours, *pseudo]
        mixed = [plane.clone() for plane in planes]
        for b, seed in enumerate(seeds):
            other = (b + 1) % len(seeds)
            box = sized_boxes([seed], *seen.image.shape[-2:], self.c.share, self.c.cutmix)
            for y, x in box[0, 0].nonzero().tolist():
                for plane, result in zip(planes, mixed, strict=True):
                    result[b, ..., y, x] = plane[other, ..., y, x]
        return mixed[0], mixed[1:]

    def loss(self, outputs, pseudo):
        label, confidence, valid = pseudo
        total = 0.0
        for weight, logits in zip((1.0, self.c.auxiliary), outputs, strict=False):
            log_p = logits - logits.exp().sum(1, keepdim=True).log()
            for k in range(C):
                total = total - weight * log_p[:, k][valid & (confidence >= self.c.threshold) & (label == k)].sum()
        return total / valid.sum()


class NaiveFixMatch(Naive):
    def terms(self, batch):
        known, seen, terms = batch.labelled, batch.unlabelled, self.source(batch)
        outputs, n = self.net.levels(torch.cat([known.image, seen.image])), len(known.image)
        terms["labelled"] = self.cross_entropy([logits[:n] for logits in outputs], known.label)
        image, pseudo = self.view(seen, seen.seeds, self.pseudo_labels(outputs[0][n:]))
        return terms | {"strong": self.c.consistency * self.loss(self.net.levels(image), pseudo)}


class NaiveUniMatch(Naive):
    def terms(self, batch):
        known, seen, c, terms = batch.labelled, batch.unlabelled, self.c, self.source(batch)
        n, images = len(known.image), torch.cat([known.image, seen.image])
        maps = self.net.encoder((images - self.net.mean) / self.net.std)
        left = list(maps)
        for k in range(1, len(maps)):
            drawn = channel_dropout(torch.ones_like(maps[k]), known.seeds + seen.seeds, c.dropout, str(k - 1))
            left[k] = maps[k] * (drawn > 0) / (1 - c.dropout)
        m = len(images)
        if c.separate_decoding:
            dropped = self.decoded([entry[n:] for entry in left])
            outputs = self.decoded(maps)
        else:
            outputs = self.decoded([torch.cat(pair) for pair in zip(maps, left, strict=True)])
            dropped = [logits[m + n :] for logits in outputs]
        terms["labelled"] = self.cross_entropy([logits[:n] for logits in outputs], known.label)
        pseudo = self.pseudo_labels(outputs[0][n:m])
        terms["features"] = c.features * self.loss(dropped, pseudo)
        image_1, pseudo_1 = self.view(seen, seen.seeds, pseudo)
        image_2, pseudo_2 = self.view(seen, [seed_of(seed, "second") for seed in seen.seeds], pseudo)
        both = self.net.levels(torch.cat([image_1, image_2]))
        n = len(image_1)
        terms["strong 1"] = c.images * self.loss([logits[:n] for logits in both], pseudo_1)
        terms["strong 2"] = c.images * self.loss([logits[n:] for logits in both], pseudo_2)
        return terms

    def decoded(self, maps):
        coarse = [self.net.decoder(maps), *self.net.decoder.auxiliary(maps)]
        return [F.interpolate(logits, size=(33, 48), mode="bilinear") for logits in coarse]


CASES = {
    "semi-supervised": (SSL, {}),
    "adaptation": (ALL, {"source": 0.7}),
    "every pixel counts": (SSL, {"threshold": 0.0, "share": (0.2, 0.9), "cutmix": 1}),
    "no boxes": (SSL, {"cutmix": 0, "threshold": 0.4}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "auxiliary": 0.4, "threshold": 0.334}),
}
WEIGHTS = {
    "fixmatch": {"consistency": 0.6},
    "unimatch": {"images": 0.3, "features": 0.7, "dropout": 0.3, "separate_decoding": True},
}


@both
@pytest.mark.parametrize("case", [*CASES, "weights"])
def test_step_is_the_formula(name, case):
    streams, settings = CASES.get(case, (SSL, WEIGHTS[name]))
    method = make(name, streams, **settings)
    naive = (NaiveFixMatch if name == "fixmatch" else NaiveUniMatch)(method)
    engine = lend_engine(method, STEPS)
    for step in range(2):
        seen = batch(step, streams)
        expected = naive.step(seen, step)
        assert advance(engine, method, seen, step) == pytest.approx(expected, rel=2e-5)
        assert all(term > 0 for term in expected.values())
    assert_same_weights(method.segmenter, naive.net)


def test_the_defaults_are_the_published_ones():
    """L = (L_x + L_s) / 2 and L = (L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2; the threshold is that of VOC and COCO."""
    shared = {"threshold": 0.95, "cutmix": 0.5, "share": (0.02, 0.4)}
    assert FixMatchConfig().model_dump(exclude=OURS) == shared | {"consistency": 1}
    weights = {"images": 0.25, "features": 0.5, "dropout": 0.5}
    assert UniMatchConfig().model_dump(exclude=OURS) == shared | weights | {"separate_decoding": False}


def test_the_strong_view_is_the_published_one():
    """Jitter 0.5, 0.5, 0.5 and 0.25 with probability 0.8, grey 0.2, blur 0.5 of sigma 0.1 to 2, in this order."""
    seen = block(1, 8, labelled=False)
    pseudo = pseudo_labels(torch.zeros(8, C, 33, 48), seen.image)
    image, _ = strong_view(seen, seen.seeds, pseudo, FixMatchConfig(cutmix=0))
    assert torch.equal(image, strong(seen.image, seen.seeds, 0.5, 0.5, 0.5, 0.25, 0.8, 0.2, 0.5, (0.1, 2.0)))


def test_the_mean_is_over_all_pixels_inside_the_picture():
    """Of 100 pixels 20 are outside and 40 confident: log 2 from 40 of 80, not of 40 or 100."""
    confidence, image = torch.full((1, 10, 10), 0.5), torch.ones(1, 3, 10, 10)
    image[..., :2] = 0
    confidence[..., 6:] = 0.96
    label = pseudo_labels(torch.zeros(1, 2, 10, 10), image).label
    assert (label == IGNORE).sum() == 20
    loss = pseudo_loss([torch.zeros(1, 2, 10, 10)], PseudoLabels(label, confidence), FixMatchConfig(threshold=0.95))
    assert loss.item() == pytest.approx(math.log(2) / 2)


def test_a_view_is_mixed_with_the_next_picture_and_so_are_its_labels():
    config, seen = FixMatchConfig(cutmix=1), block(1, 3, labelled=False)
    flat = torch.arange(3).view(3, 1, 1).expand(3, 33, 48)
    image, (label, confidence) = strong_view(seen, seen.seeds, PseudoLabels(flat, flat / 4), config)
    box, colours = sized_boxes(seen.seeds, 33, 48), strong(seen.image, seen.seeds)
    assert torch.equal(image, torch.where(box, colours[[1, 2, 0]], colours))
    assert torch.equal(label, torch.where(box[:, 0], (flat + 1) % 3, flat))
    assert torch.equal(confidence, label / 4)


def test_two_views_of_a_picture_are_independent():
    seen, asked = batch(0, count=4), []
    method = make("unimatch", cutmix=1)
    method.segmenter.encoder.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone()))
    kept = copy.deepcopy(seen)
    advance(lend_engine(method), method, seen)
    assert [len(image) for image in asked] == [2 + 4, 8], "labelled with weak, and both strong views at once"
    first, second = asked[1].chunk(2)
    assert all((a != b).float().mean() > 0.5 for a, b in zip(first, second, strict=True))
    assert torch.equal(seen.unlabelled.image, kept.unlabelled.image)


@both
def test_labels_come_from_the_weak_view(name, monkeypatch):
    """And not from the view that learns them, which is taken for something else."""
    method, seen, learnt = make(name, network="deeplabv2", cutmix=0), batch(0), []

    def loss(outputs, pseudo, config):
        learnt.append((outputs[0].detach(), pseudo))
        return pseudo_loss(outputs, pseudo, config)

    monkeypatch.setattr(f"udas.methods.{name}.pseudo_loss", loss)
    with torch.no_grad():
        logits = copy.deepcopy(method.segmenter)(torch.cat([seen.labelled.image, seen.unlabelled.image]))
        confidence, label = logits[len(seen.labelled.image) :].softmax(1).max(1)
    label[0, :, :10] = IGNORE
    advance(lend_engine(method), method, seen)
    assert len(learnt) == (1 if name == "fixmatch" else 3)
    for logits, pseudo in learnt:
        assert torch.equal(pseudo.label, label)
        torch.testing.assert_close(pseudo.confidence, confidence)
        assert (logits.argmax(1) != label)[label != IGNORE].float().mean() > 0.02


@pytest.mark.parametrize(("network", "features"), [("deeplabv3plus", [1, 2, 3, 4, 5]), ("segnet", [5])])
def test_features_lose_channels_and_nothing_else_does(network, features):
    """The picture and the maps in which SegNet finds its pooling positions reach the decoder as they are."""
    method, seen, decoded = make("unimatch", network=network, separate_decoding=True), batch(0), []
    decode, seeds = method.segmenter.decode, (*seen.labelled.seeds, *seen.unlabelled.seeds)
    method.segmenter.decode = lambda pyramid, image: decoded.append(pyramid) or decode(pyramid, image)
    advance(lend_engine(method), method, seen)
    dropped, whole, _ = decoded
    for k, (found, entry) in enumerate(zip(dropped, whole, strict=True)):
        expected = channel_dropout(entry, seeds, 0.5, str(k - 1)) if k in features else entry
        assert torch.equal(found, expected[len(seen.labelled.image) :])
        assert (k in features) != torch.equal(expected, entry)


@both
def test_one_picture_is_never_mixed_with_itself(name):
    seen = batch(0, count=1)
    with pytest.raises(ConfigError, match="batch of one"):
        advance(lend_engine(alone := make(name)), alone, seen)
    advance(lend_engine(alone := make(name, cutmix=0)), alone, seen)


@both
def test_a_picture_is_never_mixed_with_another_crop_of_itself(name):
    """The batch holds two crops of a and two of b: each view has a box of the first crop of the other that follows."""
    method, seen, shown = make(name, cutmix=1), block(2, 4, labelled=False), []
    seen, levels = replace(seen, names=("a", "a", "b", "b")), method.segmenter.levels
    method.segmenter.levels = lambda image: shown.append(image.clone()) or levels(image)
    advance(lend_engine(method), method, Batch(labelled=block(1), unlabelled=seen))
    assert len(shown[-1]) == (4 if name == "fixmatch" else 8)
    for number, view in enumerate(shown[-1].split(4)):
        seeds = [seed_of(seed, "second") for seed in seen.seeds] if number else seen.seeds
        colours = strong(seen.image, seeds)
        assert torch.equal(view, torch.where(sized_boxes(seeds, 33, 48), colours[[2, 2, 0, 0]], colours))


@both
def test_pixels_below_the_threshold_teach_nothing(name):
    """With no confident pixel the step is that of supervised training at half the weight."""
    method, seen = make(name, threshold=1.0, network="deeplabv2"), batch(0)
    net = copy.deepcopy(method.segmenter)
    losses = advance(lend_engine(method), method, seen)
    assert all(value == 0 for key, value in losses.items() if key != "labelled")
    logits = net(torch.cat([seen.labelled.image, seen.unlabelled.image]))[: len(seen.labelled.image)]
    (naive_cross_entropy(logits, seen.labelled.label) / 2).backward()
    torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4).step()
    for key, value in net.named_parameters():
        torch.testing.assert_close(method.segmenter.get_parameter(key), value, rtol=1e-5, atol=2e-6, msg=key)
