"""NNI 3.0: synaptic strength as a pruner, and from any NNI pruner's masks to a smaller model. Needs the extra `nni`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

try:
    import nni  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "this needs NNI 3.0: pip install 'ss-pruning[nni]' (ss_pruning.integrations.nni.masks works without)",
        name="nni",
    ) from error
from nni.compression.base.compressor import Compressor
from nni.compression.base.setting import PruningSetting
from nni.compression.pruning import L1NormPruner
from nni.compression.utils import Evaluator
from schema import SchemaError
from torch import Tensor, nn

from ss_pruning.errors import InputError
from ss_pruning.graph.layers import groups_of
from ss_pruning.graph.refusals import check_finite
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import StatisticsSource, measure
from ss_pruning.integrations.nni.masks import bake, compact, speedup, symbolic_graph
from ss_pruning.integrations.nni.ranking import generate_masks
from ss_pruning.integrations.nni.scores import Score, Scores
from ss_pruning.integrations.nni.targets import check_targets
from ss_pruning.sparsity.penalty import strength_penalty

__all__ = ["SynapticStrengthPruner", "bake", "compact", "speedup", "symbolic_graph"]

Config = dict[str, Any]
_KEYS = (
    "op_types, op_names, op_names_re, exclude_op_types, exclude_op_names, exclude_op_names_re, target_names, "
    "target_settings, sparse_ratio, sparse_threshold (floats), max_sparse_ratio, min_sparse_ratio, global_group_id, "
    "dependency_group_id, internal_metric_block, granularity, apply_method, align"
)


class SynapticStrengthPruner(L1NormPruner):  # type: ignore[misc]
    """A pruner for NNI's `compress()`, schedules and config lists that ranks by synaptic strength.

    All config keys mean what they mean in NNI, but for three things. `granularity="default"` is the synapse,
    `[1, 1, -1, -1]`: one mask value a 2-D kernel. A named op type selects its subclasses too (timm's `Conv2dSame`,
    `BatchNormAct2d`). And `global_group_id` ranks by one exact order of all scores: the asked ratio to within one
    kernel and never more, `max_sparse_ratio` and `min_sparse_ratio` honoured for every layer, the same masks in
    every process, and no layer emptied unless its ratio is 1.

    Scores are "share", `s^2 / sum_c s^2` (comparable across layers), or "strength", `s = sqrt(v_c) ||W||`. Blocks add
    them up (strengths as their squares). The shares of all synapses of an output add up to 1, so a block of whole
    outputs is scored by the shares it has in what reads it. Norms that are pruned are scored by their scales.

    Args:
        model: The model to mask; NNI wraps it in place.
        config_list: As for any NNI pruner.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        evaluator: With one, `compress(max_steps, max_epochs)` trains with the strength penalty, then masks; `AGPPruner`
            and `LinearPruner` need one.
        statistics: Where variances come from: "batchnorm", "gaussian" or batches, see `ss_pruning.synaptic_strength`.
        score: "share" or "strength".
        penalty: What the sum of the configured layers' strengths is multiplied with in the loss.
        existed_wrappers: For `from_compressor`.

    Raises:
        InputError: The config has an unknown key or value, selects nothing, or names a layer or a target that NNI
            cannot mask; or the model is wrapped already.
        ModelError: The model does not run on the inputs, or holds NaN or Inf weights.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[Config],
        example_inputs: Any = None,
        evaluator: Evaluator | None = None,
        *,
        statistics: StatisticsSource = "batchnorm",
        score: Score = "share",
        penalty: float = 1e-4,
        existed_wrappers: Mapping[str, Any] | None = None,
    ) -> None:
        if example_inputs is None:
            raise InputError(
                "give example_inputs=, what the model's forward takes: who feeds whom is found by running it"
            )
        if score not in ("share", "strength"):
            raise InputError(f"score={score!r} is unknown; use 'share' or 'strength'")
        check_finite(model)
        self.connectivity = trace(model, example_inputs)
        self.example_inputs, self.statistics, self.score, self.penalty = (
            example_inputs,
            statistics,
            score,
            penalty,
        )
        config_list = _with_subclasses(model, config_list)
        super().__init__(model, config_list, evaluator, existed_wrappers)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        for table in (self._module_wrappers, self._target_spaces):  # NNI's order changes with the hash seed
            ordered = sorted(table.items(), key=lambda item: order.get(item[0], len(order)))
            table.clear()
            table.update(ordered)
        self._align_biases()

    def _align_biases(self) -> None:
        """NNI masks biases along the first axis of the weight, which in transposed convolutions is that of inputs.

        Where there are groups no axis is that of the outputs: the bias stays.
        """
        for path, spaces in self._target_spaces.items():
            module, bias = self.bound_model.get_submodule(path), spaces.get("bias")
            align = None if bias is None else bias.align
            if align and align["dims"] == [0] and getattr(module, "transposed", False):
                outputs = {**align, "dims": [1]} if groups_of(module) == 1 else None
                bias._setting = {**bias.setting, "align": outputs}

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[Config],
        *args: Any,
        evaluator: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Go on from another compressor's wrappers; further arguments as for the class."""
        make = Compressor.from_compressor.__func__
        return make(cls, compressor, new_config_list, *args, evaluator=evaluator, **kwargs)

    def _validate_config(self) -> None:
        """NNI's check of keys and values, and ours of what they select.

        Raises:
            InputError: It does not pass.
        """
        try:
            super()._validate_config()
        except SchemaError as error:
            raise InputError(f"NNI refuses the config: {error}. Its keys are {_KEYS}") from error
        check_targets(self.bound_model, self.config_list)

    def _set_default_sparse_granularity(self, target_space: Any) -> list[int] | str | None:
        shape = target_space.shape
        if target_space._target_name != "weight" or shape is None or len(shape) < 2:
            granularity: str | None = super()._set_default_sparse_granularity(target_space)
            return granularity
        return [1, 1, *(-1 for _ in shape[2:])]

    def _calculate_metrics(self, data: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        weights = {path: targets["weight"].detach() for path, targets in data.items() if "weight" in targets}
        with torch.no_grad():
            scores = Scores(self.bound_model, self.connectivity, weights, self._variances(), self.score)
            return {
                path: {
                    name: scores.of(path, target.detach(), self._target_spaces[path][name]._scaler)
                    for name, target in targets.items()
                }
                for path, targets in data.items()
            }

    def _variances(self) -> dict[str, Tensor]:
        """By layer, `[in_channels]`: the variance of what arrives."""
        model, connectivity, paths = self.bound_model, self.connectivity, self.connectivity.weighted
        statistics = measure(model, connectivity, self.statistics, self.example_inputs, paths)
        return {path: found.variance for path, found in statistics.items()}

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return generate_masks(metrics, self._target_spaces)

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is None and max_epochs is None:
            self.update_masks(self.generate_masks())
        elif self.evaluator is None:
            raise InputError(
                "to train with the penalty give the pruner an evaluator=; without one, call compress()"
            )
        else:
            self._fusion_compress(max_steps, max_epochs)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        super()._fuse_preprocess(evaluator)
        if self.penalty:
            paths = [path for path in self.connectivity.weighted if path in self._target_spaces]
            evaluator.patch_loss(
                lambda loss, batch: (
                    loss
                    + self.penalty * strength_penalty(self.bound_model, self.connectivity, paths).to(loss)
                )
            )

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        super()._fuse_postprocess(evaluator)
        if self.interval_steps < 0:  # no schedule has made masks on the way
            self.update_masks(self.generate_masks())


def _with_subclasses(model: nn.Module, config_list: list[Config]) -> list[Config]:
    """The config with the subclasses of its op types named too; NNI is told how to mask them, as their base."""
    bases: dict[str, set[str]] = {}
    for module in model.modules():
        names = [base.__name__ for base in type(module).__mro__]
        bases[names[0]] = set(names)
        known = next((name for name in names if name in PruningSetting.registry), None)
        if known is not None and names[0] != known:
            PruningSetting.register(names[0], PruningSetting.registry[known])
    config_list = copy.deepcopy(config_list)
    for config in config_list:
        for key in ("op_types", "exclude_op_types"):
            if isinstance(config, dict) and isinstance(config.get(key), list):
                asked = config[key]
                more = sorted(
                    name for name, names in bases.items() if name not in asked and names & set(asked)
                )
                config[key] = asked + more
    return config_list
