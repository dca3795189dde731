"""While a network is pruned, it returns what its head's last convolutions put out, and nothing else.

Decoded boxes are in pixels beside scores in [0, 1], and some heads choose among them: what their error is says little.
And heads return the features that they read, for their shapes alone; as outputs these could not be pruned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _RawOutputs:
    """Goes before a network's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        return _without_features(outputs[1] if isinstance(outputs, tuple) else outputs)


def _without_features(outputs: Any) -> Any:
    if not isinstance(outputs, dict):
        return outputs
    return {key: _without_features(value) for key, value in outputs.items() if key != "feats"}


@contextmanager
def raw_outputs(network: nn.Module) -> Iterator[None]:
    """Inside the block `network` returns logits, by name: of boxes, classes, masks, key points, angles."""
    kind = type(network)
    network.__class__ = type(kind.__name__, (_RawOutputs, kind), {})
    try:
        yield
    finally:
        network.__class__ = kind
