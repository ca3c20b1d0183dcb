"""The step of the AdaptSegNet family written a second time: the players by hand, one backward pass per loss."""

from __future__ import annotations

import copy

import torch

from equivalence.small import block, naive_cross_entropy, task
from udas.data.batch import Batch, Stream
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "head_factor": 3, "schedule": "constant"}
CRITIC = {"name": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0}
MULTI = "deeplabv2_2branch_multi"
SOURCE = (Stream.SOURCE, Stream.UNLABELLED)
PSEUDO = (Stream.PSEUDO, Stream.UNLABELLED)


def make(kind, streams, network="fcn", norm="train", **settings):
    critic = {"critic_optimiser": CRITIC} if "critic_optimiser" in kind.settings.model_fields else {}
    config = validate(kind.settings, {"optimiser": SGD} | critic | settings, "test")
    torch.manual_seed(3)
    return kind(config, task(streams, network, STEPS, norm))


def batch(step, streams):
    """What the streams give in a step; pseudo-labels come with confidences, which these methods do not use."""
    return Batch(
        source=block(10 * step) if Stream.SOURCE in streams else None,
        pseudo=block(10 * step + 3, confident=True) if Stream.PSEUDO in streams else None,
        labelled=block(10 * step + 1, count=1) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, labelled=False),
    )


class NaiveNetwork:
    """The segmenter with its SGD, and its loss on labels."""

    def __init__(self, method):
        self.config, self.net = method.config, copy.deepcopy(method.segmenter)
        halves = ((self.net.encoder, 0.05), (self.net.decoder, 0.15))
        groups = [{"params": [p for p in half.parameters() if p.requires_grad], "lr": lr} for half, lr in halves]
        self.sgd = torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=5e-4)

    def learn(self, labelled, weight=1.0):
        """CE(main) + lambda_seg CE(aux), back-propagated; returns the loss and the detached logits."""
        outputs = self.net.levels(labelled.image)
        loss = naive_cross_entropy(outputs[0], labelled.label)
        if len(outputs) == 2:
            loss = loss + self.config.auxiliary * naive_cross_entropy(outputs[1], labelled.label)
        (weight * loss).backward()
        return weight * loss.item(), [output.detach() for output in outputs]

    def learn_all(self, batch):
        """The labelled domain, then the labelled real pictures."""
        stream = "source" if batch.source is not None else "pseudo"
        losses = {}
        losses[stream], outputs = self.learn(getattr(batch, stream))
        if batch.labelled is not None and self.config.labelled > 0:
            losses["labelled"], _ = self.learn(batch.labelled, self.config.labelled)
        return stream, losses, outputs


class NaiveAdversary:
    """Both players, with requires_grad switched by hand and one optimiser per critic; `seen` is what critics see."""

    def __init__(self, method, seen):
        self.player, self.critics, self.seen = NaiveNetwork(method), copy.deepcopy(list(method.critics)), seen
        self.optimisers = [torch.optim.SGD(critic.parameters(), 0.1, momentum=0.5) for critic in self.critics]
        self.lambdas = [method.config.adversarial, method.config.adversarial_auxiliary]

    def step(self, batch, t):
        torch.manual_seed(t)
        self._hold(True)
        self.player.sgd.zero_grad()
        stream, losses, labelled = self.player.learn_all(batch)
        target = self.player.net.levels(batch.unlabelled.image)
        fooling = sum(
            weight * self.verdict(critic, logits, 1.0)
            for weight, critic, logits in zip(self.lambdas, self.critics, target, strict=False)
        )
        fooling.backward()
        self.player.sgd.step()

        self._hold(False)
        real, fake = 0.0, 0.0
        for critic, optimiser, ours, theirs in zip(self.critics, self.optimisers, labelled, target, strict=True):
            optimiser.zero_grad()
            on_real = self.verdict(critic, ours, 1.0) / 2
            on_real.backward()
            on_fake = self.verdict(critic, theirs.detach(), 0.0) / 2
            on_fake.backward()
            optimiser.param_groups[0]["lr"] = 0.1 * (1 - t / STEPS) ** 0.9
            optimiser.step()
            real, fake = real + on_real.item(), fake + on_fake.item()
        return losses | {"adversarial": fooling.item(), f"critic on {stream}": real, "critic on target": fake}

    def verdict(self, critic, logits, truth):
        score = critic(self.seen(logits))
        if self.player.config.gan == "least_squares":
            return ((score - truth) ** 2).sum() / score.numel()
        sure = 1 / (1 + torch.exp(-score))
        return -(torch.log(sure) if truth else torch.log(1 - sure)).sum() / score.numel()

    def _hold(self, held):
        for critic in self.critics:
            critic.requires_grad_(not held)


def by_softmax(logits):
    powers = torch.exp(logits)
    return powers / powers.sum(1, keepdim=True)


def weights(*modules):
    """A copy of all that the modules hold."""
    states = (module.state_dict() for module in modules)
    return [{key: value.double().clone() for key, value in state.items()} for state in states]


def assert_same_changes(start, found, expected):
    """Every tensor has moved alike; a rounded activation at its kink may turn a thousandth of a small gradient."""
    for before, ours, theirs in zip(start, found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= 0.005 * (value - before[key]).norm() + 1e-6, key
