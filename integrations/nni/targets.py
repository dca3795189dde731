"""What a config has NNI mask, checked before it wraps anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import PruningSetting
from torch import nn

from ss_pruning.errors import InputError

Setting = dict[str, Any]


def check_targets(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> None:
    """Refuse entries that select nothing, and targets for which NNI can make no mask.

    Raises:
        InputError: Names them.
    """
    settings: dict[str, dict[str, Setting]] = {}
    for config in config_list:
        modules, public = _selected(model, config)
        for path, module in modules.items():
            settings.setdefault(path, {}).update(_targets(path, module, public))
    for path, targets in settings.items():
        for name, setting in targets.items():
            if getattr(model.get_submodule(path), name, None) is not None and not _is_ranked(setting):
                _check_aligned(path, name, setting.get("align"), settings)


def _selected(model: nn.Module, config: Mapping[str, Any]) -> tuple[dict[str, nn.Module], Setting]:
    """Modules by path, in the model's order, and the part of the config that is said of all of them."""
    try:
        modules, public, _ = select_modules_by_config(model, config)
    except KeyError as error:
        raise InputError(f"the config names {error}, which is no module of the model") from error
    if not modules:
        raise InputError(f"the config {config} selects no module; see dict(model.named_modules())")
    unknown = {type(m).__name__ for m in modules.values()} - set(PruningSetting.registry)
    if unknown:
        raise InputError(
            f"NNI knows no layer of type {', '.join(sorted(unknown))} to mask; leave it out, or describe it "
            "with nni.compression.base.setting.PruningSetting.register"
        )
    return {path: module for path, module in model.named_modules() if path in modules}, public


def _targets(path: str, module: nn.Module, config: Setting) -> dict[str, Setting]:
    """NNI's settings of what it is to mask of a module."""
    try:
        found: dict[str, Setting] = PruningSetting.get(module, config)
    except KeyError as error:
        known = ", ".join(map(repr, PruningSetting.registry[type(module).__name__]))
        raise InputError(
            f"target_names names {error}, which NNI does not mask of '{path}'; take of {known}"
        ) from error
    return found


def _is_ranked(setting: Mapping[str, Any]) -> bool:
    """It has a mask of its own."""
    return setting.get("sparse_ratio") is not None or setting.get("sparse_threshold") is not None


def _check_aligned(
    path: str, name: str, align: Mapping[str, Any] | None, settings: Mapping[str, Mapping[str, Setting]]
) -> None:
    """Refuse a target whose mask is to be that of another, which has none."""
    if not align:
        return
    home, source = align["module_name"] or path, align["target_name"]
    if not _is_ranked(settings.get(home, {}).get(source, {})):
        raise InputError(
            f"NNI masks the {name} of '{path}' where the {source} of '{home}' is masked, which the config does not "
            f"do: name {source!r} in target_names and give it a sparse_ratio, or leave {name!r} out"
        )
