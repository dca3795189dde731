"""Killing at a moment of one's choice, many times over: one process imports what is slow to import, and forks.

with forks("examples.finetune_timm") as run:
    run(0.3, "examples.finetune_timm:main", [...])  # -9 if it was killed after 0.3 s, else its exit code
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def forks(*modules: str) -> Iterator[Callable[..., int]]:
    """A function that runs `module:function` in a fresh copy of a process that has imported the modules."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.killing", *modules]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asks, answers = server.stdin, server.stdout

        def run(seconds: float | None, target: str, *arguments: Any) -> int:
            print(json.dumps([seconds, target, arguments]), file=asks, flush=True)
            return int(answers.readline())

        try:
            yield run
        finally:
            asks.close()  # the server ends with its input


def serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        seconds, target, arguments = json.loads(line)
        if pid := os.fork():
            print(ended(pid, seconds), flush=True)
        else:
            call(target, arguments)


def call(target: str, arguments: list[Any]) -> None:
    """In the child: silent on stdout, which carries the answers."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        module, _, name = target.partition(":")
        code = getattr(importlib.import_module(module), name)(*arguments) or 0
    finally:
        os._exit(code)


def ended(pid: int, seconds: float | None) -> int:
    """How the child ended: by itself, or killed after so long."""
    end = float("inf") if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.002)


if __name__ == "__main__":
    serve(sys.argv[1:])
