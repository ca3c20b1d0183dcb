"""Device, precision and processes: what is chosen, and what cannot be had is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from udas.errors import RunError
from udas.training.runtime import Runtime, RuntimeConfig


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """What `Runtime.start` changes in the process is taken back."""
    yield
    torch.set_flush_denormal(False)


def start(**settings: Any) -> Runtime:
    return Runtime.start(RuntimeConfig(**settings))


def refusal(**settings: Any) -> str:
    with pytest.raises(RunError) as caught:
        start(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two CUDA devices of compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    return monkeypatch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_a_missing_device_is_refused_and_auto_takes_the_cpu(no_gpu: pytest.MonkeyPatch) -> None:
    assert "device 'cuda' was asked for" in refusal(device="cuda")
    assert start().device == torch.device("cpu")


def test_more_processes_than_devices_are_refused(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("LOCAL_WORLD_SIZE", "3")
    assert refusal(device="cuda") == "3 processes were asked for, but there are 2 cuda devices"
    assert refusal(device="auto").startswith("3 processes")


def test_every_process_takes_its_own_device(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("LOCAL_WORLD_SIZE", "2")
    gpus.setenv("LOCAL_RANK", "1")
    assert start().device == torch.device("cuda", 1)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_compute_in_bf16_where_they_have_it(
    gpus: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    gpus.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert start().precision == precision
    assert start(precision="fp32").precision == "fp32"


@pytest.mark.parametrize(("found", "precision"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32")])
def test_cpus_compute_in_bf16_where_they_have_it(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert start(device="cpu").precision == precision


def test_autocast_follows_the_precision() -> None:
    layer, image = torch.nn.Linear(2, 2), torch.rand(1, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with start(device="cpu", precision=precision).autocast():
            assert layer(image).dtype == dtype


def test_weights_changed_inside_autocast_are_used_at_once() -> None:
    layer, image = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with start(device="cpu", precision="bf16").autocast():
        before = layer(image)
        with torch.no_grad():
            layer.bias += 1
        assert not torch.equal(layer(image), before)


def test_one_process_averages_with_nobody() -> None:
    flat = torch.tensor([1.0, 2.0])
    runtime = start(device="cpu")
    runtime.average(flat)
    runtime.barrier()
    assert flat.tolist() == [1, 2]
    assert (runtime.rank, runtime.world, runtime.main) == (0, 1, True)


def test_loaders_and_memory_format_follow_the_configuration() -> None:
    assert start(device="cpu").workers == 1
    assert start(device="cpu", workers=3).workers == 3
    assert start(device="cpu").memory_format == torch.channels_last
    assert start(device="cpu", channels_last=False).memory_format == torch.contiguous_format


def test_the_machine_is_described_for_manifests() -> None:
    described = start(device="cpu", precision="fp32").describe()
    assert described["precision"] == "fp32"
    assert described["processes"] == 1
    assert described["device"]
