"""The sampler: every epoch shows each picture once; any step can be the first; ranks share a batch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.data.batch import Stream
from udas.data.sampling import StreamSampler, seed_of
from udas.errors import ConfigError, DataError

SOURCE, LABELLED, UNLABELLED = Stream.SOURCE, Stream.LABELLED, Stream.UNLABELLED

worlds = st.integers(1, 4)
seeds = st.integers(0, 2**40)


@st.composite
def plans(draw):
    """Sizes, global batch sizes and the number of processes of an arbitrary subset of the streams."""
    world = draw(worlds)
    streams = draw(st.lists(st.sampled_from(list(Stream)), min_size=1, unique=True))
    sizes = {stream: draw(st.integers(1, 9)) for stream in streams}
    batch = {stream: world * draw(st.integers(1, 4)) for stream in streams}
    return sizes, batch, world


def keys(sampler):
    return [key for step in sampler for key in step]


@settings(max_examples=60, deadline=None)
@given(plans(), seeds)
def test_every_epoch_is_a_permutation(plan, seed):
    sizes, batch, _ = plan
    steps = 4 * max(sizes.values())
    shown = keys(StreamSampler(sizes, batch, seed, 0, steps))
    for stream, size in sizes.items():
        draws = [draw for s, _, draw in shown if s is stream]
        assert draws == list(range(steps * batch[stream]))
        indices = [index for s, index, _ in shown if s is stream]
        for first in range(0, len(indices) - size + 1, size):
            assert sorted(indices[first : first + size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(plans(), seeds, st.integers(0, 30), st.integers(0, 10))
def test_a_resumed_run_sees_what_it_would_have_seen(plan, seed, start, more):
    sizes, batch, world = plan
    for rank in range(world):
        whole = list(StreamSampler(sizes, batch, seed, 0, start + more, rank, world))
        resumed = StreamSampler(sizes, batch, seed, start, start + more, rank, world)
        assert list(resumed) == whole[start:]
        assert len(resumed) == more
        assert list(resumed) == whole[start:], "a second pass over the same sampler differs"


@settings(max_examples=60, deadline=None)
@given(plans(), seeds, st.integers(0, 30))
def test_the_ranks_shares_in_order_are_the_single_batch(plan, seed, step):
    sizes, batch, world = plan
    single = keys(StreamSampler(sizes, batch, seed, step, step + 1))
    shares = [keys(StreamSampler(sizes, batch, seed, step, step + 1, rank, world)) for rank in range(world)]
    for stream in sizes:
        joined = [key for share in shares for key in share if key[0] is stream]
        assert joined == [key for key in single if key[0] is stream]
        assert {len([key for key in share if key[0] is stream]) for share in shares} == {batch[stream] // world}


def test_epochs_streams_and_seeds_have_orders_of_their_own():
    sizes, batch = {SOURCE: 20, LABELLED: 20}, {SOURCE: 20, LABELLED: 20}

    def orders(seed):
        steps = list(StreamSampler(sizes, batch, seed, 0, 2))
        return [tuple(index for s, index, _ in step if s is stream) for step in steps for stream in sizes]

    assert len(set(orders(0) + orders(1))) == 8


def test_the_first_pictures_of_epochs_are_uniform():
    firsts = Counter(keys(StreamSampler({SOURCE: 4}, {SOURCE: 4}, 3, epoch, epoch + 1))[0][1] for epoch in range(800))
    assert all(140 < firsts[index] < 260 for index in range(4))  # 200 expected, standard deviation 12


def test_seed_of_is_fixed_for_ever():
    assert seed_of(0, "source", 7) == 6_741_282_830_787_229_081
    assert seed_of(0, SOURCE, 7) == 6_741_282_830_787_229_081, "a stream is its text"


@given(st.lists(st.integers() | st.text(), min_size=1, max_size=4), st.lists(st.integers() | st.text(), max_size=4))
def test_seed_of_tells_parts_apart(left, right):
    typed = [[(type(part), part) for part in parts] for parts in (left, right)]
    assert (seed_of(*left) == seed_of(*right)) == (typed[0] == typed[1])
    assert 0 <= seed_of(*left) < 2**63


def test_seed_of_separates_neighbours():
    assert len({seed_of("ab"), seed_of("a", "b"), seed_of("1"), seed_of(1), seed_of("", "ab"), seed_of("ab", "")}) == 6
    bits = sum(seed_of(0, draw).bit_count() for draw in range(500)) / 500
    assert 30.5 < bits < 32.5  # half of 63


@pytest.mark.parametrize(
    ("sizes", "batch", "world", "error", "message"),
    [
        ({SOURCE: 5}, {SOURCE: 3}, 2, ConfigError, r"batch: 3 source pictures cannot be shared by 2 .* multiple of 2"),
        ({SOURCE: 5}, {SOURCE: 0}, 1, ConfigError, r"batch\.source: must be at least 1 \(got 0\)"),
        ({SOURCE: 5, LABELLED: 1}, {SOURCE: 2}, 1, ConfigError, r"streams given \(source, labelled\); found source"),
        ({SOURCE: 5}, {SOURCE: 2, UNLABELLED: 2}, 1, ConfigError, r"found source, unlabelled"),
        ({SOURCE: 0}, {SOURCE: 2}, 1, DataError, r"the source stream has no pictures"),
    ],
)
def test_unusable_plans_are_refused_before_the_first_step(sizes, batch, world, error, message):
    with pytest.raises(error, match=message):
        StreamSampler(sizes, batch, 0, 0, 1, 0, world)
