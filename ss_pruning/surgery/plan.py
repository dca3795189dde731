"""Plans: which channels of which layers stay. Applying one is the only way this package changes a model's shape."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.copying import shell
from ss_pruning._utils.memento import parameter_like
from ss_pruning._utils.modules import modules_of, tensors_of
from ss_pruning._utils.running import kept_by
from ss_pruning.errors import InputError, PlanError
from ss_pruning.graph.attention import make_prunable_
from ss_pruning.graph.connectivity import Key, Side
from ss_pruning.graph.layers import is_depthwise, layer_type_of, width
from ss_pruning.graph.refusals import check_whole
from ss_pruning.surgery.cut import Cut, cut_layer, gather_, give_bias
from ss_pruning.surgery.factors import Factor, multiply_

#: Name under which a pruned model carries the plan that made it.
PLAN_ATTRIBUTE = "ss_pruning_plan"
_FORMAT = 1


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

    @property
    def place(self) -> tuple[str, str, int | None]:
        """Where it is stored."""
        return self.path, self.name, self.position


@dataclass(frozen=True)
class Plan:
    """Immutable, serialisable: which channels stay, which stored numbers follow, and which layers get a bias.

    `factors` multiply channels that stay, see `ss_pruning.surgery.factors`.
    """

    cuts: tuple[Cut, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    biases: tuple[str, ...] = ()
    factors: tuple[Factor, ...] = ()

    def __deepcopy__(self, memo: Any) -> Plan:
        """Itself, as it never changes: copies of a model that carries it need not copy all numbers in it."""
        return self

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

        Where they differ, tensors are taken from `values`, a model of the same shapes.

        Raises:
            PlanError: The plan does not fit the model.
            ModelError: The model cannot be copied.
        """
        small = shell(model)
        with torch.inference_mode(False):  # what is made there could never be trained
            holders = {path.rpartition(".")[0] for path in (*(cut.path for cut in self.cuts), *self.biases)}
            if any(isinstance(m, nn.MultiheadAttention) for m in modules_of(small).values()):
                make_prunable_(small, holders.__contains__)
            self._check(small)
            self._cut_(small)
            _tie_(small, model)
            if values is not None:
                _take_values_(small, values)
        return small

    def _cut_(self, model: nn.Module) -> None:
        modules = modules_of(model)
        for cut in _in_order(self.cuts, modules):
            _cut(modules, cut)
        multiply_(modules, self.factors, self.cuts)
        for attribute in self.attributes:
            set_number(modules[attribute.path], attribute)
        for path in self.biases:
            give_bias(modules[path])
        setattr(model, PLAN_ATTRIBUTE, plan_of(model).then(self) if hasattr(model, PLAN_ATTRIBUTE) else self)

    def then(self, later: Plan) -> Plan:
        """The one plan that does first this and then `later`."""
        cuts: dict[Key, Cut] = {cut.key: cut for cut in self.cuts}
        for cut in later.cuts:
            first = cuts.get(cut.key)
            if first is not None:
                if cut.width != len(first.kept):
                    raise PlanError(f"'{cut.path}' has {len(first.kept)} channels, not {cut.width}")
                cut = replace(first, kept=tuple(first.kept[i] for i in cut.kept))
            cuts[cut.key] = cut
        numbers = {a.place: a for a in self.attributes}
        for a in later.attributes:
            numbers[a.place] = replace(a, before=numbers.get(a.place, a).before)
        biases = (*self.biases, *(path for path in later.biases if path not in self.biases))
        own = {cut.key: cut for cut in self.cuts}
        factors = (*self.factors, *(f.before(own.get(f.key)) for f in later.factors))
        return Plan(tuple(cuts.values()), tuple(numbers.values()), biases, factors)

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
            factors = tuple(_factor_from(f) for f in data.get("factors", ()))
            return Plan(cuts, attributes, tuple(str(path) for path in data["biases"]), factors)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
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
        made = {cut.key: cut.width for cut in self.cuts}
        for factor in self.factors:
            if not set(factor.channels) <= set(range(made.get(factor.key, 0))):
                raise PlanError(f"the plan multiplies channels of '{factor.path}' that it does not cut")
        for attribute in self.attributes:
            if _number(modules.get(attribute.path), attribute) != attribute.before:
                raise PlanError(
                    f"the plan expects the number {attribute.before} in '{attribute.path}.{attribute.name}'"
                )


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model carries, empty if none; text where its pickle is to open without this package."""
    noted = getattr(model, PLAN_ATTRIBUTE, None)
    return Plan.from_json(noted) if isinstance(noted, str) else noted or Plan()


def cut_like(model: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of the dense model that is cut like `model`, with the same shapes.

    Raises:
        InputError: It is not the model that was pruned.
        ModelError: It cannot be copied.
    """
    plan = plan_of(model)
    try:
        fresh = plan.cut_copy(dense)
    except PlanError as error:
        raise InputError(f"dense is not the model that was pruned: {error}") from error
    ours, theirs = ({n: tuple(t.shape) for n, t in tensors_of(net).items()} for net in (model, fresh))
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd and not plan.cuts:
        raise InputError(
            f"the model carries no plan, and '{odd[0]}' has another shape than in dense: give what prune_ or compact_ "
            "has made, or read it with ss_pruning.load"
        )
    if odd:
        raise InputError(
            f"dense is not the model that was pruned: cut like it, its '{odd[0]}' would have shape "
            f"{theirs.get(odd[0], 'none')}, not {ours.get(odd[0], 'none')}"
        )
    return fresh


# Attributes in which layers keep their sizes.
_SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels"),
    *("normalized_shape", "num_parameters"),
)


def adopt_(model: nn.Module, small: nn.Module) -> nn.Module:
    """Make `model` what `small` is, a copy of it that was cut: tensors, sizes, numbers that follow, the plan.

    All tables are updated (and attention that lost heads changes its class) in one call of C, between whose steps
    Python handles no signal: an interrupt comes before it or after it. The old values are held until then, so that no
    finaliser runs in between.
    """
    plan = vars(small)[PLAN_ATTRIBUTE]
    numbers: dict[str, list[str]] = {"": [PLAN_ATTRIBUTE]}
    for attribute in plan.attributes:
        numbers.setdefault(attribute.path, []).append(attribute.name)
    theirs = modules_of(small)
    steps: list[partial[None]] = []
    before = []
    for path, module in modules_of(model).items():
        own = layer_type_of(module)
        sizes = _SIZES if own is None else own.sizes.values()
        stale = [kept.name for kept in kept_by(module) if kept.missing_in(theirs[path])]
        for table, now in _differing(module, theirs[path], (*sizes, *numbers.get(path, ()), *stale)):
            steps.append(partial(dict.update, table, now))
            before.append(dict(table))
        if type(theirs[path]) is not type(module):
            steps.append(partial(object.__setattr__, module, "__class__", type(theirs[path])))
    deque(map(partial.__call__, steps), maxlen=0)
    del before
    return model


def _cut_from(data: Mapping[str, Any]) -> Cut:
    kept = tuple(int(i) for i in data["kept"])
    cut = Cut(str(data["path"]), data["side"], int(data["width"]), kept, int(data["axis"]))
    if cut.side not in ("in", "out", "through", "tensor"):
        raise PlanError(f"unknown side {cut.side!r} for '{cut.path}'")
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= cut.width:
        raise PlanError(f"the kept channels of '{cut.path}' are not distinct numbers below {cut.width}")
    return cut


def _factor_from(data: Mapping[str, Any]) -> Factor:
    channels = tuple(int(i) for i in data["channels"])
    factor = Factor(str(data["path"]), data["side"], channels, float(data["by"]))
    if factor.side not in ("out", "through", "tensor") or not 0 < factor.by < float("inf"):
        raise PlanError(f"'{factor.path}' cannot be multiplied by {factor.by} on side {factor.side!r}")
    return factor


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
        gather_(modules[owner], name, cut.axis, cut.kept)
    else:
        cut_layer(modules[cut.path], cut)


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


def _tie_(small: nn.Module, model: nn.Module) -> None:
    """Where a tensor that was cut stands in another place, too, let it do so in the cut model."""
    theirs = modules_of(small)
    places = [(tensor, vars(theirs[path])[table], name) for path, table, name, tensor in _held(model)]
    cut = {id(tensor): table[name] for tensor, table, name in places if table[name] is not tensor}
    for tensor, table, name in places:
        table[name] = cut.get(id(tensor), table[name])


def _take_values_(model: nn.Module, values: nn.Module) -> None:
    """Give a model the tensors of another one, of the same shapes, where they differ."""
    theirs = modules_of(values)
    made: dict[int, Tensor] = {}  # by what it was made for: tied tensors stay tied
    ours = modules_of(model)
    for path, table, name, tensor in list(_held(model)):
        value = vars(theirs[path])[table].get(name)
        if value is not None:
            vars(ours[path])[table][name] = made.setdefault(id(tensor), _with_values(tensor, value))


def _held(model: nn.Module) -> Iterator[tuple[str, str, str, Tensor]]:
    """Module path, table, name and tensor, each as often as it is held; those of TorchScript cannot be reached."""
    for path, module in modules_of(model).items():
        if not isinstance(module, torch.jit.ScriptModule):
            for table in ("_parameters", "_buffers"):
                for name, tensor in vars(module)[table].items():
                    if tensor is not None:
                        yield path, table, name, tensor


def _with_values(tensor: Tensor, values: Any) -> Any:
    """A tensor of the same kind, type and place with other values; itself where they are its own."""
    values = values.detach().to(tensor)
    if torch.equal(tensor, values):
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return values
    parameter = parameter_like(tensor, values)
    parameter.grad = tensor.grad
    return parameter


def _differing(
    module: nn.Module, other: nn.Module, names: Iterable[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Tables of a module, and what of them is something else in the other module."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    sizes = {name: vars(other)[name] for name in names if name in vars(other)}
    layers = {} if type(module) is type(other) else other._modules
    pairs = (
        (module._parameters, other._parameters),
        (module._buffers, other._buffers),
        (vars(module), sizes),
        (module._modules, {name: layer for name, layer in layers.items() if name not in module._modules}),
    )
    for table, now in pairs:
        changed = {name: value for name, value in now.items() if table.get(name, ...) is not value}
        if changed:
            yield table, changed
