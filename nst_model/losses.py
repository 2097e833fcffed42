"""Style and content losses: tiny modules that TorchScript compiles into the objective.

Shapes: C channels, H and W positions of a layer, P = H·W. Features are (1, C, H, W), in the trunk's precision, of mean
activation 1 over natural images. Every loss is a mean over entries, so that it means the same for every layer and size.

Each module returns the loss, an fp32 scalar, and its gradient towards the features times `scale`, in their precision.
What is large, features and their gradient, is never copied to another precision where the loss is one of moments:
the product over positions reads bf16 and adds up in fp32, and so does the one back.

A style loss compares a *statistic* of the picture's features with the style's. What is kept of a style, its targets,
is a small dictionary of tensors by layer; targets of several styles mix linearly. Statistics are taken over all
positions alike or, in a region, by weights (P,) that sum to 1.
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

import functools
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


def as_features(rows: Tensor, like: Tensor) -> Tensor:
    """Return positions by channels (H·W, C) as features (1, C, H, W), of the shape of others, channels innermost."""
    return rows.view(1, like.shape[2], like.shape[3], like.shape[1]).permute(0, 3, 1, 2)


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


def differentiable(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values that gradients are taken towards."""
    return tensor.detach().requires_grad_(True)


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return rows (P, C) times what each of them counts, or as they are if all count alike, in their own precision."""
    # Rounded after the product and not before, else equal weights would all be wrong by the same.
    return rows if weights is None else (rows * weights[:, None]).to(rows.dtype)


def mean_near(rows: Tensor, weights: Tensor | None, expected: Tensor) -> Tensor:
    """Return the mean of rows (P, C), (C,), in the precision of `expected`, a guess; see `gram_near`."""
    near = expected.to(rows.dtype)
    share = 1.0 / rows.shape[0] if weights is None else 1.0
    ones = torch.ones_like(rows[:, :1]).t()
    difference = torch.addmm(near[None], ones, weighted(rows, weights), beta=-1, alpha=share)[0]
    return near.to(expected.dtype) + difference.to(expected.dtype)


def gram_near(rows: Tensor, weights: Tensor | None, expected: Tensor) -> Tensor:
    """Return the Gram matrix of rows (P, C), (C, C), in the precision of `expected`, a guess at it.

    A product of bf16 matrices is added up in fp32, but comes out rounded to bf16. So what is taken from the product is
    its difference from the guess: it is that which is rounded, and the less, the better the guess.
    """
    near = expected.to(rows.dtype)
    share = 1.0 / rows.shape[0] if weights is None else 1.0
    difference = torch.addmm(near, weighted(rows, weights).t(), rows, beta=-1, alpha=share)
    return near.to(expected.dtype) + difference.to(expected.dtype)


def moments(rows: Tensor, weights: Tensor | None, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,) and covariance (C, C) of rows (P, C), leaves for autograd, and the rows about their mean.

    `expected` is a guess at the mean; see `gram_near`. The guess at the covariance is itself, as a product of bf16
    matrices gives it: its smallest eigenvalues must not fall below 0 by more than rounding in fp32.
    """
    mean = mean_near(rows, weights, expected)
    centred = rows - mean.to(rows.dtype)
    if rows.dtype == torch.bfloat16:
        share = 1.0 / rows.shape[0] if weights is None else 1.0
        guess = (share * (weighted(centred, weights).t() @ centred)).to(expected.dtype)
    else:
        guess = torch.zeros_like(expected).diag()  # any will do
    return differentiable(mean), differentiable(gram_near(centred, weights, guess)), centred


def through_gram(slope: Tensor, rows: Tensor, weights: Tensor | None, features: Tensor) -> Tensor:
    """Return a function's gradient towards features, given its symmetric slope in the Gram matrix of their rows."""
    share = 1.0 / rows.shape[0] if weights is None else 1.0
    return as_features(weighted(rows @ (2 * share * slope).to(rows.dtype), weights), features)


def through_moments(
    value: Tensor, found: tuple[Tensor, Tensor, Tensor], weights: Tensor | None, features: Tensor
) -> Tensor:
    """Return a function's gradient towards features, given its value as autograd can follow it to `moments`.

    `found` is what they returned. What the rows' mean does to the covariance cancels: the rows about it sum to 0.
    """
    mean, covariance, centred = found
    slopes = torch.autograd.grad([value], [mean, covariance])
    by_mean, by_covariance = slopes[0], slopes[1]
    assert by_mean is not None
    assert by_covariance is not None
    share = 1.0 / centred.shape[0] if weights is None else 1.0
    slope = (share * (by_covariance + by_covariance.t())).to(centred.dtype)
    gradient = torch.addmm((share * by_mean).to(centred.dtype), centred, slope)
    return as_features(weighted(gradient, weights), features)


def through_autograd(value: Tensor, features: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a value that autograd can follow to the features, a leaf, and its gradient there, times `scale`."""
    gradient = torch.autograd.grad([scale * value], [features])[0]
    assert gradient is not None
    return value.detach(), gradient.to(dtype)


def inverse_root(matrix: Tensor) -> Tensor:
    """Return the inverse square root of a positive semidefinite matrix (C, C), by products only, fast on a GPU.

    The iteration is coupled (Higham, 2008, section 6.7). Its steps x → ax + bx³ + cx⁵ take the root x of each
    eigenvalue, relative to the largest, to 1: within 1e-7 for x from 0.04 to 1. The first three come as near to 1 in
    the maximum norm as three such steps in succession can (Amsel et al., 2025, "The Polar Express"); the last two are
    Newton and Schulz's of the fifth order.

    Smaller eigenvalues are not converged: their inverse roots come out too small. That is wanted. With more steps
    pictures come no nearer to the style by an exact measure, and have more specks. Small x are multiplied by 134, as by
    twelve Newton–Schulz steps of the third order, which take twice the matrix products.
    """
    steps = [
        (7.0864, -19.6595, 14.3005),
        (2.7266, -2.0304, 0.4585),
        (1.9751, -1.3572, 0.3859),
        (1.875, -1.25, 0.375),
        (1.875, -1.25, 0.375),
    ]
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    norm = torch.linalg.vector_norm(matrix) + 1e-8
    root = matrix / norm
    inverse = identity
    for number, (a, b, c) in enumerate(steps):
        ratio = inverse @ root if number > 0 else root  # the identity, once converged
        step = torch.addmm(b * ratio + a * identity, ratio, ratio, alpha=c)
        inverse = step @ inverse if number > 0 else step
        if number + 1 < len(steps):
            root = root @ step
    scaled: Tensor = inverse / norm.sqrt()
    return scaled


def trace_of_root(matrix: Tensor) -> Tensor:
    """Return the trace of the square root of a positive semidefinite matrix (C, C), a scalar.

    Its gradient is half the inverse root (d tr M^½ = ½ tr M^-½ dM), so nothing is remembered of the iteration.
    """
    half = 0.5 * (inverse_root(matrix.detach()) * matrix).sum()
    trace: Tensor = half + half.detach()
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

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) and its gradient times `scale`."""
        rows = as_rows(features)
        difference = gram_near(rows, weights, self.gram) - self.gram
        slope = 2 * scale / difference.numel() * difference
        return difference.square().mean(), through_gram(slope, rows, weights, features)


class CovarianceLoss(nn.Module):
    """Mean squared difference of the covariance matrices: Gram matrices about the mean (Li et al., 2017)."""

    mean: Tensor
    gram: Tensor
    covariance: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("mean", targets["mean"])
        self.register_buffer("gram", targets["gram"])
        self.register_buffer("covariance", targets["gram"] - torch.outer(targets["mean"], targets["mean"]))

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) and its gradient times `scale`."""
        rows = as_rows(features)
        mean = mean_near(rows, weights, self.mean)
        difference = gram_near(rows, weights, self.gram) - torch.outer(mean, mean) - self.covariance
        slope = 2 * scale / difference.numel() * difference
        centred = rows - mean.to(rows.dtype)
        return difference.square().mean(), through_gram(slope, centred, weights, features)


class MeanStdLoss(nn.Module):
    """Mean squared difference of the channels' means and standard deviations (Li et al., 2017, batch normalization)."""

    mean: Tensor
    std: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        variance = targets["gram"].diagonal() - targets["mean"].square()
        self.register_buffer("mean", targets["mean"])
        self.register_buffer("std", variance.clamp_min(0).add(1e-8).sqrt())

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) and its gradient times `scale`."""
        found = moments(as_rows(features), weights, self.mean)
        mean, covariance, _ = found
        std = (covariance.diagonal().clamp_min(0) + 1e-8).sqrt()
        value = F.mse_loss(mean, self.mean) + F.mse_loss(std, self.std)
        return value.detach(), through_moments(scale * value, found, weights, features)


@functools.lru_cache(maxsize=64)
def covariance_root(mean: bytes, gram: bytes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return trace and square root of the covariance, a scalar and (C, C), of a mean (C,) and a Gram matrix (C, C).

    All are of one type and on the CPU. What was found is remembered, since it takes a tenth of a second at
    each scale of `fine`, and styles come again: 64 are its layers at all scales up to 4096 px, in some 50 MiB.
    """
    # A copy, since it may be written to.
    own, product = (torch.frombuffer(bytearray(data), dtype=dtype).double() for data in (mean, gram))
    # The difference cancels for a style of one colour, and its eigenvalues may come out below 0.
    values, vectors = torch.linalg.eigh(product.view(len(own), -1) - torch.outer(own, own))
    values = values.clamp_min(0)
    return values.sum().to(dtype), ((vectors * values.sqrt()) @ vectors.t()).to(dtype)


class WassersteinLoss(nn.Module):
    """Squared Wasserstein-2 distance between Gaussians of the features' means and covariances, divided by C.

    ‖m - m'‖² + tr(K + K' - 2 (K'^½ K K'^½)^½) (Dowson and Landau, 1982); as style loss by Crowson (2021). A little
    above 0 even where it should be 0, by what `inverse_root` leaves unconverged.
    """

    mean: Tensor
    variance: Tensor
    root: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        mean = targets["mean"]
        found = covariance_root(*(tensor.cpu().numpy().tobytes() for tensor in (mean, targets["gram"])), mean.dtype)
        # Copies: what is found serves other objectives, too, and buffers may be overwritten.
        variance, root = (tensor.to(mean.device, copy=True) for tensor in found)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.register_buffer("root", root)

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) and its gradient times `scale`."""
        rows = as_rows(features)
        if rows.shape[0] < rows.shape[1]:
            return self._by_positions(features, scale, weights)
        found = moments(rows, weights, self.mean)
        mean, covariance, _ = found
        overlap = trace_of_root(self.root @ covariance @ self.root)
        spread = covariance.trace() + self.variance - 2 * overlap
        value = F.mse_loss(mean, self.mean) + spread / rows.shape[1]
        return value.detach(), through_moments(scale * value, found, weights, features)

    def _by_positions(self, features: Tensor, scale: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the same where there are fewer positions than channels, as at coarse scales.

        K'^½ K K'^½ and rows · K' · rowsᵀ have the same eigenvalues, zeros apart, and the latter is smaller.
        """
        leaf = differentiable(features.to(self.mean.dtype))
        rows = as_rows(leaf)
        mean = mean_row(rows, weights)
        rows = rows - mean
        positions, channels = rows.shape
        # From here on rowsᵀ · rows is the covariance. The root is of an integer: a float would be baked into a graph.
        rows = rows * ((torch.ones_like(rows[:, 0]) / positions) if weights is None else weights).sqrt()[:, None]
        rooted = rows @ self.root
        spread = rows.square().sum() + self.variance - 2 * trace_of_root(rooted @ rooted.t())
        value = F.mse_loss(mean, self.mean) + spread / channels
        return through_autograd(value, leaf, scale, features.dtype)


class SlicedLoss(nn.Module):
    """Mean squared Wasserstein-2 distance of the features along fixed directions (Heitz et al., 2021)."""

    quantiles: Tensor
    directions: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("quantiles", targets["quantiles"])
        self.register_buffer("directions", targets["directions"])

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) and its gradient times `scale`."""
        leaf = differentiable(features.to(self.quantiles.dtype))
        value = F.mse_loss(quantiles(leaf, self.directions, weights), self.quantiles)
        return through_autograd(value, leaf, scale, features.dtype)


class DirectLoss(nn.Module):
    """Mean squared difference of the feature maps themselves, position by position: what Gram matrices avoid."""

    features: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("features", targets["features"])

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W), the style's map stretched to their size, and its gradient."""
        leaf = differentiable(features.to(self.features.dtype))
        wanted = F.interpolate(self.features, size=features.shape[2:], mode="bilinear", align_corners=False)
        value = mean_row(as_rows((leaf - wanted).square()), weights).mean()
        return through_autograd(value, leaf, scale, features.dtype)


class CrossLoss(nn.Module):
    """Mean squared difference of two matrices of inner products: the style's map with the picture's, and with itself.

    Channels are compared with channels, as by Gram matrices, but only where they stand: nearer to `direct` than `gram`.
    """

    features: Tensor

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.register_buffer("features", targets["features"])

    def forward(self, features: Tensor, scale: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W), the style's map stretched to their size, and its gradient."""
        leaf = differentiable(features.to(self.features.dtype))
        style = F.interpolate(self.features, size=features.shape[2:], mode="bilinear", align_corners=False)
        rows = as_rows(style)
        weighted = rows / rows.shape[0] if weights is None else rows * weights[:, None]
        value = F.mse_loss(as_rows(leaf).t() @ weighted, rows.t() @ weighted)
        return through_autograd(value, leaf, scale, features.dtype)


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

    def forward(self, features: Tensor, scale: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, and its gradient."""
        difference = features - content
        gradient = (2 * scale / difference.numel() * difference).to(features.dtype)
        return difference.square().mean(), gradient


class InnerProduct(nn.Module):
    """One minus the inner product of the whole feature maps, each divided by its norm: from 0 to 2.

    The raw inner product has no lower bound: brighter features always lower it. Adding half the squared norm bounds
    it, but that is the squared error again, up to a constant. What is left of the idea is the whole map's direction.
    """

    def forward(self, features: Tensor, scale: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, and its gradient."""
        leaf = differentiable(features.to(content.dtype))
        value = 1 - F.cosine_similarity(leaf.flatten(), content.flatten(), dim=0, eps=1e-8)
        return through_autograd(value, leaf, scale, features.dtype)


class Cosine(nn.Module):
    """One minus the cosine between the features at each position, averaged over positions: from 0 to 2."""

    def forward(self, features: Tensor, scale: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, and its gradient."""
        leaf = differentiable(features.to(content.dtype))
        value = 1 - F.cosine_similarity(leaf, content, dim=1, eps=1e-8).mean()
        return through_autograd(value, leaf, scale, features.dtype)


class SelfSimilarity(nn.Module):
    """Difference between the features' own cosine distances, position to position (Kolkin et al., 2019, eq. 6–7).

    Scaled by the number of positions, so that it is the mean over them of the total variation between two rows.
    """

    def forward(self, features: Tensor, scale: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) against the content's, of the same shape, and its gradient."""
        leaf = differentiable(features.to(content.dtype))
        value = (self._distances(leaf) - self._distances(content)).abs().sum(dim=0).mean()
        return through_autograd(value, leaf, scale, features.dtype)

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
