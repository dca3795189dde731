"""The stages of a long work: how far it is, what each has taken, and when all will be over."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from ss_pruning.errors import InputError

#: Called with a stage's name, how much of the work is done, and how much there is.
Progress = Callable[[str, int, int], None]
#: Called with how much of the stage that runs is done, and how much there is of it.
Step = Callable[[float, float], None]
_listener: ContextVar[Step] = ContextVar("listener", default=lambda done, total: None)
_log = logging.getLogger("ss_pruning")

# What was expected counts as much as having seen this share of the work.
_TRUST = 0.05


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
    """Times the stages and reports progress; a stage within another does not count to it.

    What is told is milliseconds of expected work: how many are done, and how many there are; before anything is
    expected, none of one.

    Attributes:
        seconds: By stage, what it has taken.
        expected: By stage, what it is expected to take.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.perf_counter()
        #: By stage, how often it was gone through before, and the share that is done now.
        self._reached: dict[str, tuple[int, float]] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """The time that passes within belongs to this stage, and `step` tells how far it is."""
        self._turn()
        self._running.append(stage)
        self._tell(stage)
        try:
            with listening(self._step):
                yield
        finally:
            self._turn()
            self._running.pop()
            self._tell(self._running[-1] if self._running else stage)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """From now on tell how far all of this is."""
        self.expected = dict(seconds)
        _log.info("pruning takes %s", time_in_words(sum(seconds.values())))
        self._tell(self._running[-1])

    def _step(self, done: float, total: float) -> None:
        """Less than before means that the stage has to be gone through again."""
        stage, share = self._running[-1], min(done / total, 1.0) if total else 1.0
        rounds, before = self._reached.get(stage, (0, 0.0))
        self._reached[stage] = rounds + (share < before), share
        self._tell(stage)

    def over(self, but: str = "") -> None:
        """All stages are done, but this one."""
        reached = {stage: (self._reached.get(stage, (0, 0.0))[0], 1.0) for stage in self.expected}
        self._reached |= {stage: at for stage, at in reached.items() if stage != but}
        self._tell(next(reversed(self.seconds), ""))

    def steps(self, stage: str) -> Step:
        """For a stage that is over before anything is expected, and reports its own steps."""
        begin = time.perf_counter()

        def report(done: float, total: float) -> None:
            self.seconds[stage] = time.perf_counter() - begin
            self.progress(stage, int(done), int(total))

        return report

    def _tell(self, stage: str) -> None:
        done, total = 0.0, 0.0
        for name, seconds in self.expected.items():
            rounds, share = self._reached.get(name, (0, 0.0))
            done += seconds * (rounds + share)
            total += seconds * (rounds + 1)
        whole = max(int(1000 * total), 1)
        self.progress(stage, int(whole * done / total) if total else 0, whole)

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the stage that runs."""
        now = time.perf_counter()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def step(done: float, total: float) -> None:
    """Tell whoever listens, such as a clock, how far the work is."""
    _listener.get()(done, total)


@contextlib.contextmanager
def listening(told: Step) -> Iterator[None]:
    """Of the work within, `told` is called with how much is done, and how much there is."""
    token = _listener.set(told)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def part(begin: float, end: float) -> Iterator[None]:
    """Steps within lead from one share of the stage to another."""
    whole = _listener.get()

    def told(done: float, total: float) -> None:
        whole(begin + (end - begin) * (done / total if total else 1.0), 1.0)

    with listening(told):
        yield


def seconds_left(passed: float, done: float, total: float) -> float:
    """How long the rest will take, when `done` of `total` expected seconds of work took `passed`.

    What was expected and the speed that is seen both count, the speed for more the more is done.
    """
    trust = _TRUST * total
    pace = (passed + trust) / max(done + trust, 1e-9)
    return max(total - done, 0.0) * pace


def time_in_words(seconds: float) -> str:
    """A time as people say it.

    >>> time_in_words(3), time_in_words(47), time_in_words(100), time_in_words(250), time_in_words(9000)
    ('a few seconds', 'about 50 seconds', 'about 2 minutes', 'about 4 minutes', 'about 2.5 hours')
    """
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds, -1):.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
