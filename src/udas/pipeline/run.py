"""Running a chain of stages: each is reused, resumed, restarted or started; a failing one stops the run."""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from udas import __version__
from udas.data.batch import Stream
from udas.errors import RunError, UdasError
from udas.evaluation.table import save_tables
from udas.pipeline import difference, stages
from udas.pipeline.build import rehearse
from udas.pipeline.config import RunConfig, uses
from udas.pipeline.context import Context
from udas.pipeline.estimate import estimate
from udas.pipeline.plan import Action, Planned, plan, read_manifest
from udas.reporting.html import render
from udas.reporting.read import Run, Stage, read_runs
from udas.storage import remove_leftovers, write_atomically
from udas.training.runtime import Runtime

RUNNERS: dict[str, Any] = {
    "train": stages.run_train,
    "translate": stages.run_translate,
    "label": stages.run_label,
    "rank": stages.run_rank,
    "prototypes": stages.run_prototypes,
    "evaluate": stages.run_evaluate,
}


def run(config: RunConfig, folder: Path, runtime: Runtime, console: Console) -> Path:
    """Carry out all stages in `folder` and write table and report. Returns the report's path.

    Raises:
        UdasError: from the first stage that fails; what was finished before stays finished.
    """
    context = Context(config, folder, runtime)
    with _locked(folder, runtime):
        planned = plan(Context(config.model_copy(update={"cache": False}), folder, runtime))
        rehearse(context, [item.name for item in planned if item.action != Action.REUSE])
        runtime.barrier()  # nobody changes a manifest before all have read it
        if runtime.main:
            remove_leftovers(folder)
            content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write_atomically(folder / "run.yaml", content.encode())
        for number, item in enumerate(planned, 1):
            if runtime.main:
                console.print(f"[bold]{number}/{len(planned)} {item.name}[/bold]  {item.action}: {item.why}")
            if item.action != Action.REUSE:
                _carry_out(context, item)
            elif runtime.main:
                _retitle(folder / item.name, item)
        return write_results(folder) if runtime.main else folder / "report.html"


def prepare_cache(config: RunConfig, folder: Path, runtime: Runtime, console: Console) -> None:
    """Decode and resize every picture and every granted label of a run into `folder`/cache."""
    context = Context(config, folder, runtime)
    sets = [context.unlabelled, context.validation]
    if context.probe is not context.validation:
        sets.append(context.probe)
    for stage in config.stages.values():
        if stage.kind == "train" and Stream.LABELLED in context.streams("", stage):
            sets.append(context.labelled(stage))
    if config.data.source is not None:
        sets.append(context.source_pictures)
    size = sum(path.stat().st_size for path in (folder / "cache").glob("*.npy"))
    console.print(f"{sum(len(s) for s in sets if s)} pictures, {_size(size)} in {folder / 'cache'}")


def write_results(folder: Path) -> Path:
    """Table files (`results.txt`, `.json`, `.csv`, `.md`) and the HTML report of a run folder."""
    [run] = read_runs([folder])
    save_tables(_evaluations(run), folder / "results")
    write_atomically(folder / "report.html", render([run]).encode())
    return folder / "report.html"


def _evaluations(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """(title, evaluation.json and what training took) of every finished evaluation, in the order of a run's stages."""
    done = [stage for stage in run.stages if stage.evaluation and stage.manifest.state == "done"]
    stages = {stage.manifest.stage: stage for stage in done}
    order = [stages[name] for name in run.config["stages"] if name in stages]
    return [(str(stage.manifest.title), _evaluation(run, stage)) for stage in order]


def _evaluation(run: Run, stage: Stage) -> dict[str, Any]:
    budget = run.budget(stage)
    content: dict[str, Any] = json.loads((stage.folder / "evaluation.json").read_text(encoding="utf-8"))
    return content | (asdict(budget) if budget else {})


def show_plan(config: RunConfig, folder: Path, runtime: Runtime, console: Console) -> None:
    """Print what `run` would do, why, and what it would cost; change nothing in the folder.

    Raises:
        UdasError: what `run` would find wrong before its first stage.
    """
    context = Context(config.model_copy(update={"cache": False}), folder, runtime)
    table = Table("stage", "action", "why", "time", "disk", title=f"plan of {config.name} in {folder}")
    total_time, total_disk = 0.0, 0.0
    planned = plan(context)
    rehearse(context, [item.name for item in planned if item.action != Action.REUSE])
    for item in planned:
        seconds, size = (0.0, 0.0) if item.action == Action.REUSE else estimate(context, item.name, item.stage)
        total_time, total_disk = total_time + seconds, total_disk + size
        table.add_row(item.name, item.action, item.why, _duration(seconds), _size(size))
    table.add_section()
    table.add_row("all", "", "times: networks alone, timed now", _duration(total_time), _size(total_disk))
    console.print(table)
    free = shutil.disk_usage(_existing(folder)).free
    if free < total_disk:
        console.print(f"[bold red]only {_size(free)} are free on that disk[/bold red]")


def _existing(folder: Path) -> Path:
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.0f} MB"


def _carry_out(context: Context, item: Planned) -> None:
    folder, runtime = context.folder / item.name, context.runtime
    if item.action == Action.RESTART and runtime.main:
        _move_aside(folder)
    manifest = _manifest(context, item)
    before = (read_manifest(folder) or {}).get("seconds", 0.0) if item.action == Action.RESUME else 0.0
    began = time.monotonic()

    def note(state: str, **more: str) -> None:
        if runtime.main:
            manifest.update(more, state=state, seconds=round(before + time.monotonic() - began, 1))
            write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2).encode())

    note("running")
    if runtime.main:
        settings = yaml.safe_dump(item.stage.model_dump(mode="json"), sort_keys=False)
        write_atomically(folder / "config.yaml", settings.encode())
        difference.note(folder, item.made_from)
    runtime.barrier()
    try:
        RUNNERS[item.stage.kind](context, item.name, item.stage, folder)
    except KeyboardInterrupt:
        with suppress(RunError):
            note("stopped")
        raise
    except BaseException as error:
        with suppress(RunError):  # a full disk must not hide what went wrong first
            note("failed", error=str(error) if isinstance(error, UdasError) else repr(error))
        raise
    runtime.barrier()
    note("done")


def _retitle(folder: Path, item: Planned) -> None:
    """Take over a new title: it names a row, and is no reason to do a stage again."""
    manifest, title = read_manifest(folder), item.stage.title or item.name
    if manifest and manifest["title"] != title:
        write_atomically(folder / "manifest.json", json.dumps(manifest | {"title": title}, indent=2).encode())


def _manifest(context: Context, item: Planned) -> dict[str, Any]:
    stage = item.stage
    method = stage.method.name if stage.kind == "train" else None
    return {
        "stage": item.name,
        "kind": stage.kind,
        "title": stage.title or item.name,
        "fingerprint": item.fingerprint,
        "uses": uses(stage),
        "machine": context.runtime.describe(),
        "versions": _versions(),
        "method": method,
        "steps": stage.training.steps if stage.kind == "train" else None,
    }


@cache
def _versions() -> dict[str, str | None]:
    """Of the code in this process; files may change on the disk while it runs."""
    return {
        "udas": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def _commit() -> str | None:
    """The commit of a source checkout, `-dirty` when files differ from it; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _move_aside(folder: Path) -> None:
    """Keep the work of an older configuration under `old/`, numbered."""
    if not folder.exists():
        return
    shelf = folder.parent / "old"
    shelf.mkdir(exist_ok=True)
    taken = {path.name for path in shelf.iterdir()}
    free = next(name for number in count() if (name := f"{folder.name}.{number}") not in taken)
    folder.rename(shelf / free)


@contextmanager
def _locked(folder: Path, runtime: Runtime) -> Iterator[None]:
    """One run per folder. Raises `RunError` when another process is at work there, or it cannot be written."""
    if not runtime.main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(
            f"{folder}: the output folder cannot be written ({error.strerror}); choose another with --out"
        ) from error
    with lock:
        try:
            # not flock: loader workers inherit it and hold it for seconds after their parent was killed
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: another udas process is running in this folder") from None
        yield
