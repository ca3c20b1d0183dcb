"""The smallest learning task: three classes, a tiny network, and blocks of random pictures."""

from __future__ import annotations

import math

import torch

from udas.config import NetworkConfig
from udas.data.batch import IGNORE, Block
from udas.methods.base import Task
from udas.networks.segmenters import build_segmenter
from udas.taxonomy import Taxonomy

CLASSES = Taxonomy("three", ("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180)))


def task(streams, network="fcn", steps=1000, norm="train"):
    """A task whose network is always the same one."""
    config = NetworkConfig(name=network, encoder="test_resnet", weights=None, norm=norm)

    def segmenter():
        torch.manual_seed(7)
        return build_segmenter(config, len(CLASSES.classes))

    return Task(CLASSES, segmenter, frozenset(streams), steps)


def block(seed, count=2, labelled=True, confident=False, height=33, width=48):
    """Random pictures; a fifth of the labels is ignored."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 3, height, width, generator=generator)
    label = torch.randint(len(CLASSES.classes), (count, height, width), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORE
    confidence = torch.rand(label.shape, generator=generator)
    seeds, names = tuple(range(100 * seed, 100 * seed + count)), tuple("abcdefgh"[:count])
    return Block(image, label if labelled else None, confidence if confident else None, seeds, names)


def naive_cross_entropy(logits, label, class_weight=None, pixel_weight=None, hard_share=1.0):
    """Class by class: probabilities, their logarithm, a sorted list of the losses."""
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    losses, weights = [], []
    for k in range(logits.shape[1]):
        here = label == k
        losses.append(-probability[:, k][here].log() * (1 if class_weight is None else class_weight[k]))
        weights.append(torch.ones(label.shape)[here] if pixel_weight is None else pixel_weight[here])
    loss, weight = torch.cat(losses), torch.cat(weights)
    hardest = loss.argsort(descending=True)[: math.ceil(hard_share * len(loss))]
    return (loss * weight)[hardest].mean()
