"""What every stage of a run shares: configuration, folder, processes, label space and the pictures of both domains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from udas.config import DomainConfig, Labelled, StreetsConfig
from udas.data.batch import Stream
from udas.data.cache import build_cache
from udas.data.dataset import Domain, PictureSet
from udas.data.streets import ensure
from udas.errors import ConfigError
from udas.names import load_method
from udas.pipeline.config import RunConfig, TrainStage
from udas.taxonomy import Taxonomy, load_taxonomy
from udas.training.log import Bar
from udas.training.runtime import Runtime


@dataclass(frozen=True)
class Context:
    """One run in its folder."""

    config: RunConfig
    folder: Path
    runtime: Runtime

    @cached_property
    def taxonomy(self) -> Taxonomy:
        """The label space of the run."""
        return load_taxonomy(self.config.taxonomy)

    @cached_property
    def target(self) -> Domain:
        """The real domain."""
        return self._domain(self.config.data.target)

    @cached_property
    def source(self) -> Domain:
        """The synthetic domain. Raises `ConfigError` when the run has none."""
        if self.config.data.source is None:
            raise ConfigError("data.source: missing, but a stage needs synthetic pictures")
        return self._domain(self.config.data.source)

    @cached_property
    def source_pictures(self) -> PictureSet:
        """All synthetic training pictures with their labels."""
        return self._cached(self.source.labelled(self.config.data.train_split, "all"))

    @cached_property
    def unlabelled(self) -> PictureSet:
        """All real training pictures, without any path to labels."""
        return self._cached(self.target.unlabelled(self.config.data.train_split))

    @cached_property
    def validation(self) -> PictureSet | None:
        """The pictures that networks are scored on, or None where the target has no such split."""
        size = self.config.data.val_size
        if size is None or self.probe is None:
            return self.probe
        pictures = self.target.labelled(self.config.data.val_split, "all")
        return self._cached(replace(pictures, size=None if size == "own" else size))

    @cached_property
    def probe(self) -> PictureSet | None:
        """The same at the size that networks are trained on, for the quality of pseudo-labels."""
        if self.config.data.val_split not in self.config.data.target.splits:
            return None
        return self._cached(self.target.labelled(self.config.data.val_split, "all"))

    def labelled(self, stage: TrainStage) -> PictureSet:
        """The real pictures whose labels this stage was granted."""
        return self._cached(self.target.labelled(self.config.data.train_split, self.granted(stage)))

    def with_real_labels(self, name: str, stage: TrainStage, pseudo: PictureSet) -> PictureSet:
        """Pseudo-labelled pictures, with real labels where the stage sees these anyway, in its stream `labelled`."""
        return pseudo.with_known(self.labelled(stage)) if Stream.LABELLED in self.streams(name, stage) else pseudo

    def granted(self, stage: TrainStage) -> Labelled:
        """Which real labels this stage may see."""
        return self.config.data.target.labelled if stage.labelled is None else stage.labelled

    def streams(self, name: str, stage: TrainStage) -> frozenset[Stream]:
        """The streams a stage trains on: those it names, or all that its method takes.

        Raises:
            ConfigError: when the method needs a stream that is not there.
        """
        method = load_method(stage.method.name)
        there = self._available(stage)
        wanted = (method.needs | method.optional) & there if stage.streams is None else frozenset(stage.streams)
        for stream in sorted((method.needs | wanted) - (there & wanted)):
            advice = "add it to `streams`" if stream in there else ADVICE[stream]
            raise ConfigError(f"stages.{name}: no stream {stream.value!r} for method {stage.method.name}: {advice}")
        if stage.pseudo is not None and Stream.PSEUDO not in method.needs | method.optional:
            raise ConfigError(f"stages.{name}.pseudo: method {stage.method.name} does not learn from pseudo-labels")
        if useless := sorted(wanted - method.needs - method.optional):
            raise ConfigError(f"stages.{name}.streams: method {stage.method.name} does not use {', '.join(useless)}")
        if not wanted:
            raise ConfigError(f"stages.{name}: no stream to train on; give data.source, labels or `pseudo`")
        return wanted

    def _available(self, stage: TrainStage) -> frozenset[Stream]:
        there = {Stream.UNLABELLED}
        if self.config.data.source is not None:
            there.add(Stream.SOURCE)
        if stage.pseudo is not None:
            there.add(Stream.PSEUDO)
        if self.target.labelled_names(self.config.data.train_split, self.granted(stage)):
            there.add(Stream.LABELLED)
        return frozenset(there)

    def _domain(self, config: DomainConfig) -> Domain:
        """Open a domain; the main process renders the embedded world, so that the others find it complete."""
        domain = Domain(config, self.taxonomy)
        if config.streets is not None and self.runtime.main:
            render_streets(config.name, config.streets, domain.root)
        self.runtime.barrier()
        return domain

    def _cached(self, pictures: PictureSet) -> PictureSet:
        if not self.config.cache:
            return pictures
        if not self.runtime.main:
            self.runtime.barrier()  # the main process writes the arrays, the others find them
            return build_cache(pictures, self.folder / "cache")
        with Bar(f"cache {pictures.domain}", len(pictures), unit="pictures") as bar:
            cached = build_cache(pictures, self.folder / "cache", bar)
        self.runtime.barrier()
        return cached


def render_streets(name: str, streets: StreetsConfig, root: Path) -> None:
    """Render what is missing of the embedded world `name` into `root`, with a progress bar."""
    with Bar(f"render {name}", sum(streets.pictures.values()), unit="pictures") as bar:
        ensure(streets, root, bar)


ADVICE = {
    Stream.SOURCE: "give data.source",
    Stream.LABELLED: "no real label is granted; set `labelled` in data.target or in the stage",
    Stream.UNLABELLED: "give data.target",
    Stream.PSEUDO: "name a label stage in `pseudo`",
}
