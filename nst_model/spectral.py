"""The initial inverse Hessian of L-BFGS by color, frequency and place, each of which has a curvature of its own.

A picture is (…, H, W), its channels C whatever comes before. Frequencies are in cycles a pixel, from 0 to √½. What is
transformed is enlarged by zeros to (H', W'), a size that the Fourier transform is fast at: 683 rows take twice as long
as 686.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

BANDS = 12
"""Radial bands of frequency, evenly spaced by their logarithm. More gain nothing, nor do orientations."""

DECAY = 0.98
"""Decay of the running sums, from pair to pair."""

LEAST, MOST = 1 / 20, 50.0
"""Bounds of a band's inverse curvature, as multiples of the newest pair's."""

CUTS = (1 / 32, 1 / 8)
"""Frequencies between the passbands, each of which has places of its own, in cycles a pixel."""

PLACES_DECAY = 0.95
"""Decay of the running sums of places, from pair to pair."""

PLACES_BOUND = 8.0
"""A place's inverse curvature is at most this many times their geometric mean, and at least as small a part of it."""

BLURS = 2
"""How often a place's squares are averaged with its eight neighbours', in pixels of its passband."""

FAST = (2, 3, 5, 7)
"""Prime factors of sizes that the Fourier transform is fast at, on any device."""

UNSEEN = 0.01
"""Places with less than this part of y's mean, as those outside all regions, have no part in the geometric mean."""


class Spectral:
    """H₀ = √Γ·D·√Γ: Γ a diagonal in the picture's Fourier domain, D one in the picture, both learnt from the pairs.

    Channels are taken in the cosine basis, which for RGB is lightness and two colors opposed to each other: curvature
    differs more between these than between red, green and blue. Full matrices between channels gain nothing over it.

    Γ has for each channel and radial band γ² = Σ|ŝ|² / Σ|ŷ|², both summed over the band and over pairs, each pair
    divided by |y|² and those before it decayed. γ = Σ ŝ·ŷ / Σ|ŷ|², which the scalar of L-BFGS corresponds to, is worse.
    A frequency between the middles of two bands has a share in both, so γ is continuous, unlike with sharp bands.

    D is the sum over passbands of one diagonal each, at the passband's resolution. It has for each place the same of
    what Γ leaves, s/√Γ and y·√Γ, of all channels, smoothed; the geometric mean of each diagonal is 1.

    Args:
        like: a picture, (…, H, W): shape, type and device of all that come.

    Attributes:
        bands: (2, C, BANDS), sums of s and of y.
        places: (2, P), sums of s and of y, P the places of all passbands. The two are all there is to remember.
    """

    def __init__(self, like: Tensor) -> None:
        channels, self._size = math.prod(like.shape[:-2]), like.shape[-2:]
        self._enlarged = tuple(fast(edge) for edge in self._size)
        self._basis = _cosines(channels).to(like)
        self._shares = _shares(self._enlarged).to(like)
        cuts = (0.0, *CUTS, math.inf)
        self._passbands = [Passband(self._enlarged, *cut, like=like) for cut in itertools.pairwise(cuts)]
        self._count = [math.prod(passband.size) for passband in self._passbands]
        self.bands = torch.zeros((2, channels, BANDS), dtype=like.dtype, device=like.device)
        self.places = torch.zeros((2, sum(self._count)), dtype=like.dtype, device=like.device)

    def learn(self, pair: Tensor, gamma: Tensor, taken: Tensor) -> None:
        """Take in a pair (2, n), s and y, and the scalar that fits it, if it is `taken`, a truth on the device."""
        spectrum = self._spectrum(pair)
        power = (spectrum * spectrum.conj()).real
        # A transform of real numbers leaves out the columns that mirror others.
        power[..., 1 : (self._enlarged[1] + 1) // 2] *= 2
        found = (power.flatten(-2) @ self._shares) / pair[1].square().sum()
        self.bands.copy_(torch.where(taken, DECAY * self.bands + found, self.bands))
        root = self._root(gamma.to(pair))
        left = spectrum.mul_(torch.stack((root.reciprocal(), root)))  # much faster than to divide
        there = torch.cat([_by_place(passband.part(left)) for passband in self._passbands], dim=1)
        self.places.copy_(torch.where(taken, PLACES_DECAY * self.places + there, self.places))

    def times(self, q: Tensor, gamma: Tensor) -> Tensor:
        """Return H₀·q, both (n,). The scalar `gamma` bounds each band's, and stands in where nothing is known.

        Where q is 0 so is the product: what the objective does not see, such as what lies outside all regions, is not
        moved along with the frequencies of the rest.
        """
        root = self._root(gamma.to(q))
        half = self._spectrum(q) * root
        whole = torch.zeros_like(half)
        for passband, places in zip(self._passbands, torch.split(self.places, self._count, dim=1), strict=True):
            passband.add(passband.part(half) * ratios(places).view(passband.size), whole)
        height, width = self._size
        product = _picture(whole.mul_(root), self._enlarged)[..., :height, :width].flatten(-2)
        return (self._basis.t() @ product).flatten().masked_fill_(q == 0, 0.0)

    def _root(self, scalar: Tensor) -> Tensor:
        """Return √Γ, (C, H', W' // 2 + 1)."""
        by_band = (self.bands[0] / self.bands[1]).sqrt().clamp(LEAST * scalar, MOST * scalar)
        by_band = torch.where(self.bands[1] > 0, by_band, scalar)
        return (by_band.log() / 2 @ self._shares.t()).exp_().view(len(self._basis), self._enlarged[0], -1)

    def _spectrum(self, x: Tensor) -> Tensor:
        """Return the spectrum of pictures (…, n), in the cosine basis: (…, C, H', W' // 2 + 1)."""
        channels = self._basis @ x.view(*x.shape[:-1], len(self._basis), -1)
        return _transform(channels.view(*channels.shape[:-1], *self._size), self._enlarged)


class Passband:
    """The part of pictures between two frequencies, at the resolution that it takes.

    The squares of all passbands' windows add up to 1, an octave wide where one goes over into the next. `add` is the
    transpose of `part`, so parts that are added as they are make the whole.

    Args:
        size: of the pictures, (H, W).
        lowest: frequency of the lower cut, 0 for none.
        highest: that of the upper one, infinite for none.
        like: type and device.

    Attributes:
        size: (H, W) of parts: the pictures' own, or odd numbers that the transform is fast at.
    """

    def __init__(self, size: tuple[int, ...], lowest: float, highest: float, *, like: Tensor) -> None:
        radius = _radius(size)
        self._whole = math.isinf(highest)
        # An odd number of rows and columns has no highest frequency that would be its own mirror image.
        if self._whole:
            self.size = tuple(size)
        else:
            self.size = tuple(fast(2 * int(math.sqrt(2) * highest * edge) + 1, odd=True) for edge in size)
        self._rows, self._columns = (edge // 2 for edge in self.size)
        self._window = self._cut((_above(radius, lowest) - _above(radius, highest)).sqrt()).to(like)

    def part(self, spectrum: Tensor) -> Tensor:
        """Return what spectra (…, H, W // 2 + 1) have of the passband, as pictures of its size."""
        return _picture(self._cut(spectrum) * self._window, self.size)

    def add(self, part: Tensor, spectrum: Tensor) -> None:
        """Add a part to spectra (…, H, W // 2 + 1)."""
        found = _transform(part, self.size) * self._window
        if self._whole:
            spectrum += found
            return
        above, columns = self._rows + 1, self._columns + 1
        spectrum[..., :above, :columns] += found[..., :above, :]
        spectrum[..., self._below(spectrum), :columns] += found[..., above:, :]

    def _cut(self, spectrum: Tensor) -> Tensor:
        """Return the frequencies that a picture of the passband's size has."""
        if self._whole:
            return spectrum
        columns = spectrum[..., : self._columns + 1]
        return torch.cat((columns[..., : self._rows + 1, :], columns[..., self._below(spectrum), :]), dim=-2)

    def _below(self, spectrum: Tensor) -> slice:
        """Return the rows of negative frequencies."""
        return slice(spectrum.shape[-2] - self._rows, None)


def ratios(places: Tensor) -> Tensor:
    """Return the diagonal that sums of s and of y, (2, P), tell: (P,)."""
    s, y = places
    logarithm = (s / y).log() / 2
    # Where nothing was learnt, it is 0/0; where nothing has moved, its logarithm is infinite.
    known = logarithm.isfinite()
    seen = known & (y > UNSEEN * y.mean())
    mean = torch.where(seen, logarithm, 0.0).sum() / seen.sum().clamp_min(1)
    bound = math.log(PLACES_BOUND)
    return torch.where(known, (logarithm - mean).clamp(-bound, bound), 0.0).exp()


def _by_place(parts: Tensor) -> Tensor:
    """Return the squares of s and y, (2, C, H, W), smoothed and relative to the mean of y's: (2, H · W)."""
    squares = parts.square().sum(dim=1)
    for _ in range(BLURS):
        # Much faster on a CPU than the library's pooling.
        padded = F.pad(squares, [1, 1, 1, 1], mode="replicate")
        rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
        squares = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
    mean = squares[1].mean()
    # Where y has nothing of the passband nothing is learnt.
    return torch.where(mean > torch.finfo(squares.dtype).tiny, squares / mean, 0.0).flatten(1)


def fast(least: int, *, odd: bool = False) -> int:
    """Return the least number that is no less and has no prime factors but those of FAST, without 2 for an odd one."""
    product = math.prod(FAST[1:] if odd else FAST)
    # None of a number's prime factors is in it more often than 2 would be.
    return next(size for size in itertools.count(least) if product ** size.bit_length() % size == 0)


def _transform(pictures: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the spectra of pictures (…, h, w) enlarged by zeros to a size: (…, H, W // 2 + 1)."""
    spectra: Tensor = torch.fft.rfft2(pictures, s=size, norm="ortho")
    return spectra


def _picture(spectra: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the pictures of spectra (…, H, W // 2 + 1): (…, H, W)."""
    pictures: Tensor = torch.fft.irfft2(spectra, s=size, norm="ortho")
    return pictures


def _radius(size: tuple[int, ...]) -> Tensor:
    """Return each frequency of `rfft2`, (H, W // 2 + 1)."""
    height, width = size
    rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    return torch.hypot(rows[:, None], columns)


def _above(radius: Tensor, cut: float) -> Tensor:
    """Return 0 for frequencies below a cut and 1 above; over the octave around it, it rises with the logarithm."""
    return ((radius / cut).log2() + 0.5).clamp(0, 1) if cut else torch.ones_like(radius)


def _cosines(count: int) -> Tensor:
    """Return the orthonormal basis of the cosine transform, a vector in each row, (count, count)."""
    place = torch.arange(count, dtype=torch.float64)
    basis = torch.cos(math.pi / count * (place + 0.5) * place[:, None])
    return basis.div(torch.linalg.vector_norm(basis, dim=1, keepdim=True))


def _shares(size: tuple[int, ...]) -> Tensor:
    """Return the share of each frequency of `rfft2` in each band, (H · (W // 2 + 1), BANDS); each one's sum to 1."""
    lowest, highest = 1 / max(size), math.sqrt(0.5)
    place = (_radius(size).clamp_min(lowest) / lowest).log() / math.log(highest / lowest) * (BANDS - 1)
    return (1 - (place[..., None] - torch.arange(BANDS)).abs()).clamp_min(0).flatten(0, 1)
