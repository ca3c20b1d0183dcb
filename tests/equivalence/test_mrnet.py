"""MRNet against its step written a second time, its class weights, and what its terms must never do."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from equivalence.small import block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine, turns
from udas.data.batch import IGNORE, Batch, Stream
from udas.errors import ConfigError
from udas.losses import balanced_cross_entropy
from udas.methods.adversary import REAL
from udas.methods.mrnet import MRNet, MRNetConfig, memory_regularisation
from udas.validation import validate

STEPS = 5
NETWORK = "deeplabv2_multi"
SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": "constant"}
CRITIC = {"name": "sgd", "lr": 0.02, "momentum": 0.5, "weight_decay": 0, "schedule": "constant"}
STILL = {"momentum": 0, "nesterov": False, "weight_decay": 0}
UDA, ALL = (Stream.SOURCE, Stream.UNLABELLED), (Stream.SOURCE, Stream.UNLABELLED, Stream.LABELLED)
# of three classes some are rare; a quarter of any number of pixels is exact
SMALL = {"rare_share": 0.27, "hard_share": 0.25, "adversarial": 0.1, "adversarial_auxiliary": 0.02}


def make(streams=UDA, network=NETWORK, **settings):
    config = validate(MRNetConfig, {"optimiser": SGD, "critic_optimiser": CRITIC} | SMALL | settings, "test")
    torch.manual_seed(3)
    return MRNet(config, task(streams, network, STEPS))


def batch(step, streams=UDA):
    source = block(10 * step)
    source.label[source.label == step % 3] = (step + 1) % 3  # every class is missing once
    inside = torch.zeros_like(source.label, dtype=torch.bool)
    inside[:, 4:-4, 4:-4] = True  # along the border logits are repeated, and which of equal pixels is harder is chance
    source.label[~inside] = IGNORE
    return Batch(
        source=source,
        labelled=block(10 * step + 1) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, labelled=False),
    )


class Naive:
    """One player after the other, requires_grad switched by hand, losses summed before one backward."""

    def __init__(self, method):
        self.config = method.config
        self.net, self.critics = copy.deepcopy(method.segmenter), copy.deepcopy(list(method.critics))
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        self.slow_sgd = torch.optim.SGD([p for d in self.critics for p in d.parameters()], 0.02, momentum=0.5)
        self.often = [1.0, 1.0, 1.0]

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms = self.config, {}
        self.switch_critics(False)
        source = self.net.levels(batch.source.image)
        weights = self.class_weights(batch.source.label)
        main, aux = (self.balanced(z, batch.source.label, weights) for z in source)
        terms["source"] = main + c.auxiliary * aux
        if batch.labelled is not None:
            main, aux = (naive_cross_entropy(z, batch.labelled.label) for z in self.net.levels(batch.labelled.image))
            terms["labelled"] = c.labelled * (main + c.auxiliary * aux)
        target = self.net.levels(batch.unlabelled.image)
        probabilities = [z.exp() / z.exp().sum(1, keepdim=True) for z in target]
        terms["adversarial"] = 0
        for p, critic, share in zip(probabilities, self.critics, (c.adversarial, c.adversarial_auxiliary), strict=True):
            terms["adversarial"] += share * sum(self.distance(s, 1.0) for s in self.scales(critic(p)))
        terms["memory"] = torch.zeros(())
        if t >= c.memory_from * STEPS:
            memory = torch.softmax(target[0] + c.fusion * target[1], 1).detach()
            for p in probabilities:
                terms["memory"] = terms["memory"] + c.memory * (memory * (memory / p).log()).sum(1).mean()
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()

        self.switch_critics(True)
        real = torch.softmax(source[0] + c.fusion * source[1], 1).detach().requires_grad_()
        terms |= {"critic on source": 0, "critic on target": 0, "critic penalty": 0}
        for p, critic in zip(probabilities, self.critics, strict=True):
            for score in self.scales(critic(real)):
                terms["critic on source"] += self.distance(score, 1.0)
                terms["critic penalty"] += c.penalty * self.slope(score, real)
            terms["critic on target"] += sum(self.distance(s, 0.0) for s in self.scales(critic(p.detach())))
        self.slow_sgd.zero_grad()
        (terms["critic on source"] + terms["critic on target"] + terms["critic penalty"]).backward()
        self.slow_sgd.step()
        if not c.penalty:
            del terms["critic penalty"]
        return {name: term.item() for name, term in terms.items()}

    def class_weights(self, label):
        """The released code's two loops over classes, counting pixels."""
        c, weights = self.config, []
        for k in range(3):
            count = label.flatten().tolist().count(k)
            self.often[k] = 0.9 * self.often[k] + 0.1 * (c.rare_weight if count == 0 else 1)
            weights.append(self.often[k] * (c.rare_weight if count < c.rare_share * label.numel() else 1))
        return weights

    def balanced(self, logits, label, weights):
        """sum of w l / sum of w over the hardest labelled pixels."""
        log_p, losses, found = logits - logits.exp().sum(1, keepdim=True).log(), [], []
        for k, weight in enumerate(weights):
            here = label == k
            losses.append(-weight * log_p[:, k][here])
            found += [weight] * int(here.sum())
        losses = torch.cat(losses)
        hardest = losses.argsort(descending=True)[: math.ceil(self.config.hard_share * len(losses))]
        return losses[hardest].sum() / sum(found[index] for index in hardest.tolist())

    def distance(self, score, truth):
        if self.config.gan == "least_squares":
            return torch.mean((score - truth) ** 2)
        sure = 1 / (1 + torch.exp(-score))
        return -torch.mean(truth * torch.log(sure) + (1 - truth) * torch.log(1 - sure))

    def scales(self, scores):
        return scores if isinstance(scores, list) else [scores]

    def slope(self, score, real):
        gradient = torch.autograd.grad(score.sum(), real, create_graph=True, retain_graph=True)[0]
        return sum((one**2).sum() for one in gradient) / len(gradient)

    def switch_critics(self, on):
        for critic in self.critics:
            critic.requires_grad_(on)


CASES = {
    "as published": (UDA, {}),
    "real labels too": (ALL, {"labelled": 0.5, "auxiliary": 0.3, "fusion": 0.8, "memory": 1.0, "memory_from": 0.2}),
    "all pixels, no balance, no penalty": (UDA, {"hard_share": 1, "rare_weight": 1, "penalty": 0, "memory_from": 0}),
    "one scale, vanilla, strong penalty": (UDA, {"critic": "patch", "gan": "vanilla", "penalty": 10.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(4 if case == "as published" else 2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=5e-5)
    assert_same_weights(method.segmenter, naive.net, rtol=1e-4, atol=5e-6)
    for ours, theirs in zip(method.critics, naive.critics, strict=True):
        assert_same_weights(ours, theirs, rtol=1e-4, atol=5e-6)
    assert method.balance.missing.tolist() == pytest.approx(naive.often)


@pytest.mark.parametrize(("share", "first"), [(0.6, 3), (0.35, 2)])
def test_memory_begins_at_its_step(share, first):
    """0.6 of five steps are three, 0.35 nearly two; without an adversary it is all there is of the target."""
    method = make(adversarial=0, memory_from=share)
    engine, seen = lend_engine(method, STEPS), batch(0)
    terms = [advance(engine, method, seen, step)["memory"] for step in range(5)]
    assert terms[:first] == [0] * first
    assert min(terms[first:]) > 0


def test_each_player_moves_alone():
    method = make(memory_from=0)
    engine = lend_engine(method)
    players = {"segmenter": list(method.segmenter.parameters()), "critic": list(method.critics.parameters())}
    seen = turns(engine, players)
    advance(engine, method, batch(0))
    (first_name, first), (second_name, second) = seen
    assert (first_name, second_name) == ("segmenter", "critic")
    assert True in first["segmenter"]
    assert first["critic"] == second["segmenter"] == {False}
    assert True in second["critic"]


def test_without_an_adversary_there_is_no_second_player():
    method = make(adversarial=0, memory_from=0)
    assert set(method.optimised()) == {"segmenter"}
    losses = advance(lend_engine(method), method, batch(0))
    assert set(losses) == {"source", "memory"}


def test_pictures_without_any_label_teach_nothing():
    method = make(adversarial=0, memory=0, optimiser=SGD | STILL)
    before, seen = copy.deepcopy(list(method.segmenter.parameters())), batch(0)
    seen.source.label.fill_(IGNORE)
    losses = advance(engine := lend_engine(method), method, seen)
    assert losses == {"source": 0}
    assert engine.failure() is None
    assert all(torch.equal(old, new) for old, new in zip(before, method.segmenter.parameters(), strict=True))


def test_one_output_is_a_mistake():
    with pytest.raises(ConfigError, match="mrnet compares two outputs of a network and fcn has one; take deeplab_gn"):
        make(network="fcn")


# ------------------------------------------------------------------------------------------------------- the terms


def test_memory_of_equal_outputs_costs_nothing_when_their_fusion_is_the_same():
    logits = torch.randn(2, 3, 4, 5)
    assert memory_regularisation((logits, logits), fusion=0.0).item() == pytest.approx(0, abs=1e-6)
    assert memory_regularisation((logits, logits), fusion=0.5) > 0  # the fused prediction is sharper
    assert memory_regularisation((torch.zeros(1, 3, 2, 2),) * 2, fusion=0.5).item() == 0


def test_memory_pulls_outputs_to_a_fixed_target():
    """dKL(m || p)/dz = p - m: nothing flows through m."""
    main, aux = (torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    memory_regularisation((main, aux), fusion=0.5).backward()
    m = (main + 0.5 * aux).softmax(1).detach()
    torch.testing.assert_close(main.grad, (main.softmax(1) - m) / 4)
    torch.testing.assert_close(aux.grad, (aux.softmax(1) - m) / 4)


def test_penalty_of_a_linear_critic_is_its_squared_weights():
    method = make()
    critics = method.critics
    for index in range(2):
        critics[index] = torch.nn.Conv2d(3, 1, 1)
    expected = sum(4 * 5 * critic.weight.square().sum().item() for critic in critics)  # one slope per pixel
    _, found = critics.judge_with_slope([torch.randn(2, 3, 4, 5)] * 2, REAL)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_class_weights_follow_the_batch():
    method = make(rare_weight=7, rare_share=0.25)
    label = torch.tensor([[[0, 0, 0, 0, 0, 1, 255, 255]]])  # class 1 is rare, class 2 absent
    first = method.balance(label)
    assert first.tolist() == pytest.approx([1, 7, 7 * 1.6])
    assert method.balance(label).tolist() == pytest.approx([1, 7, 7 * (0.9 * 1.6 + 0.7)])
    assert method.balance.missing.tolist() == pytest.approx([1, 1, 2.14])
    assert "balance.missing" in method.state_dict()


def test_hard_pixels_are_those_above_the_percentile():
    """Of ten labelled pixels with known losses the two largest count, ignored ones do not move the percentile."""
    wrong = torch.linspace(0, 1.8, 10)
    logits = torch.zeros(1, 2, 1, 15)
    logits[0, 1, 0, :10] = wrong
    label = torch.zeros(1, 1, 15, dtype=torch.long)
    label[..., 10:] = IGNORE
    losses = torch.log(1 + torch.exp(wrong))
    found = balanced_cross_entropy(logits, label, torch.ones(2), hard_share=0.2)
    assert found.item() == pytest.approx(losses[-2:].mean().item(), rel=1e-5)
