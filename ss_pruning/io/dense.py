"""The dense model that a file was pruned from: rebuilt, and known again by the checksum of its weights."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ss_pruning.errors import InputError
from ss_pruning.io.checkpoint import (
    Architecture,
    architecture_of,
    built,
    checksum_of_weights,
    dense_checksum_of,
)


def load_dense(
    path: str | os.PathLike[str],
    architecture: Architecture | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """Rebuild the dense model that a file was pruned from, as `recover_` wants it.

    Args:
        path: A file of `save`, which keeps a checksum of the dense weights where it was told the dense model.
        architecture: As for `load`; may be left out where the file names one. Only a name that is given here may ask
            for weights, as "timm:resnet50,pretrained=True" does.
        weights: The dense weights: a `.safetensors` file, or a `.pth`, `.pt`, `.th` or `.bin` file that holds tensors
            only. Not needed where the architecture comes with them.

    Returns:
        The dense model in eval mode, on the CPU.

    Raises:
        InputError: The weights are not those that were pruned, or nothing says where they are.
        FileFormatError: The file is damaged, or not written by `save`.
    """
    from ss_pruning.sources.weights import load_weights

    named = architecture_of(path)
    if architecture is None and (named or "").startswith("demo:"):
        architecture = named  # the package has its weights
    dense = built(architecture, named, path)
    if weights is not None:
        load_weights(dense, weights)
    check_dense(dense, path, known=weights is not None or callable(architecture))
    return dense.eval()


def check_dense(dense: nn.Module, path: str | os.PathLike[str], *, known: bool) -> None:
    """Refuse a dense model whose weights are not those that a file was pruned from.

    Where it is `known` what its weights are, since somebody has said so, a file without a checksum is no obstacle.

    Raises:
        InputError: They are others, or nobody knows.
    """
    wanted = dense_checksum_of(path)
    if wanted is None and not known:
        raise InputError(
            f"'{path}' does not tell its dense weights, and nothing else says where they are: give --weights (in "
            "Python weights=, or the dense model itself to recover_)"
        )
    if wanted is not None and wanted != checksum_of_weights(dense):
        raise InputError(
            f"these are not the dense weights that '{path}' was pruned from (their checksum is another): give "
            "--weights, or a --model that comes with them (in Python weights=, or to recover_ any model that is to be "
            "imitated)"
        )
