"""Runs `python -m udas` many times without importing torch again: one fork per line of JSON on standard input.

A line is {"argv": [...], "after": seconds or null, "output": file}; the answer is the exit code, or null when the
process was killed (SIGKILL) because it was still alive after that time.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any

IMPORTED_ONLY_WHEN_NEEDED = ["udas.pipeline.run", "kornia", "matplotlib.pyplot", "torch.utils.tensorboard", "udas.cli"]


def become_udas(argv: list[str], output: str) -> None:
    """What `python -m udas ARGV` does, in this process; does not return."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["udas", *argv]
    code: Any = 0
    try:
        runpy.run_module("udas", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def kill_later(child: int, after: float | None) -> int | None:
    """Wait for `child`; kill it when it lives longer than `after` seconds."""
    deadline = time.monotonic() + (after if after is not None else 300)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    for name in IMPORTED_ONLY_WHEN_NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            become_udas(job["argv"], job["output"])
        print(json.dumps(kill_later(child, job["after"])), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
