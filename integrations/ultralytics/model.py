"""`PrunedYOLO`: a YOLO that keeps its structure when it is trained, and that safetensors can hold, too."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics import YOLO

from ss_pruning._utils.files import check_writable, write_bytes
from ss_pruning.errors import InputError
from ss_pruning.integrations.ultralytics.networks import follow_, name_of, stock_file
from ss_pruning.integrations.ultralytics.trainers import NOTE, TRAINERS
from ss_pruning.io.checkpoint import architecture_of, load, save
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, plan_of


class PrunedYOLO(YOLO):  # type: ignore[misc]
    """A YOLO whose `train` keeps the structure of a pruned network; all else is as in `ultralytics.YOLO`.

    Its `.pt` files open in `YOLO`, too, to predict, validate and export, without this package. To train on, open them
    here: `YOLO.train` builds networks anew from their yaml, and fails with a message that says so.
    """

    def __init__(
        self, model: str | os.PathLike[str] | YOLO, task: str | None = None, verbose: bool = False
    ) -> None:
        """Open one.

        Args:
            model: What `YOLO` takes, such as a `.pt` file (a pickle, **which runs the code in it**), or a
                `.safetensors` file of `save`.
            task: As for `YOLO`.
            verbose: As for `YOLO`.

        Raises:
            InputError: A `.safetensors` file is missing, or names no network of Ultralytics'.
            FileFormatError: It is damaged.
        """
        if not str(model).endswith(".safetensors"):
            super().__init__(model, task=task, verbose=verbose)
            return
        kind, _, name = (architecture_of(str(model)) or "").partition(":")
        if kind != "yolo":
            raise InputError(f"'{model}' holds no network of Ultralytics': ss_pruning.load opens it")
        super().__init__(stock_file(name.partition(",")[0]), task=task, verbose=verbose)
        network: Any = load(str(model))
        network.pt_path = str(Path(str(model)).with_suffix(".pt"))
        self._take(network)

    @classmethod
    def around(cls, network: nn.Module, yolo: YOLO) -> PrunedYOLO:
        """Like `yolo`, which is not changed, with a pruned network in place of its own."""
        pruned = cls.__new__(cls)
        nn.Module.__init__(pruned)
        del pruned.training  # YOLO asks its network
        own = {key: value for key, value in vars(yolo).items() if not key.startswith("_")}
        own |= dict.fromkeys(("predictor", "trainer", "metrics"))  # of the dense network
        own["overrides"] = dict(yolo.overrides)
        own["callbacks"] = {event: list(calls) for event, calls in yolo.callbacks.items()}
        pruned.__dict__.update(own)
        pruned._take(network)
        return pruned

    def _take(self, network: Any) -> None:
        follow_(network)
        # Text, not objects: whoever opens the file need not have this package.
        setattr(network, PLAN_ATTRIBUTE, plan_of(network).to_json())
        network.yaml["backbone"] = [[-1, 1, NOTE, []]]
        self.model = network
        known: Any = self.__dict__.get("ckpt") or {}
        # `train` begins with the network if this is set.
        self.ckpt = {"model": network, "train_args": known.get("train_args", {})}

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """By task, what `YOLO` uses, with trainers that keep the structure."""
        return {
            task: {**parts, "trainer": TRAINERS.get(task, parts.get("trainer"))}
            for task, parts in super().task_map.items()
        }

    def save(self, filename: str | os.PathLike[str] = "saved_model.pt") -> None:
        """Write the network, atomically.

        Args:
            filename: `*.pt`, in half precision as Ultralytics has it, with names of classes and all settings; or
                `*.safetensors`, as it is, for `ss_pruning.load` and this class: weights and plan only.

        Raises:
            InputError: For safetensors, that none of Ultralytics' yaml files builds the dense network; or the folder
                is missing or read-only.
        """
        check_writable(filename)
        if str(filename).endswith(".safetensors"):
            self._save_safetensors(filename)
        else:
            content = io.BytesIO()
            super().save(content)
            write_bytes(filename, content.getvalue())
        self.model.pt_path = str(Path(filename).with_suffix(".pt"))  # exports go beside it

    def _save_safetensors(self, filename: str | os.PathLike[str]) -> None:
        name = name_of(self.model)
        if name is None:
            raise InputError(
                "no yaml file of Ultralytics' builds the dense network, so that nobody could open the file: save as "
                "*.pt, or with ss_pruning.save(yolo.model, path), to be opened by load(path, dense_factory)"
            )
        save(self.model, filename, name)
