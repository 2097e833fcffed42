"""The plain loops that speed is measured against: eager fp32 and autograd, as tutorials write them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model import FeatureModel, Precision, Style, StylizeOptions, gram
from nst_model.network import build_trunk
from nst_model.options import relative
from nst_model.variation import neighbours


def as_installed() -> AbstractContextManager[None]:
    """Return a context with fp32 as PyTorch comes, which `FeatureModel` changes: a GPU convolves in TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True)


def leaf(content: Tensor) -> Tensor:
    """Return a photograph (3, H, W) as a picture for autograd to differentiate to, (1, 3, H, W)."""
    return content[None].clone().requires_grad_(True)


def textbook_loop(model: FeatureModel, image: Tensor, style: Tensor, options: StylizeOptions) -> Iterator[float]:
    """Yield the loss before each iteration of `torch.optim.LBFGS` on the objective of `gatys`, which it then makes.

    `image` (1, 3, H, W), a leaf of autograd's, is optimized in place; as it is given, it is the content. `style` is
    (3, H, W).
    """
    style_layers, content_layers = relative(options.style_layers), relative(options.content_layers)
    trunk = build_trunk(
        model.weights,
        [*style_layers, *content_layers],
        pooling=options.pooling,
        precision=Precision.FP32,
        device=model.device,
    )
    layers = [(stage.name, stage.weight.contiguous(), stage.bias, stage.pooled) for stage in trunk.stages]

    def features(x: Tensor) -> dict[str, Tensor]:
        found, x = {}, x - trunk.mean
        for name, weight, bias, pooled in layers:
            x = F.relu(F.conv2d(F.avg_pool2d(x, 2) if pooled else x, weight, bias, padding=1))
            found[name] = x
        return found

    with torch.no_grad():
        there = features(image)
        grams = {layer: gram(found) for layer, found in features(style[None]).items() if layer in style_layers}
    optimizer = torch.optim.LBFGS([image], max_iter=1, history_size=100, tolerance_grad=0, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        here = features(image)
        loss = options.content_weight * sum(
            w * F.mse_loss(here[layer], there[layer]) for layer, w in content_layers.items()
        )
        loss = loss + options.style_weight * sum(
            w * F.mse_loss(gram(here[layer]), grams[layer]) for layer, w in style_layers.items()
        )
        loss.backward()
        return loss

    while True:
        with as_installed():
            loss = float(optimizer.step(closure).detach())
        yield loss


def plain_root(matrix: Tensor) -> Tensor:
    """Return the square root of a matrix by twelve Newton–Schulz steps that autograd follows."""
    identity = torch.eye(len(matrix), device=matrix.device)
    norm = torch.linalg.matrix_norm(matrix) + 1e-8
    root, inverse = matrix / norm, identity
    for _ in range(12):
        step = 1.5 * identity - 0.5 * (inverse @ root)
        root, inverse = root @ step, step @ inverse
    return root * norm.sqrt()


def plain_fine(model: FeatureModel, content: Tensor, style: Tensor) -> Iterator[float]:
    """Yield the loss before each iteration of Adam on the objective of `fine`, which it then makes.

    Both pictures are (3, H, W). The first loss is that at the content.
    """
    options = StylizeOptions(precision=Precision.FP32)
    shares, kept = relative(options.style_layers), model.style_targets(Style(style), options)
    trunk, margin = model.trunk(options), options.margin_px
    layers = [(s.name, s.weight.contiguous(), s.bias, s.pooled, s.padding) for s in trunk.stages]
    image = F.pad(content[None], [margin] * 4, mode="reflect")

    def features(x: Tensor) -> dict[str, Tensor]:
        found, x = {}, F.pad(x - trunk.mean, [1] * 4, mode="replicate")
        for name, weight, bias, pooled, padding in layers:
            x = F.relu(F.conv2d(F.max_pool2d(x, 2) if pooled else x, weight, bias, padding=padding))
            found[name] = x
        return found

    def moments(found: Tensor) -> tuple[Tensor, Tensor]:
        columns = found[0].flatten(1)
        centre = columns.mean(dim=1)
        return centre, columns @ columns.T / columns.shape[1] - torch.outer(centre, centre)

    with torch.no_grad():
        there = features(image)["relu4_2"]
    targets = {}
    for layer, known in kept.items():
        covariance = known["gram"] - torch.outer(known["mean"], known["mean"])
        targets[layer] = known["mean"], covariance.trace(), plain_root(covariance)
    image = image.clone().requires_grad_(True)
    adam = torch.optim.Adam([image], lr=0.02, betas=(0.9, 0.99))

    def step() -> float:
        adam.zero_grad()
        here = features(image)
        loss = options.content_weight * F.mse_loss(here["relu4_2"], there)
        for layer, share in shares.items():
            centre, covariance = moments(here[layer])
            centre_there, variance, root = targets[layer]
            overlap = plain_root(root @ covariance @ root).trace()
            distance = (covariance.trace() + variance - 2 * overlap) / len(centre)
            loss = loss + share * (F.mse_loss(centre, centre_there) + distance)
        down, across, one, other = (difference.square().mean() for difference in neighbours(image))
        loss = loss + options.tv_weight * (down + across + 0.5 * (one + other)) / 3
        loss.backward()
        adam.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        return float(loss.detach())

    while True:
        with as_installed():
            loss = step()
        yield loss
