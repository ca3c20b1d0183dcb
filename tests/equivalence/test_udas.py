"""The UDAS teacher against its step written a second time, and what its adversary and its mixing must never do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from equivalence.small import block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_average_follows, assert_same_weights, lend_engine, turns
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.masks import cutmix_boxes
from udas.data.mixing import jitter
from udas.errors import ConfigError
from udas.methods.udas import FAKE, REAL, UDAS, UDASConfig, domain_cutmix, evidence
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
CRITIC = {"name": "sgd", "lr": 0.02, "momentum": 0.5, "weight_decay": 0}
UDA, ALL = (Stream.SOURCE, Stream.UNLABELLED), tuple(s for s in Stream if s != Stream.PSEUDO)


def make(streams, network="fcn", **settings):
    config = validate(UDASConfig, {"optimiser": SGD, "critic_optimiser": CRITIC} | settings, "test")
    torch.manual_seed(3)
    return UDAS(config, task(streams, network, STEPS))


def batch(step, streams, count=2, labelled=2):
    return Batch(
        source=block(10 * step, count),
        labelled=block(10 * step + 1, labelled) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, count, labelled=False),
    )


class Naive:
    """One player after the other, requires_grad switched by hand, losses summed before one backward."""

    def __init__(self, method):
        c = self.config = method.config
        self.net, self.critics = copy.deepcopy(method.segmenter), copy.deepcopy(method.critics)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        self.slow_sgd = torch.optim.SGD(self.critics.parameters(), 0.02, momentum=0.5)
        self.shares = [1.0, c.auxiliary]

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms = self.config, {}
        self.critics.requires_grad_(False)
        if c.source > 0:
            terms["source"], real = self.learn(batch.source.image, batch.source.label, c.source)
        if batch.labelled is not None and c.cutmix > 0:
            image, label = self.mix(batch.source, batch.labelled)
            terms["cutmix"], real = self.learn(image, label, c.cutmix)
        if batch.labelled is not None and c.labelled > 0:
            terms["labelled"], _ = self.learn(batch.labelled.image, batch.labelled.label, c.labelled)
        target = self.net.levels(batch.unlabelled.image)
        terms["adversarial"] = c.adversarial * self.judge(target, 1.0)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()

        self.critics.requires_grad_(True)
        terms["critic on labelled"] = self.judge([p.detach() for p in real], 1.0) / 2
        terms["critic on target"] = self.judge([p.detach() for p in target], 0.0) / 2
        self.slow_sgd.zero_grad()
        (terms["critic on labelled"] + terms["critic on target"]).backward()
        self.slow_sgd.param_groups[0]["lr"] = 0.02 * (1 - t / STEPS) ** 0.9
        self.slow_sgd.step()
        return {name: term.item() for name, term in terms.items()}

    def learn(self, image, label, weight):
        outputs = self.net.levels(image)
        losses = [naive_cross_entropy(output, label, hard_share=self.config.hard_share) for output in outputs]
        return weight * sum(share * loss for share, loss in zip(self.shares, losses, strict=False)), outputs

    def mix(self, source, labelled):
        """Copy the box of each labelled picture row by row into a copy of the synthetic one."""
        image, label = source.image.clone(), source.label.clone()
        boxes = cutmix_boxes(source.seeds, *image.shape[-2:])
        for b in range(len(image)):
            partner = b % len(labelled.image)
            for y, x in boxes[b, 0].nonzero().tolist():
                image[b, :, y, x] = labelled.image[partner, :, y, x]
                label[b, y, x] = labelled.label[partner, y, x]
        strength = self.config.jitter
        return jitter(image, source.seeds, strength, strength, strength, 0.0), label

    def judge(self, outputs, truth):
        total = 0.0
        for share, critic, logits in zip(self.shares, self.critics, outputs, strict=False):
            scores = critic(self.seen(logits))
            for score in scores if isinstance(scores, list) else [scores]:
                if self.config.gan == "least_squares":
                    loss = torch.mean((score - truth) ** 2)
                else:
                    sure = 1 / (1 + torch.exp(-score))
                    loss = -torch.mean(truth * torch.log(sure) + (1 - truth) * torch.log(1 - sure))
                total = total + share * loss
        return total

    def seen(self, logits):
        """Sharpened probabilities; unsure pixels are black."""
        powers = torch.exp(logits / self.config.temperature)
        sharpened = powers / powers.sum(1, keepdim=True)
        sure = torch.softmax(logits.detach(), 1).max(1).values >= self.config.confidence
        return sharpened * sure[:, None] if self.config.confidence else sharpened


CASES = {
    "no real labels": (UDA, {"gan": "vanilla"}),
    "real labels": (ALL, {"cutmix": 0.7, "jitter": 0.3}),
    "mixed pictures only": (ALL, {"source": 0, "cutmix": 1.0, "jitter": 0}),
    "real labels directly too": (ALL, {"source": 0.5, "labelled": 0.25, "hard_share": 0.3, "jitter": 0}),
    "real labels without mixing": (ALL, {"cutmix": 0, "labelled": 0.5, "adversarial": 0.1}),
    "sharpened and masked": (ALL, {"temperature": 0.5, "confidence": 0.4, "adversarial": 0.1}),
    "vanilla, masked, no real labels": (UDA, {"gan": "vanilla", "confidence": 0.4, "adversarial": 0.1}),
    "several scales": (ALL, {"critic": "multiscale", "adversarial": 0.1}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "auxiliary": 0.3, "adversarial": 0.1}),
    "two levels, several scales, vanilla": (
        UDA,
        {"network": "deeplabv2_multi", "critic": "multiscale", "gan": "vanilla", "adversarial": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(3):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=2e-5)
        for ours, theirs in ((method.segmenter, naive.net), (method.critics, naive.critics)):
            assert_same_weights(ours, theirs)
            theirs.load_state_dict(ours.state_dict())  # on from equal weights: rounding can turn a ReLU later


@pytest.mark.parametrize("network", ["fcn", "deeplabv2_multi"])
@pytest.mark.parametrize("streams", [UDA, ALL])
def test_each_player_moves_alone(network, streams):
    method = make(streams, network)
    engine = lend_engine(method)
    players = {"segmenter": list(method.segmenter.parameters()), "critic": list(method.critics.parameters())}
    seen = turns(engine, players)
    advance(engine, method, batch(0, streams))
    assert [name for name, _ in seen] == ["segmenter", "critic"]
    (_, first), (_, second) = seen
    assert True in first["segmenter"]
    assert first["critic"] == second["segmenter"] == {False}
    assert second["critic"] == {True}


@pytest.mark.parametrize("gan", ["least_squares", "vanilla"])
def test_the_adversary_pulls_target_predictions_towards_real(gan):
    """With nothing but the adversarial term, the critic as it was finds the target's predictions more real."""
    still = {"lr": 1e-2, "momentum": 0, "weight_decay": 0}
    method = make(ALL, gan=gan, source=0, cutmix=1e-9, adversarial=1.0, optimiser=SGD | still)
    critic, seen = copy.deepcopy(method.critics[0]), batch(0, ALL)

    def verdict():
        torch.manual_seed(0)
        with torch.no_grad():
            return critic(evidence(method.segmenter(seen.unlabelled.image))).mean().item()

    before = verdict()
    losses = advance(lend_engine(method), method, seen)
    assert losses["cutmix"] < 1e-8
    assert FAKE < REAL
    assert before < REAL
    assert verdict() > before


def test_the_critic_learns_to_tell_real_from_target():
    method = make(
        ALL, adversarial=1e-9, critic_optimiser=CRITIC | {"schedule": "constant"}, optimiser=SGD | {"lr": 1e-9}
    )
    engine, seen = lend_engine(method), batch(0, ALL)
    losses = [advance(engine, method, seen) for _ in range(8)]
    for term in ("critic on labelled", "critic on target"):
        assert all(0 <= loss[term] < 1 for loss in losses)
    totals = [loss["critic on labelled"] + loss["critic on target"] for loss in losses]
    assert totals[-1] < totals[0]


def test_pictures_without_any_label_teach_nothing():
    method = make(ALL, labelled=1.0, adversarial=0, optimiser=SGD | {"weight_decay": 0})
    before = copy.deepcopy(list(method.segmenter.parameters()))
    seen = batch(0, ALL)
    for void in (seen.source, seen.labelled):
        void.label.fill_(IGNORE)
    losses = advance(engine := lend_engine(method), method, seen)
    assert losses == {"source": 0, "cutmix": 0, "labelled": 0}  # and no critic without an adversary
    assert engine.failure() is None
    assert all(torch.equal(old, new) for old, new in zip(before, method.segmenter.parameters(), strict=True))


@pytest.mark.parametrize(("streams", "settings"), [(UDA, {}), (ALL, {"cutmix": 0})])
def test_mixed_only_without_anything_to_mix_is_a_mistake(streams, settings):
    with pytest.raises(ConfigError, match=r"source: 0 .* no labelled real pictures are mixed in"):
        make(streams, source=0, **settings)


def test_the_running_average_is_handed_on_and_follows():
    assert_average_follows(make(UDA, average=0.5), batch(0, UDA))


def test_pictures_need_one_size_where_they_are_mixed():
    assert make(ALL, source=0).same_size() == {Stream.SOURCE, Stream.LABELLED}
    assert not make(ALL, cutmix=0).same_size()


# ------------------------------------------------------------------------------------------------------ the mixing


def coded(seed, count, first):
    """Pictures whose grey level is their label: value / 255, void included."""
    made = block(seed, count)
    made.label.copy_(torch.where(made.label == IGNORE, IGNORE, made.label + first))
    made.image.copy_(made.label[:, None].expand(-1, 3, -1, -1) / 255)
    return made


@pytest.mark.parametrize(("count", "real"), [(4, 4), (5, 2), (2, 5), (3, 1)])
def test_label_and_picture_are_mixed_alike(count, real):
    source, labelled = coded(1, count, 0), coded(2, real, 100)
    kept = copy.deepcopy((source, labelled))
    mixed = domain_cutmix(source, labelled, 0.0)
    assert torch.equal((mixed.image * 255).round().long(), mixed.label[:, None].expand(-1, 3, -1, -1))
    boxes = cutmix_boxes(source.seeds, *source.image.shape[-2:])[:, 0]
    for b, box in enumerate(boxes):
        assert torch.equal(mixed.label[b][box], labelled.label[b % real][box])  # a small block is used repeatedly
        assert torch.equal(mixed.label[b][~box], source.label[b][~box])
    assert (mixed.label[boxes] == IGNORE).any(), "void labels stay void"
    assert boxes.any()
    assert not boxes.all()
    for block_now, block_before in zip((source, labelled), kept, strict=True):
        assert torch.equal(block_now.image, block_before.image)
        assert torch.equal(block_now.label, block_before.label)
    assert mixed.names == source.names


def test_mixing_with_colours_touches_no_block_and_no_label():
    source, labelled = block(1, 3), block(2, 3)
    kept = copy.deepcopy((source, labelled))
    mixed, plain = domain_cutmix(source, labelled, 0.4), domain_cutmix(source, labelled, 0.0)
    assert torch.equal(mixed.label, plain.label)
    assert not torch.equal(mixed.image, plain.image)
    assert 0 <= mixed.image.min() <= mixed.image.max() <= 1
    mixed.image.zero_()
    mixed.label.zero_()
    for block_now, block_before in zip((source, labelled), kept, strict=True):
        assert torch.equal(block_now.image, block_before.image)
        assert torch.equal(block_now.label, block_before.label)


# ---------------------------------------------------------------------------------------------- what the critic sees


def test_evidence_by_hand():
    logits = torch.tensor([[2.0, 0.1], [0.0, 0.0]])[None, :, None]  # two pixels: one sure (0.88), one not (0.52)
    plain = torch.tensor([[0.8808, 0.5250], [0.1192, 0.4750]])
    sharp = torch.tensor([[0.9820, 0.5498], [0.0180, 0.4502]])  # logits twice as large
    torch.testing.assert_close(evidence(logits)[0, :, 0], plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(evidence(logits, 0.5)[0, :, 0], sharp, atol=1e-4, rtol=0)
    masked = evidence(logits, 0.5, confidence=0.54)  # of the unsharpened prediction
    torch.testing.assert_close(masked[0, :, 0], sharp * torch.tensor([1, 0]), atol=1e-4, rtol=0)


def test_blanked_pixels_give_no_gradient():
    logits = torch.tensor([[2.0, 0.1], [0.0, 0.0]])[None, :, None].requires_grad_()
    evidence(logits, confidence=0.6)[0, 0].sum().backward()
    assert (logits.grad[0, :, 0] != 0).tolist() == [[True, False], [True, False]]


def test_one_critic_per_output():
    for network, count in (("fcn", 1), ("deeplabv2_multi", 2)):
        method = make(UDA, network)
        assert len(method.critics) == count
        assert all(isinstance(critic, nn.Module) for critic in method.critics)
