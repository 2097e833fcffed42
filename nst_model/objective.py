"""The objective of one stylization, as a module that TorchScript compiles: trunk, style targets and losses in one.

Shapes: C channels, H and W positions of a layer. A picture is (1, 3, H, W), RGB, fp32, nominally in [0, 1].
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_model.network import Trunk

METADATA_FILE = "nst.json"


class Losses(NamedTuple):
    """The objective and what it is made of.

    Attributes:
        total: content_weight · content + style_weight · Σ weight · style, a scalar.
        content: the content loss before its weight, a scalar.
        style: each style layer's loss before any weight, (L,), in the order of `Objective.style_layers`.
    """

    total: Tensor
    content: Tensor
    style: Tensor


def gram(features: Tensor) -> Tensor:
    """Return the Gram matrix of features (1, C, H, W): (C, C), the mean over positions of the outer product.

    Divides by H·W, so that it means the same at every size; Gatys et al. (2016), eq. 3, does not.
    """
    positions = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    # The number of positions stays an integer: a float would be baked into an exported graph.
    return positions.t() @ positions / positions.shape[0]


class GramLoss(nn.Module):
    """Mean squared difference of the Gram matrix to the style's.

    Gatys et al. (2016), eq. 4, is a quarter of this.
    """

    weight: float
    target: Tensor

    def __init__(self, target: Tensor, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("target", target)

    def forward(self, features: Tensor) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar."""
        return F.mse_loss(gram(features), self.target)


class ContentLoss(nn.Module):
    """Mean squared difference of the features to the content's. Gatys et al. (2016), eq. 1, is half the sum."""

    weight: float

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the loss of features (1, C, H, W) against a target of the same shape, a scalar."""
        return F.mse_loss(features, target)


class Objective(nn.Module):
    """What is minimized: a function of the picture and of the content's features.

    The style's targets are buffers: they serve any picture size and are saved with the module. The content's features
    have the size of the picture, so they are an argument.

    Args:
        trunk: the feature model; must tap every layer named.
        style_targets: layer → Gram matrix (C, C) of the style.
        style_layers: layer → relative weight; the weights sum to 1.
        content_layers: layer → relative weight; the weights sum to 1.
    """

    content_weight: float
    style_weight: float
    style_layers: Final[list[str]]
    content_layers: Final[list[str]]

    def __init__(
        self,
        trunk: Trunk,
        style_targets: Mapping[str, Tensor],
        *,
        style_layers: Mapping[str, float],
        content_layers: Mapping[str, float],
        style_weight: float,
        content_weight: float,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.style_weight = style_weight
        self.content_weight = content_weight
        self.style_layers = list(style_layers)
        self.content_layers = list(content_layers)
        self.style = nn.ModuleDict(
            {layer: GramLoss(style_targets[layer], weight) for layer, weight in style_layers.items()}
        )
        self.content = nn.ModuleDict({layer: ContentLoss(weight) for layer, weight in content_layers.items()})

    def forward(self, image: Tensor, content: dict[str, Tensor]) -> Losses:
        """Return the losses of a picture (1, 3, H, W), given `content_targets` of the content image."""
        features = self.trunk(image)
        content_loss = torch.zeros((), device=image.device)
        for layer, loss in self.content.items():
            content_loss = content_loss + loss.weight * loss(features[layer], content[layer])
        style_loss = torch.zeros((), device=image.device)
        style_losses: list[Tensor] = []
        for layer, loss in self.style.items():
            value = loss(features[layer])
            style_losses.append(value)
            style_loss = style_loss + loss.weight * value
        total = self.content_weight * content_loss + self.style_weight * style_loss
        return Losses(total, content_loss, torch.stack(style_losses))

    @torch.jit.export
    def loss_and_gradient(self, image: Tensor, content: dict[str, Tensor]) -> tuple[Losses, Tensor]:
        """Return the losses of a picture and the total's gradient, (1, 3, H, W). One closure of the optimizer.

        Does not work under the caller's `torch.no_grad`.
        """
        image = image.detach().requires_grad_(True)
        losses = self.forward(image, content)
        gradient = torch.autograd.grad([losses.total], [image])[0]
        assert gradient is not None
        return Losses(losses.total.detach(), losses.content.detach(), losses.style.detach()), gradient

    @torch.jit.export
    def content_targets(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features that the content is compared at, layer → (1, C, H, W), of the content image."""
        features = self.trunk(image.detach())
        return {layer: features[layer].detach() for layer in self.content_layers}


def script(objective: Objective) -> torch.jit.ScriptModule:
    """Return `objective` compiled by TorchScript; it shares the original's tensors."""
    with _deprecation_accepted():
        return torch.jit.script(objective)


def save_artifact(module: torch.jit.ScriptModule, target: Path | IO[bytes], metadata: Mapping[str, Any]) -> None:
    """Write a scripted objective and its metadata (anything JSON can hold) to a file that C++ can load too."""
    # Through a buffer: torch's writer reports a full disk by ending the process.
    buffer = io.BytesIO()
    with _deprecation_accepted():
        torch.jit.save(module, buffer, _extra_files={METADATA_FILE: json.dumps(dict(metadata)).encode()})
    if isinstance(target, Path):
        target.write_bytes(buffer.getbuffer())
    else:
        target.write(buffer.getbuffer())


def load_artifact(
    source: Path | IO[bytes], device: torch.device | str = "cpu"
) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """Return the scripted objective and the metadata that `save_artifact` wrote."""
    extra = {METADATA_FILE: ""}
    with _deprecation_accepted():
        module = torch.jit.load(  # type: ignore[no-untyped-call]
            str(source) if isinstance(source, Path) else source, map_location=device, _extra_files=extra
        )
    return module, json.loads(extra[METADATA_FILE])


class _deprecation_accepted(warnings.catch_warnings):  # noqa: N801 - reads as a statement
    """TorchScript is deprecated, and is what this project ships; ARCHITECTURE.md says why."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
