"""What is left of a photograph in a picture made of it, as numbers."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.feature import canny
from skimage.metrics import structural_similarity
from torch import Tensor

from studies.lab import luminance


def ssim(picture: Tensor, other: Tensor) -> float:
    """Return the structural similarity of two pictures' luma, 1 for equal ones (Wang et al., 2004)."""
    return float(structural_similarity(luminance(picture), luminance(other), data_range=1.0))


def edge_agreement(picture: Tensor, other: Tensor, tolerance_px: int = 1) -> float:
    """Return the F1 score of two pictures' Canny edges, which may lie `tolerance_px` apart; 1 for equal ones."""
    ours, theirs = (canny(luminance(of), sigma=2.0) for of in (picture, other))
    near = np.ones((2 * tolerance_px + 1, 2 * tolerance_px + 1), dtype=bool)
    precision = _share(ours, ndimage.binary_dilation(theirs, near))
    recall = _share(theirs, ndimage.binary_dilation(ours, near))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def _share(edges: np.ndarray, near: np.ndarray) -> float:
    return float((edges & near).sum() / max(edges.sum(), 1))


def intensity(picture: Tensor, photo: Tensor) -> float:
    """Return the correlation of two pictures' blurred luma: 1 if light and dark lie alike, whatever the detail."""
    return float(np.corrcoef(_coarse(picture).ravel(), _coarse(photo).ravel())[0, 1])


def ghost(picture: Tensor, photo: Tensor, style: Tensor) -> float:
    """Return how much of the style picture's own layout shows: its slope in a regression of the blurred luma.

    The blurred luma of the picture is explained by the photo's and the style's, each standardized: 0 for no trace of
    where things are in the style picture, 1 for nothing else. The style has the picture's size.
    """
    wanted, *known = (_standardized(_coarse(of)) for of in (picture, photo, style))
    slopes, *_ = np.linalg.lstsq(np.stack(known, axis=1), wanted, rcond=None)
    return float(slopes[1])


def _coarse(picture: Tensor) -> np.ndarray:
    blurred: np.ndarray = ndimage.gaussian_filter(luminance(picture), max(picture.shape[1:]) / 32)
    return blurred


def _standardized(values: np.ndarray) -> np.ndarray:
    flat = values.ravel() - values.mean()
    standardized: np.ndarray = flat / max(float(flat.std()), 1e-9)
    return standardized
