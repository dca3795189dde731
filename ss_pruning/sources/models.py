"""From a word on the command line to a model: timm, torchvision, Ultralytics, a file of the user's, or the demo.

timm, torchvision, Ultralytics and safetensors are imported when called.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ss_pruning._utils.files import nearby
from ss_pruning.errors import InputError, SSPruningError
from ss_pruning.sources.preprocessing import Preprocess
from ss_pruning.sources.weights import TORCH_SUFFIXES, load_weights

SPEC_HELP = "timm:NAME, torchvision:NAME, yolo:NAME, path/to/file.py:factory or demo:digits"
#: Kinds of names that a file of ours may hold, so that `load` builds the model by itself.
NAMED = ("timm", "torchvision", "yolo", "demo")


def build_model(spec: str, weights: str | Path | None = None, *, by_order: bool = False) -> nn.Module:
    """Build a model from its name and load its weights.

    Args:
        spec: `timm:NAME`, `torchvision:NAME`, `yolo:NAME.yaml`, `yolo:FILE.pt` or `path/to/file.py:factory` (these
            two **execute** what is in the file), or `demo:digits`. Arguments may follow, as in
            `timm:resnet18,num_classes=10`.
        weights: a `.safetensors` file, or a `.pth`, `.pt`, `.th`, `.bin` file that holds tensors only.
            Without it the weights are random, except for the demo.
        by_order: match weights to the model by their order and shape, not by their names.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        InputError: the model or the file is unknown, or they do not fit; the message names the fix.
    """
    kind, name, options = _parse(spec)
    model = BUILDERS[kind](name, options)
    if kind == "demo" and weights is None:
        from ss_pruning.sources.demo import digits_weights

        weights = digits_weights()
    if weights is not None:
        load_weights(model, weights, by_order=by_order)
    return model.eval()


def brings_weights(spec: str) -> bool:
    """Whether a name asks for weights, or has some; of a function in a file nobody knows."""
    kind, name, options = _parse(spec)
    asks = bool(options.get("pretrained")) or options.get("weights") is not None
    return asks or kind == "demo" or (kind == "yolo" and not name.endswith((".yaml", ".yml")))


def is_function(spec: str) -> bool:
    """Whether a name is that of a function in a file, which may give its model any weights."""
    return _parse(spec)[0] == "file"


def input_of(spec: str, model: nn.Module) -> Preprocess:
    """Return the input that a model was made for: what it notes itself (timm), torchvision's, or ImageNet's."""
    kind, name, _ = _parse(spec)
    if kind == "demo":
        return Preprocess(size=(1, 8, 8), mean=(0.0,), std=(1.0,), crop=1.0)  # its images come normalised
    if kind == "yolo":
        return Preprocess(size=(3, 640, 640), mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0)
    noted = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(noted, Mapping) and "input_size" in noted:
        return _timm_input(noted)
    return _torchvision_input(name) if kind == "torchvision" else Preprocess()


def _timm_input(noted: Mapping[str, Any]) -> Preprocess:
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=noted)
    names = {"size": "input_size", "crop": "crop_pct", "timm_crop": "crop_mode"}
    same = {name: name for name in ("mean", "std", "interpolation")}
    return Preprocess(**{ours: found[theirs] for ours, theirs in (names | same).items()})


def _torchvision_input(name: str) -> Preprocess:
    """Read what torchvision's own weights for this model ask for; nothing is downloaded."""
    from torchvision import models

    # Detection and video weights come without a crop: then ImageNet's input is as good a guess as any.
    with contextlib.suppress(AttributeError, IndexError, StopIteration, TypeError, ValueError):
        asked = next(iter(models.get_model_weights(name))).transforms()
        side, resized = asked.crop_size[0], asked.resize_size[0]
        return Preprocess(
            (3, side, side), tuple(asked.mean), tuple(asked.std), side / resized, asked.interpolation.value
        )
    return Preprocess()


def _parse(spec: str) -> tuple[str, str, dict[str, Any]]:
    """Split `kind:name,key=value` into its parts; a file's kind is "file" and its name `path:factory`."""
    base, *given = re.split(r",\s*(?=\w+=)", spec)  # a value may have commas, too: num_blocks=[2,2,2]
    options = {key: _literal(value.strip()) for key, _, value in (item.partition("=") for item in given)}
    kind, _, name = base.partition(":")
    if kind in NAMED and name:
        return kind, name, options
    if re.search(r"\.py(:|$)", base):
        return "file", base, options
    raise InputError(f"unknown model {spec!r}: write {SPEC_HELP}.{_meant(base)}")


def _meant(base: str) -> str:
    """What somebody meant who gave a file of weights, or a name alone, for a model."""
    if base.endswith(".safetensors"):
        return (
            " What ss-prune has written is read by recover, finetune, export and bench, and pruned again in Python "
            f"(ss_pruning.load, prune_, save); weights alone are given beside a name, with --weights {base}."
        )
    if base.endswith(TORCH_SUFFIXES):
        return f" Weights alone do not say what is to be computed: give them beside a name, with --weights {base}."
    if re.fullmatch(r"\w+", base) and not os.path.exists(base):
        return f" Did you mean torchvision:{base} or timm:{base}?"
    return ""


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two where it is nested deeply
        return text


def check_name(spec: str) -> None:
    """Refuse a name that could not be built; nothing is built, and no library is imported for it.

    Raises:
        InputError: It has not the form of a name, or the library it names is loaded and has no such model.
    """
    kind, name, _ = _parse(spec)
    if kind == "timm" and "timm" in sys.modules:
        _check_timm(name)
    elif kind == "torchvision":
        _check_torchvision(name)


def _check_timm(name: str) -> None:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise InputError(_unknown("timm", name, timm.list_models()))


def _check_torchvision(name: str) -> None:
    from torchvision import models

    if name not in (names := models.list_models()):
        raise InputError(_unknown("torchvision", name, names))


def _build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"timm:{name} needs timm, which is not installed: pip install 'ss-pruning[timm]'"
        ) from error
    _check_timm(name)
    return _call(f"timm:{name}", lambda: timm.create_model(name, **{"pretrained": False, **options}), options)


def _build_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    _check_torchvision(name)
    takes = inspect.signature(models.get_model_builder(name)).parameters
    # Detectors fetch a backbone by default.
    defaults: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if name in ("googlenet", "inception_v3") and options.get("weights") is None:
        defaults["init_weights"] = True  # what they do anyway, after a warning
    given = {**defaults, **options}
    if "weights_backbone" not in takes:
        del given["weights_backbone"]
    return _call(f"torchvision:{name}", lambda: models.get_model(name, **given), options)


def _build_file(name: str, options: dict[str, Any]) -> nn.Module:
    place, _, factory = name.rpartition(":")
    if not place or not factory or factory.endswith(".py"):
        raise InputError(f"name the function that builds the model, as in {name}:build")
    path = Path(place)
    if not path.is_file():
        raise InputError(f"no file {place!r} to take the model from. {nearby(path)}".rstrip())
    with _same_folder():
        module = _import_file(path)
        function = getattr(module, factory, None)
        if not callable(function):
            names = [
                key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
            ]
            how = "" if factory.isidentifier() else f" Arguments are given as in {place}:build,depth=20."
            meant = _closest(factory, names) or f" It has {', '.join(names[:8]) or 'none'}."
            raise InputError(f"{place!r} has no function {factory!r}.{meant}{how}")
        _check_arguments(name, function, options)
        return _call(name, lambda: function(**options), options)


def _check_arguments(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        takes = inspect.signature(function)
    except (TypeError, ValueError):  # of code that is not Python
        return
    try:
        takes.bind(**options)
    except TypeError as error:
        raise InputError(
            f"{name} takes {takes}: {error}. Give arguments by name, as in {name},{next(iter(takes.parameters), 'x')}=1"
        ) from error


@contextlib.contextmanager
def _same_folder() -> Iterator[None]:
    """Whatever a file does to the working folder: paths that a user gives mean what they mean where they were typed."""
    here = os.getcwd()
    try:
        yield
    finally:
        os.chdir(here)


def _build_demo(name: str, options: dict[str, Any]) -> nn.Module:
    if name != "digits" or options:
        raise InputError(f"unknown demo {name!r}: the only one is demo:digits, without arguments.")
    from ss_pruning.sources.demo import digits_resnet

    return digits_resnet()


def _build_yolo(name: str, options: dict[str, Any]) -> nn.Module:
    from ss_pruning.integrations.ultralytics.networks import build

    return _call(f"yolo:{name}", lambda: build(name, options), options)


def portable_name(spec: str, model: nn.Module) -> str | None:
    """What a file may say of how to build `model`, which came from `spec`; None where nobody else could.

    A file of the user's is not named: loading must not run code that the reader did not ask for.
    """
    kind, name, _ = _parse(spec)
    if kind == "yolo" and not name.endswith((".yaml", ".yml")):
        from ss_pruning.integrations.ultralytics.networks import name_of

        return name_of(model)
    return spec if kind in NAMED else None


#: By kind of name; called with the name and its options.
BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "yolo": _build_yolo,
    "file": _build_file,
    "demo": _build_demo,
}


def _import_file(path: Path) -> Any:
    """Execute a Python file as a module; what it imports from its own folder is found."""
    name = f"ss_pruning_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError(f"{str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(found)
    folder = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    sys.path.insert(0, folder)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{str(path)!r} cannot be imported: {_said(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _call(spec: str, build: Callable[[], object], options: Mapping[str, Any]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # Advice for the model's author; the user of a name cannot act on it.
            warnings.simplefilter("ignore")
            model = build()
    except SSPruningError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{spec} could not be built: {_said(error).rstrip('.')}.{_remedy(error, options)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def _remedy(error: BaseException, options: Mapping[str, Any]) -> str:
    """What may help where a model cannot be built."""
    fetched = {name for name in ("pretrained", "weights", "weights_backbone") if options.get(name)}
    if fetched and isinstance(error, OSError):  # what downloads raise
        return f" Weights could not be fetched: leave out {fetched.pop()}=, and give a file with --weights."
    return f" Arguments given: {', '.join(f'{k}={v!r}' for k, v in options.items())}." if options else ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _unknown(library: str, name: str, names: Iterable[str]) -> str:
    return f"{library} has no model {name!r}.{_closest(name, names)}"


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=4, cutoff=0.5)
    return f" The closest names are {', '.join(close)}." if close else ""
