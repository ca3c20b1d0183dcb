"""Runs `python -m udas` many times without importing torch again: one fork per line of JSON on standard input.

A line is {"argv": [...], "after": seconds or null, "output": file}. The process is killed (SIGKILL) when
it has used that much processor time, which counts its work even where many others compute. The answer is [exit code,
or null when it was killed; seconds of processor time it used].
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
from pathlib import Path
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


def wait(child: int, after: float | None) -> tuple[int | None, float]:
    """Wait for `child`; kill it when it has used more than `after` seconds of processor time."""
    killed = False
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if after is not None and not killed and processor_time(child) > after:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    _, status, used = ended
    return None if killed else os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def processor_time(process: int) -> float:
    """Seconds of processor time of a running process (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    for name in IMPORTED_ONLY_WHEN_NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            become_udas(job["argv"], job["output"])
        print(json.dumps(wait(child, job["after"])), flush=True)


if __name__ == "__main__":
    main()
