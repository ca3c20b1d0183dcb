"""Files that are whole or not there: what every writer of results uses."""

from __future__ import annotations

import io
import json
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image

from udas.errors import RunError

UNFINISHED = ".udas-"
"""In the names of files that are being written, before the number of the process."""


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` in one instant.

    Args:
        path: the file; its folder is made when absent.
        content: all of it.
        durable: wait until it survives a power cut, too; not worth it for what can be made again at once.

    Raises:
        RunError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _make_durable(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); what was there before is untouched"
        ) from error


def write_picture(path: Path, picture: Image.Image, kind: str = "PNG", quality: int = 75) -> None:
    """Save a picture in one piece, folders included; `quality` is of JPEGs. Raises `RunError` when it cannot be."""
    coded = io.BytesIO()
    picture.save(coded, kind, quality=quality)
    write_atomically(path, coded.getvalue())


def in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order: of equal networks every byte is equal."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)  # tensors are aligned
    return len(ordered).to_bytes(8, "little") + ordered + content[start:]


def _make_durable(folder: Path) -> None:
    """Write the folder's names to disk: a renamed file is there after a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left unfinished, anywhere below `folder`; those still alive keep theirs."""
    for path in folder.rglob(f".*{UNFINISHED}*"):
        writer = path.name.rpartition(UNFINISHED)[2]
        if path.is_file() and writer.isdecimal() and not _alive(int(writer)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
