"""Where the files of a data set lie: patterns with fields, and lists of pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape, iglob
from pathlib import Path, PurePosixPath

from udas.config import DomainConfig
from udas.data.files import SUFFIXES
from udas.errors import ConfigError, DataError
from udas.validation import nearest

_TOKEN = re.compile(r"(\*\*/|\*|\{[A-Za-z]\w*\})")
_TREE = "_tree"  # the field that holds what `**/` stood for


@dataclass(frozen=True)
class Picture:
    """One picture.

    name: path below the root without suffix, with `/`; unique in its split.
    image: the file.
    fields: what the pattern's fields stood for in its path; `stem` is the file's name without suffix.
    """

    name: str
    image: Path
    fields: Mapping[str, str] = field(default_factory=dict)


class Layout:
    """The patterns `images` and `labels` of a domain.

    `*` is any part of one folder or file name, `**/` any number of folders, `{field}` a part that `labels` uses
    again; `{split}` is what the split says, or any one part when the split is a list or a share.
    """

    def __init__(self, config: DomainConfig) -> None:
        """Check the patterns.

        Raises:
            ConfigError: a field of `labels` that `images` does not have, a path that leads out of the root, a wildcard
                that cannot be filled, or splits that nothing tells apart.
        """
        self._config = config
        self._images = config.images + "/*" if config.images.endswith("**") else config.images
        if self._images.count("**/") > 1:
            raise ConfigError(f"{config.name}.images: `**` may stand only once in {config.images!r}")
        self._check_below_root()
        plain = [name for name, value in config.splits.items() if isinstance(value, str)]
        if len(plain) > 1 and "{split}" not in self._images:
            raise ConfigError(
                f"{config.name}: splits {' and '.join(plain)} are the same pictures, since {config.images!r} has no "
                "{split}; add it, or split by {file: ...} or {share: [from, to]}"
            )
        self._check_labels()

    def _check_below_root(self) -> None:
        """Results are named by pictures' paths below the root: what leads out of it would lead out of their folder."""
        values = {f"splits.{key}": value for key, value in self._config.splits.items() if isinstance(value, str)}
        for key, value in {"images": self._config.images, **values}.items():
            path = PurePosixPath(value.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise ConfigError(f"{self._config.name}.{key}: {value!r} leads out of `root`; give a `root` above it")

    def _check_labels(self) -> None:
        known = {"{split}", "{stem}", *_TOKEN.findall(self._images)} - {"*"}
        for token in _TOKEN.findall(self._config.labels or ""):
            if token == "*":
                raise ConfigError(
                    f"{self._config.name}.labels: `*` is ambiguous; name the part as {{field}} in `images`"
                )
            if token not in known:
                hint = nearest(token, sorted(known))
                raise ConfigError(f"{self._config.name}.labels: {token} does not occur in `images`{hint}")

    def find(self, root: Path, split: str) -> list[Picture]:
        """All pictures below `root` whose path fits, sorted by name.

        Raises:
            DataError: two pictures have the same name.
        """
        pattern, regex = self._compile(split)
        # Unlike pathlib's, this glob follows linked folders below `**`, and data sets are often linked.
        paths = iglob(pattern, root_dir=root, recursive=True)  # noqa: PTH207
        found: dict[str, Picture] = {}
        for path in map(PurePosixPath, sorted(path.replace("\\", "/") for path in paths)):
            match = regex.fullmatch(str(path))
            if match is None or path.suffix.lower() not in SUFFIXES:
                continue
            name = str(path.with_suffix(""))
            if name in found:
                raise DataError(f"{root / path} and {found[name].image} have the same name; make `images` stricter")
            found[name] = Picture(name, root / path, {"stem": path.stem, "split": split, **match.groupdict()})
        return [found[name] for name in sorted(found)]

    def label(self, picture: Picture) -> str:
        """Path of the label file below the root; `images` and `labels` agree on their fields."""
        text = self._config.labels or ""
        return _TOKEN.sub(lambda token: picture.fields[_TREE if token[0] == "**/" else token[0][1:-1]], text)

    def tried(self, split: str) -> str:
        """The pattern as it was looked for, for messages."""
        return self._compile(split)[0]

    def _compile(self, split: str) -> tuple[str, re.Pattern[str]]:
        """A glob pattern, and a regular expression that captures the fields."""
        value = self._config.splits[split]
        inner = value if isinstance(value, str) else "*"
        seen: set[str] = set()
        globbed, regex = "", ""
        for part in _TOKEN.split(self._images):
            globbed += _glob(inner) if part == "{split}" else _glob(part)
            regex += _regex(part, inner, seen)
            seen.add(part)
        return globbed, re.compile(regex)


def _glob(text: str) -> str:
    parts = _TOKEN.split(text)
    return "".join("*" if part.startswith("{") else part if _TOKEN.fullmatch(part) else escape(part) for part in parts)


def _regex(part: str, split: str, seen: set[str]) -> str:
    if part == "**/":
        return f"(?P<{_TREE}>(?:[^/]+/)*)"
    if part == "*":
        return "[^/]*"
    if not _TOKEN.fullmatch(part):
        return re.escape(part)
    name = part[1:-1]
    if part in seen:
        return f"(?P={name})"
    inside = "".join(_regex(piece, "", set()) for piece in _TOKEN.split(split)) if name == "split" else "[^/]+"
    return f"(?P<{name}>{inside})"


def read_list(file: Path, pictures: list[Picture], where: str) -> list[str]:
    """Names of the pictures that a list file names, sorted.

    One picture per line: its name, its stem, or a path that ends like its own (published lists carry foreign
    prefixes); the suffix may be missing, and what follows a space (a label file) is passed over. Empty lines and
    lines that begin with # do not count.

    Raises:
        DataError: missing file, a line that names no picture, or more than one.
    """
    known = _by_ending(pictures)
    names = {picture.name for picture in pictures}
    chosen: set[str] = set()
    for number, line in enumerate(_lines(file), start=1):
        if not line or line.startswith("#"):
            continue
        found = _match(line, known, names)
        if not found:
            raise DataError(f"{file}, line {number}: {line!r} is no picture of {where}; remove it or add the picture")
        if len(found) > 1:
            raise DataError(
                f"{file}, line {number}: {line!r} is {found[0]} as well as {found[1]}; write more of its path"
            )
        chosen.update(found)
    return sorted(chosen)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{file}: {reason}; a list file has one picture per line") from None


def _match(line: str, known: Mapping[str, list[str]], names: set[str]) -> list[str]:
    """Pictures that a line may mean, the most literal reading first."""
    whole, first = _spellings(line), _spellings(line.split()[0])
    for text in (*whole, *first):
        if hits := [text] if text in names else known.get(text):
            return hits
    # A foreign prefix is dropped from the first path of the line before a path with spaces is considered.
    return [ending for text in (*first, *whole) for ending in _endings(text) if ending in names][:1]


def _spellings(text: str) -> list[str]:
    path = PurePosixPath(text.replace("\\", "/").removeprefix("./"))
    return [str(path), str(path.with_suffix(""))] if path.suffix.lower() in SUFFIXES else [str(path)]


def _by_ending(pictures: list[Picture]) -> dict[str, list[str]]:
    known = defaultdict(list)
    for picture in pictures:
        for ending in _endings(picture.name):
            known[ending].append(picture.name)
    return known


def _endings(path: str) -> list[str]:
    """`a/b/c` -> `a/b/c`, `b/c`, `c`."""
    parts = path.strip("/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
