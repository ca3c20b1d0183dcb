"""One update: whose weights it moves, how far, and what it does with a loss that is not finite."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from toys import CPU, SGD, Toy, ToyConfig, advance, engine, toy

from tiny_run import same_tensors
from udas.config import NetworkConfig, OptimiserConfig
from udas.methods.base import Optimised
from udas.networks.segmenters import build_segmenter
from udas.training.runtime import Runtime
from udas.training.schedule import lr_factor

PLAIN = SGD.model_copy(update={"momentum": 0.0})


def weights(method: Toy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(name)}


def test_an_update_moves_and_differentiates_its_own_parameters_only() -> None:
    method = toy()
    lent, before = engine(method), weights(method)
    with lent.update("painter") as minimise:
        minimise(method.critic(method.painter(torch.rand(1, 3, 8, 8))).mean(), "fool")
    after = weights(method)
    assert same_tensors(part(before, "critic"), part(after, "critic"))
    assert not any(torch.equal(before[key], after[key]) for key in part(before, "painter"))
    assert all(parameter.grad is None for parameter in method.critic.parameters())


def test_terms_of_one_update_add_up_and_old_gradients_are_forgotten() -> None:
    method = toy(config=ToyConfig(critic=PLAIN))
    lent, weight = engine(method), method.critic.bias
    for _ in range(2):
        before = weight.detach().clone()
        with lent.update("critic") as minimise:
            minimise(3 * weight.sum(), "a")
            minimise(2 * weight.sum(), "b")
        torch.testing.assert_close(weight.detach(), before - 0.1 * 5)


def test_terms_that_share_a_graph_are_minimised_together_and_logged_apart() -> None:
    method = toy(config=ToyConfig(critic=PLAIN))
    lent, weight = engine(method), method.critic.bias
    before = weight.detach().clone()
    lent.begin(0)
    with lent.update("critic") as minimise:
        shared = weight.exp().log().sum()  # its graph is freed by a first backward pass
        minimise({"a": 3 * shared, "b": 2 * shared})
    torch.testing.assert_close(weight.detach(), before - 0.1 * 5)
    losses, total = lent.take_losses(), before.sum().item()
    assert losses == pytest.approx({"a": 3 * total, "b": 2 * total}, abs=1e-6)


def test_gradients_are_clipped_to_the_largest_norm() -> None:
    method = toy(config=ToyConfig(critic=PLAIN.model_copy(update={"clip": 0.5})))
    lent, weight = engine(method), method.critic.bias
    for slope, norm in ((300.0, 0.5), (0.1, 0.1 * 2**0.5)):  # below the limit nothing is changed
        before = weight.detach().clone()
        with lent.update("critic") as minimise:
            minimise(slope * weight.sum(), "a")
        torch.testing.assert_close((weight.detach() - before).norm().item(), 0.1 * norm)


def test_adam_with_decoupled_decay_follows_its_formula() -> None:
    config = OptimiserConfig(name="adamw", lr=0.01, weight_decay=0.1, schedule="poly", warmup=2)
    method = toy(config=ToyConfig(critic=config))
    lent, weight = engine(method, steps=5), method.critic.bias
    w, m, v = weight.detach().double(), 0.0, 0.0
    for step in range(4):
        lent.begin(step)
        g = w.cos()
        with lent.update("critic") as minimise:
            minimise(weight.sin().sum(), "a")
        lr = 0.01 * lr_factor(config, step, 5)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        scaled = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        w = w * (1 - lr * 0.1) - lr * scaled
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-4, atol=1e-6)
        assert lent.learning_rates()["critic"] == pytest.approx(lr)


def test_the_decay_of_adam_is_a_part_of_its_gradient() -> None:
    """Where the loss has no gradient the first step is the learning rate against the sign of every weight."""
    config = OptimiserConfig(name="adam", lr=0.01, weight_decay=0.1, schedule="constant")
    method = toy(config=ToyConfig(critic=config))
    weight = method.critic.bias
    before = weight.detach().clone()
    with engine(method).update("critic") as minimise:
        minimise(0 * weight.sum(), "nothing")
    torch.testing.assert_close(weight.detach(), before - 0.01 * before.sign(), rtol=0, atol=1e-6)


def test_what_was_computed_in_full_precision_is_differentiated_in_it() -> None:
    method = toy(config=ToyConfig(critic=PLAIN))
    runtime = replace(CPU, precision="bf16", channels_last=False)
    lent, image, before = engine(method, 10, runtime), torch.rand(27, 5), method.critic.weight.detach().clone()
    with runtime.autocast(), lent.update("critic") as minimise:
        with torch.autocast("cpu", enabled=False):
            loss = (method.critic.weight.flatten(1) @ image).sum()
        minimise(loss, "exact")
    moved = (before - method.critic.weight.detach()).flatten(1) / 0.1
    torch.testing.assert_close(moved, image.sum(1).expand(2, -1), rtol=1e-4, atol=1e-5)


def test_the_decoder_learns_head_factor_times_faster() -> None:
    network = build_segmenter(NetworkConfig(name="fcn", encoder="test_resnet", weights=None), 2)
    optimised = Optimised.segmenter(network, PLAIN.model_copy(update={"head_factor": 10.0}))
    method = toy()
    method.optimised = lambda: {"segmenter": optimised}  # type: ignore[method-assign]
    lent = engine(method)
    encoder, decoder = next(network.encoder_parameters()), next(network.decoder_parameters())
    before = encoder.detach().clone(), decoder.detach().clone()
    with lent.update("segmenter") as minimise:
        minimise(encoder.sum() + decoder.sum(), "a")
    torch.testing.assert_close(before[0] - encoder, torch.full_like(encoder, 0.1))
    torch.testing.assert_close(before[1] - decoder, torch.full_like(decoder, 1.0))


def test_frozen_parameters_are_left_out() -> None:
    config = NetworkConfig(name="fcn", encoder="test_resnet", weights=None, norm="frozen")
    network = build_segmenter(config, 2)
    groups = Optimised.segmenter(network, SGD).groups
    given = {id(p) for group in groups for p in group["params"]}
    assert given == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(given) < len(list(network.parameters()))


def test_losses_are_means_since_they_were_last_taken() -> None:
    method = toy()
    lent = engine(method)
    for step, value in enumerate((1.0, 2.0, 6.0)):
        lent.begin(step)
        with lent.update("critic") as minimise:
            minimise(method.critic.bias.sum() * 0 + value, "a")
            minimise(method.critic.bias.sum() * 0 + 2 * value, "b")
    assert lent.take_losses() == {"a": 3.0, "b": 6.0}
    assert lent.take_losses() == {}


# ---------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_freezes_every_optimiser(name: str, value: float) -> None:
    config = OptimiserConfig(name=name, lr=0.1, schedule="constant")
    method = toy(config=ToyConfig(painter=config, critic=config))
    lent = engine(method)
    advance(method, lent, range(2))
    assert lent.failure() is None
    lent.take_losses()
    good, states = weights(method), {key: value.clone() for key, value in lent.state().items()}
    lent.begin(2)
    with lent.update("painter") as minimise:
        minimise(value * method.painter[0].weight.sum(), "broken")
    advance(method, lent, range(3, 5))
    lent.take_losses()
    assert same_tensors(weights(method), good)
    assert same_tensors(lent.state(), states)
    assert lent.failure() == 2


def test_a_gradient_that_is_not_finite_counts_although_its_loss_is() -> None:
    method = toy()
    lent, before = engine(method), weights(method)
    lent.begin(7)
    with lent.update("critic") as minimise:
        minimise((method.critic.bias * 0).sqrt().sum(), "root of zero")
    assert lent.losses["root of zero"] == 0
    assert lent.failure() == 7
    assert same_tensors(weights(method), before)


# ------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Pair(Runtime):
    """The first of two processes; `other` is what the second one would send, in the order it is asked for."""

    other: tuple[Tensor, ...] = ()

    def average(self, flat: Tensor) -> None:
        theirs = self.other[0]
        object.__setattr__(self, "other", self.other[1:])
        flat.copy_((flat + theirs) / 2)


def flat_gradient(method: Toy, image: Tensor) -> Tensor:
    """[not finite, gradients of the critic] as a process sends them."""
    method.critic.zero_grad()
    (method.critic(image) - 1).square().mean().backward()
    return torch.cat([torch.zeros(1), *(p.grad.flatten() for p in method.critic.parameters())])


def test_gradients_are_averaged_over_processes() -> None:
    """Two processes with half a batch each step like one with all of it."""
    images = torch.rand(4, 3, 8, 8)
    alone, shared = toy(config=ToyConfig(critic=PLAIN)), toy(config=ToyConfig(critic=PLAIN))
    theirs = flat_gradient(toy(), images[2:])
    runtime = Pair(CPU.device, "fp32", channels_last=False, world=2, other=(theirs,))
    for method, lent, part_of in ((alone, engine(alone), images), (shared, engine(shared, 10, runtime), images[:2])):
        with lent.update("critic") as minimise:
            minimise((method.critic(part_of) - 1).square().mean(), "judge")
    for ours, whole in zip(shared.critic.parameters(), alone.critic.parameters(), strict=True):
        torch.testing.assert_close(ours, whole)


def test_a_failure_in_another_process_freezes_this_one() -> None:
    method = toy()
    theirs = flat_gradient(method, torch.rand(2, 3, 8, 8))
    theirs[0] = 1
    runtime = Pair(CPU.device, "fp32", channels_last=False, world=2, other=(theirs,))
    lent, before = engine(method, 10, runtime), weights(method)
    with lent.update("critic") as minimise:
        minimise((method.critic(torch.rand(2, 3, 8, 8)) - 1).square().mean(), "judge")
    assert lent.failure() == 0
    assert same_tensors(weights(method), before)


def test_logged_losses_are_those_of_all_processes() -> None:
    method = toy()
    lent = engine(method)
    advance(method, lent, range(1))
    ours = torch.stack([lent.losses[name] for name in ("fool", "judge")])
    lent.runtime = replace(Pair(CPU.device, "fp32", world=2), other=(torch.tensor([3.0, 5.0]),))
    expected = (ours + torch.tensor([3.0, 5.0])) / 2
    assert lent.take_losses() == pytest.approx({"fool": expected[0].item(), "judge": expected[1].item()})


# ----------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_restored_optimisers_continue_identically_in_any_memory_format(name: str, channels_last: bool) -> None:
    """Fused optimisers walk through memory: a state in another layout than its weight would meet the wrong elements."""
    config = ToyConfig(painter=OptimiserConfig(name=name), critic=OptimiserConfig(name=name))
    runtime = Runtime(CPU.device, "fp32", channels_last)
    whole, first, second = (toy(config=config, seed=seed) for seed in (0, 0, 1))
    advance(whole, engine(whole, 10, runtime), range(5))
    lent = engine(first, 10, runtime)
    advance(first, lent, range(3))
    stored = {key: tensor.contiguous().clone() for key, tensor in lent.state().items()}  # as a file holds them
    resumed = engine(second, 10, runtime)
    second.load_state_dict({key: tensor.contiguous() for key, tensor in first.state_dict().items()})
    resumed.load(stored)
    assert second.painter[0].weight.is_contiguous(memory_format=runtime.memory_format)
    advance(second, resumed, range(3, 5))
    assert same_tensors(second.state_dict(), whole.state_dict())
