"""A clock of stages, run on a fake one: what it tells, what it expects, and when the rest is over."""

from __future__ import annotations

import pytest

from ss_pruning._utils import progress
from ss_pruning._utils.progress import Clock, part, seconds_left, step


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    at = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: at[0])
    return at


def test_a_stage_within_another_does_not_count_to_it(now: list[float]) -> None:
    clock = Clock(lambda *_: None)
    with clock("plan"):
        now[0] = 1.0
        with clock("score"):
            now[0] = 4.0
        now[0] = 4.5
    assert clock.seconds == {"plan": 1.5, "score": 3.0}


def test_what_is_told_is_expected_work(now: list[float]) -> None:
    told: list[tuple[str, int, int]] = []
    clock = Clock(lambda *at: told.append(at))
    with clock("trace"):
        pass
    assert told[-1] == ("trace", 0, 1)  # nothing is expected yet
    with clock("estimate"):
        clock.expect({"score": 2.0, "measure": 3.0, "cut": 5.0})
    with clock("plan"), clock("score"):
        step(1, 4)
        assert told[-1] == ("score", 500, 10_000)
        step(4, 4)
    with clock("plan"), clock("measure"):
        step(1, 3)
        assert told[-1] == ("measure", 3000, 10_000)
    clock.over(but="cut")
    assert told[-1][1:] == (5000, 10_000)
    with clock("cut"):
        with part(0.0, 0.5):
            step(1, 2)
            assert told[-1] == ("cut", 6250, 10_000)
        with part(0.5, 1.0):
            step(1, 2)
            assert told[-1] == ("cut", 8750, 10_000)
    clock.over()
    assert told[-1] == ("cut", 10_000, 10_000)


def test_what_has_to_be_done_again_is_more_work() -> None:
    told: list[tuple[str, int, int]] = []
    clock = Clock(lambda *at: told.append(at))
    with clock("measure"):
        clock.expect({"measure": 4.0, "cut": 4.0})
        for done in (1, 2, 1):  # half way it turns out that a group cannot be cut
            step(done, 2)
        assert told[-1] == ("measure", 6000, 12_000)
    clock.over()
    assert told[-1][1:] == (12_000, 12_000)


def test_steps_are_told_to_nobody_without_a_clock() -> None:
    step(1, 2)
    with pytest.raises(ZeroDivisionError), Clock(lambda *_: None)("score"):
        raise ZeroDivisionError
    step(1, 2)  # the clock has stopped to listen


@pytest.mark.parametrize("slower", [0.4, 1.0, 4.0])
@pytest.mark.parametrize("wrong", [0.6, 1.0, 1.6])
def test_after_a_tenth_the_rest_is_known_within_a_factor_of_two(
    now: list[float], slower: float, wrong: float
) -> None:
    """The machine is slower than it seemed, or faster, and one stage was misjudged."""
    expected = {"score": 10.0, "measure": 20.0, "cut": 30.0}
    true = {"score": 10.0 * slower, "measure": 20.0 * slower * wrong, "cut": 30.0 * slower}
    whole, guesses = sum(true.values()), list[float]()

    def told(stage: str, done: int, total: int) -> None:
        if now[0] >= whole / 10:
            left = seconds_left(now[0], done / 1000, total / 1000)
            guesses.append((left + 1e-6) / (whole - now[0] + 1e-6))

    clock = Clock(told)
    with clock("estimate"):
        clock.expect(expected)
    for stage, seconds in true.items():
        with clock(stage):
            for number in range(20):
                now[0] += seconds / 20
                step(number + 1, 20)
    assert min(guesses[:-1]) >= 0.5
    assert max(guesses[:-1]) <= 2.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "a few seconds"), (44, "about 40 seconds"), (80, "about 80 seconds"), (240, "about 4 minutes"),
     (6000, "about 1.7 hours")],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert progress.time_in_words(seconds) == words
