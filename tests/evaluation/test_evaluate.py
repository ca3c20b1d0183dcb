from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

from udas.data.dataset import Domain, load_domain
from udas.errors import ConfigError, DataError, RunError
from udas.evaluation.evaluate import Sample, batches, evaluate, evaluation_mode
from udas.evaluation.metrics import Scores, bootstrap, confusion
from udas.evaluation.protocols import ProtocolConfig
from udas.taxonomy import Taxonomy, load_taxonomy

SPACE = Taxonomy("three", ("road", "sky", "car"), ((128, 64, 128), (70, 130, 180), (0, 0, 142)))
CPU = torch.device("cpu")
SIZES = ((8, 12), (8, 12), (10, 6), (8, 12), (10, 6), (5, 7), (8, 12))


@dataclass(frozen=True)
class Named:
    name: str


class Pictures:
    """A stand-in for a labelled PictureSet: red, green and blue stand for the classes, with some noise and gaps."""

    domain = "toy"

    def __init__(self, sizes=SIZES):
        self.sizes = sizes
        self.pictures = tuple(Named(f"street/{i}") for i in range(len(sizes)))
        self.labels = {picture.name: picture.name for picture in self.pictures}

    def __len__(self):
        return len(self.sizes)

    def image(self, index):
        return torch.randint(0, 256, (3, *self.sizes[index]), generator=self._seed(index), dtype=torch.uint8)

    def label(self, index):
        generator = self._seed(index)
        image = torch.randint(0, 256, (3, *self.sizes[index]), generator=generator, dtype=torch.uint8)
        noise = torch.rand(self.sizes[index], generator=generator)
        label = torch.where(noise < 0.7, image.argmax(0), 2).to(torch.uint8)
        return torch.where(noise < 0.9, label, 255).to(torch.uint8)

    def fixed(self, count):
        return [i * len(self) // count for i in range(count)]

    @staticmethod
    def _seed(index):
        return torch.Generator().manual_seed(index)


class Network(nn.Module):
    """Ten times the colour: the brightest channel wins."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, image):
        return 10 * self.frozen(self.norm(image))


def expected(pictures, indices=None):
    return [
        confusion(pictures.image(i).float().argmax(0)[None], pictures.label(i)[None], 3)[0]
        for i in (range(len(pictures)) if indices is None else indices)
    ]


def colour(image):
    return 10 * image


def test_one_confusion_matrix_over_pictures_of_all_sizes():
    pictures = Pictures()
    result = evaluate(colour, pictures, SPACE, ProtocolConfig(), CPU, batch=2)
    assert torch.equal(result.per_picture, torch.stack(expected(pictures)))
    assert result.scores == Scores.from_confusion(sum(expected(pictures)), SPACE.classes)
    assert result.interval[0] <= result.scores.miou <= result.interval[1]


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batch_size_changes_nothing(batch):
    results = [evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, batch=b) for b in (2, batch)]
    assert torch.equal(results[0].per_picture, results[1].per_picture)


def test_logits_of_another_size_are_compared_at_the_size_of_the_label():
    result = evaluate(colour, Pictures(), SPACE, ProtocolConfig(input=(16, 24)), CPU)
    assert result.per_picture.sum((1, 2)).tolist() == [int((Pictures().label(i) < 255).sum()) for i in range(7)]


def test_labels_are_compared_at_a_given_size():
    result = evaluate(colour, Pictures(), SPACE, ProtocolConfig(compare=(4, 6)), CPU)
    assert result.per_picture.sum((1, 2)).max() <= 24
    halved = Pictures(SIZES[:2])
    halved.label = lambda index: Pictures().label(index)[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert evaluate(colour, halved, SPACE, ProtocolConfig(compare=(4, 6)), CPU).per_picture.sum() == sum(
        int((Pictures().label(i)[::2, ::2] < 255).sum()) for i in range(2)
    )


def test_subset_is_scored_in_the_reading_of_the_protocol():
    matrix = sum(expected(Pictures()))
    for reading in ("subset", "ignore"):
        protocol = ProtocolConfig(subset=("road", "sky"), reading=reading)
        result = evaluate(colour, Pictures(), SPACE, protocol, CPU)
        assert result.scores == Scores.from_confusion(matrix, SPACE.classes, ("road", "sky"), reading)
        assert result.interval == bootstrap(result.per_picture, [0, 1], reading)
        assert f"reading {reading!r}" in result.summary()["protocol"]


def test_a_restricted_network_chooses_scored_classes_only():
    protocol = ProtocolConfig(subset=("road", "sky"), reading="ignore", restrict=True)
    result = evaluate(colour, Pictures(), SPACE, protocol, CPU)
    assert result.per_picture[..., 2].sum() == 0


def test_files(tmp_path):
    pictures = Pictures()
    result = evaluate(colour, pictures, SPACE, ProtocolConfig(), CPU, tmp_path, split="test", shown=3)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(result.summary()))
    assert written["miou"] == result.scores.miou
    assert written["split"] == "test"
    assert written["pictures"] == 7
    assert written["shown"] == ["street/0", "street/2", "street/4"]
    assert written["confusion"] == sum(expected(pictures)).tolist()
    assert written["colours"][0] == [128, 64, 128]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        ["evaluation.json", *["input.png", "truth.png", "prediction.png", "confidence.png"] * 3]
    )
    folder, image = tmp_path / "pictures" / "1", pictures.image(2)
    assert np.array_equal(np.array(Image.open(folder / "input.png")), image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.array(Image.open(folder / "truth.png")), SPACE.colourise(pictures.label(2).numpy()))
    predicted = SPACE.colourise(image.argmax(0).byte().numpy())
    assert np.array_equal(np.array(Image.open(folder / "prediction.png")), predicted)
    share = (image / 25.5).softmax(0).amax(0) * 255
    assert np.abs(np.array(Image.open(folder / "confidence.png")) - share.numpy()).max() <= 1


def test_an_absent_class_is_null_in_the_file(tmp_path):
    pictures = Pictures(SIZES[:1])
    pictures.image = lambda index: torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 12)
    pictures.label = lambda index: torch.zeros(8, 12, dtype=torch.uint8)
    evaluate(colour, pictures, SPACE, ProtocolConfig(), CPU, tmp_path, shown=1)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["iou"] == {"road": 1.0, "sky": None, "car": None}
    assert written["absent"] == ["sky", "car"]
    assert written["miou"] == 1.0


def test_pictures_of_a_real_domain(tmp_path):
    for index in range(3):
        for kind, pixels in (
            ("images", Pictures().image(index).permute(1, 2, 0).contiguous()),
            ("labels", Pictures().label(index)),
        ):
            path = tmp_path / kind / "val" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
    (tmp_path / "three.yaml").write_text("name: three\nclasses: {road: [1, 2, 3], sky: [4, 5, 6], car: [7, 8, 9]}\n")
    space = load_taxonomy(str(tmp_path / "three.yaml"))
    raw = {
        "name": "toy",
        "root": str(tmp_path),
        "images": "images/{split}/*.png",
        "labels": "labels/{split}/{stem}.png",
        "splits": {"val": "val"},
        "taxonomy": str(tmp_path / "three.yaml"),
        "map": {"road": [0], "sky": [1], "car": [2], "ignore": [255]},
    }
    domain = Domain(load_domain(raw), space)
    result = evaluate(colour, domain.labelled("val", "all"), space, ProtocolConfig(), CPU, tmp_path / "out")
    assert torch.equal(result.per_picture, torch.stack(expected(Pictures(), range(3))))
    assert [name.rpartition("/")[2] for name in result.summary()["shown"]] == ["0", "1", "2"]
    with pytest.raises(DataError, match="toy: none of the 3 pictures has labels"):
        evaluate(colour, domain.unlabelled("val"), space, ProtocolConfig(), CPU)


def test_modes_are_put_back_and_statistics_left_alone():
    model = Network().train()
    model.frozen.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, Pictures(), SPACE, ProtocolConfig(), CPU)
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_are_put_back_after_an_error():
    model = nn.Dropout().train()

    def fail():
        with evaluation_mode(model):
            assert not model.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.training


def test_progress_reaches_the_end():
    steps = []
    evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (7, 7)
    assert steps == sorted(steps)


def test_errors_name_what_is_wrong():
    with pytest.raises(RunError, match="4 outputs, the label space 3 classes"):
        evaluate(lambda image: image[:, [0, 1, 2, 0]], Pictures(), SPACE, ProtocolConfig(), CPU)
    with pytest.raises(ConfigError, match="no class 'bus'"):
        evaluate(colour, Pictures(), SPACE, ProtocolConfig(subset=("bus",)), CPU)
    unlabelled, void = Pictures(), Pictures()
    unlabelled.labels = {}
    with pytest.raises(DataError, match="toy: none of the 7 pictures has labels"):
        evaluate(colour, unlabelled, SPACE, ProtocolConfig(), CPU)
    void.label = lambda index: torch.full(SIZES[index], 255, dtype=torch.uint8)
    with pytest.raises(DataError, match="no labelled pixel"):
        evaluate(colour, void, SPACE, ProtocolConfig(), CPU)


def test_a_broken_picture_stops_with_its_name():
    pictures = Pictures()

    def broken(index):
        raise DataError(f"street/{index}.png: truncated")

    pictures.image = broken
    with pytest.raises(DataError, match=r"street/0\.png"):
        evaluate(colour, pictures, SPACE, ProtocolConfig(), CPU)


def test_results_that_cannot_be_written_name_the_file(tmp_path):
    (tmp_path / "out" / "evaluation.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"evaluation.json.*cannot be written"):
        evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, tmp_path / "out", shown=0)


def _second_process(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=1, world_size=2)
    result = evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, folder, shown=3, rank=1, world=2)
    torch.save(result.per_picture, folder / "second.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree(tmp_path):
    child = mp.get_context("spawn").Process(target=_second_process, args=(tmp_path,))
    child.start()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=2)
    try:
        result = evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, tmp_path, shown=3, rank=0, world=2)
    finally:
        dist.destroy_process_group()
    child.join(60)
    assert child.exitcode == 0
    alone = evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU)
    assert torch.equal(result.per_picture, alone.per_picture)
    assert torch.equal(torch.load(tmp_path / "second.pt"), alone.per_picture)
    assert result.interval == alone.interval
    assert len(list(tmp_path.glob("pictures/*/prediction.png"))) == 3


def test_two_ranks_share_the_work_and_agree(tmp_path, monkeypatch):
    """The same with two threads and a sum in place of the collective."""
    counts, together = [], threading.Barrier(2, timeout=30)

    def all_reduce(mine):
        counts.append(mine.clone())
        together.wait()
        mine.copy_(sum(counts))

    def score(rank):
        return evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, tmp_path, shown=3, rank=rank, world=2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(score, range(2)))
    alone = evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU)
    assert all(torch.equal(result.per_picture, alone.per_picture) for result in results)
    assert all(result.summary() == results[0].summary() for result in results)
    assert not ((counts[0] > 0) & (counts[1] > 0)).any()
    assert len(list(tmp_path.glob("pictures/*/prediction.png"))) == 3


def test_a_process_scores_its_own_share_only(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda counts: None)
    result = evaluate(colour, Pictures(), SPACE, ProtocolConfig(), CPU, rank=1, world=3)
    filled = [i for i in range(7) if result.per_picture[i].sum()]
    assert filled == [1, 4]


# ---------------------------------------------------------------------------------------------------- batches


def sample(index, size):
    return Sample(index, torch.zeros(3, *size, dtype=torch.uint8))


def test_batches_hold_equal_sizes_and_every_picture_once():
    found = list(batches(lambda i: sample(i, SIZES[i % 7]), range(50), 4, ProtocolConfig()))
    assert sorted(s.index for group in found for s in group) == list(range(50))
    assert all(len({s.key for s in group}) == 1 and len(group) <= 4 for group in found)
    assert max(map(len, found)) == 4


def test_large_pictures_come_in_small_batches():
    large = [len(g) for g in batches(lambda i: sample(i, (1024, 2048)), range(6), 8, ProtocolConfig())]
    huge = [len(g) for g in batches(lambda i: sample(i, (2100, 2100)), range(3), 8, ProtocolConfig())]
    enlarged = batches(lambda i: sample(i, (4, 4)), range(6), 8, ProtocolConfig(input=(1024, 2048)))
    assert large == [2, 2, 2]
    assert huge == [1, 1, 1]
    assert [len(g) for g in enlarged] == [2, 2, 2]


def test_pictures_that_cannot_be_had_are_left_out():
    found = batches(lambda i: None if i % 2 else sample(i, (4, 4)), range(9), 4, ProtocolConfig())
    assert [s.index for group in found for s in group] == [0, 2, 4, 6, 8]


def test_only_a_bounded_number_of_pictures_waits():
    loaded = []

    def load(index):
        loaded.append(index)
        return sample(index, (4, 4 + index))

    stream = batches(load, range(1000), 4, ProtocolConfig())
    next(stream)
    time.sleep(0.05)
    assert len(loaded) <= 4 * 4 + 4 + 1
    stream.close()
