"""The networks of Ultralytics that can be pruned: opened, checked, built from a name, and named again.

`yolo:yolov8n.yaml,nc=10` names an architecture of Ultralytics' own, without weights; `yolo:FILE.pt` a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

try:
    from ultralytics import YOLO
    from ultralytics.engine.model import Model
    from ultralytics.nn import tasks
    from ultralytics.nn.modules import DFL
    from ultralytics.utils import DEFAULT_CFG_DICT, ROOT
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "this needs Ultralytics 8.4: pip install 'ss-pruning[ultralytics]'", name="ultralytics"
    ) from error

from ss_pruning.config import is_count
from ss_pruning.errors import InputError, PlanError
from ss_pruning.surgery.plan import Attribute, Plan, plan_of

#: By task, the class of its networks.
NETWORKS: Mapping[str, type[nn.Module]] = {
    "detect": tasks.DetectionModel,
    "segment": tasks.SegmentationModel,
    "pose": tasks.PoseModel,
    "obb": tasks.OBBModel,
    "classify": tasks.ClassificationModel,
}


def opened(model: Any) -> Any:
    """A `YOLO` whose network can be pruned.

    Args:
        model: One, or a path to a `.pt` file (**which runs the code in it**), or the name of a `.yaml` file.

    Raises:
        InputError: There is no such file, it is none of Ultralytics', or its network does another task.
    """
    yolo = model if isinstance(model, Model) else _open(model)
    network = yolo.model
    if type(network) not in NETWORKS.values():
        kind = type(network).__name__ if isinstance(network, nn.Module) else f"the file {network}"
        raise InputError(
            f"the YOLO holds {kind}; those of {', '.join(NETWORKS)} can be pruned here, as modules of PyTorch. Any "
            "other module: ss_pruning.prune_(yolo.model, example_inputs)"
        )
    return yolo


def _open(model: Any) -> Any:
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"the model is a {type(model).__name__}; give a YOLO, a .pt file or the name of a .yaml file"
        )
    place = Path(model)
    if place.suffix not in (".pt", ".yaml", ".yml"):
        raise InputError(f"'{model}' is neither a .pt nor a .yaml file")
    if place.suffix == ".pt" and not place.is_file():
        raise InputError(f"there is no file '{model}'; download weights yourself, this fetches none")
    try:
        return YOLO(str(model))
    except Exception as error:
        raise InputError(f"Ultralytics cannot open '{model}' ({type(error).__name__}: {error})") from error


def side_of(yolo: Any, imgsz: int | None) -> int:
    """Height and width of the images that a YOLO sees: `imgsz`, or what it was trained with, or the usual.

    Raises:
        InputError: They are no multiple of its stride.
    """
    usual = yolo.overrides.get("imgsz") or (224 if yolo.task == "classify" else 640)
    side = usual if imgsz is None else imgsz
    stride = max(int(yolo.model.stride.max()), 32)
    if not is_count(side) or side % stride:
        raise InputError(f"imgsz={side!r} must be a multiple of {stride}, the network's stride")
    return int(side)


def thaw_(network: nn.Module) -> nn.Module:
    """Let all weights be trained but the fixed ones that decode distances, as Ultralytics does before it trains."""
    fixed = {
        id(weight) for part in network.modules() if isinstance(part, DFL) for weight in part.parameters()
    }
    for weight in network.parameters():
        if weight.is_floating_point():
            weight.requires_grad_(id(weight) not in fixed)
    return network


@contextmanager
def thawed(network: nn.Module) -> Iterator[None]:
    """Within, `network` is as `thaw_` leaves it: what comes from a file of Ultralytics' is frozen altogether."""
    before = {name: weight.requires_grad for name, weight in network.named_parameters()}
    thaw_(network)
    try:
        yield
    finally:
        for name, weight in network.named_parameters():
            weight.requires_grad_(before.get(name, weight.requires_grad))


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """The network that `yolo:NAME` stands for.

    Args:
        name: A `.pt` file (**which runs the code in it**) or a `.yaml` file.
        options: For a `.yaml` file, `nc` (classes), `ch` (channels of the image), `keypoints` and `dims` (of each);
            with `stock`, nothing but Ultralytics' own files is opened.

    Raises:
        InputError: There is none.
    """
    options = dict(options)
    stock = options.pop("stock", False)
    if not name.endswith((".yaml", ".yml")):
        if stock or options:
            raise InputError(f"yolo:{name} is no .yaml file, and only those take options")
        return thaw_(opened(name).model)
    shape = options.pop("keypoints", None), options.pop("dims", 3)
    settings = tasks.yaml_model_load(stock_file(name) if stock else name)
    task = tasks.guess_model_task(settings)
    if task not in NETWORKS:
        raise InputError(f"yolo:{name} is for the task {task!r}; known are {', '.join(NETWORKS)}")
    if shape[0] is not None:
        options["data_kpt_shape"] = shape
    network: Any = NETWORKS[task](settings, verbose=False, **options)
    network.task = task
    network.args = {**DEFAULT_CFG_DICT, "model": name, "task": task}
    return network  # type: ignore[no-any-return]


def stock_file(name: str) -> str:
    """Where Ultralytics' own file of a name lies; the size that the name may hold stays in it.

    Raises:
        InputError: It has none.
    """
    size = tasks.guess_model_scale(name)
    known = {path.stem: path for path in sorted((ROOT / "cfg" / "models").rglob("*.yaml"))}
    stem = Path(name).stem
    for candidate in (stem, *(stem[:i] + stem[i + 1 :] for i in range(len(stem)) if stem[i] == size)):
        if Path(name).name == name and candidate in known:
            return str(known[candidate].with_name(name))
    raise InputError(f"Ultralytics has no model {name!r} of its own")


def name_of(network: Any) -> str | None:
    """How `ss_pruning.load` can build the dense network of one that may have been pruned; None where it cannot.

    It is built to see: of a network that was fitted to other classes, widths may differ from those of its name.
    """
    options: dict[str, Any] = {"nc": network.yaml["nc"], "ch": network.yaml.get("channels", 3)}
    if getattr(network, "kpt_shape", None):
        options["keypoints"], options["dims"] = network.kpt_shape
    name = Path(network.yaml.get("yaml_file", "")).name
    try:
        twin = plan_of(network).cut_copy(build(name, {**options, "stock": True}))
    except (InputError, PlanError):
        return None
    same = _shapes(twin) == _shapes(network)
    return f"yolo:{name}," + ",".join(f"{k}={v}" for k, v in options.items()) if same else None


def follow_(network: Any) -> None:
    """Let widths that only exports read follow a cut, as a part of its plan.

    They are those of blocks whose `forward` halves what it reads with `chunk`, and that are exported as
    `forward_split`.
    """
    stale = []
    for path, block in network.named_modules():
        half = block.cv1.conv.out_channels // 2 if hasattr(block, "forward_split") else None
        if half is not None and block.c != half:
            stale.append(Attribute(path, "c", None, block.c, half))
    if stale:
        Plan(attributes=tuple(stale)).apply_(network)


def _shapes(network: nn.Module) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
