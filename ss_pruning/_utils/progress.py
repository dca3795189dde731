"""The stages of a long work: how far it is, and what each has taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ss_pruning.errors import InputError

#: Called with a stage's name, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
_STAGES = 5


def reporter(progress: Progress | None) -> Progress:
    """What to call; without any, a function that does nothing.

    Raises:
        InputError: It cannot be called.
    """
    if progress is None:
        return lambda *_: None
    if not callable(progress):
        raise InputError(f"progress={progress!r} cannot be called; give a function of (stage, done, total)")
    return progress


class Clock:
    """Times the stages and reports them as progress; a stage within another does not count to it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.running: list[tuple[str, int]] = []
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str, done: int) -> Iterator[None]:
        """The time that passes within belongs to this stage, the `done`-th."""
        self._turn()
        self.running.append((stage, done))
        self.progress(stage, done, _STAGES)
        try:
            yield
        finally:
            self._turn()
            self.running.pop()
            self.progress(*self.running[-1] if self.running else (stage, done + 1), _STAGES)

    def steps(self, stage: str) -> Callable[[int, int], None]:
        """For a stage that reports its own steps."""
        begin = time.perf_counter()

        def report(done: int, total: int) -> None:
            self.seconds[stage] = time.perf_counter() - begin
            self.progress(stage, done, total)

        return report

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the stage that runs."""
        now = time.perf_counter()
        if self.running:
            stage, _ = self.running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.since
        self.since = now
