"""Calibration inputs, however they come: each batch is brought to the form of the example inputs, and they are joined.

A model takes a tensor, a tuple or a dict; data loaders give these, labels beside them, or a dict with more keys than
the model has. From here on there is one `Batch`, cut and repeated along the batch axis whatever it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import tensors_among
from ss_pruning.errors import InputError

#: No more samples than these are taken.
MOST = 1024
#: Statistics are taken on so many samples at a time.
BATCH = 64
# Numbers of the inputs that run at once: what larger batches make is too large for what the C library keeps at hand,
# and the system clears memory anew for every layer.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Batch:
    """Many inputs of a model: some rows of what the caller holds, copied only while they run.

    Attributes:
        source: What the caller holds, in the form in which the model takes it.
        batched: By entry (tensor, list of images, or other), whether it has one row a sample.
        rows: `[count]`, the numbers of the rows.
        unit: Samples run in multiples of this number only, as where a batch holds the frames of clips.
        most: No more samples run at once; None for any number.
        channels_last: Whether images are laid out channels last.
    """

    source: Any = field(repr=False)
    batched: tuple[bool, ...] = field(repr=False)
    rows: Tensor
    unit: int = 1
    most: int | None = None
    channels_last: bool = False

    @staticmethod
    def of(inputs: Any) -> Batch:
        """What the model takes, as a batch: entries with as many rows as the first one are cut with it."""
        if isinstance(inputs, Batch):
            return inputs
        entries, _ = _flat(inputs)
        lengths = [_rows(entry) for entry in entries]
        first = next((length for length in lengths if length is not None), None)
        batched = tuple(length is not None and length == first for length in lengths)
        return Batch(inputs, batched, torch.arange(first or 0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """Some of the samples."""
        return replace(self, rows=self.rows[index])

    def different(self) -> int:
        """How many samples there are, counting once those that are as the first is, such as blank ones."""
        rows, held = self.rows.tolist(), self._held()
        others = (any(not torch.equal(x[row], x[rows[0]]) for x in held) for row in rows[1:])
        return min(len(rows), 1) + sum(others)

    @property
    def inputs(self) -> Any:
        """In the form in which the model takes them: a copy, in which it may write."""
        return self._mapped(self._taken)

    @property
    def numbers(self) -> int:
        """How many a sample has, in all entries; the mean of those that differ in size."""
        held = [x for entry in self._held() for x in (entry if isinstance(entry, list) else [entry])]
        return int(sum(x.numel() for x in held)) // max(self._held_rows(), 1)

    def of_units(self, numbers: Tensor) -> Batch:
        """Some of the samples, those that must run together by the number that they have together."""
        return self[(numbers[:, None] * self.unit + torch.arange(self.unit)).flatten()]

    def split(self, size: int) -> list[Batch]:
        """Parts of about so many samples, and no more than run at once."""
        size = self.most or max(size // self.unit, 1) * self.unit
        return [self[begin : begin + size] for begin in range(0, len(self), size)]

    def parts(self) -> list[Batch]:
        """All samples, as many at once as run fast."""
        return self.split(max(_AT_ONCE // max(self.numbers, 1), 1))

    def at_most(self, size: int) -> Batch:
        """The first samples, of which no more run at once."""
        return self.split(size)[0]

    def repeated(self, copies: int) -> Batch:
        """The same samples so many times, one copy behind the other."""
        return replace(self, rows=self.rows.repeat(copies))

    def resized(self, count: int) -> Batch:
        """So many samples, the same again and again."""
        return self.repeated(-(-count // max(len(self), 1)))[:count]

    def limited(self, unit: int, most: int | None) -> Batch:
        """Of which only such numbers run; what is left over is dropped."""
        return replace(self, unit=unit, most=most)[: len(self) // unit * unit]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With each tensor that goes by samples changed."""
        whole = self.rows.equal(torch.arange(self._held_rows()))

        def changed(entry: Any) -> Any:
            x = entry if whole else self._taken(entry)
            return [change(one) for one in x] if isinstance(x, list) else change(x)

        return replace(self, source=self._mapped(changed), rows=torch.arange(len(self)))

    def tensors(self) -> list[Tensor]:
        """What goes by samples."""
        taken = map(self._taken, self._held())
        return [x for entry in taken for x in (entry if isinstance(entry, list) else [entry])]

    def _held(self) -> list[Any]:
        """The entries that go by samples, with all of them."""
        entries, _ = _flat(self.source)
        return [entry for entry, by_row in zip(entries, self.batched, strict=True) if by_row]

    def _held_rows(self) -> int:
        return len(next(iter(self._held()), ()))

    def _taken(self, entry: Any) -> Any:
        if isinstance(entry, list):
            return [entry[i] for i in self.rows.tolist()]
        taken: Tensor = entry[self.rows.to(entry.device)]
        laid_out = self.channels_last and taken.dim() == 4 and not taken.is_cuda
        return taken.contiguous(memory_format=torch.channels_last) if laid_out else taken

    def _mapped(self, change: Callable[[Any], Any]) -> Any:
        entries, spec = _flat(self.source)
        pairs = zip(entries, self.batched, strict=True)
        return pytree.tree_unflatten([change(entry) if by_row else entry for entry, by_row in pairs], spec)


def stream(batches: Iterable[Any], example: Any) -> Iterator[Batch]:
    """Batches as they come, each in the form of the example inputs; without an example, of one tensor."""
    for number, batch in enumerate(batches):
        where = f"calibration batch {number}"
        if example is None and not isinstance(batch, Batch):
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            batch = Batch.of(images).mapped(Tensor.detach)
        elif not isinstance(batch, Batch):
            batch = Batch.of(shaped(batch, example, where))
        _check_finite(batch, example, where)
        yield batch


def gather(calibration: Any, example: Any, most: int = MOST) -> Batch:
    """Calibration inputs as one batch, on the device and in the precision of the example inputs.

    Args:
        calibration: One batch, or an iterable of batches (a data loader), each in the form of the example inputs.
            Labels behind them are dropped, as are keys that the example does not have.
        example: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        most: Take no more samples than this.

    Raises:
        InputError: Nothing is there, a batch has another form, or holds NaN or Inf.
    """
    parts: list[Batch] = []
    count = 0
    for part in stream(_batches(calibration, example), example):
        parts.append(part)
        count += len(part)
        if count >= most:
            break
    if not count:
        raise InputError(
            "the calibration inputs are empty; give a tensor with some, or batches (an iterator gives its own only "
            "once: make it anew)"
        )
    return _joined(parts)[:most]


def shaped(batch: Any, example: Any, where: str) -> Any:
    """A batch in the form of the example inputs, without what comes beside it, such as labels.

    What is no tensor in the example stays what it is there.
    """
    if isinstance(example, Mapping):
        return _as_mapping(batch, example, where)
    if isinstance(example, tuple):
        return _as_tuple(batch, example, where)
    if isinstance(example, list):
        return _as_images(batch, example, where)
    if isinstance(example, Tensor):
        return _as_tensor(batch, example, where)
    return example


def _batches(calibration: Any, example: Any) -> Iterable[Any]:
    """The batches of a source, which may be one itself."""
    if isinstance(calibration, (Tensor, Mapping)) or _is_one(calibration, example):
        return [calibration]
    if isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes)):
        return calibration
    fix = ": wrap it in a torch.utils.data.DataLoader" if hasattr(calibration, "__getitem__") else ""
    raise InputError(
        f"calibration is a {type(calibration).__name__}, which gives no batches{fix}; give {_wanted(example)}, or a "
        "data loader of such"
    )


def _is_one(calibration: Any, example: Any) -> bool:
    """Whether a tuple or list is one batch, where the model takes several tensors, or images in a list."""
    if not isinstance(calibration, (tuple, list)) or not calibration:
        return False
    if isinstance(example, list):
        return all(isinstance(item, Tensor) and item.dim() == 3 for item in calibration)
    several = isinstance(example, tuple) and _tensors(example) > 1
    return several and all(isinstance(item, Tensor) for item in calibration)


def _as_mapping(batch: Any, example: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]
    wanted = [key for key, value in example.items() if _tensors(value)]
    if not isinstance(batch, Mapping):
        if len(wanted) != 1:
            raise InputError(f"{where} is a {_kind(batch)}; give {_wanted(example)}")
        batch = {wanted[0]: batch}
    missing = [key for key in wanted if key not in batch]
    if missing:
        raise InputError(
            f"{where} has keys {sorted(map(str, batch))}, no {missing[0]!r}; give {_wanted(example)}"
        )
    return {k: shaped(batch[k], v, f"{where}, {k!r}") if k in batch else v for k, v in example.items()}


def _as_tuple(batch: Any, example: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if len(example) == 1 or not isinstance(batch, (tuple, list)):
        if not _tensors(example[0]) or _tensors(example[1:]):
            raise InputError(f"{where} is a {_kind(batch)}; give {_wanted(example)}")
        return (shaped(batch, example[0], where), *example[1:])
    if batch and isinstance(batch[0], (tuple, list)) and isinstance(example[0], Tensor):
        return _as_tuple(batch[0], example, where)  # labels behind it
    if _tensors(example[len(batch) :]):
        raise InputError(f"{where} has {len(batch)} entries; give {_wanted(example)}")
    pairs = enumerate(zip(batch, example, strict=False))
    taken = (shaped(entry, like, f"{where}, entry {i}") for i, (entry, like) in pairs)
    return (*taken, *example[len(batch) :])


def _as_images(batch: Any, example: list[Any], where: str) -> list[Any]:
    """A list of images, as detectors take them."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (tuple, list)):
        batch = batch[0]
    if not isinstance(batch, (tuple, list, Tensor)) or not example:
        raise InputError(f"{where} is a {_kind(batch)}; give {_wanted(example)}")
    return [shaped(image, example[0], f"{where}, image {i}") for i, image in enumerate(batch)]


def _as_tensor(batch: Any, example: Tensor, where: str) -> Tensor:
    if isinstance(batch, (tuple, list)) and batch:
        return _as_tensor(batch[0], example, where)
    if isinstance(batch, Mapping):
        found = [k for k, x in batch.items() if isinstance(x, Tensor) and _alike(x, example)]
        if len(found) != 1:
            raise InputError(
                f"{where} has keys {sorted(map(str, batch))}, of which {len(found)} hold a tensor like the example "
                f"input; give {_wanted(example)}, or example_inputs as a dict with the keys that forward takes"
            )
        batch = batch[found[0]]
    if not isinstance(batch, Tensor):
        raise InputError(f"{where} is a {_kind(batch)}; give {_wanted(example)}")
    if batch.dim() != example.dim() or batch.is_meta or batch.layout is not torch.strided:
        raise InputError(f"{where} is a {_kind(batch)}; give {_wanted(example)}")
    if not _alike(batch, example):
        raise InputError(
            f"{where} is {batch.dtype}, the example input {example.dtype}; give what the model takes, such as images "
            "as numbers of floating point, normalised as in training"
        )
    return batch.detach().to(example.device, example.dtype)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and (a.is_floating_point(), a.is_complex()) == (
        b.is_floating_point(),
        b.is_complex(),
    )


def _wanted(example: Any) -> str:
    """What a batch must look like, in words."""
    if isinstance(example, Mapping):
        return f"dicts with the keys {[key for key, value in example.items() if _tensors(value)]}"
    if isinstance(example, tuple) and _tensors(example) > 1:
        return f"tuples of {_tensors(example)} tensors, as the example inputs are"
    first = next(iter(tensors_among(example)), None)
    shape = "" if first is None else f" with {first.dim()} axes, like the example's {list(first.shape)}"
    return f"lists of image tensors{shape}" if isinstance(example, list) else f"tensors{shape}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        odd = "meta " if value.is_meta else "" if value.layout is torch.strided else "sparse "
        return f"{odd}tensor of shape {list(value.shape)}"
    return type(value).__name__


def _tensors(tree: Any) -> int:
    """How many arguments are tensors, or lists of them."""
    return sum(_rows(entry) is not None for entry in _flat(tree)[0])


def _flat(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The entries of inputs, of which a list of images is one."""
    return pytree.tree_flatten(tree, is_leaf=lambda x: isinstance(x, list))


def _rows(entry: Any) -> int | None:
    if isinstance(entry, list):
        return len(entry) if any(isinstance(item, Tensor) for item in entry) else None
    return len(entry) if isinstance(entry, Tensor) and entry.dim() else None


def _check_finite(batch: Batch, example: Any, where: str) -> None:
    """Refuse NaN, and Inf where the example has none (masks that are added may)."""
    examples, _ = _flat(example)
    entries, _ = _flat(batch.inputs)
    for entry, like in zip(entries, examples, strict=False):
        infinite = any(bool(x.isinf().any()) for _, x in _samples(like))
        for number, x in _samples(entry):
            if _is_sound(x, infinite):
                continue
            bad = x.isnan() if infinite else ~x.isfinite()
            index = int(bad.reshape(len(x), -1).any(1).nonzero()[0]) if number is None else number
            raise InputError(f"{where} holds NaN or Inf at index {index}; take it out or mend it")


def _is_sound(x: Tensor, infinite: bool) -> bool:
    """Whether there is no NaN, nor Inf where that is no number to expect. Its ends tell, without a copy."""
    if not x.numel():
        return True
    ends = torch.stack(x.aminmax())
    return not bool((ends.isnan() if infinite else ~ends.isfinite()).any())


def _samples(entry: Any) -> Iterator[tuple[int | None, Tensor]]:
    """The tensors of an entry, with their number where each is a sample."""
    if isinstance(entry, list):
        yield from ((i, x) for i, x in enumerate(entry) if isinstance(x, Tensor) and x.is_floating_point())
    elif isinstance(entry, Tensor) and entry.is_floating_point() and entry.dim():
        yield None, entry


def _joined(parts: Sequence[Batch]) -> Batch:
    """One batch of all; what does not go by samples must be the same in each."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(_flat(part.inputs)[0] for part in parts), strict=True)
    batched = tuple(map(all, zip(*(part.batched for part in parts), strict=True)))
    entries = [_join(column, by_row) for column, by_row in zip(columns, batched, strict=True)]
    _, spec = _flat(parts[0].inputs)
    return Batch(pytree.tree_unflatten(entries, spec), batched, torch.arange(sum(map(len, parts))))


def _join(column: Sequence[Any], by_row: bool) -> Any:
    first = column[0]
    if not by_row:
        same = all(x.equal(first) if isinstance(x, Tensor) else x == first for x in column)
        if not same:
            raise InputError(
                "an entry of the calibration batches has no row a sample and differs from batch to batch, so that they "
                "cannot be joined; give one batch"
            )
        return first
    if isinstance(first, list):
        return [image for images in column for image in images]
    shapes = {tuple(x.shape[1:]) for x in column}
    if len(shapes) > 1:
        raise InputError(
            f"calibration inputs have different shapes, {' and '.join(str(list(s)) for s in sorted(shapes))} without "
            "the batch; bring them to one"
        )
    return torch.cat(list(column))
