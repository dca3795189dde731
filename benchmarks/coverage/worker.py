"""One model of the coverage run: built, pruned by one of the two sides, and checked from outside.

The checks know neither side's internals: they take which input channels of which consumers went, zero those columns
in a dense float64 copy, and compare outputs. Torch-Pruning's are read off the groups that it prunes.
"""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning import prune_
from ss_pruning.config import Allocation
from ss_pruning.errors import SSPruningError
from ss_pruning.integrations.torch_pruning import importance as _imported_before_the_fork  # noqa: F401

try:
    import timm  # before the fork, too
except ModuleNotFoundError:  # who makes pages needs no models
    timm = None

RATIO, MAX_RATIO, CLASSES = 0.5, 0.9, 1000
SIZES = (64, 96, 128)
TOLERANCE = 1e-10
SIDES = ("ours", "tp")
Removed = dict[str, set[int]]


class OutOfTimeError(BaseException):
    """Raised by the timer; no `except Exception` on the way may swallow it."""


@dataclass
class Stages:
    """CPU seconds by stage."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.process_time() - started

    def progress(self, stage: str, done: int, total: int) -> None:
        """What `prune_` calls when a stage begins and when it ends."""
        now = time.process_time()
        if hasattr(self, "_stage"):
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now


def build(spec: str) -> nn.Module:
    """The model with fixed random weights, in eval mode; constant tensors get noise, so that every branch counts."""
    library, name = spec.split(":")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(name)
    else:
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    return stirred(model)


def stirred(model: nn.Module) -> nn.Module:
    """The model in eval mode; constant tensors get noise."""
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            tensor.data.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def example_for(model: nn.Module) -> Tensor:
    """The smallest square image of a few that the model takes, else its default size."""
    shape = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    generator = torch.Generator().manual_seed(2)
    for side in (*(s for s in SIZES if s < shape[1]), shape[1]):
        x = torch.randn(1, shape[0], side, side, generator=generator)
        try:
            with torch.no_grad():
                model(x)
            return x
        except Exception:  # any refusal: the next size
            continue
    raise RuntimeError("the dense model runs at none of the sizes tried")


def tensors(value: object) -> list[Tensor]:
    """The floating-point tensors of a nested output, depth first."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------
# The two sides: each prunes in place and returns which input channels of which consumers went


def prune_ours(model: nn.Module, x: Tensor, stages: Stages) -> tuple[Removed, dict[str, Any]]:
    report = prune_(
        model,
        x,
        ratio=RATIO,
        allocation=Allocation(scope="local", max_ratio=MAX_RATIO),
        progress=stages.progress,
    )
    removed = {c.path: set(c.removed) for c in model.ss_pruning_plan.cuts if c.side == "in"}
    whole: dict[str, int] = defaultdict(int)
    for left in report.excluded:
        whole[left.reason.partition(":")[0]] += left.channels
    outputs = sum(layer.outputs_before for layer in report.layers if layer.kind)
    details = [
        {
            "paths": list(left.paths[:3]),
            "layers": len(left.paths),
            "channels": left.channels,
            "reason": left.reason,
        }
        for left in report.excluded
    ]
    return removed, {
        "max_error": report.max_error,
        "outputs": outputs,
        "excluded": dict(whole),
        "left_whole_details": details,
    }


def prune_tp(
    model: nn.Module, x: Tensor, stages: Stages, whole: Collection[str] = ()
) -> tuple[Removed, dict[str, Any]]:
    names = {module: path for path, module in model.named_modules()}
    depthwise = {m for m in names if isinstance(m, _ConvNd) and m.groups == m.in_channels > 1}
    magnitude = tp.importance.GroupMagnitudeImportance()

    def importance(group: Any) -> Tensor:
        with stages("score"):
            return magnitude(group)

    with stages("build"):
        pruner = tp.pruner.BasePruner(
            model,
            x,
            importance=importance,
            pruning_ratio=RATIO,
            global_pruning=False,
            max_pruning_ratio=MAX_RATIO,
            pruning_ratio_dict={},
            ignored_layers=[m for m, path in names.items() if _is_classifier(m) or path in whole],
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            customized_pruners={},
            channel_groups={},
        )
    left: dict[str, list[int]] = {}

    def reads(dep: Any) -> bool:
        """Whether this step of a group removes what a consumer reads."""
        module = dep.target.module
        if not isinstance(module, (_ConvNd, nn.Linear)) or module in depthwise:
            return False
        return dep.handler == pruner.DG.get_pruner_of_module(module).prune_in_channels

    with stages("cut"):
        for group in pruner.step(interactive=True):
            for dep, indices in group:
                if reads(dep):
                    module = dep.target.module
                    _note(left, names[module], module, tp._helpers.to_plain_idxs(indices))
            group.prune()
    stages.seconds["cut"] -= stages.seconds["score"]
    return {path: set(range(kept[-1])) - set(kept[:-1]) for path, kept in left.items()}, {}


def _note(left: dict[str, list[int]], path: str, module: nn.Module, indices: list[int]) -> None:
    """Keep, by consumer, the original numbers of the input channels that stay; last, how many there were."""
    channels = left.setdefault(path, [*range(_inputs(module)), _inputs(module)])
    gone = set(indices)
    left[path] = [c for i, c in enumerate(channels[:-1]) if i not in gone] + channels[-1:]


def _inputs(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _is_classifier(module: nn.Module) -> bool:
    outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
    return isinstance(module, (nn.Linear, _ConvNd)) and outputs == CLASSES


# ----------------------------------------------------------------------------------------------------------
# Checks


def masked(dense: nn.Module, removed: Removed) -> nn.Module:
    """A float64 copy of the dense model in which the removed inputs of every consumer carry nothing."""
    twin = copy.deepcopy(dense).double()
    with torch.no_grad():
        for path, channels in removed.items():
            layer = twin.get_submodule(path)
            gone = torch.zeros(_inputs(layer), dtype=torch.bool)
            gone[sorted(channels)] = True
            groups = getattr(layer, "groups", 1)
            if getattr(layer, "transposed", False):
                layer.weight[gone] = 0
            else:
                rows = gone.reshape(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
                layer.weight[rows] = 0
    return twin


def masked_error(dense: nn.Module, cut: nn.Module, removed: Removed, x: Tensor) -> float:
    """Largest difference between cut and masked outputs, relative to the largest output, in float64."""
    with torch.no_grad():
        expected = tensors(masked(dense, removed)(x.double()))
        found = tensors(copy.deepcopy(cut).double()(x.double()))
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))


def mixers(model: nn.Module) -> list[str]:
    """Kinds of layers that mix channels: to them, zeroed channels are not the same as absent ones."""
    return sorted({type(module).__name__ for module in model.modules() if _mixes(module)})


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):  # slides along channels, or standardises its kernel over what it reads
        along = isinstance(module, nn.Conv1d) and module.in_channels == module.out_channels == 1
        return along or "Std" in type(module).__name__
    each = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.Identity)
    leaf = not list(module.children()) and not isinstance(module, each)
    return leaf and any(word in type(module).__name__ for word in ("Norm", "GlobalResponse"))


def trains(model: nn.Module, x: Tensor) -> str:
    """Empty if a forward pass in train mode, a backward pass and a step work; else the error."""
    try:
        model.train()
        x = torch.cat([x, x.flip(-1)])
        loss = sum(t.square().mean() for t in tensors(model(x)))
        loss.backward()
        graded = [p for p in model.parameters() if p.grad is not None]
        torch.optim.SGD(graded, 1e-3).step()
        return "" if graded else "no gradient"
    except Exception as error:
        return _said(error)
    finally:
        model.eval()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def known(spec: str) -> tuple[nn.Module, Tensor]:
    """A model of timm or torchvision, and an image for it."""
    model = build(spec)
    return model, example_for(model)


def examine(
    made: Callable[[], tuple[nn.Module, Tensor]], side: str, timeout: float, whole: Collection[str] = ()
) -> dict[str, Any]:
    """Everything about one model and one side, as one line of results.

    Args:
        made: Builds the model, and an input for it.
        side: One of `SIDES`.
        timeout: CPU seconds.
        whole: Layers that Torch-Pruning must be told to exclude, besides classifiers of 1,000 classes.
    """
    warnings.simplefilter("ignore")
    dense, x = made()
    model, stages = copy.deepcopy(dense), Stages()
    result: dict[str, Any] = {"pixels": x.shape[-1], "params_before": params(dense)}
    started = time.process_time()
    try:
        with limited(timeout):
            prune = prune_ours if side == "ours" else partial(prune_tp, whole=whole)
            removed, facts = prune(model, x, stages)
    except OutOfTimeError:
        result.update(status="timeout", error=f"more than {timeout:g} s of CPU time in {_stage(stages)}")
    except SSPruningError as error:
        result.update(status="refused", error=_said(error))
    except Exception as error:
        result.update(status="error", error=_said(error), stage=_stage(stages))
    else:
        result.update(facts)
        result["seconds"] = time.process_time() - started
        result.update(_checked(dense, model, removed, x))
    result.setdefault("seconds", time.process_time() - started)
    return {**result, "stages": {k: round(v, 3) for k, v in stages.seconds.items()}}


def _stage(stages: Stages) -> str:
    return getattr(stages, "_stage", None) or ("cut" if "build" in stages.seconds else "build")


def _checked(dense: nn.Module, model: nn.Module, removed: Removed, x: Tensor) -> dict[str, Any]:
    """Status and figures of a pruned model."""
    facts: dict[str, Any] = {"params_after": params(model), "removed": 1 - params(model) / params(dense)}
    try:
        with torch.no_grad():
            model(x)
    except Exception as error:
        return {**facts, "status": "broken", "error": _said(error)}
    facts["mixers"] = mixers(dense)
    try:
        facts["masked_error"] = masked_error(dense, model, removed, x)
    except Exception as error:
        facts["masked_note"] = _said(error)
    wrong = not facts.get("masked_error", 0.0) <= TOLERANCE and not facts["mixers"]
    error = trains(model, x)
    if error and not trains(copy.deepcopy(dense), x):
        facts.update(status="broken", error=f"in training: {error}")
    elif facts["params_after"] == params(dense):
        facts.update(status="nothing", error="no parameter was removed")
    elif wrong:
        facts.update(
            status="wrong", error=f"differs from the masked model by {facts.get('masked_error', 0):.1e}"
        )
    else:
        facts["status"] = "ok"
    facts["trains"] = not error
    return facts


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` after so much CPU time."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
