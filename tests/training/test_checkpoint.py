"""Checkpoints: everything comes back, anything foreign is refused in one line, and a failed write costs nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import TOWN, Toy, ToyConfig, advance, engine, toy

from tiny_run import same_tensors
from udas.config import OptimiserConfig
from udas.errors import RunError
from udas.storage import remove_leftovers, write_atomically
from udas.taxonomy import Taxonomy
from udas.training.checkpoint import FORMAT, Progress, load_checkpoint, save_checkpoint

ADAM = OptimiserConfig(name="adam", schedule="constant")
SOME = Progress(3, 0.25, 12.5)


def saved(path: Path) -> Toy:
    method = toy(config=ToyConfig(painter=ADAM))
    lent = engine(method)
    advance(method, lent, range(3))
    save_checkpoint(path, method, lent, SOME)
    return method


def refusal(path: Path, method: Toy) -> str:
    with pytest.raises(RunError) as caught:
        load_checkpoint(path, method, engine(method))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_networks_optimisers_and_progress_come_back(tmp_path: Path) -> None:
    method = saved(tmp_path / "last.safetensors")
    other = toy(seed=1, config=ToyConfig(painter=ADAM))
    lent = engine(other)
    assert load_checkpoint(tmp_path / "last.safetensors", other, lent) == SOME
    assert same_tensors(other.state_dict(), method.state_dict())
    advance(method, method.engine, range(3, 6))  # type: ignore[arg-type]
    advance(other, lent, range(3, 6))
    assert same_tensors(other.state_dict(), method.state_dict())


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    saved(tmp_path / "last.safetensors")
    content = (tmp_path / "last.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert "udas" in header["__metadata__"]


def test_another_network_is_named_with_what_differs(tmp_path: Path) -> None:
    saved(tmp_path / "last")
    text = refusal(tmp_path / "last", toy(width=6))
    assert "another network; 3 tensors differ" in text
    assert "painter.0.bias: (4,) -> (6,)" in text


def test_another_label_space_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "last")
    other = Taxonomy("sea", ("water", "sky"), TOWN.colours)
    text = refusal(tmp_path / "last", toy(taxonomy=other))
    assert "another label space: only the file has road; only the run has water; remove it" in text


def test_another_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "last", {"udas": json.dumps({"format": FORMAT + 1})})
    assert f"checkpoint format {FORMAT + 1}, this version reads {FORMAT}" in refusal(tmp_path / "last", toy())


def malicious(path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (path.with_name("opened"),)

    path.write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize(
    "broken",
    [
        malicious,
        lambda path: torch.save({"weights": torch.zeros(3)}, path),
        lambda path: path.write_bytes(b""),
        lambda path: (saved(path), path.write_bytes(path.read_bytes()[:-100])),
        lambda path: save_file({"x": torch.zeros(1)}, path),
        lambda path: save_file({"x": torch.zeros(1)}, path, {"udas": "{"}),
    ],
    ids=["pickle", "torch.save", "empty", "truncated", "foreign", "metadata"],
)
def test_what_is_not_a_checkpoint_is_refused_unopened(tmp_path: Path, broken: object) -> None:
    broken(tmp_path / "last")  # type: ignore[operator]
    text = refusal(tmp_path / "last", toy())
    assert "not a checkpoint of udas, or a broken one" in text
    assert "delete it to start again" in text
    assert not (tmp_path / "opened").exists()


# -------------------------------------------------------------------------------------------------- atomic writing


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "deep" / "file", content)
    assert (tmp_path / "deep" / "file").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_costs_neither_the_old_checkpoint_nor_clarity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "last"
    method = saved(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=r"last: cannot be written \(No space left on device\); what was there before"):
        save_checkpoint(path, method, method.engine, SOME)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/last: cannot be written"):
        write_atomically(tmp_path / "file" / "last", b"")


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("a.png", ".lock", "deep/.backup.2024", ".coverage.host.42", "deep/.hidden")]
    kept.append(tmp_path / f".b.png.udas-{os.getpid()}")  # its writer is alive
    left = [tmp_path / name for name in (".a.png.udas-4999999", "deep/.model.safetensors.udas-4999998")]
    (tmp_path / ".venv.udas-4999997").mkdir()
    for path in kept + left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    remove_leftovers(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("meta", ["{}", "[]", json.dumps({"format": FORMAT, "classes": []})])
def test_a_description_that_lacks_something_is_no_checkpoint(tmp_path: Path, meta: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "last", {"udas": meta})
    method = toy()
    with pytest.raises(RunError, match="last: not a checkpoint of udas, or a broken one"):
        load_checkpoint(tmp_path / "last", method, engine(method))
