"""A training that was interrupted, as one safetensors file: weights, the best ones, Adam's state; numbers in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ss_pruning._utils.arrays import digest
from ss_pruning._utils.files import write_bytes
from ss_pruning._utils.modules import tensors_of
from ss_pruning.errors import FileFormatError, InputError
from ss_pruning.recovery.report import HeldOutResult, Moment
from ss_pruning.recovery.training import Training

_KEY = "ss_pruning_recovery"
_NUMBERS = ("step", "seconds", "best_step", "stopped", "turns", "first_loss")


class Checkpoint:
    """The file of one training; it belongs to the weights that the model came with, the images and the settings."""

    def __init__(self, path: str | os.PathLike[str], training: Training) -> None:
        self.path, self.training = Path(path), training
        self.recipe = self._recipe()

    def save(self) -> None:
        """Write it, whole or not at all.

        Raises:
            InputError: It cannot be written.
        """
        state, held = self.training.state, self.training.optimizer.state
        tensors = {
            f"{part}/{name}": tensor.detach().clone().contiguous()
            for name, weight in state.weights.items()
            for part, tensor in {"weights": weight, "best": state.best[name], **held.get(weight, {})}.items()
        }
        note = {name: getattr(state, name) for name in _NUMBERS} | {
            "recipe": self.recipe,
            "history": [asdict(measured) for measured in state.history],
            "before": asdict(state.before),
            "after": asdict(state.after),
        }
        note["sha256"] = digest(sorted(tensors.items()), note)
        write_bytes(self.path, to_bytes(tensors, metadata={_KEY: json.dumps(note)}))

    def restore(self) -> None:
        """Go on from the file, if it is there.

        Raises:
            FileFormatError: It is damaged, or something else.
            InputError: It belongs to another training.
        """
        if not self.path.exists():
            return
        note, tensors = _read(self.path)
        try:
            if note["recipe"] != self.recipe:
                raise InputError(
                    f"'{self.path}' belongs to a recovery of another model, on other images or with other settings; "
                    "name another file, or delete it"
                )
            self._fill(note, tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise FileFormatError(f"'{self.path}' is damaged ({error}); delete it to start anew") from error

    @torch.no_grad()
    def _fill(self, note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        state, optimizer = self.training.state, self.training.optimizer
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            weight = state.weights[name]
            if part in ("weights", "best"):
                (weight if part == "weights" else state.best[name]).copy_(tensor)
            else:  # Adam counts its steps on the CPU
                optimizer.state[weight][part] = tensor if part == "step" else tensor.to(weight.device)
        for name in _NUMBERS:
            setattr(state, name, note[name])
        state.before, state.after = HeldOutResult(**note["before"]), HeldOutResult(**note["after"])
        state.history = [
            Moment(m["step"], m["loss"], HeldOutResult(**m["fidelity"])) for m in note["history"]
        ]

    def _recipe(self) -> str:
        """A digest of all that decides what comes out."""
        training = self.training
        imitation = training.imitation
        said = [
            asdict(training.settings),
            asdict(training.length),
            [asdict(p) for p in imitation.places],
            sorted(training.state.weights),
        ]
        inputs = training.images.tensors() + [t for part in training.held_out.parts for t in part.tensors()]
        models = [
            tensor for model in (imitation.model, imitation.dense) for tensor in tensors_of(model).values()
        ]
        return digest((("", tensor) for tensor in [*models, *inputs]), said)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            note = dict(json.loads((file.metadata() or {})[_KEY]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if note.pop("sha256") != digest(sorted(tensors.items()), note):
            raise ValueError("its checksum does not fit")
        return note, tensors
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(
            f"'{path}' is damaged, or no checkpoint of a recovery ({error}); where that is said a second time, delete "
            "it to start anew"  # an interrupt in the midst of torch's own code looks like it
        ) from error
