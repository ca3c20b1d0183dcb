from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.errors import DataError
from udas.evaluation.metrics import Scores, bootstrap, confusion

CLASSES = ("road", "sky", "car", "terrain")


@st.composite
def cases(draw):
    """Prediction and label [B, H, W] with C classes; labels also hold 255 and ids outside the classes."""
    shape = tuple(draw(st.integers(1, 4)) for _ in range(3))
    classes = draw(st.integers(1, 5))
    size = shape[0] * shape[1] * shape[2]
    prediction = draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size))
    label = draw(st.lists(st.sampled_from([*range(classes), classes, 254, 255]), min_size=size, max_size=size))
    return torch.tensor(prediction).view(shape), torch.tensor(label, dtype=torch.uint8).view(shape), classes


@given(cases())
@settings(max_examples=60, deadline=None)
def test_confusion_counts_like_a_loop(case):
    prediction, label, classes = case
    counts = confusion(prediction, label, classes)
    assert counts.shape == (len(label), classes, classes)
    for picture in range(len(label)):
        pairs = Counter(zip(label[picture].flatten().tolist(), prediction[picture].flatten().tolist(), strict=True))
        for truth in range(classes):
            for guess in range(classes):
                assert counts[picture, truth, guess] == pairs[truth, guess]
    assert counts.sum() == (label < classes).sum()


def test_negative_labels_are_not_counted():
    assert confusion(torch.zeros(1, 1, 2, dtype=torch.long), torch.tensor([[[-1, 0]]]), 2).sum() == 1


@given(cases())
@settings(max_examples=60, deadline=None)
def test_scores_agree_with_sets_of_pixels(case):
    prediction, label, classes = case
    names = [f"c{i}" for i in range(classes)]
    pixels = [
        (t, p) for t, p in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True) if t < classes
    ]
    matrix = confusion(prediction, label, classes).sum(0)
    if not pixels:
        with pytest.raises(DataError, match="no labelled pixel"):
            Scores.from_confusion(matrix, names)
        return
    scores, expected = Scores.from_confusion(matrix, names), {}
    for i, name in enumerate(names):
        union = sum(t == i or p == i for t, p in pixels)
        expected[name] = sum(t == i == p for t, p in pixels) / union if union else None
    assert scores.iou == expected
    present = [iou for iou in expected.values() if iou is not None]
    assert scores.miou == pytest.approx(np.mean(present))
    assert scores.pixel_accuracy == pytest.approx(np.mean([t == p for t, p in pixels]))
    assert set(scores.absent) == {name for name, iou in expected.items() if iou is None}


def test_absent_class_is_left_out_but_a_wrongly_predicted_one_counts_as_zero():
    matrix = torch.zeros(4, 4, dtype=torch.long)
    matrix[0, 0], matrix[0, 2] = 3, 1
    scores = Scores.from_confusion(matrix, CLASSES)
    assert scores.iou == {"road": 0.75, "sky": None, "car": 0.0, "terrain": None}
    assert scores.absent == ("sky", "terrain")
    assert scores.miou == pytest.approx(0.375)


def test_subset_and_ignore_read_the_same_matrix_differently():
    """Truth: 4 road (1 taken for sky), 4 sky, 4 terrain (3 taken for road, 1 right); terrain is not scored."""
    matrix = torch.tensor([[3, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [3, 0, 0, 1]])
    subset = Scores.from_confusion(matrix, CLASSES, ("road", "sky"), "subset")
    ignore = Scores.from_confusion(matrix, CLASSES, ("road", "sky"), "ignore")
    assert subset.iou == {"road": 3 / 7, "sky": 4 / 5}
    assert ignore.iou == {"road": 3 / 4, "sky": 4 / 5}
    assert subset.miou == pytest.approx((3 / 7 + 4 / 5) / 2)
    assert ignore.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert subset.pixel_accuracy == ignore.pixel_accuracy == 7 / 8


def test_subset_equals_scaled_full_mean_when_the_other_classes_score_zero():
    """mIoU16 = mIoU19 * 19/16 holds exactly when the missing classes have IoU 0."""
    torch.manual_seed(0)
    matrix = torch.randint(0, 50, (4, 4))
    matrix[3, 3] = 0
    full = Scores.from_confusion(matrix, CLASSES)
    part = Scores.from_confusion(matrix, CLASSES, CLASSES[:3])
    assert part.miou == pytest.approx(full.miou * 4 / 3)


def test_bootstrap_is_deterministic_and_brackets_the_score():
    torch.manual_seed(0)
    counts = torch.randint(0, 20, (30, 4, 4)) + 30 * torch.eye(4, dtype=torch.long)
    low, high = bootstrap(counts)
    assert (low, high) == bootstrap(counts)
    assert (low, high) != bootstrap(counts, seed=1)
    assert low < Scores.from_confusion(counts.sum(0), CLASSES).miou < high
    wide = bootstrap(counts[:5])
    assert wide[1] - wide[0] > high - low


def test_bootstrap_equals_a_loop_over_the_same_draws():
    torch.manual_seed(1)
    counts = torch.randint(0, 9, (6, 4, 4))
    counts[:, :, 2], counts[:, 2, :] = 0, 0
    counts[0, 2, 2] = 5  # a class that many draws do not contain
    draws = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=200)
    for rows, reading in ((None, "subset"), ([0, 2], "subset"), ([0, 2], "ignore")):
        names = None if rows is None else [CLASSES[row] for row in rows]
        means = [
            Scores.from_confusion((torch.tensor(draw)[:, None, None] * counts).sum(0), CLASSES, names, reading).miou
            for draw in draws
        ]
        expected = np.quantile(means, (0.025, 0.975))
        assert bootstrap(counts, rows, reading, repeats=200, seed=3) == pytest.approx(tuple(expected))


def test_equal_pictures_have_no_spread():
    counts = torch.tensor([[5, 1], [2, 7]]).expand(10, 2, 2)
    low, high = bootstrap(counts)
    assert low == pytest.approx(high)


def test_bootstrap_skips_draws_without_labels():
    counts = torch.zeros(2, 2, 2, dtype=torch.long)
    counts[0] = torch.tensor([[3, 1], [0, 4]])
    score = Scores.from_confusion(counts.sum(0), ("a", "b")).miou
    assert bootstrap(counts) == pytest.approx((score, score))
