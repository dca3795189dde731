"""What the command line shows besides its results: progress and errors, on stderr."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import NoReturn, TextIO

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from ss_pruning._utils import progress
from ss_pruning._utils.progress import listening, seconds_left, time_in_words
from ss_pruning.report.formatting import printable

PRUNING = "pruning"

FAILED = 2


def note(text: str) -> None:
    """Tell the user something that is neither result nor error."""
    Console(stderr=True).print(Text(printable(text), style="yellow"))


def banner(title: str, text: str) -> None:
    """Tell the user something that must not be overlooked."""
    panel = Panel(Text(printable(text)), title=title, title_align="left", border_style="yellow")
    Console(stderr=True).print(panel)


def fail(message: str) -> NoReturn:
    """Show one red panel and exit."""
    panel = Panel(Text(printable(message)), title="Error", title_align="left", border_style="red")
    Console(stderr=True).print(panel)
    raise typer.Exit(FAILED)


@contextmanager
def guarded() -> Iterator[TextIO]:
    """Turn our errors into a panel and exit code 2, Ctrl-C into exit code 130 (SIGTERM: 143); bugs stay as they are.

    What libraries or the user's own model file print meanwhile goes to stderr: stdout is for results.

    Yields:
        The real stdout, for results.
    """
    from ss_pruning.errors import SSPruningError

    results = sys.stdout
    with _interrupts() as interrupted:
        try:
            with redirect_stdout(sys.stderr):
                yield results
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) or interrupted:
                note("Interrupted; nothing was left half-written.")
                raise typer.Exit(128 + (interrupted or [signal.SIGINT])[-1]) from None
            if isinstance(error, SSPruningError):
                fail(str(error))
            raise


_interrupted: list[int] = []


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on Ctrl-C and SIGTERM, and remember it.

    Torch imports its compiler while models run, and whoever catches all errors there swallows an interrupt, or turns it
    into another error: what was remembered is raised again at the next step (`not_interrupted`).
    """

    def interrupt(number: int, _: object) -> NoReturn:
        _interrupted.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield _interrupted
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield _interrupted
    finally:
        _interrupted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def not_interrupted() -> None:
    """Raise the interrupt that somebody has swallowed."""
    if _interrupted:
        raise KeyboardInterrupt


@contextmanager
def progress_bars() -> Iterator[progress.Progress]:
    """Show one bar per job while the block runs; nothing at all where stderr is not a terminal.

    What follows a colon names the stage that the job is at: it changes the bar's label, not the bar. The work of
    `PRUNING` comes in milliseconds as they were expected, see `ss_pruning._utils.progress`, that of others in pieces.
    """
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}
    begun: dict[str, float] = {}

    def update(what: str, done: int, total: int) -> None:
        not_interrupted()
        job = what.partition(":")[0]
        if job not in tasks:
            tasks[job] = bars.add_task("", total=total, left="")
        if not done:
            begun[job] = time.monotonic()
        left = _left(job, time.monotonic() - begun.setdefault(job, time.monotonic()), done, total)
        bars.update(tasks[job], description=printable(what), completed=done, total=total, left=left)

    with bars:
        yield update


def shown_as(name: str, update: progress.Progress) -> AbstractContextManager[None]:
    """The steps of the work within are those of a job of that name."""
    return listening(lambda done, total: update(name, int(done), int(total)))


def _left(job: str, passed: float, done: int, total: int) -> str:
    """What is left of a job, in words; nothing where nobody knows yet, or all is done."""
    if job == PRUNING and total > 1:
        return (
            f"{time_in_words(seconds_left(passed, done / 1000, total / 1000))} left" if done < total else ""
        )
    return f"{time_in_words(passed * (total - done) / done)} left" if 0 < done < total else ""
