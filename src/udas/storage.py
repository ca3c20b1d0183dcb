"""Files that are whole or not there: what every writer of results uses."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from udas.errors import RunError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one instant. Raises `RunError` when the disk is full or not writable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror}); what was there before is untouched") from error
