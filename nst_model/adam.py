"""Adam (Kingma and Ba, 2015): the optimizer that needs no curvature, and so cannot be led astray by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.margin import mirrored, trimmed

MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
EPSILON = 1e-8


class Adam:
    """The memory of one minimization by Adam, with the interface of `LBFGS`.

    The second moment decays by 0.99, not 0.999, and x stays in [0, 1], as suits pictures (Crowson, 2021).

    Args:
        start: first x, any shape, fp32. Not modified.
        learning_rate: step size, in units of x.

    Attributes:
        x: the current point, of `start`'s shape. Replaced by each step, never modified in place.
    """

    def __init__(self, start: Tensor, learning_rate: float) -> None:
        self.x = start.detach().clone()
        self._given_rate = self._learning_rate = learning_rate
        self._mean = torch.zeros_like(start)
        self._square = torch.zeros_like(start)
        self._steps = 0
        self._g: Tensor | None = None

    def restart(self, x: Tensor) -> None:
        """Go on from `x`, without memory and with steps half as long."""
        self.forget()
        self.x = x
        self._learning_rate /= 2

    def forget(self) -> None:
        """Go on from where it is, without memory."""
        self._mean.zero_()
        self._square.zero_()
        self._steps = 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what `restore` needs to go on exactly, after a step: x and the moments, and for JSON the rest."""
        tensors = {"x": self.x, "mean": self._mean.clone(), "square": self._square.clone()}
        return tensors, {"given_rate": self._given_rate, "rate": self._learning_rate, "steps": self._steps}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Adam:
        """Return the minimization that `state` was of, on the device of its tensors."""
        self = cls(tensors["x"], values["given_rate"])
        self._learning_rate, self._steps = values["rate"], values["steps"]
        self._mean, self._square = tensors["mean"].clone(), tensors["square"].clone()
        return self

    def observe(self, gradient: Tensor) -> Tensor:
        """Return the squared norm of the gradient at `x`, as a vector of one."""
        self._g = gradient.detach()
        return self._g.square().sum()[None]

    def step(self, products: np.ndarray, loss: float) -> None:  # noqa: ARG002 - the interface of LBFGS
        """Move `x` against the gradient last observed."""
        assert self._g is not None, "observe a gradient before each step"
        self._steps += 1
        self._mean.lerp_(self._g, 1 - MEAN_DECAY)
        self._square.lerp_(self._g.square(), 1 - SQUARE_DECAY)
        mean = self._mean / (1 - MEAN_DECAY**self._steps)
        square = self._square / (1 - SQUARE_DECAY**self._steps)
        self.x = (self.x - self._learning_rate * mean / (square.sqrt() + EPSILON)).clamp(0, 1)

    def carried(self, start: Tensor, margin_px: int = 0) -> Adam:
        """Return an optimizer that goes on at another size, (1, 3, H, W), from `start`, with this one's moments.

        The moments count gradients, and those of a picture of n pixels are as 1/n. A margin stays as wide as it is.
        """
        other = Adam(start, self._given_rate)
        finer = self.x.numel() / start.numel()
        size = [length - 2 * margin_px for length in start.shape[2:]]
        mean = F.interpolate(trimmed(self._mean, margin_px), size=size, mode="bicubic", antialias=True)
        square = F.interpolate(trimmed(self._square, margin_px), size=size, mode="bilinear", antialias=True)
        other._mean = mirrored(mean, margin_px) * finer
        other._square = mirrored(square, margin_px).clamp_min(0) * finer**2
        other._steps = self._steps
        return other
