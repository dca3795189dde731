"""Weights from a file into a model: tensors only, and all of them or none.

safetensors is imported when called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ss_pruning._utils.files import nearby
from ss_pruning._utils.modules import as_state_of
from ss_pruning.errors import InputError

# Averaged weights first: they are the better ones.
_NESTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "state_dict", "model")
TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")


def load_weights(model: nn.Module, path: str | Path, *, by_order: bool = False) -> None:
    """Load a file of weights, see `read_weights`, into `model`; everything must fit, or nothing is changed.

    `by_order` matches by order and shape, not by name: for files of the same architecture with other names.

    Raises:
        InputError: keys or shapes differ; the first few are named.
    """
    found = read_weights(path)
    wanted = model.state_dict()
    if by_order:
        found = _renamed_by_order(found, wanted, path)
    else:
        found = _of_the_model(found, wanted, path)
    _check_fit(found, wanted, path)
    # Not strict for the counters that _check_fit allows to lack.
    model.load_state_dict(as_state_of(model, found), strict=False)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name from safetensors, or what `torch.save` has written, running no code from the file.

    Nested checkpoints are opened: `state_dict`, `model`, or the only entry that holds tensors by name, whatever it is
    called. Averaged weights (`ema`, `model_ema`, `state_dict_ema`) are preferred.

    Raises:
        InputError: the file is missing, damaged, of another kind, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder: name the weights file in it.")
    if not path.is_file():
        raise InputError(f"no weights file at {str(path)!r}. {nearby(path)}".rstrip())
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise InputError(
            f"{str(path)!r} has no suffix of a weights file; understood are .safetensors and "
            f"{', '.join(TORCH_SUFFIXES)}."
        )
    if not path.stat().st_size:
        raise InputError(f"{str(path)!r} is empty: was it copied or downloaded to its end?")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _tensors_in(_read_torch(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{str(path)!r} is damaged or no safetensors file: {error}.") from error


def _read_torch(path: Path) -> object:
    import pickle
    from argparse import Namespace

    try:
        # Training scripts keep their options; they are plain.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{str(path)!r} holds more than tensors, or is damaged. Loading the rest would run code from the "
            "file, which is refused. If you trust its source, save the tensors alone: "
            "torch.save(model.state_dict(), 'weights.pth')."
        ) from error
    except Exception as error:  # of bytes that are no pickle it may raise anything
        what = ", ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(f"{str(path)!r} is damaged or was not written by torch.save: {what}") from error


def _tensors_in(value: object, path: Path, depth: int = 0) -> dict[str, Tensor]:
    """Open nests until there is a dict from names to tensors."""
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise InputError(f"{str(path)!r} holds a {kind}, not tensors by name. Save model.state_dict().")
    for key in _NESTS:
        if depth < 3 and isinstance(value.get(key), Mapping):
            return _tensors_in(value[key], path, depth + 1)
    tensors = {str(key): entry for key, entry in value.items() if isinstance(entry, Tensor)}
    inside = [key for key, entry in value.items() if _holds_tensors(entry) and len(entry) > len(tensors)]
    if len(inside) > 1:
        raise InputError(
            f"{str(path)!r} holds tensors by name in {_some([repr(key) for key in inside])}: save those of the model "
            "alone."
        )
    if inside:
        return _tensors_in(value[inside[0]], path, depth + 1)
    if not tensors:
        listed = ", ".join(repr(key) for key in list(value)[:6]) or "nothing"
        raise InputError(f"no tensors by name in {str(path)!r}; it holds {listed}. Save model.state_dict().")
    return tensors


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(x, Tensor) for x in value.values())


def _of_the_model(
    found: dict[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Tensors by the model's own names: modules around it put something before them, and others may lie beside it."""
    bare = _without_prefix(found, wanted)
    if bare.keys() & wanted.keys():
        return bare
    fitting = [part for part in _parts(found, wanted).items() if _names(part[1]) == _names(wanted)]
    if len(fitting) > 1:
        raise InputError(
            f"{str(path)!r} holds the model's tensors behind {_some([repr(prefix) for prefix, _ in fitting])}: save "
            "those of one alone."
        )
    return fitting[0][1] if fitting else found


def _without_prefix(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what all names begin with where the model's do not."""
    bare = {key: value for key, value in found.items() if "." in key or not _is_counter(key)}
    while bare and not bare.keys() & wanted.keys():
        heads = {key.partition(".")[0] for key in bare}
        if len(heads) > 1 or not all("." in key for key in bare):
            return found
        bare = {key.partition(".")[2]: value for key, value in bare.items()}
    return bare


def _parts(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By each prefix that one of the model's names has, what lies behind it."""
    name = next(iter(wanted), "")
    prefixes = [key.removesuffix(name) for key in found if key.endswith(f".{name}")]
    return {
        prefix: {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
        for prefix in prefixes
    }


def _names(tensors: Mapping[str, Tensor]) -> set[str]:
    return {key for key in tensors if not _is_counter(key)}


def _renamed_by_order(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Give the file's tensors the model's names, one after the other; counters of batches do not count."""
    values = [value for key, value in found.items() if not _is_counter(key)]
    names = [key for key in wanted if not _is_counter(key)]
    if len(values) != len(names):
        raise InputError(
            f"{str(path)!r} holds {len(values)} tensors, the model {len(names)}: "
            "they cannot be matched by order."
        )
    return dict(zip(names, values, strict=True))


def _check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise unless names, shapes and kinds agree; counters may be missing, or there in vain."""
    both = [(key, found[key], value) for key, value in wanted.items() if key in found]
    differences = {
        "missing": [key for key in wanted if key not in found and not _is_counter(key)],
        "not in the model": [key for key in found if key not in wanted and not _is_counter(key)],
        "of another shape": [
            f"{key} is {list(there.shape)} in the file, {list(here.shape)} in the model"
            for key, there, here in both
            if there.shape != here.shape
        ],
        "of a kind that cannot be loaded": [
            f"{key} is {_kind(there)}" for key, there, here in both if _is_foreign(there, here)
        ],
    }
    parts = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if parts:
        told = "\n".join([*parts, _advice(found, wanted)])
        raise InputError(f"{str(path)!r} does not fit the model.\n{told}")


def _is_foreign(found: Tensor, wanted: Tensor) -> bool:
    """Whether copying would fail, or lose what the numbers mean: whole numbers in a weight are quantised ones."""
    loses = wanted.is_floating_point() and not found.is_floating_point()
    return loses or found.is_meta or found.layout != wanted.layout


def _kind(tensor: Tensor) -> str:
    words = ["without data"] if tensor.is_meta else []
    words += ["sparse"] if tensor.layout != torch.strided else []
    return ", ".join([*words, str(tensor.dtype).removeprefix("torch.")])


def _advice(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    def shapes(tensors: Mapping[str, Tensor]) -> list[torch.Size]:
        return [value.shape for key, value in tensors.items() if not _is_counter(key)]

    if _names(found) == _names(wanted) and shapes(found) == shapes(wanted):
        return "Save them as the model itself holds them: dense floating-point numbers."
    if shapes(found) == shapes(wanted):
        return (
            "The shapes agree in order, only the names differ: if it is the same architecture, "
            "match by order (--weights-by-order)."
        )
    for key, value in wanted.items():
        if key in found and value.ndim == found[key].ndim == 2 and len(value) != len(found[key]):
            classes = len(found[key])
            return (
                f"{key} has {classes} outputs in the file: give the model as many, as in "
                f"timm:NAME,num_classes={classes}."
            )
    return "Name the model that these weights were trained with."


def _is_counter(key: str) -> bool:
    """Of batches, of operations (a profiler, thop, leaves those in models), or of models that were averaged."""
    return key.rpartition(".")[2] in ("num_batches_tracked", "total_ops", "total_params", "n_averaged")


def _some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + rest
