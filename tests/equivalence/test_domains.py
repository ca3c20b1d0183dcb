"""Which labelled domain an adaptation method takes, one and not both; what a weight of 0 means."""

from __future__ import annotations

import copy

import pytest
import torch

from equivalence.adversarial import PSEUDO, SOURCE, make
from equivalence.small import block, task
from udas.data.batch import Stream
from udas.errors import ConfigError
from udas.methods.adaptsegnet import AdaptSegNet
from udas.methods.advent import AdvEnt
from udas.methods.domains import supervise
from udas.methods.minent import MinEnt

every_method = pytest.mark.parametrize("kind", [AdaptSegNet, MinEnt, AdvEnt])


@every_method
def test_one_labelled_domain(kind):
    assert make(kind, SOURCE).domain == Stream.SOURCE
    assert make(kind, PSEUDO).domain == Stream.PSEUDO


@every_method
@pytest.mark.parametrize(
    ("streams", "found"),
    [
        ((*SOURCE, Stream.PSEUDO), "both are given"),
        ((Stream.UNLABELLED,), "neither is given"),
        ((Stream.UNLABELLED, Stream.LABELLED), "neither is given"),
    ],
)
def test_none_or_two_are_a_mistake(kind, streams, found):
    with pytest.raises(ConfigError, match=f"source or pseudo, and {found}"):
        make(kind, streams)


def test_a_block_of_weight_0_does_not_pass():
    """Else its pictures would still move the running statistics of batch norms."""
    segmenter = task(SOURCE, norm="train").segmenter().train()
    before = copy.deepcopy(segmenter.state_dict())
    said = []
    assert supervise(lambda loss, name: said.append(name), segmenter, block(0), "source", 0.1, weight=0) == []
    assert not said
    assert all(torch.equal(before[key], value) for key, value in segmenter.state_dict().items())
    assert len(supervise(lambda loss, name: said.append(name), segmenter, block(0), "source", 0.1)) == 1
    assert said == ["source"]
    assert not all(torch.equal(before[key], value) for key, value in segmenter.state_dict().items())
