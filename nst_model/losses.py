"""Style and content losses: tiny modules that TorchScript compiles into the objective.

Shapes: C channels, H and W positions of a layer. Features are (1, C, H, W), fp32, of mean activation 1 over natural
images. Every loss is a mean over entries, so that it means the same for every layer and size.

A style loss compares a *statistic* of the picture's features with the style's. What is kept of a style, its targets,
is a small dictionary of tensors by layer; targets of several styles mix linearly. Statistics are taken over all
positions alike or, in a region, by weights (H·W,) that sum to 1.
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_model.options import MOMENTS, ContentLoss, StyleLoss

Targets = Mapping[str, Tensor]
"""What is kept of one style at one layer: statistic's name → tensor."""

POSITIONED = frozenset({StyleLoss.DIRECT, StyleLoss.CROSS})
"""Losses that compare position by position."""

MAX_DIRECTIONS = 128
"""Directions that the sliced loss projects on, at most."""

# TorchScript sees no module constants, so those that compiled code needs are defaults of parameters or stand in place.


def as_rows(features: Tensor) -> Tensor:
    """Return features (1, C, H, W) as positions by channels, (H·W, C)."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def mean_row(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of rows (P, C): (C,)."""
    return rows.mean(dim=0) if weights is None else weights @ rows


def gram(features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the Gram matrix of features (1, C, H, W): (C, C), the mean over positions of the outer product.

    Divides by H·W, so that it means the same at every size; Gatys et al. (2016), eq. 3, does not.
    """
    rows = as_rows(features)
    if weights is None:
        # The number of positions stays an integer: a float would be baked into an exported graph.
        return rows.t() @ rows / rows.shape[0]
    return (rows * weights[:, None]).t() @ rows


def covariance(features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the covariance matrix of features (1, C, H, W) over positions: (C, C), the Gram matrix about the mean."""
    rows = as_rows(features)
    rows = rows - mean_row(rows, weights)
    if weights is None:
        return rows.t() @ rows / rows.shape[0]
    return (rows * weights[:, None]).t() @ rows


def square_roots(matrix: Tensor, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Return the square root of a positive semidefinite matrix (C, C), and the inverse of that root.

    By the coupled Newton–Schulz iteration (Higham, 2008, eq. 6.35): products only, fast on a GPU. Eigenvalues below
    some 1e-4 of the largest are not converged: their roots come out too small, their inverses too. That is wanted. With
    20 steps in place of 12, pictures come no nearer to the style by an exact measure, and have more specks.
    """
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    norm = torch.linalg.vector_norm(matrix) + 1e-8
    root = matrix / norm
    inverse = identity
    for _ in range(steps):
        step = 1.5 * identity - 0.5 * (inverse @ root)
        root = root @ step
        inverse = step @ inverse
    return root * norm.sqrt(), inverse / norm.sqrt()


def trace_of_root(matrix: Tensor) -> Tensor:
    """Return the trace of the square root of a positive semidefinite matrix (C, C), a scalar.

    Its gradient is half the inverse root (d tr M^½ = ½ tr M^-½ dM), so nothing is remembered of the iteration.
    """
    root, inverse = square_roots(matrix.detach())
    slope = 0.5 * (inverse * matrix).sum()
    trace: Tensor = root.trace() + slope - slope.detach()
    return trace


def directions(channels: int) -> Tensor:
    """Return the directions that the sliced loss projects on: (C, D) orthonormal columns, always the same."""
    random = torch.Generator().manual_seed(channels)
    q, _ = torch.linalg.qr(torch.randn(channels, channels, generator=random, dtype=torch.float64))
    columns: Tensor = q[:, :MAX_DIRECTIONS].float().contiguous()
    return columns


def quantiles(features: Tensor, onto: Tensor, weights: Tensor | None = None, count: int = 512) -> Tensor:
    """Return the quantile functions of features (1, C, H, W) projected on directions (C, D): (D, count)."""
    ranked, order = (as_rows(features) @ onto).t().sort(dim=1)
    # By indices and not by F.interpolate, whose gradient is not repeatable on a GPU; sums of floats are not, either.
    if weights is None:
        place = torch.linspace(0, 1, ranked.shape[1], device=ranked.device, dtype=ranked.dtype)
        place = place.expand_as(ranked).contiguous()
    else:
        # Each value stands in the middle of its share of the distribution.
        share = weights[order]
        place = (share * 2.0**40).long().cumsum(dim=1).to(share.dtype) / 2.0**40 - share / 2
    wanted = (
        torch.linspace(0, 1, count, device=ranked.device, dtype=place.dtype).expand(ranked.shape[0], count).contiguous()
    )
    above = torch.searchsorted(place, wanted).clamp(0, ranked.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    start, end = place.gather(1, below), place.gather(1, above)
    part = ((wanted - start) / (end - start).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(ranked.gather(1, below), ranked.gather(1, above), part)


class GramLoss(nn.Module):
    """Mean squared difference of the Gram matrices. Gatys et al. (2016), eq. 4, is a quarter of this."""

    gram: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("gram", targets["gram"])

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar."""
        return F.mse_loss(gram(features, weights), self.gram)


class CovarianceLoss(nn.Module):
    """Mean squared difference of the covariance matrices: Gram matrices about the mean (Li et al., 2017)."""

    covariance: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("covariance", targets["gram"] - torch.outer(targets["mean"], targets["mean"]))

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar."""
        return F.mse_loss(covariance(features, weights), self.covariance)


class MeanStdLoss(nn.Module):
    """Mean squared difference of the channels' means and standard deviations (Li et al., 2017, batch normalization)."""

    mean: Tensor
    std: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        variance = targets["gram"].diagonal() - targets["mean"].square()
        self.register_buffer("mean", targets["mean"])
        self.register_buffer("std", variance.clamp_min(0).add(1e-8).sqrt())

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar."""
        rows = as_rows(features)
        mean = mean_row(rows, weights)
        std = (mean_row((rows - mean).square(), weights) + 1e-8).sqrt()
        return F.mse_loss(mean, self.mean) + F.mse_loss(std, self.std)


class WassersteinLoss(nn.Module):
    """Squared Wasserstein-2 distance between Gaussians of the features' means and covariances, divided by C.

    ‖m - m'‖² + tr(K + K' - 2 (K'^½ K K'^½)^½) (Dowson and Landau, 1982); as style loss by Crowson (2021). A little
    above 0 even where it should be 0, by what `square_roots` leaves unconverged.
    """

    mean: Tensor
    variance: Tensor
    root: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        mean = targets["mean"].cpu().double()
        # The difference cancels for a style of one colour, and its eigenvalues may come out below 0.
        values, vectors = torch.linalg.eigh(targets["gram"].cpu().double() - torch.outer(mean, mean))
        values = values.clamp_min(0)
        self.register_buffer("mean", targets["mean"])
        self.register_buffer("variance", values.sum().to(targets["mean"]))
        self.register_buffer("root", ((vectors * values.sqrt()) @ vectors.t()).to(targets["mean"]))

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar."""
        rows = as_rows(features)
        mean = mean_row(rows, weights)
        rows = rows - mean
        positions, channels = rows.shape
        # From here on rowsᵀ · rows is the covariance. The root is of an integer: a float would be baked into a graph.
        rows = rows * ((torch.ones_like(rows[:, 0]) / positions) if weights is None else weights).sqrt()[:, None]
        if positions < channels:
            # K'^½ K K'^½ and rows · K' · rowsᵀ have the same eigenvalues, zeros apart; at coarse scales the latter is
            # much smaller.
            rooted = rows @ self.root
            overlap = trace_of_root(rooted @ rooted.t())
        else:
            overlap = trace_of_root(self.root @ (rows.t() @ rows) @ self.root)
        spread = rows.square().sum() + self.variance - 2 * overlap
        return F.mse_loss(mean, self.mean) + spread / channels


class SlicedLoss(nn.Module):
    """Mean squared Wasserstein-2 distance of the features along fixed directions (Heitz et al., 2021)."""

    quantiles: Tensor
    directions: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("quantiles", targets["quantiles"])
        self.register_buffer("directions", targets["directions"])

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar."""
        return F.mse_loss(quantiles(features, self.directions, weights), self.quantiles)


class DirectLoss(nn.Module):
    """Mean squared difference of the feature maps themselves, position by position: what Gram matrices avoid."""

    features: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("features", targets["features"])

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar; the style's map is stretched to their size."""
        wanted = F.interpolate(self.features, size=features.shape[2:], mode="bilinear", align_corners=False)
        return mean_row(as_rows((features - wanted).square()), weights).mean()


class CrossLoss(nn.Module):
    """Mean squared difference of two matrices of inner products: the style's map with the picture's, and with itself.

    Channels are compared with channels, as by Gram matrices, but only where they stand: nearer to `direct` than `gram`.
    """

    features: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("features", targets["features"])

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of features (1, C, H, W), a scalar; the style's map is stretched to their size."""
        style = F.interpolate(self.features, size=features.shape[2:], mode="bilinear", align_corners=False)
        rows = as_rows(style)
        weighted = rows / rows.shape[0] if weights is None else rows * weights[:, None]
        return F.mse_loss(as_rows(features).t() @ weighted, rows.t() @ weighted)


STYLE_LOSSES: Mapping[StyleLoss, Callable[[Targets], nn.Module]] = {
    StyleLoss.GRAM: GramLoss,
    StyleLoss.COVARIANCE: CovarianceLoss,
    StyleLoss.MEAN_STD: MeanStdLoss,
    StyleLoss.WASSERSTEIN: WassersteinLoss,
    StyleLoss.SLICED: SlicedLoss,
    StyleLoss.DIRECT: DirectLoss,
    StyleLoss.CROSS: CrossLoss,
}


def style_targets(features: Tensor, loss: StyleLoss, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Return what `loss` needs of a style's features (1, C, H, W) at one layer, those of one region by `weights`.

    `mean` (C,) and `gram` (C, C) for the losses on moments; `quantiles` (D, Q) and `directions` (C, D) for SLICED;
    `features` for DIRECT and CROSS.
    """
    if loss in MOMENTS:
        return {"mean": mean_row(as_rows(features), weights), "gram": gram(features, weights)}
    if loss is StyleLoss.SLICED:
        onto = directions(features.shape[1]).to(features)
        return {"quantiles": quantiles(features, onto, weights), "directions": onto}
    return {"features": features}


def mixed_targets(parts: Sequence[tuple[float, Targets]]) -> dict[str, Tensor]:
    """Return the targets of several styles mixed, (share, targets) each; the shares sum to 1.

    Moments are means over positions, so theirs is the mixture of distributions; the mean of quantile functions is their
    Wasserstein barycentre; feature maps take the first one's size.
    """
    names = parts[0][1].keys()
    found = {}
    for name in names:
        first = parts[0][1][name]
        tensors = [targets[name] for _, targets in parts]
        if name == "features":
            tensors = [F.interpolate(t, size=first.shape[2:], mode="bilinear", align_corners=False) for t in tensors]
        found[name] = torch.stack([share * t for (share, _), t in zip(parts, tensors, strict=True)]).sum(dim=0)
    return found


class SquaredError(nn.Module):
    """Mean squared difference of the features. Gatys et al. (2016), eq. 1, is half the sum."""

    def forward(self, features: Tensor, content: Tensor) -> Tensor:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, a scalar."""
        return F.mse_loss(features, content)


class InnerProduct(nn.Module):
    """One minus the inner product of the whole feature maps, each divided by its norm: from 0 to 2.

    The raw inner product has no lower bound: brighter features always lower it. Adding half the squared norm bounds
    it, but that is the squared error again, up to a constant. What is left of the idea is the whole map's direction.
    """

    def forward(self, features: Tensor, content: Tensor) -> Tensor:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, a scalar."""
        return 1 - F.cosine_similarity(features.flatten(), content.flatten(), dim=0, eps=1e-8)


class Cosine(nn.Module):
    """One minus the cosine between the features at each position, averaged over positions: from 0 to 2."""

    def forward(self, features: Tensor, content: Tensor) -> Tensor:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, a scalar."""
        return 1 - F.cosine_similarity(features, content, dim=1, eps=1e-8).mean()


class SelfSimilarity(nn.Module):
    """Difference between the features' own cosine distances, position to position (Kolkin et al., 2019, eq. 6–7).

    Scaled by the number of positions, so that it is the mean over them of the total variation between two rows.
    """

    def forward(self, features: Tensor, content: Tensor) -> Tensor:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, a scalar."""
        return (self._distances(features) - self._distances(content)).abs().sum(dim=0).mean()

    def _distances(self, features: Tensor) -> Tensor:
        stride = 1
        while features.shape[2] * features.shape[3] > 1024 * stride * stride:
            stride += 1
        rows = F.normalize(as_rows(features[:, :, ::stride, ::stride]), dim=1, eps=1e-8)
        distances = (1 - rows @ rows.t()).clamp_min(0.0)
        return distances / (distances.sum(dim=0, keepdim=True) + 1e-8)


CONTENT_LOSSES: Mapping[ContentLoss, Callable[[], nn.Module]] = {
    ContentLoss.SQUARED_ERROR: SquaredError,
    ContentLoss.INNER_PRODUCT: InnerProduct,
    ContentLoss.COSINE: Cosine,
    ContentLoss.SELF_SIMILARITY: SelfSimilarity,
}
