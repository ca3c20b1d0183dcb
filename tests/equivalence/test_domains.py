"""Which labelled domain an adaptation method takes: synthetic pictures or pseudo-labels, never none, never both."""

from __future__ import annotations

import pytest

from equivalence.adversarial import PSEUDO, SOURCE, make
from udas.data.batch import Stream
from udas.errors import ConfigError
from udas.methods.adaptsegnet import AdaptSegNet
from udas.methods.advent import AdvEnt
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
