"""A file for another runtime as a module: it is called, timed and compared as models are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.files import absent
from ss_pruning.errors import FileFormatError, InputError, first_line


class ExportedModel(nn.Module):
    """Runs a file on the CPU, with as many threads as torch has when this is made. No code is run from the file.

    Attributes:
        path: The file.
        batch: So many inputs run at once; None for any number.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file.

        Args:
            path: What `ss_pruning.export` or any other exporter wrote.

        Raises:
            InputError: There is no such file, or the runtime is not installed.
            FileFormatError: It is no file of the runtime's, takes nothing, or the runtime cannot run it.
        """
        super().__init__()
        self.path = Path(path)
        for file in self.files:
            if not file.is_file():
                raise InputError(absent(file))
        self._inputs = self._open()
        sizes = [shape[0] for shape in self._inputs.values() if shape]
        self.batch: int | None = next((size for size in sizes if isinstance(size, int)), None)
        if self.batch == 0:
            raise FileFormatError(
                f"{str(path)!r} takes batches of no inputs; export it with a free batch size"
            )

    def _open(self) -> dict[str, list[Any]]:
        """Open the file; by name the shape of each input, where what is no whole number is free."""
        raise NotImplementedError

    def _outputs(self, arrays: dict[str, Any]) -> list[Any]:
        """What the file puts out."""
        raise NotImplementedError

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the model lies in."""
        return (self.path,)

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def inputs(self) -> int:
        """How many tensors it takes."""
        return len(self._inputs)

    @property
    def size(self) -> tuple[int, ...] | None:
        """Of one input; None where there are several, or sizes are free."""
        shapes = list(self._inputs.values())
        if len(shapes) == 1 and all(isinstance(size, int) for size in shapes[0][1:]):
            return tuple(shapes[0][1:])
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The outputs, one tensor or several, for the tensors among the arguments, taken in order.

        Raises:
            InputError: Their number, type or a size is another than the file takes, or it puts out no tensors.
        """
        values = tensors_among((args, kwargs))
        if len(values) != len(self._inputs):
            raise InputError(f"{self.path.name} takes {len(self._inputs)} tensors, not {len(values)}")
        columns = [self._split(x, name) for x, name in zip(values, self._inputs, strict=True)]
        parts = [self._run(part) for part in zip(*columns, strict=True)]
        outputs = parts[0] if len(parts) == 1 else [torch.cat(same) for same in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _split(self, values: Tensor, name: str) -> list[Tensor]:
        """Parts as large as the file takes."""
        given, taken = list(values.shape), self._inputs[name]
        fits = [a == b or not isinstance(b, int) for a, b in zip(given[1:], taken[1:], strict=False)]
        if len(given) != len(taken) or not all(fits):
            raise InputError(f"{self.path.name} takes inputs of shape {taken}, not {given}")
        if self.batch is None or given[0] == self.batch:
            return [values]
        if given[0] % self.batch:
            raise InputError(
                f"{self.path.name} takes {self.batch} inputs at a time, and {given[0]} are no multiple of that; "
                f"export it with a free batch size, as ss_pruning.export does, or take a batch of {self.batch}"
            )
        return list(values.split(self.batch))

    def _run(self, values: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = {name: x.detach().cpu().numpy() for name, x in zip(self._inputs, values, strict=True)}
        try:
            outputs = self._outputs(arrays)
        except Exception as error:  # the runtime's own, for numbers of another type, say
            raise InputError(f"{self.path.name} does not run on these inputs: {first_line(error)}") from error
        odd = next((output for output in outputs if not isinstance(output, np.ndarray)), None)
        if odd is not None:
            raise InputError(
                f"{self.path.name} puts out a {type(odd).__name__}, where tensors can be compared: export it without "
                "what makes that of them"
            )
        return [torch.from_numpy(output) for output in outputs]
