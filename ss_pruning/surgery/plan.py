"""Plans: which channels of which layers stay. Applying one is the only way this package changes a model's shape.

Convolutions and linear layers are cut by Torch-Pruning. Gathered here are norms (all their tensors with one index) and
what it cannot cut: grouped convolutions that lose other positions in each group, further tensors of subclasses (the
gain of a scaled convolution), frozen batch norms, loose tensors, and channels that change places.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.copying import shell
from ss_pruning._utils.memento import like
from ss_pruning._utils.modules import modules_of, tensors_of
from ss_pruning.errors import PlanError
from ss_pruning.graph.groups import Key, Side
from ss_pruning.graph.layers import groups_of, is_depthwise, long_axis, registered_axes, width
from ss_pruning.graph.refusals import check_whole
from ss_pruning.registry import layer_type_of

#: Name under which a pruned model carries the plan that made it.
PLAN_ATTRIBUTE = "ss_pruning_plan"
_FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """The channels of one layer side that stay, in their new order.

    Attributes:
        path: Module path, or the name of a loose tensor.
        side: "in" or "out" of a convolution or linear layer, "through" a norm, or "tensor".
        width: Number of channels before.
        kept: The channels that stay.
        axis: Axis of a loose tensor; 0 otherwise.
    """

    path: str
    side: Side
    width: int
    kept: tuple[int, ...]
    axis: int = 0

    @property
    def removed(self) -> list[int]:
        """The channels that go, ascending."""
        stays = set(self.kept)
        return [channel for channel in range(self.width) if channel not in stays]


@dataclass(frozen=True)
class Attribute:
    """A number that a module's `forward` relies on and that follows the cut.

    Attributes:
        path: Module path.
        name: Attribute name.
        position: Place in a list or tuple, or None for a plain number.
        before: Old value.
        after: New value.
    """

    path: str
    name: str
    position: int | None
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """Immutable, serialisable: which channels stay, which stored numbers follow, and which layers get a bias."""

    cuts: tuple[Cut, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    biases: tuple[str, ...] = ()

    def apply_(self, model: nn.Module) -> nn.Module:
        """Cut `model` in place and note the plan on it (composed with the plan of an earlier cut).

        All or nothing: a copy is cut, and what it has become is swapped in at once. Optimisers keep the old tensors:
        build them after pruning.

        Raises:
            PlanError: The plan does not fit the model.
            ModelError: The model cannot be copied, or is sharded.
        """
        check_whole(model, "cut")
        return adopt_(model, self.cut_copy(model))

    def cut_copy(self, model: nn.Module, values: nn.Module | None = None) -> nn.Module:
        """A copy of `model` that is cut; it shares the tensors that are not.

        Args:
            model: What to copy; not changed.
            values: A model of the same shapes, from which tensors are taken where they differ.

        Raises:
            PlanError: The plan does not fit the model.
            ModelError: The model cannot be copied.
        """
        self._check(model)
        small = shell(model)
        with torch.inference_mode(False):  # what is made there could never be trained
            self._cut_(small)
            _tie_(small, model)
            if values is not None:
                _take_values_(small, values)
        return small

    def _cut_(self, model: nn.Module) -> None:
        modules = modules_of(model)
        for cut in _in_order(self.cuts, modules):
            _cut(modules, cut)
        for attribute in self.attributes:
            set_number(modules[attribute.path], attribute)
        for path in self.biases:
            give_bias(modules[path])
        before = getattr(model, PLAN_ATTRIBUTE, None)
        setattr(model, PLAN_ATTRIBUTE, before.then(self) if isinstance(before, Plan) else self)

    def then(self, later: Plan) -> Plan:
        """The one plan that does first this and then `later`."""
        cuts: dict[Key, Cut] = {(cut.path, cut.side): cut for cut in self.cuts}
        for cut in later.cuts:
            first = cuts.get((cut.path, cut.side))
            if first is not None:
                if cut.width != len(first.kept):
                    raise PlanError(f"'{cut.path}' has {len(first.kept)} channels, not {cut.width}")
                kept = tuple(first.kept[i] for i in cut.kept)
                cut = Cut(cut.path, cut.side, first.width, kept, first.axis)
            cuts[cut.path, cut.side] = cut
        numbers = {(a.path, a.name, a.position): a for a in self.attributes}
        for a in later.attributes:
            key = (a.path, a.name, a.position)
            before = numbers[key].before if key in numbers else a.before
            numbers[key] = Attribute(a.path, a.name, a.position, before, a.after)
        biases = (*self.biases, *(path for path in later.biases if path not in self.biases))
        return Plan(tuple(cuts.values()), tuple(numbers.values()), biases)

    def to_json(self) -> str:
        """A JSON text that `from_json` reads."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: The text is no plan, or of a format that this version does not know.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise PlanError(
                    f"plan format {data['format']!r} is unknown here; this version reads {_FORMAT}"
                )
            cuts = tuple(_cut_from(c) for c in data["cuts"])
            attributes = tuple(_attribute_from(a) for a in data["attributes"])
            return Plan(cuts, attributes, tuple(str(path) for path in data["biases"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PlanError(f"this is not a pruning plan ({type(error).__name__}: {error})") from error

    def _check(self, model: nn.Module) -> None:
        modules, tensors = modules_of(model), tensors_of(model)
        for cut in self.cuts:
            if cut.side == "tensor":
                tensor = tensors.get(cut.path)
                now = None if tensor is None or tensor.dim() <= cut.axis else tensor.shape[cut.axis]
            else:
                module = modules.get(cut.path)
                now = None if module is None else _side_width(module, cut.side)
            if now != cut.width:
                raise PlanError(
                    f"the plan expects {cut.width} channels on side '{cut.side}' of '{cut.path}', the model has "
                    f"{now or 'no such layer'}; apply a plan to a fresh copy of the architecture it was made for"
                )
        for path in self.biases:
            if getattr(modules.get(path), "bias", 0) is not None:
                raise PlanError(f"the plan expects a layer without a bias at '{path}'")
        for attribute in self.attributes:
            if _number(modules.get(attribute.path), attribute) != attribute.before:
                raise PlanError(
                    f"the plan expects the number {attribute.before} in '{attribute.path}.{attribute.name}'"
                )


# Attributes in which layers keep their sizes.
_SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels"),
    *("normalized_shape", "num_parameters"),
)


def adopt_(model: nn.Module, small: nn.Module) -> nn.Module:
    """Make `model` what `small` is, a copy of it that was cut: tensors, sizes, numbers that follow, the plan.

    All tables are updated in one call of C, between whose steps Python handles no signal: an interrupt comes before it
    or after it. The old values are held until then, so that no finaliser runs in between.
    """
    plan = vars(small)[PLAN_ATTRIBUTE]
    numbers: dict[str, list[str]] = {"": [PLAN_ATTRIBUTE]}
    for attribute in plan.attributes:
        numbers.setdefault(attribute.path, []).append(attribute.name)
    theirs = modules_of(small)
    tables, updates, before = [], [], []
    for path, module in modules_of(model).items():
        own = layer_type_of(module)
        sizes = _SIZES if own is None else own.sizes.values()
        for table, now in _differing(module, theirs[path], (*sizes, *numbers.get(path, ()))):
            tables.append(table)
            updates.append(now)
            before.append(dict(table))
    deque(map(dict.update, tables, updates), maxlen=0)
    del before
    return model


def _tie_(small: nn.Module, model: nn.Module) -> None:
    """Where a tensor that was cut stands in another place, too, let it do so in the cut model."""
    theirs = modules_of(small)
    places = [
        (tensor, vars(theirs[path])[table], name)
        for path, module in modules_of(model).items()
        if not isinstance(module, torch.jit.ScriptModule)
        for table in ("_parameters", "_buffers")
        for name, tensor in vars(module)[table].items()
        if tensor is not None
    ]
    cut = {id(tensor): table[name] for tensor, table, name in places if table[name] is not tensor}
    for tensor, table, name in places:
        table[name] = cut.get(id(tensor), table[name])


def _take_values_(model: nn.Module, values: nn.Module) -> None:
    theirs = modules_of(values)
    made: dict[int, Tensor] = {}  # by what it was made for: tied tensors stay tied
    for path, module in modules_of(model).items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for table in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[table].items():
                if tensor is not None:
                    value = _with_values(tensor, vars(theirs[path])[table][name])
                    vars(module)[table][name] = made.setdefault(id(tensor), value)


def _with_values(tensor: Tensor, values: Any) -> Any:
    """A tensor of the same kind, type and place with other values; itself where they are its own."""
    values = values.detach().to(tensor)
    if torch.equal(tensor, values):
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return values
    parameter = nn.Parameter(values, requires_grad=tensor.requires_grad)
    like(parameter, tensor)
    parameter.grad = tensor.grad
    return parameter


def _differing(
    module: nn.Module, other: nn.Module, names: Iterable[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Tables of a module, and what of them is something else in the other module."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    sizes = {name: vars(other)[name] for name in names if name in vars(other)}
    pairs = (
        (module._parameters, other._parameters),
        (module._buffers, other._buffers),
        (vars(module), sizes),
    )
    for table, now in pairs:
        changed = {name: value for name, value in now.items() if table.get(name, ...) is not value}
        if changed:
            yield table, changed


def _cut_from(data: Mapping[str, Any]) -> Cut:
    kept = tuple(int(i) for i in data["kept"])
    cut = Cut(str(data["path"]), data["side"], int(data["width"]), kept, int(data["axis"]))
    if cut.side not in ("in", "out", "through", "tensor"):
        raise PlanError(f"unknown side {cut.side!r} for '{cut.path}'")
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= cut.width:
        raise PlanError(f"the kept channels of '{cut.path}' are not distinct numbers below {cut.width}")
    return cut


def _attribute_from(data: Mapping[str, Any]) -> Attribute:
    position = None if data["position"] is None else int(data["position"])
    number = Attribute(
        str(data["path"]), str(data["name"]), position, int(data["before"]), int(data["after"])
    )
    if not 0 <= number.after <= number.before:  # they follow widths, which only shrink
        raise PlanError(f"the number '{number.path}.{number.name}' would grow to {number.after}")
    return number


def _side_width(module: nn.Module, side: Side) -> int | None:
    try:
        return width(module, "in" if side == "in" else "out")
    except (AttributeError, TypeError, AssertionError):
        return None


def _in_order(cuts: Iterable[Cut], modules: Mapping[str, nn.Module]) -> list[Cut]:
    """Outputs first; inputs of depthwise layers not at all: those follow their outputs.

    Cut the other way round, a grouped convolution left with one input a group would pass for a depthwise one, and a
    depthwise one left with one channel for a plain one.
    """
    inputs = [c for c in cuts if c.side == "in" and not is_depthwise(modules[c.path])]
    return [*(c for c in cuts if c.side != "in"), *inputs]


def _cut(modules: Mapping[str, nn.Module], cut: Cut) -> None:
    if cut.side == "tensor":
        owner, _, name = cut.path.rpartition(".")
        _gather(modules[owner], name, cut.axis, torch.tensor(cut.kept))
    else:
        cut_layer(modules[cut.path], cut)


def cut_layer(module: nn.Module, cut: Cut) -> None:
    """Keep the channels `cut.kept` of one side of a layer, in that order."""
    own = registered_axes(module, "in" if cut.side == "in" else "out")
    if own is not None:
        with _same_flags(module):
            _cut_registered(module, own, cut)
        return
    before = dict(_own_tensors(module))
    with torch.no_grad(), _same_flags(module):
        if not is_depthwise(module) or cut.side != "in":  # a depthwise layer is cut once, on its output side
            _cut_tensors(module, cut)
    if (
        cut.side != "in"
    ):  # further tensors of a subclass, such as the gain of a weight-standardised convolution
        for name, tensor in _own_tensors(module):
            if tensor is before.get(name) and tensor.dim() and tensor.shape[0] == cut.width:
                _gather(module, name, 0, torch.tensor(cut.kept))


def _cut_registered(module: nn.Module, axes: Mapping[str, int], cut: Cut) -> None:
    for name, axis in axes.items():
        _gather(module, name, axis, torch.tensor(cut.kept))
    size = {} if (own := layer_type_of(module)) is None else own.sizes
    if cut.side in size:
        setattr(module, size[cut.side], len(cut.kept))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def give_bias(module: nn.Module) -> nn.Parameter:
    """Register a bias of zeros on a convolution or linear layer without one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = nn.Parameter(torch.zeros(width(module, "out"), dtype=weight.dtype, device=weight.device))
    module.bias = bias
    return bias


def _cut_tensors(module: nn.Module, cut: Cut) -> None:
    import torch_pruning as tp

    in_order = list(cut.kept) == sorted(cut.kept)
    lost_groups = isinstance(module, _ConvNd) and cut.side == "in" and module.in_channels != cut.width
    if isinstance(module, _ConvNd) and (groups_of(module) > 1 or lost_groups):
        _cut_grouped(module, cut)
    elif isinstance(module, _ConvNd) and in_order:
        (tp.prune_conv_in_channels if cut.side == "in" else tp.prune_conv_out_channels)(module, cut.removed)
    elif isinstance(module, nn.Linear) and in_order:
        (tp.prune_linear_in_channels if cut.side == "in" else tp.prune_linear_out_channels)(
            module, cut.removed
        )
    else:
        _gather_layer(module, cut)


def _cut_grouped(conv: _ConvNd, cut: Cut) -> None:
    """A grouped convolution: each group keeps positions of its own. Groups without outputs go, inputs and all."""
    groups, axis = conv.groups, int((cut.side == "in") != conv.transposed)
    kept, alive = torch.tensor(cut.kept), torch.arange(groups)  # not where the weight is: it may hold no data
    if cut.side == "out":
        alive = (kept // (cut.width // groups)).unique()

    def select(weight: Tensor) -> Tensor:
        blocks = weight.unflatten(0, (groups, -1))[alive.to(weight.device)]  # [groups, rows, columns, ...]
        positions = (kept.reshape(len(blocks), -1) % blocks.shape[1 + axis]).to(weight.device)
        group = torch.arange(len(blocks), device=weight.device)[:, None]
        selected: Tensor = blocks.transpose(1, 1 + axis)[group, positions].transpose(1, 1 + axis)
        return selected.flatten(0, 1).contiguous()

    _replace(conv, "weight", select)
    if cut.side == "out" and conv.bias is not None:
        _gather(conv, "bias", 0, kept)
    if len(alive) < groups:
        conv.in_channels, conv.groups = conv.in_channels // groups * len(alive), len(alive)
    setattr(conv, f"{cut.side}_channels", len(cut.kept))


def _gather_layer(module: nn.Module, cut: Cut) -> None:
    """Norms, every layer that Torch-Pruning does not know, and those whose channels change places."""
    n, kept = len(cut.kept), torch.tensor(cut.kept)
    if isinstance(module, nn.Linear):
        _gather(module, "weight", 1 if cut.side == "in" else 0, kept)
        if cut.side == "out" and module.bias is not None:
            _gather(module, "bias", 0, kept)
        setattr(module, f"{cut.side}_features", n)
    elif isinstance(module, _ConvNd):
        _gather(module, "weight", int((cut.side == "in") != module.transposed), kept)
        if cut.side == "out" and module.bias is not None:
            _gather(module, "bias", 0, kept)
        setattr(module, f"{cut.side}_channels", n)
    else:
        for name, tensor in list(_own_tensors(module)):
            axis = long_axis(tensor)
            if axis is not None and tensor.shape[axis] == cut.width:
                _gather(module, name, axis, kept)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = (n,)
        elif isinstance(module, _NormBase):
            module.num_features = n
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = n
        elif isinstance(getattr(module, "num_features", None), int):
            setattr(module, "num_features", n)  # noqa: B010


def _gather(module: nn.Module, name: str, axis: int, index: Tensor) -> None:
    """Replace a parameter or buffer (and its gradient) by its selected indices."""
    _replace(module, name, lambda tensor: tensor.index_select(axis, index.to(tensor.device)))


def _replace(module: nn.Module, name: str, select: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter or buffer (and its gradient) by a selection from it."""
    tensor = getattr(module, name)
    selected = select(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        parameter = nn.Parameter(selected, requires_grad=tensor.requires_grad)
        like(parameter, tensor)
        if tensor.grad is not None:
            parameter.grad = select(tensor.grad)
        setattr(module, name, parameter)
        if isinstance(module, nn.PReLU):
            module.num_parameters = parameter.numel()
    else:
        setattr(module, name, selected)


@contextlib.contextmanager
def _same_flags(module: nn.Module) -> Iterator[None]:
    """Torch-Pruning makes fresh parameters: carry over `requires_grad` and the memory format."""
    flags = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
    weight = getattr(module, "weight", None)
    last = isinstance(weight, Tensor) and weight.dim() == 4 and not weight.is_contiguous()
    yield
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        parameter.requires_grad_(flags.get(name, True))
        if last and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _number(module: nn.Module | None, attribute: Attribute) -> int | None:
    """The number as it is stored, None where there is none (plans come from files: nothing else may be set)."""
    value = vars(module).get(attribute.name) if module is not None else None
    if attribute.position is not None:
        fits = type(value) in (list, tuple) and 0 <= attribute.position < len(value)  # type: ignore[arg-type]
        value = value[attribute.position] if fits else None  # type: ignore[index]
    return value if type(value) is int else None


def set_number(module: nn.Module, attribute: Attribute) -> None:
    """Let a stored number follow."""
    if attribute.position is None:
        setattr(module, attribute.name, attribute.after)
        return
    values = getattr(module, attribute.name)
    changed = list(values)
    changed[attribute.position] = attribute.after
    setattr(module, attribute.name, type(values)(changed))
