"""Running a model so that nothing of it stays, and nothing of earlier passes plays a part.

Put back are its flags, its state, its users' hooks and the random numbers.
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.hooks import BACKWARD, FORWARD, hook_tables, without_leftovers
from ss_pruning._utils.memento import Memento
from ss_pruning._utils.modules import modules_of, parameters_of
from ss_pruning._utils.outputs import tensors_in
from ss_pruning.errors import ModelError

#: The train flag that modules are given, or how it is decided for each.
Training = bool | Callable[[nn.Module], bool]

# No results: what modules of any kind hold.
_OTHER = frozenset(vars(nn.Module()))
# What an enclosing block has looked at already, by `id`.
_SEEN: ContextVar[frozenset[int]] = ContextVar("_SEEN", default=frozenset())
# Passes that read a result and that make it anew differ by no more than this, relative to the largest number.
_ROUNDING = 1e-4


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run `model` on example inputs: a tensor, a tuple of positional or a dict of keyword arguments."""
    args, kwargs = as_arguments(example_inputs)
    return model(*args, **kwargs)


def checked_call(model: nn.Module, inputs: Any, what: str = "example inputs") -> Any:
    """Likewise, of inputs that nothing has run on yet; `what` names them where the model does not run."""
    try:
        return call(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on the {what} ({type(error).__name__}: {error}); {advice(inputs)}"
        ) from error


def advice(inputs: Any) -> str:
    """What to do about inputs that a model does not run on."""
    if isinstance(inputs, list):
        return "a list is one argument: give several in a tuple"
    return "check their shape, dtype and device: call the model on them yourself first"


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of `forward`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


@contextlib.contextmanager
def preserved(
    model: nn.Module, training: Training, *, but: Iterable[nn.Module] = (), replaced: bool = False
) -> Iterator[None]:
    """Run a block with the train flag set as asked; what the passes within have changed is taken back afterwards.

    Args:
        model: What runs.
        training: The train flag of all modules but dropout, which would hide who feeds whom; or by module.
        but: Modules whose tensors are set within, on purpose.
        replaced: Other tensors will stand in the place of parameters.
    """
    before = Memento(model, but, replaced, training is not False)
    flag = training if callable(training) else lambda _: training
    try:
        with same_random_numbers(model), without_checkpoints():
            for module in modules_of(model).values():
                wanted = flag(module) and not isinstance(module, nn.modules.dropout._DropoutNd)
                if module.training != wanted:
                    module.training = wanted
            yield
    finally:
        try:
            before.restore()
        except BaseException:  # an interrupt has come in between: all of it is done again
            before.restore()
            raise


def output_of(
    model: nn.Module, example_inputs: Any, *within: AbstractContextManager[Any], training: Training = False
) -> Any:
    """What a model returns, without gradients, while contexts are entered; nothing of the pass stays."""
    with preserved(model, training), torch.no_grad(), contextlib.ExitStack() as entered:
        for context in within:
            entered.enter_context(context)
        return call(model, example_inputs)


@contextlib.contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn within, random numbers go on afterwards as if nothing had been."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models draw from
    try:
        with torch.random.fork_rng(devices=_gpus(model)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


def _gpus(model: nn.Module) -> list[int]:
    """Those that the model lies on, if CUDA is in use."""
    if not torch.cuda.is_initialized():
        return []
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def draws_of(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers are those of a seed within; afterwards they go on as if nothing had been."""
    with same_random_numbers(model):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        for gpu in _gpus(model):
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def random_state(model: nn.Module) -> bytes:
    """Where random numbers stand: the same again after a pass that draws none."""
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _gpus(model))]
    plain = random.getstate(), *map(_bytes, np.random.get_state())  # noqa: NPY002
    return b"".join([repr(plain).encode(), *(state.numpy().tobytes() for state in states)])


def _bytes(part: Any) -> bytes:
    return np.asarray(part).tobytes()


_GENERATOR = "_checkpoint_without_reentrant_generator"  # how it begins in every version


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Let activation checkpointing run what it is given at once: a pull has no use for a second pass, without labels.

    Both of torch's ways are looked up by name when they are called.
    """

    class AtOnce:
        @staticmethod
        def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
            return function(*args)

    def generator(*_: Any, **__: Any) -> Iterator[None]:
        yield

    names = vars(checkpointing)
    ours: dict[str, Any] = {name: generator for name in names if name.startswith(_GENERATOR)}
    ours["CheckpointFunction"] = AtOnce
    theirs = {name: names[name] for name in ours}
    try:
        names.update(ours)
        yield
    finally:
        names.update(theirs)


@contextlib.contextmanager
def quiet_hooks(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """Within, of the hooks on `model` only those run that take part in what it computes; later all are back.

    Which do shows in one pass on the example inputs: they return something, write into a tensor that they are given or
    change their module. The others have run once then, as they would for a pass of the user's own. Nothing that an
    interrupt leaves on the model outlives the block, see `without_leftovers`. Weights are read as in eval mode. What
    modules have kept from earlier passes is not there, see `without_kept_results`.

    Raises:
        ModelError: The model does not run on the example inputs.
    """
    with without_leftovers(model), settled_weights(model):
        for table in hook_tables(model, BACKWARD):
            table.clear()
        if tables := [table for table in hook_tables(model, FORWARD) if table]:
            idle = _idle_hooks(model, example_inputs, tables)
            for table in tables:
                for number in [n for n in table if (id(table), n) in idle]:
                    del table[number]
        with without_kept_results(model, example_inputs):
            yield


@contextlib.contextmanager
def settled_weights(model: nn.Module) -> Iterator[None]:
    """Within, to read a weight changes nothing: in training, one under a spectral norm moves with every look at it."""
    holders = [m for m in modules_of(model).values() if isinstance(m, ParametrizationList)]
    flags = [(module, module.training) for holder in holders for module in holder.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def _idle_hooks(model: nn.Module, example_inputs: Any, tables: list[Any]) -> set[tuple[int, int]]:
    """Hooks, by table and number, that ran and did nothing to what is computed."""
    ran: dict[tuple[int, int], bool] = {}
    with preserved(model, training=False), torch.no_grad():
        for table in tables:
            for number, hook in table.items():
                table[number] = partial(_listened, hook, ran, (id(table), number))
        checked_call(model, example_inputs)
    return {key for key, takes_part in ran.items() if not takes_part}


def _listened(
    hook: Callable[..., Any],
    ran: dict[tuple[int, int], bool],
    key: tuple[int, int],
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a hook, and note whether it did something."""
    tensors = tensors_among((args, kwargs))

    def state() -> list[Any]:
        own = [v for table in (vars(module), module._parameters, module._buffers) for v in table.values()]
        return [*map(id, own), *(t._version for t in tensors if not t.is_inference())]

    before = state()
    answer = hook(module, *args, **kwargs)
    ran[key] = ran.get(key, False) or answer is not None or state() != before
    return answer


class Kept(NamedTuple):
    """A table of tensors, by name, that hangs on a module."""

    module: nn.Module
    name: str
    value: dict[Any, Tensor]

    def forget(self) -> None:
        """Let it be empty."""
        vars(self.module)[self.name] = {}

    def put_back(self) -> None:
        """Let it be what it was."""
        vars(self.module)[self.name] = self.value

    def missing_in(self, module: nn.Module) -> bool:
        """Whether a module's is empty."""
        return not vars(module).get(self.name)


def kept_by(module: nn.Module) -> list[Kept]:
    """All that may be results. A single tensor is left alone: code may rely on it, `to` of YOLO on its anchors."""
    own = ((name, value) for name, value in vars(module).items() if name not in _OTHER)
    return [Kept(module, name, value) for name, value in own if _is_table(value)]


def _is_table(value: Any) -> bool:
    return type(value) is dict and bool(value) and all(type(item) is Tensor for item in value.values())


@contextlib.contextmanager
def without_kept_results(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """Within, nothing is there that modules have kept from earlier passes and that the next pass makes anew.

    Biases of attention laid out once a device, features by name: they have the old widths, and hide what they were made
    from. Which they are shows in a pass without them, which puts out the same and leaves them there again. After the
    block they are back, unless parameters have changed.
    """
    found = [kept for module in modules_of(model).values() for kept in kept_by(module)]
    found = [kept for kept in found if id(kept.value) not in _SEEN.get()]
    parameters, forgotten = _look_of_parameters(model), list[Kept]()
    token = _SEEN.set(_SEEN.get() | {id(kept.value) for kept in found})
    try:
        if found:
            forgotten = _made_anew(found, model, example_inputs)
        for kept in forgotten:
            kept.forget()
        yield
    finally:
        _SEEN.reset(token)
        if _look_of_parameters(model) == parameters:
            for kept in forgotten:
                kept.put_back()


def _look_of_parameters(model: nn.Module) -> list[tuple[Any, ...]]:
    tensors = parameters_of(model).values()
    return [(id(t), t.shape, None if t.is_inference() else t._version) for t in tensors]


def _made_anew(found: Sequence[Kept], model: nn.Module, example_inputs: Any) -> list[Kept]:
    """Those that are results; modules of a class keep the same under the same name."""
    alike = defaultdict[tuple[type, str], list[Kept]](list)
    for kept in found:
        alike[type(kept.module), kept.name].append(kept)
    try:
        expected = tensors_in(output_of(model, example_inputs))
    except Exception:  # whoever runs it next says so
        return []
    results = (some for some in alike.values() if _are_results(some, model, example_inputs, expected))
    return [kept for some in results for kept in some]


def _are_results(
    some: Sequence[Kept], model: nn.Module, example_inputs: Any, expected: Mapping[str, Tensor]
) -> bool:
    there_again = False

    @contextlib.contextmanager
    def looking() -> Iterator[None]:
        nonlocal there_again
        for kept in some:
            kept.forget()
        yield
        there_again = not any(kept.missing_in(kept.module) for kept in some)

    try:
        output = tensors_in(output_of(model, example_inputs, looking()))  # all is there again afterwards
    except Exception:  # it is read, and not made
        return False
    same = output.keys() == expected.keys() and all(_same(output[name], expected[name]) for name in output)
    return there_again and same


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    largest = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True)
