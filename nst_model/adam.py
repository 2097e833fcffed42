"""Adam (Kingma and Ba, 2015): the optimizer that needs no curvature, and so cannot be led astray by it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

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
        x: the current point, of `start`'s shape, in the same memory always: copy what you want to keep.
    """

    def __init__(self, start: Tensor, learning_rate: float) -> None:
        self.x = start.detach().clone()
        self._mean, self._square = torch.zeros_like(self.x), torch.zeros_like(self.x)
        exact = torch.float32 if start.device.type == "mps" else torch.float64
        self._given_rate = torch.full((), learning_rate, dtype=exact, device=start.device)
        self._rate = self._given_rate.clone()
        self._steps = torch.zeros((), dtype=exact, device=start.device)

    @property
    def form(self) -> Hashable:
        """What another minimization must have in common for `restore` to take its state, and to go on alike."""
        return ("adam", self.x.shape, self.x.dtype)

    def restart(self, x: Tensor) -> None:
        """Go on from `x`, without memory and with steps half as long."""
        self.forget()
        self.x.copy_(x)
        self._rate /= 2

    def forget(self) -> None:
        """Go on from where it is, without memory."""
        for memory in (self._mean, self._square, self._steps):
            memory.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on exactly, after a step: copies, on the device.

        x, mean and square, of `start`'s shape; steps, given_rate and rate, scalars.
        """
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where a minimization of as many unknowns was when `state` was made."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Return by name all that changes."""
        names = ("x", "mean", "square", "steps", "given_rate", "rate")
        return {name: self.x if name == "x" else getattr(self, f"_{name}") for name in names}

    def step(self, gradient: Tensor, loss: Tensor) -> None:  # noqa: ARG002 - the interface of LBFGS
        """Move `x` against the gradient at it, of its shape."""
        g = gradient.detach()
        self._steps += 1
        self._mean.lerp_(g, 1 - MEAN_DECAY)
        self._square.lerp_(g.square(), 1 - SQUARE_DECAY)
        mean = self._mean / (1 - MEAN_DECAY**self._steps).to(g)
        square = self._square / (1 - SQUARE_DECAY**self._steps).to(g)
        self.x.sub_(self._rate.to(g) * mean / (square.sqrt() + EPSILON)).clamp_(0, 1)

    def carried(self, start: Tensor, margin_px: int = 0) -> Adam:
        """Return an optimizer that goes on at another size, (1, 3, H, W), from `start`, with this one's moments.

        The moments count gradients, and those of a picture of n pixels are as 1/n. A margin stays as wide as it is.
        """
        other = Adam(start, 0.0)
        finer = self.x.numel() / start.numel()
        size = [length - 2 * margin_px for length in start.shape[2:]]
        mean = F.interpolate(trimmed(self._mean, margin_px), size=size, mode="bicubic", antialias=True)
        square = F.interpolate(trimmed(self._square, margin_px), size=size, mode="bilinear", antialias=True)
        other._mean.copy_(mirrored(mean, margin_px) * finer)
        other._square.copy_(mirrored(square, margin_px).clamp_min(0) * finer**2)
        other._steps.copy_(self._steps)
        for rate in (other._given_rate, other._rate):
            rate.copy_(self._given_rate)
        return other
