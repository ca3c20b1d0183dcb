"""CyCADA's alignment against its step written a second time, and what its critic and its gate must never do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_average_follows, assert_same_weights, lend_engine, turns
from udas.data.batch import IGNORE, Batch, Stream
from udas.methods.cycada import SOURCE, TARGET, CyCADA, CyCADAConfig, Gate, accuracy, domain_cross_entropy
from udas.validation import validate

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
STILL = SGD | {"lr": 1e-9, "weight_decay": 0}
CRITIC = SGD | {"lr": 0.1, "momentum": 0.5}
SMALL = {"critic_width": 8, "dropout": 0, "optimiser": SGD, "critic_optimiser": CRITIC}
UDA, ALL = (Stream.SOURCE, Stream.UNLABELLED), (Stream.SOURCE, Stream.UNLABELLED, Stream.LABELLED)


def make(streams=UDA, network="fcn", **settings):
    config = validate(CyCADAConfig, SMALL | settings, "test")
    torch.manual_seed(3)
    return CyCADA(config, task(streams, network))


def batch(step, streams=UDA):
    labelled = block(10 * step + 1) if Stream.LABELLED in streams else None
    dark = block(10 * step + 2, labelled=False)
    return Batch(source=block(10 * step), labelled=labelled, unlabelled=replace(dark, image=0.3 * dark.image))


class Naive:
    """As released: critic first, its accuracies in a list, requires_grad switched by hand, 1x1 layers as matrices."""

    def __init__(self, method):
        self.config, self.net = method.config, copy.deepcopy(method.segmenter)
        layers = [m for m in copy.deepcopy(method.critic).modules() if isinstance(m, nn.Conv2d)]
        self.layers = nn.ModuleList(layers)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        lr = self.config.critic_optimiser.lr
        self.critic_sgd = torch.optim.SGD(self.layers.parameters(), lr, momentum=0.5, weight_decay=5e-4)
        self.accuracies, self.gates = [], []

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms = self.config, {}
        levels_s, seen_s = self.look(batch.source.image)
        _, seen_t = self.look(batch.unlabelled.image)

        self.layers.requires_grad_(True)
        d_s, d_t = self.criticise(seen_s.detach()), self.criticise(seen_t.detach())
        terms["critic on source"] = -d_s[..., 1].log().mean() / 2
        terms["critic on target"] = -d_t[..., 0].log().mean() / 2
        self.critic_sgd.zero_grad()
        (terms["critic on source"] + terms["critic on target"]).backward()
        self.critic_sgd.step()
        self.accuracies.append((sum(d_s[..., 1] > 0.5) + sum(d_t[..., 0] >= 0.5)).item() / (2 * len(d_s)))

        self.layers.requires_grad_(False)
        last = self.accuracies[-c.window :]
        self.gates.append(c.gate is None or sum(last) / len(last) > c.gate)
        terms["source"] = self.supervised(levels_s, batch.source.label)
        if self.gates[-1]:
            terms["adversarial"] = c.adversarial * -self.criticise(seen_t)[..., 1].log().mean()
        if batch.labelled is not None:
            levels_l, _ = self.look(batch.labelled.image)
            terms["labelled"] = c.labelled * self.supervised(levels_l, batch.labelled.label)
        self.sgd.zero_grad()
        sum(term for name, term in terms.items() if "critic" not in name).backward()
        self.sgd.step()
        return {"adversarial": 0} | {name: term.item() for name, term in terms.items()}

    def look(self, image):
        """Logits, and what the critic sees; features are caught on their way into the classifier."""
        if self.config.evidence == "scores":
            levels = self.net.levels(image)
            return levels, levels[0]
        seen = []
        handle = self.net.decoder.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        levels = self.net.levels(image)
        handle.remove()
        return levels, seen[0]

    def criticise(self, seen):
        """Probabilities [all locations, 2]: every location is a row."""
        x = seen.permute(0, 2, 3, 1).reshape(-1, seen.shape[1])
        for k, layer in enumerate(self.layers):
            x = x @ layer.weight[:, :, 0, 0].T + layer.bias
            x = x.clamp(min=0) if k < 2 else x
        powers = torch.exp(x)
        return powers / powers.sum(1, keepdim=True)

    def supervised(self, levels, label):
        shares = [1.0, self.config.auxiliary]
        losses = [naive_cross_entropy(logits, label) for logits in levels]
        return sum(share * loss for share, loss in zip(shares, losses, strict=False))


CASES = {
    "scores": (UDA, {"gate": None}),
    "scores, real labels": (ALL, {"gate": None, "labelled": 0.4, "adversarial": 0.3}),
    "features": (UDA, {"gate": None, "evidence": "features"}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "gate": None, "auxiliary": 0.3, "labelled": 0.4}),
    "gate": (UDA, {"gate": 0.5, "window": 2, "adversarial": 1.0, "critic_optimiser": CRITIC | {"lr": 0.5}}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method)
    for step in range(4 if case == "gate" else 3):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=2e-5)
    assert set(naive.gates) == ({True, False} if case == "gate" else {True})
    convolutions = nn.ModuleList(m for m in method.critic.modules() if isinstance(m, nn.Conv2d))
    for ours, theirs in ((method.segmenter, naive.net), (convolutions, naive.layers)):
        assert_same_weights(ours, theirs)


@pytest.mark.parametrize("settings", [{"gate": None}, {"gate": None, "evidence": "features"}, {"gate": 1.0}])
def test_each_player_moves_alone(settings):
    method = make(ALL, **settings)
    engine = lend_engine(method)
    players = {"segmenter": list(method.segmenter.parameters()), "critic": list(method.critic.parameters())}
    seen = turns(engine, players)
    advance(engine, method, batch(0, ALL))
    assert [name for name, _ in seen] == ["critic", "segmenter"]
    (_, first), (_, second) = seen
    assert first["critic"] == {True}
    assert first["segmenter"] == second["critic"] == {False}
    assert True in second["segmenter"]


def test_auxiliary_outputs_are_supervised_and_the_main_one_is_judged():
    method = make(network="deeplabv2_multi", auxiliary=0.3, gate=None)
    advance(engine := lend_engine(method), method, batch(0))
    assert engine.failure() is None
    assert method.critic.layers[0].in_channels == len(CLASSES.classes)


@pytest.mark.parametrize("evidence", ["scores", "features"])
def test_the_adversary_pulls_the_target_towards_the_source(evidence):
    """With hardly anything but the adversarial term, the critic as it was finds the target more source-like."""
    method = make(
        evidence=evidence, gate=None, adversarial=1.0, critic_optimiser=STILL, optimiser=SGD | {"momentum": 0}
    )
    seen = batch(0)
    seen.source.label.fill_(IGNORE)  # no cross-entropy

    def verdict():
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = method.segmenter.outputs(seen.unlabelled.image)
            return domain_cross_entropy(method.critic(method._evidence(outputs)), SOURCE).item()

    before = verdict()
    losses = advance(lend_engine(method), method, seen)
    assert losses["source"] == 0
    assert verdict() < before


def test_the_critic_learns_to_tell_the_domains_apart():
    method = make(gate=None, adversarial=0, optimiser=STILL)
    engine, seen = lend_engine(method), batch(0)
    losses = [advance(engine, method, seen) for _ in range(8)]
    totals = [loss["critic on source"] + loss["critic on target"] for loss in losses]
    assert totals[-1] < totals[0]


def test_the_running_average_is_handed_on_and_follows():
    assert_average_follows(make(average=0.5, gate=None), batch(0))


def test_the_critic_has_the_dropout_of_the_settings():
    assert {m.p for m in make(dropout=0.3).critic.modules() if isinstance(m, nn.Dropout2d)} == {0.3}


# ------------------------------------------------------------------------------------------------------------ gate


def test_a_closed_gate_is_the_step_without_an_adversary():
    closed, without = make(gate=1.0), make(gate=None, adversarial=0)
    for method in (closed, without):
        losses = advance(lend_engine(method), method, batch(0))
        assert losses["adversarial"] == 0
    for a, b in zip(closed.segmenter.parameters(), without.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_gate_is_a_mean_over_the_last_values():
    gate, given = Gate(0.6, window=3), [0.9, 0.2, 0.7, 0.91, 0.2, 0.65, 0.99, 0.6]
    for place, value in enumerate(given):
        last = given[max(0, place - 2) : place + 1]
        expected = sum(last) / len(last) > 0.6
        assert gate(torch.tensor(value)).item() == expected, last


def test_the_gate_remembers_over_a_checkpoint():
    gate, other = Gate(0.5, window=4), Gate(0.5, window=4)
    for value in (1.0, 0.0, 1.0):
        gate(torch.tensor(value))
    other.load_state_dict(copy.deepcopy(gate.state_dict()))
    assert [gate(torch.tensor(v)).item() for v in (0.0, 0.6)] == [other(torch.tensor(v)).item() for v in (0.0, 0.6)]
    assert torch.equal(gate.values, other.values)


def test_accuracy_by_hand():
    source_like, target_like = [-1.0, 2.0], [1.0, -3.0]  # logits of (target, source)
    d_s = torch.tensor([source_like, source_like, target_like, source_like]).T[None, :, None]
    d_t = torch.tensor([target_like, source_like]).T[None, :, None]
    assert accuracy(d_s, d_t).item() == pytest.approx((3 / 4 + 1 / 2) / 2)  # domains of different sizes count alike


@pytest.mark.parametrize(("domain", "loss"), [(SOURCE, 0.0486), (TARGET, 3.0486)])
def test_domain_cross_entropy_by_hand(domain, loss):
    verdict = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1).expand(2, 2, 3, 4)
    assert domain_cross_entropy(verdict, domain).item() == pytest.approx(loss, abs=1e-4)


def test_the_published_settings_are_the_defaults():
    config = CyCADAConfig()
    assert (config.adversarial, config.gate, config.window) == (0.1, 0.6, 100)
    assert (config.critic_width, config.dropout, config.evidence) == (512, 0.5, "scores")
