"""Pruned models as files: safetensors with the plan, the architecture's name and a checksum in the metadata.

Checkpoints that Torch-Pruning users write, weights beside a pruning history, are read too. Nothing but tensors and
plain values is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ss_pruning._utils.arrays import digest
from ss_pruning._utils.files import absent, check_writable, write_bytes
from ss_pruning._utils.modules import as_state_of
from ss_pruning.errors import FileFormatError, InputError, PlanError
from ss_pruning.graph.refusals import check_module
from ss_pruning.report.records import Report
from ss_pruning.surgery.plan import Plan, cut_like, plan_of

_KEY = "ss_pruning"
_FORMAT = 2
_READ = (1, 2)  # the first had no checksum
_OTHER_MODEL = "; name the dense model with its arguments, as in load(path, 'timm:resnet18,num_classes=10')"

Architecture = str | Callable[[], nn.Module]


class _Content(NamedTuple):
    """What a file says: how to build the dense model, what was cut, the tensors, and which the dense weights were."""

    architecture: str | None
    plan: str
    tensors: dict[str, Tensor]
    dense: str | None = None

    def checksum(self) -> str:
        """SHA-256 of all of it."""
        return digest(sorted(self.tensors.items()), self.architecture, self.plan)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    architecture: str | None = None,
    dense: nn.Module | None = None,
) -> None:
    """Write a (pruned) model's tensors, its plan, and how to build the dense architecture; atomically.

    Args:
        model: The model; if it was pruned here it carries its plan.
        path: File to write, usually `*.safetensors`.
        architecture: How `load` can build the dense model by itself, such as "timm:resnet18", "torchvision:resnet18"
            or "demo:digits"; None if `load` will be given a callable.
        dense: The model that was pruned. Of its weights a checksum is kept, by which `load_dense` knows them again.

    Raises:
        InputError: The folder is missing or read-only, the model is wrapped or holds more than tensors, `architecture`
            names no model, or `dense` is not the model that was pruned.
    """
    check_writable(path)
    if not isinstance(architecture, str | None):
        raise InputError(f"architecture={architecture!r:.80} is no name, such as 'timm:resnet18'")
    if architecture is not None:
        from ss_pruning.sources.models import check_name

        check_name(architecture)
    if dense is not None:
        check_module(dense, "save")
        cut_like(model, dense)
    write_bytes(path, packed(model, architecture, None if dense is None else checksum_of_weights(dense))[0])


def checksum_of_weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, their names, types and shapes."""
    return digest(sorted(_tensors_of(model).items()))


def packed(model: nn.Module, architecture: str | None = None, dense: str | None = None) -> tuple[bytes, str]:
    """What `save` writes, and the checksum that is in it (of tensors, plan and architecture, not of the bytes)."""
    check_module(model, "save")
    # Cloned: safetensors refuses tensors that share memory, which tied weights do.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in _tensors_of(model).items()}
    content = _Content(architecture, plan_of(model).to_json(), tensors)
    checksum = content.checksum()
    note = {
        "format": _FORMAT,
        "architecture": content.architecture,
        "plan": content.plan,
        "sha256": checksum,
        "dense_sha256": dense,
    }
    return to_bytes(tensors, metadata={_KEY: json.dumps(note)}), checksum


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name!r} is a {type(value).__name__}, and safetensors hold nothing but tensors: save the model "
                "before it is quantised or its layers get a state of their own"
            )
    return state


def checksum_of(path: str | os.PathLike[str]) -> str | None:
    """The checksum that a file of `save` carries, not compared with its tensors; None in the first format."""
    return _noted(_metadata(path), {}, path)[1]


def dense_checksum_of(path: str | os.PathLike[str]) -> str | None:
    """The checksum of the dense weights that a file of `save` keeps; None where it keeps none."""
    return None if _is_checkpoint(path) else _noted(_metadata(path), {}, path)[0].dense


def load(
    path: str | os.PathLike[str], architecture: Architecture | None = None, example_inputs: Any = None
) -> nn.Module:
    """Rebuild a model written by `save`: build the dense architecture, apply the plan, load the tensors.

    Args:
        path: The file. Or a checkpoint with a history of Torch-Pruning's (or of `GraphPruner`), as
            `torch.save({"model": model.state_dict(), "pruning": pruner.pruning_history()}, path)` writes it.
        architecture: A callable that builds the dense model, or a name such as "timm:resnet18"; may be left out
            where the file names one. Of a name in a file only plain options are passed on
            (`ss_pruning.sources.architecture_names`), and no weights are asked for: nothing is fetched, and nothing but
            the file is opened.
        example_inputs: What `forward` takes; only a history of Torch-Pruning's asks for it, and only where the
            architecture is a callable.

    Returns:
        The model in eval mode, on the CPU, with outputs equal bit for bit to the saved one's.

    Raises:
        InputError: The file does not exist, or it names no architecture and none is given.
        FileFormatError: The file is truncated, damaged, not written by `save`, or names an architecture in a way that
            is not followed.
        PlanError: The architecture is not the one that was pruned.
    """
    if _is_checkpoint(path):
        model, plan, tensors = _from_history(path, architecture, example_inputs)
    else:
        content = _read(path)
        model = built(architecture, content.architecture, path)
        plan, tensors = Plan.from_json(content.plan), content.tensors
    _apply(plan, model, path)
    _fill(model, tensors, path)
    return model.eval()


def architecture_of(path: str | os.PathLike[str]) -> str | None:
    """The architecture that a file names; None where it names none."""
    return None if _is_checkpoint(path) else _read(path).architecture


def _is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """True for what `torch.save` writes; a safetensors file would need a header of 64 MiB to begin so."""
    try:
        if not Path(path).is_file():
            raise InputError(absent(path))
        with Path(path).open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise InputError(f"cannot read '{path}' ({error.strerror})") from error
    except TypeError as error:
        raise InputError(
            f"a {type(path).__name__} is no path to read; give a str or a pathlib.Path"
        ) from error


def _from_history(
    path: str | os.PathLike[str], architecture: Architecture | None, example_inputs: Any
) -> tuple[nn.Module, Plan, dict[str, Tensor]]:
    from ss_pruning.io.torch_pruning_history import plan_of, read_checkpoint
    from ss_pruning.sources.models import input_of

    tensors, history = read_checkpoint(path)
    model = built(architecture, None, path)
    if example_inputs is None and isinstance(architecture, str):
        example_inputs = torch.zeros(1, *input_of(architecture, model).size)
    return model, plan_of(history, model, example_inputs), tensors


def _apply(plan: Plan, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Cut the fresh model; a plan that somebody wrote by hand may fail anywhere."""
    try:
        plan.apply_(model)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"the plan in '{path}' does not fit the architecture ({error})") from error


def _read(path: str | os.PathLike[str]) -> _Content:
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    content, checksum = _noted(metadata, tensors, path)
    if checksum is not None and checksum != content.checksum():
        raise FileFormatError(f"'{path}' is damaged: its checksum does not fit; get the file again")
    return content


def _metadata(path: str | os.PathLike[str]) -> Mapping[str, str]:
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"'{path}' is truncated or no safetensors file ({error}); give one that ss_pruning.save or ss-prune has "
            "written"
        ) from error


def _noted(
    metadata: Mapping[str, str], tensors: dict[str, Tensor], path: str | os.PathLike[str]
) -> tuple[_Content, str | None]:
    """The content, and the checksum that it should have (None in the first format)."""
    try:
        note = json.loads(metadata[_KEY])
        version, architecture, plan = note["format"], note["architecture"], note["plan"]
        checksum, dense = note.get("sha256"), note.get("dense_sha256")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"'{path}' holds no plan of ours; write files with ss_pruning.save, or load plain weights yourself"
        ) from error
    if version not in _READ:
        raise FileFormatError(f"'{path}' has format {version!r}; this version reads up to {_FORMAT}")
    if (
        not isinstance(plan, str)
        or not isinstance(architecture, str | None)
        or not isinstance(dense, str | None)
        or (version > 1 and not checksum)
    ):
        raise FileFormatError(f"'{path}' is damaged: its note about the plan is incomplete")
    return _Content(architecture, plan, tensors, dense), checksum


def built(architecture: Any, named: str | None, path: str | os.PathLike[str]) -> nn.Module:
    """The dense model: as the caller says, else as the file names it, which may say much less."""
    if architecture is None and named is None:
        raise InputError(
            f"'{path}' does not name its architecture; pass a callable that builds the dense model: "
            "load(path, lambda: MyNet())"
        )
    if architecture is None:
        from ss_pruning.sources.architecture_names import build_named

        return build_named(str(named), path)
    if isinstance(architecture, str):
        from ss_pruning.sources.models import NAMED, build_model

        if architecture.partition(":")[0] not in NAMED:
            raise InputError(
                f"'{architecture}' would run code of a local file; build the model yourself and pass a callable: "
                "load(path, factory)"
            )
        return build_model(architecture)
    if isinstance(architecture, nn.Module) or not callable(architecture):
        raise InputError(
            f"architecture is a {type(architecture).__name__}; pass a callable that builds the dense model: "
            "load(path, lambda: MyNet())"
        )
    model = architecture()
    if not isinstance(model, nn.Module):
        raise InputError("the architecture callable must return a torch.nn.Module")
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load by assignment of values, keeping dtypes as saved."""
    state = model.state_dict()
    if set(state) != set(tensors):
        odd = sorted(set(state) ^ set(tensors))
        raise PlanError(
            f"'{path}' and the architecture differ in {len(odd)} tensors, first '{odd[0]}'{_OTHER_MODEL}"
        )
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise PlanError(
                f"'{name}' has shape {tuple(tensor.shape)} in '{path}', {tuple(state[name].shape)} in the architecture"
                f"{_OTHER_MODEL}"
            )
        if _number_kind(state[name]) != _number_kind(tensor):
            raise PlanError(
                f"'{name}' is {tensor.dtype} in '{path}', {state[name].dtype} in the architecture"
            )
    # Cloned: a file's tensors lie at any address, and kernels round differently on memory that is not aligned.
    cloned = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(as_state_of(model, cloned), assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _number_kind(tensor: Tensor) -> tuple[bool, bool]:
    """Floating point (of any width), complex, or whole."""
    return tensor.is_floating_point(), tensor.is_complex()


def report_file(place: Path) -> Path:
    """The report in a folder, or the file itself."""
    return place / "report.json" if place.is_dir() else place


def open_report(place: Path) -> Report:
    """Read a report, from its file or from the folder that `ss-prune prune --out` has written.

    Raises:
        FileFormatError: the file is missing or no report, or tells of another model than the one that lies beside it.
    """
    path = report_file(place)
    report = Report.load_json(path)
    model = path.with_name("model.safetensors")
    known = report.model_sha256
    if known is not None and model.is_file() and checksum_of(model) != known:
        raise FileFormatError(
            f"{str(path)!r} tells of another model than {str(model)!r}: one of them was replaced, or a run was killed "
            "between writing the two. Prune again, or move the report away from that model."
        )
    return report
