"""CutMix-Seg against its step written a second time, and what its masks, confidence and teacher must never do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import Batch, Stream
from udas.data.masks import box_masks
from udas.data.mixing import strong
from udas.errors import ConfigError
from udas.methods.cutmixseg import CutMixSeg, CutMixSegConfig
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
SSL = (Stream.LABELLED, Stream.UNLABELLED)
ALL = (*SSL, Stream.SOURCE)
C = len(CLASSES.classes)
OURS = {"name", "optimiser", "source", "auxiliary"}  # what the publication does not give


def make(streams=SSL, network="fcn", **settings):
    torch.manual_seed(3)
    config = validate(CutMixSegConfig, {"optimiser": SGD, "threshold": 0.38} | settings, "test")
    return CutMixSeg(config, task(streams, network, STEPS)).train()


def framed(seen, rows=6, columns=9):
    """The first picture was too small for its crop."""
    seen.image[0, :, :rows] = 0
    seen.image[0, :, :, -columns:] = 0
    return seen


def batch(step, streams=SSL, count=3):
    return Batch(
        source=block(10 * step) if Stream.SOURCE in streams else None,
        labelled=block(10 * step + 1),
        unlabelled=framed(block(10 * step + 2, count, labelled=False)),
    )


class Naive:
    """One picture after the other, its pixels copied one by one; a teacher that is averaged by hand."""

    def __init__(self, method):
        self.c = method.config
        self.net, self.teacher = copy.deepcopy(method.segmenter), copy.deepcopy(method.segmenter)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        pictures, logits, valid, counts = self.mix(batch.unlabelled)
        terms = {"labelled": self.learn(batch.labelled)}
        if batch.source:
            terms["source"] = self.c.source * self.learn(batch.source)
        terms["consistency"] = self.c.consistency * self.compare(self.net(pictures), logits, valid, counts)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        for mine, theirs in zip(self.teacher.state_dict().values(), self.net.state_dict().values(), strict=True):
            mine.copy_(self.c.decay * mine + (1 - self.c.decay) * theirs if mine.is_floating_point() else theirs)
        return {name: term.item() for name, term in terms.items()}

    def mix(self, seen):
        c, image, size = self.c, seen.image, seen.image.shape[-2:]
        self.teacher.train(c.teacher_norm == "batch")
        with torch.no_grad():
            logits = self.teacher(image)
        valid = torch.ones(len(image), *size, dtype=bool)
        valid[0, :6], valid[0, :, -9:] = False, False
        shown = strong(image, seen.seeds, 0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.0) if c.colours else image
        mixed = [shown.clone(), logits.clone(), valid.clone(), torch.ones_like(valid)]
        for b, seed in enumerate(seen.seeds):
            other = b + 1 if b + 1 < len(image) else 0
            for y, x in box_masks([seed], *size, c.share)[0, 0].nonzero().tolist():
                if c.mask == "cutmix":
                    mixed[0][b, :, y, x], mixed[1][b, :, y, x] = shown[other, :, y, x], logits[other, :, y, x]
                    mixed[2][b, y, x] = valid[other, y, x]
                else:
                    mixed[0][b, :, y, x], mixed[3][b, y, x] = self.net.mean.flatten(), False
        return mixed

    def compare(self, student, teacher, valid, counts):
        p, q = (x.exp() / x.exp().sum(1, keepdim=True) for x in (student, teacher))
        if self.c.loss == "squared":
            distance = sum((p[:, k] - q[:, k]) ** 2 for k in range(C))
        else:
            distance = -sum(q[:, k] * p[:, k].log() for k in range(C))
        total, everywhere = 0.0, (q.amax(1) >= self.c.threshold)[valid].float().mean()
        for b in range(len(p)):
            sure = q[b].max(0).values >= self.c.threshold
            share = everywhere if self.c.confidence == "batch" else sure[valid[b]].float().mean()
            if self.c.confidence == "pixel":
                total += distance[b][valid[b] & counts[b] & sure].sum()
            else:
                total += share * distance[b][valid[b] & counts[b]].sum()
        return total / valid.sum()

    def learn(self, seen):
        losses = [naive_cross_entropy(output, seen.label) for output in self.net.levels(seen.image)]
        return sum(share * loss for share, loss in zip((1.0, self.c.auxiliary), losses, strict=False))


CASES = {
    "published": (SSL, {}),
    "adaptation": (ALL, {"source": 0.7, "consistency": 0.6}),
    "cross-entropy": (SSL, {"loss": "cross_entropy", "share": (0.2, 0.6)}),
    "confidence per pixel": (SSL, {"confidence": "pixel"}),
    "confidence of the batch": (SSL, {"confidence": "batch"}),
    "cutout": (SSL, {"mask": "cutout"}),
    "cutout per pixel": (SSL, {"mask": "cutout", "share": (0.5, 0.5), "confidence": "pixel", "colours": True}),
    "colours": (SSL, {"colours": True, "decay": 0.6}),
    "the teacher uses batch statistics": (SSL, {"teacher_norm": "batch"}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "auxiliary": 0.3, "threshold": 0.334}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(2):
        seen = batch(step, streams)
        expected = naive.step(seen, step)
        assert advance(engine, method, seen, step) == pytest.approx(expected, rel=2e-5)
        assert expected["consistency"] > 0
    for ours, theirs in ((method.segmenter, naive.net), (method.teacher.module, naive.teacher)):
        assert_same_weights(ours, theirs)


def test_the_defaults_are_the_published_ones():
    assert CutMixSegConfig().model_dump(exclude=OURS) == {
        "consistency": 1,
        "mask": "cutmix",
        "share": (0.5, 0.5),
        "loss": "squared",
        "threshold": 0.97,
        "confidence": "picture",
        "colours": False,
        "decay": 0.99,
        "teacher_norm": "running",
        "keep": "teacher",
    }
    assert validate(CutMixSegConfig, {"mask": "cutout"}, "test").share == (0, 1)
    assert validate(CutMixSegConfig, {"mask": "cutout", "share": (0.2, 0.3)}, "test").share == (0.2, 0.3)


class Certain(nn.Module):
    """A teacher that is sure of the first `columns` columns of each picture, and of no other."""

    def __init__(self, *columns):
        super().__init__()
        self.columns = columns

    def forward(self, image):
        logits = torch.zeros(len(image), C, *image.shape[-2:])
        for b, columns in enumerate(self.columns):
            logits[b, b % C, :, :columns] = 9.0
        return logits


@pytest.mark.parametrize("confidence", ["picture", "pixel"])
def test_confidence_is_one_weight_per_picture_or_a_mask(confidence):
    """Of 48 columns 12 and 36 are sure."""
    method = make(mask="cutout", share=(0.5, 0.5), threshold=0.97, confidence=confidence)
    method.teacher.module, seen = Certain(12, 36), block(1, labelled=False)
    mixed = method._mix(seen)
    outside = ~box_masks(seen.seeds, 33, 48)[:, 0]
    for b, columns in enumerate((12, 36)):
        sure = torch.arange(48).expand(33, 48) < columns
        expected = sure.float() if confidence == "pixel" else torch.full((33, 48), columns / 48)
        assert torch.equal(mixed.weight[b], expected * outside[b])


def test_two_pictures_and_what_the_teacher_says_of_them_are_mixed_alike():
    method, seen = make(threshold=0.0), block(1, 3, labelled=False)
    method.teacher.module = Certain(48, 48, 48)
    seen = replace(seen, image=torch.arange(1.0, 4.0).view(3, 1, 1, 1).expand(3, 3, 33, 48) / 4)
    mixed, box = method._mix(seen), box_masks(seen.seeds, 33, 48)[:, 0]
    shown = torch.where(box, torch.tensor([2, 3, 1]).view(3, 1, 1), torch.tensor([1, 2, 3]).view(3, 1, 1))
    assert torch.equal(mixed.image, (shown / 4)[:, None].expand(3, 3, 33, 48))
    assert torch.equal(mixed.target.argmax(1), shown - 1)
    assert (mixed.weight == 1).all()


def test_a_picture_is_never_mixed_with_another_crop_of_itself():
    """The batch holds two crops of a and two of b: each shows a box of the first crop of the other one that follows."""
    method, seen, shown = make(), Batch(labelled=block(1), unlabelled=block(2, 4, labelled=False)), []
    seen = replace(seen, unlabelled=replace(seen.unlabelled, names=("a", "a", "b", "b")))
    method.segmenter.register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))
    advance(lend_engine(method), method, seen)
    image, box = seen.unlabelled.image, box_masks(seen.unlabelled.seeds, 33, 48)
    assert torch.equal(shown[-1], torch.where(box, image[[2, 2, 0, 0]], image))


def test_a_hole_shows_the_mean_colour_and_counts_nowhere():
    method, seen = make(mask="cutout", share=(0.5, 0.5), threshold=0.0), block(1, labelled=False)
    mixed, hole = method._mix(seen), box_masks(seen.seeds, 33, 48)[:, 0]
    assert torch.equal(mixed.image.permute(0, 2, 3, 1)[hole], method.segmenter.mean.flatten().expand(hole.sum(), 3))
    assert torch.equal(mixed.image.permute(0, 2, 3, 1)[~hole], seen.image.permute(0, 2, 3, 1)[~hole])
    assert torch.equal(mixed.weight, (~hole).float())
    assert mixed.valid.all()


def test_one_picture_cannot_be_mixed_but_cut():
    with pytest.raises(ConfigError, match="batch of one"):
        make()._mix(block(1, 1, labelled=False))
    make(mask="cutout")._mix(block(1, 1, labelled=False))


def test_the_teacher_sees_whole_pictures_in_their_own_colours_and_learns_nothing():
    method, asked = make(colours=True), []
    method.teacher.module.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone()))
    seen = batch(0)
    kept = copy.deepcopy(seen)
    advance(lend_engine(method), method, seen)
    assert len(asked) == 1
    assert torch.equal(asked[0], kept.unlabelled.image)
    assert torch.equal(seen.unlabelled.image, kept.unlabelled.image)
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_teachers_statistics_are_a_choice(statistics):
    method = make(teacher_norm=statistics)
    method.eval()
    method.train()
    norms = [m for m in method.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.training for norm in norms} == {statistics == "batch"}
    assert method.segmenter.training


def test_the_kept_network_is_a_choice():
    teacher, student = make(), make(keep="student")
    assert teacher.model() is teacher.teacher.module
    assert student.model() is student.segmenter
