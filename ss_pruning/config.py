"""What a call can be asked for, as frozen dataclasses, and the one place where each default is chosen.

Imports nothing heavy. The defaults were chosen on training images, see docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

from ss_pruning.errors import InputError

Method = Literal["none", "mean", "linear", "reconstruct"]
Scope = Literal["global", "local", "sensitivity"]
HeadsChoice = Literal["whole", "narrow"]
Score = Literal["share", "strength", "entropy", "relevance"]
Statistics = Literal["batchnorm", "gaussian", "data"]

#: The word for calibration images that are made from the model.
SYNTHETIC = "synthetic"
#: Fewer images than this say too little: of sensitivities, and less than noise does of means and variances.
LEAST_IMAGES = 8
#: By scope, the power of costs that scores are divided by.
COST_EXPONENT: Mapping[Scope, float] = {"global": 0.5, "local": 0.5, "sensitivity": 1.0}
#: The same where layers compete by relevance: it estimates sensitivity, not as well as measuring.
RELEVANCE_EXPONENT = 0.75


def is_number(value: Any) -> bool:
    """Of Python, NumPy or fractions."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """A whole number that arrays can be measured by."""
    return is_number(value) and isinstance(value, Integral) and 1 <= int(value) < 2**31


def as_pythons_own(config: Any) -> None:
    """Numbers of other libraries become Python's: reports and checkpoints hold them as JSON."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_number(value):
            made = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(config, field.name, made)  # frozen


def check_seed(seed: Any) -> None:
    """Refuse what random numbers cannot be drawn from.

    Raises:
        InputError: It is no such number.
    """
    if not (is_number(seed) and isinstance(seed, Integral) and 0 <= int(seed) < 2**32):
        raise InputError(f"seed={seed!r} must be a whole number in [0, 2**32)")


def _check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name}={value!r} is unknown; use {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class Budget:
    """What to reach.

    Attributes:
        kind: "macs", "params" or "latency" to keep, or "ratio" of channels to remove.
        value: As a share of the dense model's, in (0, 1).
    """

    kind: Literal["macs", "params", "latency", "ratio"]
    value: float

    @staticmethod
    def of(**choices: float | None) -> Budget:
        """Make one from keyword arguments, named like its kinds, of which exactly one is given.

        Raises:
            InputError: None or several are given, or a value outside (0, 1).
        """
        given = [(kind, value) for kind, value in choices.items() if value is not None]
        if len(given) != 1:
            raise InputError(
                "give exactly one of macs=, params=, latency= (shares to keep) and ratio= (share to remove)"
            )
        kind, value = given[0]
        if not is_number(value) or not 0 < value < 1:
            raise InputError(
                f"{kind}={value!r} must be a number strictly between 0 and 1; for example {kind}=0.5"
            )
        return Budget(kind, float(value))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Allocation:
    """How a budget is spread over the layers.

    Attributes:
        scope: How layers compete. "global" ranks all channels by their scores, "local" shrinks every layer by the same
            share, "sensitivity" ranks all channels by what their removal was seen to do to the output on the
            calibration inputs, in the order of the scores within a layer, see `ss_pruning.importance.sensitivity`. By
            default, with 8 calibration inputs or more, "sensitivity" and "global" compete: that is taken whose cut is
            seen to lose less (with `Reconstruct`, "sensitivity" is taken); with fewer, or none, "global".
        max_ratio: No layer loses a larger share of its channels than this.
        round_to: Remaining widths are multiples of this; with "measured", each of a multiple that its layers' times on
            this machine ask for.
        cost_exponent: Before channels of different layers are compared, their scores are divided by what they cost (in
            the budget's unit) to this power: with 0 a channel that saves much must be as unimportant as one that saves
            little, with 1 importance per cost decides. By default 1, 0.75 and 0.5 compete for the sensitivity scope
            (with `Reconstruct` it is 1); 0.75 where relevance counts in the global scope; 0.5 for other scores. Means
            nothing to `ratio` and to the local scope.
        latency_inputs: What times are measured on, in the batch size that counts; the example inputs by default.
        budget_time: Seconds that pruning may take, by what is expected before it starts. What does not fit is traded:
            sensitivity is measured with less work, then on fewer calibration inputs, at last not at all, unless it was
            asked for; the report says so.
        heads: What goes of attention: "whole" heads, or dimensions of all of them, so that they become "narrow", where
            that is right. By default "narrow" in the sensitivity scope, which measures what they are worth, else
            "whole".

    Raises:
        InputError: A value is unknown or out of range.
    """

    scope: Scope | None = None
    max_ratio: float = 0.9
    round_to: int | Literal["measured"] | None = None
    cost_exponent: float | None = None
    latency_inputs: Any = None
    budget_time: float | None = None
    heads: HeadsChoice | None = None

    def __post_init__(self) -> None:
        if self.scope is not None:
            _check_one_of("scope", self.scope, get_args(Scope))
        if self.heads is not None:
            _check_one_of("heads", self.heads, get_args(HeadsChoice))
        if not is_number(self.max_ratio) or not 0 < self.max_ratio <= 1:
            raise InputError(f"max_ratio={self.max_ratio!r} must be a number in (0, 1]")
        exponent, multiple = self.cost_exponent, self.round_to
        if exponent is not None and not (is_number(exponent) and 0 <= exponent <= 10):
            raise InputError(
                f"cost_exponent={exponent!r} must be a number in [0, 10]; 1 is importance per cost, 0 ignores it"
            )
        seconds = self.budget_time
        if seconds is not None and not (is_number(seconds) and seconds > 0):
            raise InputError(f"budget_time={seconds!r} must be a positive number of seconds, such as 300")
        measured = isinstance(multiple, str) and multiple == "measured"
        if not (multiple is None or measured or is_count(multiple)):
            raise InputError(
                f"round_to={multiple!r} must be a positive whole number, such as 8, or 'measured'"
            )
        as_pythons_own(self)

    @classmethod
    def of(cls, choice: Allocation | str | None) -> Allocation:
        """One from its short form: a scope alone.

        Raises:
            InputError: It is neither.
        """
        if isinstance(choice, str):
            _check_one_of("allocation", choice, get_args(Scope))
        if choice is None or isinstance(choice, str):
            return cls(scope=choice)  # type: ignore[arg-type]
        if not isinstance(choice, cls):
            raise InputError(
                f"allocation={choice!r:.80} is none; give Allocation(...), or a scope such as 'local'"
            )
        return choice


@dataclass(frozen=True)
class Compensation:
    """How what removed channels carried is moved onto the channels that stay.

    Attributes:
        recalibrate: At the end, move mean and variance of the batch norms behind the cut as far as what reaches them
            has moved, on the calibration inputs or, without any, on noise, see `ss_pruning.compensation.batchnorm`.
        method: Its short form.
        solves: It solves the weights that stay anew, from calibration inputs.
    """

    recalibrate: bool = False
    method: ClassVar[Method] = "none"
    solves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.recalibrate, bool):
            raise InputError(f"recalibrate={self.recalibrate!r} is neither True nor False")

    @staticmethod
    def of(choice: Compensation | str) -> Compensation:
        """One from its short form.

        Raises:
            InputError: It is unknown.
        """
        if isinstance(choice, Compensation):
            return choice
        _check_one_of("compensation", choice, tuple(COMPENSATIONS))
        return COMPENSATIONS[choice]()

    def check(self, calibration: Any) -> None:
        """Refuse, before any work, calibration inputs that it cannot do with.

        Raises:
            InputError: An unknown word, or it lacks calibration inputs.
        """
        if isinstance(calibration, str) and calibration != SYNTHETIC:
            raise InputError(
                f"calibration={calibration!r} is unknown; give inputs, or {SYNTHETIC!r} to make some"
            )
        if self.solves and calibration is None:
            raise InputError(
                f"compensation={self.method!r} needs calibration=, a few hundred unlabelled inputs: a tensor or a "
                f"data loader. Without any, calibration={SYNTHETIC!r} makes some, and compensation='mean' does without"
            )


@dataclass(frozen=True)
class NoCompensation(Compensation):
    """Nothing is repaired: the pruned model equals the masked one, but for batch norms with `recalibrate=True`."""


@dataclass(frozen=True)
class FoldMean(Compensation):
    """The means of removed channels are added to biases; without calibration inputs, the means that batch norms know.

    See `ss_pruning.compensation.folding`.
    """

    recalibrate: bool = True
    method: ClassVar[Method] = "mean"


@dataclass(frozen=True)
class FoldLinear(Compensation):
    """Removed channels are predicted from those that stay, by linear regression; needs calibration inputs.

    See `ss_pruning.compensation.folding`.
    """

    recalibrate: bool = True
    method: ClassVar[Method] = "linear"
    solves: ClassVar[bool] = True


@dataclass(frozen=True)
class Reconstruct(Compensation):
    """The weights of every layer are fitted anew, front to back, to the dense layer's output; needs calibration inputs.

    They are fitted to the batch norms as they are, so that recalibrating these afterwards would add an error. See
    `ss_pruning.compensation.reconstruction`.
    """

    method: ClassVar[Method] = "reconstruct"
    solves: ClassVar[bool] = True


#: By short form; `ss_pruning.register_compensation` adds to it.
COMPENSATIONS: dict[str, type[Compensation]] = {
    kind.method: kind for kind in (NoCompensation, FoldMean, FoldLinear, Reconstruct)
}
METHODS: tuple[Method, ...] = get_args(Method)
#: Those that solve the weights that stay anew, from calibration inputs.
SOLVED: tuple[Method, ...] = tuple(kind.method for kind in COMPENSATIONS.values() if kind.solves)
#: Those that put what is constant of removed channels into biases.
FOLDED: tuple[Method, ...] = ("mean", "linear")


@dataclass(frozen=True)
class SyntheticImages:
    """Calibration images made from the model's batch norms, see `ss_pruning.compensation.synthetic_data`.

    Attributes:
        images: How many, half of them mirror images of the others; by default 256, fewer if they are large.
        steps: Of Adam, for each batch of 64 images.
        seed: Of the noise to start from.

    Raises:
        InputError: A value is out of range.
    """

    images: int | None = None
    steps: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.images is None or is_count(self.images)) or not is_count(self.steps):
            raise InputError(
                f"images={self.images!r} and steps={self.steps!r} must be positive whole numbers"
            )
        check_seed(self.seed)
        as_pythons_own(self)


@dataclass(frozen=True)
class Synaptic:
    """Synaptic strength as the importance. What is None is chosen to suit the compensation and the scope.

    Attributes:
        statistics: Where variances come from: "batchnorm", "gaussian" or "data"; by default the calibration inputs
            ("data") if there are any, else the model run on its own noise ("gaussian").
        score: What of the strengths counts: "share", "strength", "entropy" or "relevance"; by default "relevance" where
            layers compete and nothing is solved anew, else "share".
        conditional: How far a channel counts less for what stronger ones predict of it: scores are multiplied by
            `1 - R^2` to this power, in [0, 1]. By default 1 where weights are solved anew in the sensitivity scope, 0.5
            where they are in the other scopes, else 0.

    Raises:
        InputError: A value is unknown or out of range.
    """

    statistics: Statistics | None = None
    score: Score | None = None
    conditional: float | None = None

    def __post_init__(self) -> None:
        if self.statistics is not None:
            _check_one_of("statistics", self.statistics, get_args(Statistics))
        if self.score is not None:
            _check_one_of("score", self.score, get_args(Score))
        if self.conditional is not None and not (is_number(self.conditional) and 0 <= self.conditional <= 1):
            raise InputError(f"conditional={self.conditional!r} must be a number in [0, 1]")
        as_pythons_own(self)

    def resolve(self, scope: Scope, compensation: Compensation, images: int) -> Synaptic:
        """With nothing left open; `images` is the number of calibration inputs."""
        statistics = self.statistics or ("data" if images else "gaussian")
        score: Score = "relevance" if scope != "local" and not compensation.solves else "share"
        solved = compensation.solves and statistics == "data"
        conditional = (1.0 if scope == "sensitivity" else 0.5) if solved else 0.0
        return Synaptic(
            statistics, self.score or score, conditional if self.conditional is None else self.conditional
        )


@dataclass(frozen=True)
class Config:
    """All that decides a plan; the importance is `Synaptic`, or one of any kind."""

    budget: Budget
    allocation: Allocation = Allocation()
    compensation: Compensation = NoCompensation()
    importance: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.importance, type):
            kind = self.importance.__name__
            raise InputError(f"importance is the class {kind}; give one that was made, {kind}()")
        known = self.importance is None or isinstance(self.importance, Synaptic)
        if not (known or hasattr(self.importance, "scorer") or callable(self.importance)):
            raise InputError(
                f"importance={self.importance!r:.80} is none; give a name, Synaptic(...) or an importance of "
                "Torch-Pruning"
            )

    def uses(self, images: int) -> bool:
        """Whether so many calibration inputs are used where the model's own noise would do: of few it tells more."""
        data = isinstance(self.importance, Synaptic) and self.importance.statistics == "data"
        noise_does = self.compensation.method in (NoCompensation.method, FoldMean.method)
        return images >= LEAST_IMAGES or data or not noise_does or self.allocation.scope == "sensitivity"

    def resolve(self, images: int) -> Config:
        """The effective settings: nothing is left to a default; `images` is the number of calibration inputs."""
        scope: Scope = self.allocation.scope or ("sensitivity" if images >= LEAST_IMAGES else "global")
        importance = Synaptic() if self.importance is None else self.importance
        if isinstance(importance, Synaptic):
            importance = importance.resolve(scope, self.compensation, images)
        exponent = self.allocation.cost_exponent
        if exponent is None:
            # Relevances compare from layer to layer: nothing is lost on the way.
            by_relevance = scope == "global" and getattr(importance, "score", None) == "relevance"
            exponent = RELEVANCE_EXPONENT if by_relevance else COST_EXPONENT[scope]
        heads = self.allocation.heads or ("narrow" if scope == "sensitivity" else "whole")
        allocation = replace(self.allocation, scope=scope, cost_exponent=exponent, heads=heads)
        return replace(self, allocation=allocation, importance=importance)

    def settings(self) -> dict[str, Any]:
        """By name, what a report stores."""
        allocation = {f.name: getattr(self.allocation, f.name) for f in fields(Allocation)}
        allocation["latency_inputs"] = None if self.allocation.latency_inputs is None else "given"
        importance: dict[str, Any] = {"importance": type(self.importance).__name__}
        if isinstance(self.importance, Synaptic):
            importance = {"importance": "SynapticImportance"}
            importance |= {f.name: getattr(self.importance, f.name) for f in fields(Synaptic)}
        return {
            self.budget.kind: self.budget.value,
            **importance,
            **{name: value for name, value in allocation.items() if value is not None or name == "round_to"},
            "compensation": self.compensation.method,
            "recalibrate": self.compensation.recalibrate,
        }
