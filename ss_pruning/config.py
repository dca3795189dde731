"""What a call can be asked for, in plain words: imports nothing heavy."""

from __future__ import annotations

from typing import Literal

Method = Literal["none", "mean", "linear", "reconstruct"]


METHODS: tuple[Method, ...] = ("none", "mean", "linear", "reconstruct")


#: Those that solve the weights that stay anew, from calibration inputs.
SOLVED: tuple[Method, ...] = ("linear", "reconstruct")


#: Those that put what is constant of removed channels into biases.
FOLDED: tuple[Method, ...] = ("mean", "linear")
