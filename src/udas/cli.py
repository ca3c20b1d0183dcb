"""The command line. Each command is a few lines; torch is imported only when a command works."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from udas.errors import UdasError

if TYPE_CHECKING:
    from udas.data.dataset import Domain
    from udas.pipeline.config import RunConfig
    from udas.training.runtime import Runtime

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train segmentation networks for real pictures from synthetic labels and a few real ones.

    Begin with **udas demo** (no data needed). Then describe your data in YAML, let **udas check**
    read it once, look at **udas run FILE --plan**, and run it. A run that was stopped goes on with the same
    command.
    """,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the file, as key=value: seed=1 stages.teacher.training.steps=3000"),
]
RunFile = Annotated[str, typer.Argument(help="Run file (.yaml) or a preset (`udas list runs`).")]
RunFolder = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; runs/NAME if not given.")]
Data = Annotated[str, typer.Argument(help="A data preset (`udas list data`) or a YAML file.")]
Root = Annotated[str | None, typer.Option(help="Folder of the data set, instead of the one in the preset.")]
Labels = Annotated[
    str | None,
    typer.Option(
        "--taxonomy", help="Label space: a name (`udas list labels`) or a YAML file; the data set's own if not given."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Model = Annotated[Path, typer.Argument(help="model.safetensors of a finished train stage.")]


@app.command(rich_help_panel="Begin here")
def demo(
    out: Out = Path("runs/demo"),
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be done.")] = False,
) -> None:
    """The whole chain on the embedded street world: CPU only, no downloads, a few minutes, a table and a report."""
    _run("demo", [f"data.{domain}.root={out / 'data' / domain}" for domain in ("source", "target")], out, plan)


@app.command(rich_help_panel="Begin here")
def check(
    data: Data,
    taxonomy: Labels = None,
    root: Root = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits to read; all if not given.")] = None,
    scored: Annotated[
        list[str], typer.Option(help="Splits that networks are scored on, of which all labels are read.")
    ] = ["val", "test"],  # noqa: B006  (typer copies it)
) -> None:
    """Read a data set once: class histograms, unmapped values, sizes, unreadable files, overlap of splits.

    Only labels that the data set grants (`labelled`) and those of scored splits are opened. Exit code 1 when there is
    a problem.
    """
    from udas.data.check import check_domain
    from udas.pipeline.console import print_check
    from udas.training.log import Bar

    domain = _domain(data, root, taxonomy)
    splits = split or list(domain.config.splits)
    with Bar(f"check {domain.config.name}", 1, unit="pictures") as bar:
        report = check_domain(domain, splits, bar, grants={name: "all" for name in splits if name in scored})
    print_check(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command(rich_help_panel="Begin here")
def prepare(
    config: RunFile,
    overrides: Overrides = None,
    out: RunFolder = None,
) -> None:
    """Decode and resize every picture of a run once, into a memory-mapped cache beside the run.

    The run then reads the cache (set `cache: true` in the file, or `cache=true` behind the command).
    """
    from rich.console import Console

    from udas.pipeline.run import prepare_cache

    settings = _load(config, [*(overrides or []), "cache=true"])
    prepare_cache(settings, out or Path("runs") / settings.name, _runtime(settings), Console())


@app.command(rich_help_panel="Train")
def run(
    config: RunFile,
    overrides: Overrides = None,
    out: RunFolder = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be done, why, and its time and disk; train nothing.")
    ] = False,
) -> None:
    """Carry out a chain of stages; what is finished is kept, what was stopped goes on.

    Several processes: `torchrun --nproc-per-node 4 -m udas run FILE`.
    """
    _run(config, overrides or [], out, plan)


@app.command(rich_help_panel="Use a network")
def evaluate(
    model: Model,
    data: Data,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Labelled split to score on.")] = "val",
    protocol: Annotated[
        str, typer.Option(help="How pictures are shown and compared (`udas list protocols`).")
    ] = "whole",
    out: Out = Path("evaluation"),
) -> None:
    """Score a network: per-class IoU, mIoU with its bootstrap interval, pixel accuracy."""
    from udas.pipeline.single import evaluate_model

    evaluate_model(model, data, root, split, protocol, out)


@app.command(rich_help_panel="Use a network")
def predict(
    model: Model,
    inputs: Annotated[list[str], typer.Argument(help="Pictures, folders, or quoted glob patterns.")],
    out: Out = Path("predictions"),
    overlay: Annotated[bool, typer.Option(help="Also write the prediction laid over the picture.")] = True,
) -> None:
    """Segment pictures: a mask with a colour palette, an overlay, and a legend of the classes."""
    from udas.pipeline.single import predict_files

    predict_files(model, inputs, out, overlay)


@app.command(rich_help_panel="Use a network")
def label(
    model: Model,
    data: Data,
    root: Root = None,
    split: Annotated[str, typer.Option(help="Split whose pictures are labelled.")] = "train",
    views: Annotated[int, typer.Option(min=1, help="Looks at each picture; the surest one counts per pixel.")] = 3,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Pixels less confident than this are left out.")] = 0.6,
    rule: Annotated[
        str,
        typer.Option(help="constant: one threshold; class: lowered where less than --keep of a class would be left."),
    ] = "class",
    keep: Annotated[float, typer.Option(min=0, max=1, help="Rule class: share of each class that survives.")] = 0.5,
    confidence: Annotated[bool, typer.Option(help="Also write the confidence of every pixel, 8 bit.")] = False,
    out: Out = Path("pseudo_labels"),
) -> None:
    """Label pictures with a network, as PNGs in its label space; work that was stopped goes on at the picture."""
    from udas.pipeline.label import LabelConfig
    from udas.pipeline.single import label_pictures
    from udas.validation import validate

    given = {"views": views, "threshold": threshold, "rule": rule, "keep": keep, "confidence": confidence}
    label_pictures(model, data, root, split, validate(LabelConfig, given, "label"), out)


@app.command(rich_help_panel="Look")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are shown side by side.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file; report.html in the first run if not given.")
    ] = None,
) -> None:
    """Write one self-contained HTML file: table, curves, confusion, and the same pictures through every stage."""
    from udas.pipeline.run import write_results
    from udas.reporting.html import write_report

    for folder in runs:
        if not (folder / "run.yaml").exists():
            raise UdasError(f"{folder}: not a run folder (it has no run.yaml)")
    print(
        write_results(runs[0]) if out is None and len(runs) == 1 else write_report(runs, out or runs[0] / "report.html")
    )


@app.command("list", rich_help_panel="Look")
def list_names(
    what: Annotated[
        str | None, typer.Argument(help="runs, bases, data, labels, methods, networks or protocols.")
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="One of these: a preset's file, or a method's formula and settings.")
    ] = None,
) -> None:
    """What can be named in files and commands.

    A file of your own can begin with a preset's: **udas list runs uda_demo > mine.yaml**.
    """
    from udas.pipeline.catalogue import print_name, print_names

    print_name(what, name) if what and name else print_names(what)


@app.command(rich_help_panel="Look")
def schema() -> None:
    """Print the JSON schema of run files, for completion and checks in editors."""
    import json

    from udas.pipeline.schema import run_schema

    print(json.dumps(run_schema(), indent=2))


@app.command(rich_help_panel="Look")
def doctor() -> None:
    """Versions, devices, precision, and which optional packages import and why not."""
    from udas.pipeline.doctor import examine

    raise typer.Exit(0 if examine() else 1)


# ------------------------------------------------------------------------------------------------------- helpers


def _load(config: str, overrides: list[str]) -> RunConfig:
    from udas.pipeline.config import load_run

    return load_run(config, overrides)


def _runtime(settings: RunConfig) -> Runtime:
    from udas.training.runtime import Runtime

    return Runtime.start(settings.runtime)


def _domain(data: str, root: str | None, taxonomy: str | None) -> Domain:
    from udas.pipeline.single import open_domain

    return open_domain(data, root, taxonomy)


def _run(config: str, overrides: list[str], out: Path | None, plan: bool) -> None:
    from rich.console import Console

    from udas.pipeline.run import run as carry_out
    from udas.pipeline.run import show_plan

    settings = _load(config, overrides)
    folder, runtime, console = out or Path("runs") / settings.name, _runtime(settings), Console()
    if plan:
        show_plan(settings, folder, runtime, console)
        return
    path = carry_out(settings, folder, runtime, console)
    if runtime.main:
        console.print((folder / "results.txt").read_text(encoding="utf-8"), markup=False, highlight=False)
        console.print(f"report: {path.absolute()}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line; errors on the user's side are one readable message, bugs keep their traceback."""
    try:
        app()
    except UdasError as error:
        where = f" (process {rank})" if (rank := os.environ.get("RANK")) else ""
        print(f"error{where}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
