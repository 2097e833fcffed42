"""The initial inverse Hessian by color, frequency and place."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model import lbfgs
from nst_model.lbfgs import DAMPING_RATE, LBFGS
from nst_model.spectral import BANDS, CUTS, LEAST, MOST, PLACES_BOUND, Passband, Spectral, fast, ratios

SHAPES = [(1, 3, 24, 32), (1, 3, 17, 23), (2, 16, 16)]
ONE = torch.ones((), dtype=torch.float64)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return white noise, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(picture: Tensor) -> Tensor:
    """Return lightness and colors, a direction in each row, for pictures of 2 or 3 channels."""
    known = {2: [[1.0, 1.0], [1.0, -1.0]], 3: [[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]}
    rows = torch.tensor(known[picture.shape[-3]], dtype=picture.dtype)
    return rows / rows.norm(dim=1, keepdim=True)


def curved(picture: Tensor, power: float, channels: Tensor) -> Tensor:
    """Return a picture filtered by (1 + 50·frequency)^power, each color by its factor too: a Hessian's product."""
    height, width = picture.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)).double()
    filtered = torch.fft.irfft2(torch.fft.rfft2(picture) * (1 + 50 * radius) ** power, s=(height, width))
    between = basis(picture).T @ torch.diag(channels) @ basis(picture)
    return torch.einsum("ij,...jhw->...ihw", between, filtered)


def learn(spectral: Spectral, s: Tensor, y: Tensor, *, taken: bool = True) -> None:
    """Show it a pair of pictures, and the scalar that is right for it."""
    pair = torch.stack((s, y)).flatten(1)
    spectral.learn(pair, pair[0].dot(pair[1]) / pair[1].dot(pair[1]), torch.tensor(taken))


def learnt(shape: tuple[int, ...], power: float, channels: Tensor, pairs: int = 30) -> Spectral:
    """Return what was learnt from pairs of white noise and its product with a Hessian."""
    spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
    for seed in range(pairs):
        s = noise(shape, seed)
        learn(spectral, s, curved(s, power, channels))
    return spectral


@pytest.mark.parametrize("shape", SHAPES)
def test_without_pairs_it_is_the_scalar(shape: tuple[int, ...]) -> None:
    """And so it is after pairs that were not taken."""
    spectral, q = Spectral(torch.zeros(shape, dtype=torch.float64)), noise(shape, 1).flatten()
    learn(spectral, q, 3 * q, taken=False)
    torch.testing.assert_close(spectral.times(q, 7 * ONE), 7 * q)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hessian_by_frequency_and_color_is_learnt(shape: tuple[int, ...]) -> None:
    """What it makes of H·v is nearly v, which no scalar would make."""
    channels = torch.tensor([1.0, 3.0, 0.5][: shape[-3]], dtype=torch.float64)
    spectral, v = learnt(shape, 1.0, channels), noise(shape, 99)
    product = curved(v, 1.0, channels).flatten()
    error = float((spectral.times(product, 0.1 * ONE) - v.flatten()).norm() / v.norm())
    best_scalar = float(product @ v.flatten() / (product @ product))
    by_scalar = float((best_scalar * product - v.flatten()).norm() / v.norm())
    assert error < 0.15
    assert by_scalar > 2 * error


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_symmetric_and_positive(shape: tuple[int, ...]) -> None:
    """As L-BFGS needs it."""
    spectral = learnt(shape, 1.5, torch.ones(shape[-3], dtype=torch.float64))
    one, other = noise(shape, 1).flatten(), noise(shape, 2).flatten()
    images = [spectral.times(each, 0.1 * ONE) for each in (one, other)]
    assert float(one @ images[1]) == pytest.approx(float(other @ images[0]), rel=1e-9)
    assert float(one @ images[0]) > 0


def test_what_the_objective_does_not_see_stays_as_it_is() -> None:
    """The rest moves by frequencies, which are everywhere."""
    start, channels = noise((1, 3, 24, 32), 5), torch.ones(3, dtype=torch.float64)
    seen = torch.zeros_like(start)
    seen[..., :20] = 1
    optimizer = LBFGS(start, 5, spectral=True)
    for _ in range(12):
        gradient = seen * curved(seen * optimizer.x, 1.0, channels)
        optimizer.step(gradient, (gradient * optimizer.x).sum() / 2)
    assert torch.equal(optimizer.x[..., 20:], start[..., 20:])
    assert float((optimizer.x - start)[..., :20].abs().mean()) > 0.1


def test_bands_keep_to_the_scalar_within_bounds() -> None:
    """However extreme a band's ratio is."""
    shape = SHAPES[0]
    q = noise(shape, 1).flatten()
    for factor, bound in ((1e9, MOST), (1e-9, LEAST)):
        spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
        learn(spectral, factor * q, q)
        torch.testing.assert_close(spectral.times(q, 2 * ONE), 2 * bound * q)


def test_what_is_long_past_counts_no_more() -> None:
    """The curvature changes on the way, and is followed."""
    shape, q = SHAPES[0], noise(SHAPES[0], 1).flatten()
    spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
    for factor in [5.0] * 100 + [1.0] * 300:
        learn(spectral, factor * q, q)
    torch.testing.assert_close(spectral.times(q, ONE), q, rtol=0.05, atol=0.01)


def test_sums_count_every_frequency_once() -> None:
    """Added over bands they are the squared norms, by Parseval's theorem."""
    for shape in SHAPES:
        spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
        s, y = noise(shape, 1), noise(shape, 2)
        learn(spectral, s, y)
        assert spectral.bands.shape == (2, math.prod(shape[:-2]), BANDS)
        colors = torch.einsum("ij,...jhw->...ihw", basis(s), torch.stack((s, y)))
        wanted = colors.square().sum(dim=(-2, -1)).view(2, -1) / y.square().sum()
        torch.testing.assert_close(spectral.bands.sum(dim=-1), wanted)


def test_lbfgs_needs_fewer_iterations_with_it() -> None:
    """Where curvature grows with frequency: half as many to a thousandth of the loss, and the memory is no help."""

    def iterations(spectral: bool) -> int:
        start = noise((1, 3, 32, 32), 5)
        optimizer = LBFGS(start, 10, spectral=spectral, max_step_rms=math.inf)
        channels = torch.ones(3, dtype=torch.float64)
        first = None
        for number in range(1000):
            gradient = curved(optimizer.x, 2.0, channels)
            loss = (gradient * optimizer.x).sum() / 2
            first = loss if first is None else first
            if float(loss) < 1e-6 * float(first):
                return number
            optimizer.step(gradient, loss)
        raise AssertionError("it did not converge")

    assert iterations(True) < 0.5 * iterations(False)


def placed(x: Tensor, power: float) -> Tensor:
    """Return a picture times a Hessian that has, beside its frequencies, a curvature from 1 to 16 for each column."""
    columns = torch.logspace(0, math.log10(4.0), x.shape[-1], dtype=torch.float64)
    return columns * curved(columns * x, power, torch.ones(3, dtype=torch.float64))


def test_a_hessian_by_place_is_learnt() -> None:
    """What it makes of H·v is nearer to v than what its frequencies alone would make of it."""
    shape = (1, 3, 48, 64)
    spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
    for seed in range(30):
        s = noise(shape, seed)
        learn(spectral, s, placed(s, 1.0))
    v = noise(shape, 99)

    def error() -> float:
        found = spectral.times(placed(v, 1.0).flatten(), 0.1 * ONE)
        return float((found - v.flatten()).norm() / v.norm())

    both = error()
    spectral.places.fill_(1.0)
    assert both < 0.75 * error()


def halved(x: Tensor) -> Tensor:
    """Return a picture times a Hessian by which fine detail is stiff on the left, what is coarse on the right."""
    left = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).double()
    radius = torch.hypot(torch.fft.fftfreq(x.shape[-2])[:, None], torch.fft.rfftfreq(x.shape[-1])).double()
    fine = torch.fft.irfft2(torch.fft.rfft2(x) * (radius > 1 / 8), s=x.shape[-2:])
    stiff = torch.fft.irfft2(torch.fft.rfft2(left * fine) * (radius > 1 / 8), s=x.shape[-2:])
    coarse = (1 - left) * (x - fine)
    coarse = coarse - torch.fft.irfft2(torch.fft.rfft2(coarse) * (radius > 1 / 8), s=x.shape[-2:])
    return x + 24 * (stiff + coarse)


def test_a_place_is_learnt_for_each_passband(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Hessian that is by place another for fine detail than for what is coarse, more is made good."""

    def error() -> float:
        spectral = Spectral(torch.zeros(1, 3, 48, 64, dtype=torch.float64))
        for seed in range(30):
            s = noise((1, 3, 48, 64), seed)
            learn(spectral, s, halved(s))
        v = F.interpolate(noise((1, 3, 6, 8), 99), scale_factor=8, mode="bilinear")
        return float((spectral.times(halved(v).flatten(), 0.1 * ONE) - v.flatten()).norm() / v.norm())

    parted = error()
    monkeypatch.setattr("nst_model.spectral.CUTS", ())
    assert parted < 0.75 * error()


def test_places_that_are_not_seen_have_no_part_in_the_mean() -> None:
    """What leaks to the outside of all regions has an arbitrary ratio, which the places inside are not scaled by."""
    inside = torch.tensor([[36.0, 9.0, 2.25], [1.0, 1.0, 1.0]], dtype=torch.float64)
    outside = 1e-4 * torch.tensor([[900.0] * 9, [1.0] * 9], dtype=torch.float64)
    torch.testing.assert_close(ratios(inside), torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(ratios(torch.cat((inside, outside), dim=1))[:3], ratios(inside))


def test_places_of_which_nothing_is_known_are_left_as_they_are() -> None:
    """Where the gradient did not change, or the picture did not."""
    sums = torch.tensor([[36.0, 9.0, 2.25, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ratios(sums), torch.tensor([2.0, 1.0, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64))


def test_places_keep_within_bounds() -> None:
    """However extreme a place's ratio is."""
    sums = torch.ones((2, 1000), dtype=torch.float64)
    sums[0, 0], sums[0, 1] = 1e9, 1e-9
    found = ratios(sums)
    torch.testing.assert_close(found[:2], torch.tensor([PLACES_BOUND, 1 / PLACES_BOUND], dtype=torch.float64))


def test_a_pair_that_is_not_taken_is_not_learnt() -> None:
    """Neither by frequency nor by place."""
    spectral = learnt(SHAPES[0], 1.0, torch.ones(3, dtype=torch.float64), pairs=3)
    bands, places = spectral.bands.clone(), spectral.places.clone()
    learn(spectral, noise(SHAPES[0], 98), noise(SHAPES[0], 99), taken=False)
    assert torch.equal(spectral.bands, bands)
    assert torch.equal(spectral.places, places)


def test_what_frequencies_explain_is_left_out_of_places() -> None:
    """Where steps are finer, and so stiffer by their frequency alone, places are not told to be stiff once more."""
    shape = (1, 3, 48, 64)
    radius = torch.hypot(torch.fft.fftfreq(48)[:, None], torch.fft.rfftfreq(64))
    left = (torch.arange(64) < 32).double()
    spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
    for seed in range(30):
        spectrum = torch.fft.rfft2(noise(shape, seed))
        coarse, fine = (torch.fft.irfft2(spectrum * part, s=(48, 64)) for part in (radius < 1 / 4, radius >= 1 / 4))
        s = left * coarse + (1 - left) * fine
        learn(spectral, s, curved(s, 2.0, torch.ones(3, dtype=torch.float64)))
    columns = ratios(spectral.places[:, -48 * 64 :]).view(48, 64).log().mean(dim=0)
    assert abs(float(columns[4:28].mean() - columns[36:60].mean())) < 0.3


def test_places_long_past_count_no_more() -> None:
    """The curvature of places changes on the way, and is followed."""
    shape = (1, 3, 48, 64)
    there = torch.logspace(0, 1, 64, dtype=torch.float64)
    spectral = Spectral(torch.zeros(shape, dtype=torch.float64))
    for seed in range(160):
        s = noise(shape, seed)
        learn(spectral, s, s * (there if seed < 60 else there.flip(0)))
    columns = ratios(spectral.places[:, -48 * 64 :]).view(48, 64).log().mean(dim=0)
    assert float(columns[:8].mean()) < -0.5
    assert float(columns[-8:].mean()) > 0.5


def test_a_passband_without_gradient_learns_nothing() -> None:
    """And what it learns later counts."""
    spectral = Spectral(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    learn(spectral, noise((1, 3, 64, 64), 1), checkers.expand(1, 3, 64, 64).double())
    assert spectral.places.isfinite().all()


def test_transforms_are_of_sizes_that_they_are_fast_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and passbands alike, whatever the size of the picture: here it is prime both ways."""
    assert [fast(size) for size in (1, 11, 171, 341, 683, 1024)] == [1, 12, 175, 343, 686, 1024]
    assert [fast(size, odd=True) for size in (1, 2, 61, 91, 181)] == [1, 3, 63, 105, 189]
    sizes = set()

    def seen(transform: Callable[..., Tensor], x: Tensor, s: tuple[int, int], norm: str) -> Tensor:
        sizes.update(s)
        return transform(x, s=s, norm=norm)

    for name in ("rfft2", "irfft2"):
        monkeypatch.setattr(torch.fft, name, functools.partial(seen, getattr(torch.fft, name)))
    spectral, q = Spectral(torch.zeros(1, 3, 97, 131)), torch.rand(3 * 97 * 131)
    spectral.learn(torch.stack((q, 2 * q)), ONE / 2, torch.tensor(True))
    spectral.times(q, ONE / 2)
    assert sizes == {98, 135, 9, 15, 35, 49}


@pytest.mark.parametrize("size", [(24, 32), (17, 23), (16, 16), (97, 130), (5, 64)])
def test_passbands_make_the_whole(size: tuple[int, int]) -> None:
    """Added as they are, whatever the size of the pictures."""
    x = noise((3, *size), 1)
    spectrum = torch.fft.rfft2(x, norm="ortho")
    whole = torch.zeros_like(spectrum)
    for cut in itertools.pairwise((0.0, *CUTS, math.inf)):
        passband = Passband(size, *cut, like=x)
        part = passband.part(spectrum)
        assert part.shape == (3, *passband.size)
        passband.add(part, whole)
    torch.testing.assert_close(whole, spectrum)


def parts_of_secant_steps(slopes: list[float]) -> list[float]:
    """Return the steps that are made when each gradient is `slope` times the one before, relative to the secants'."""
    optimizer = LBFGS(torch.zeros(1, 3, 16, 16, dtype=torch.float64), 1, spectral=True)
    gradient, lengths = noise((1, 3, 16, 16), 1), []
    for slope in slopes:
        before = optimizer.x.clone()
        optimizer.step(gradient, ONE)
        lengths.append(float((optimizer.x - before).norm()))
        gradient = slope * gradient
    pairs = zip(itertools.pairwise(lengths), slopes, strict=False)
    return [length / (before * abs(slope) / (1 - slope)) for (before, length), slope in pairs]


@pytest.mark.parametrize(("slope", "rate"), [(-0.5, DAMPING_RATE / 2), (-4.0, DAMPING_RATE)])
def test_steps_that_go_too_far_become_shorter(slope: float, rate: float) -> None:
    """Where the objective's slope at their end is `slope` times that at the beginning; and longer when it is not."""
    parts = parts_of_secant_steps([slope] * 10 + [0.5] * 41)
    assert parts[:10] == pytest.approx([math.exp(-rate * number) for number in range(1, 11)])
    assert parts[10] > parts[9]
    assert parts[-1] == pytest.approx(1)


def test_steps_become_no_shorter_than_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the objective does."""
    monkeypatch.setattr(lbfgs, "DAMPING_RATE", 1.0)
    assert parts_of_secant_steps([-1.0] * 6)[1:] == pytest.approx([0.25] * 4)
