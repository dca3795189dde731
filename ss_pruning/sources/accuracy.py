"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ss_pruning._utils.modules import device_of
from ss_pruning._utils.progress import step
from ss_pruning._utils.running import preserved
from ss_pruning.errors import InputError, ModelError

if TYPE_CHECKING:
    Loader = DataLoader[Any]


def accuracy(model: nn.Module, loader: Loader) -> float:
    """Return the fraction of images whose largest output is their label (top-1).

    Raises:
        InputError: the outputs are no class scores, or a label has no output.
        ModelError: the model does not run on these images.
    """
    device = device_of(model)
    right, seen, total = 0, 0, len(loader.dataset)  # type: ignore[arg-type]
    with preserved(model, training=False), torch.inference_mode():
        for images, labels in batches(loader):
            right += _right(model, images.to(device), labels.to(device))
            seen += len(labels)
            step(seen, total)
    if not seen:
        raise InputError("no images to measure accuracy on.")
    return right / seen


def batches(loader: Loader) -> Iterator[Any]:
    """The batches of a loader; what a worker process refuses is said without its traceback."""
    try:
        yield from loader
    except InputError as error:
        # A worker process sends its whole traceback as the message; the last part is what was said.
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    try:
        outputs = model(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"the model does not run on images of shape {list(images.shape)}: {error}. "
            "Check the input size (--input-size)."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        what = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"accuracy needs a classifier with outputs [n, classes]; this model returns {what}.")
    if len(labels) and int(labels.max()) >= outputs.shape[1]:
        raise InputError(
            f"the images have labels up to {int(labels.max())}, but the model has {outputs.shape[1]} "
            "outputs: these images are not of the classes that it was trained on."
        )
    return int((outputs.argmax(1) == labels).sum())
