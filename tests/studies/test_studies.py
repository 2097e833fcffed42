"""The studies run from end to end, and what they measure is what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nst_model import FeatureModel
from nst_model.weights import load_weights
from studies import content_loss, which_loss, why_gram
from studies.lab import Lab
from studies.measures import edge_agreement, ghost, intensity, ssim
from studies.report import Report, filled, shown

STYLES = ("strokes", "waves", "mosaic")


def smooth(height: int, width: int, seed: int) -> torch.Tensor:
    """Return a picture of smooth random colours."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    picture: torch.Tensor = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return picture


@pytest.fixture(scope="module")
def lab(tiny_weights_file: Path) -> Lab:
    """A lab of small pictures and a tiny feature model."""
    model = FeatureModel(load_weights("vgg16", tiny_weights_file), "cpu")
    styles = {name: smooth(48, 64, seed) for seed, name in enumerate(STYLES)}
    photos = {name: smooth(44, 64, seed) for seed, name in enumerate(("cat", "astronaut"), start=5)}
    return Lab(model, 32, 2, styles, photos)


@pytest.mark.parametrize("study", [why_gram, content_loss, which_loss])
def test_a_study_leaves_a_page_numbers_and_pictures(study: object, lab: Lab, tmp_path: Path) -> None:
    """One command makes everything there is to see."""
    run: Callable[[Lab, Report], None] = study.run  # type: ignore[attr-defined]
    run(lab, Report(tmp_path, "study"))
    assert json.loads((tmp_path / "study.json").read_text())
    assert (tmp_path / "study.md").read_text().count("<!-- table") >= 3
    assert len(list((tmp_path / "images").glob("study-*.jpg"))) >= 3


def test_statistics_forget_where_features_stand_and_maps_do_not(lab: Lab, tmp_path: Path) -> None:
    """The first question in one line: shifted features are the same style to Gram matrices, another to the maps."""
    why_gram.responses(lab, Report(tmp_path, "study"))
    found = json.loads((tmp_path / "study.json").read_text())["response"][why_gram.FEATURES_SHIFTED]
    for loss in ("gram", "covariance", "mean_std", "sliced"):
        assert why_gram.mean(found[loss]) < 1e-4, loss
    assert why_gram.mean(found["direct"]) > 0.1
    assert why_gram.mean(found["cross"]) > 0.01


def test_only_the_raw_inner_product_has_no_bottom(lab: Lab, tmp_path: Path) -> None:
    """The second question in one line: the raw inner product falls below the photo's own, the bounded ones do not."""
    content_loss.runaway(lab, Report(tmp_path, "study"))
    found = json.loads((tmp_path / "study.json").read_text())["descent"]
    assert found[content_loss.RAW]["loss"][-1] < -1.2
    assert min(found["inner_product"]["loss"]) >= -1e-6
    assert found[content_loss.RAW]["largest_pixel"][-1] > found["squared_error"]["largest_pixel"][-1]


def test_shuffling_keeps_every_pixel() -> None:
    """Blocks change places and nothing else."""
    picture = smooth(32, 48, 0)
    moved = why_gram.shuffled(picture, 8)
    assert moved.shape == picture.shape
    assert not torch.equal(moved, picture)
    assert torch.equal(moved.flatten().sort().values, picture.flatten().sort().values)
    assert any(
        torch.equal(moved[:, :8, :8], picture[:, y : y + 8, x : x + 8])
        for y in range(0, 32, 8)
        for x in range(0, 48, 8)
    )


def test_measures_are_1_for_the_photo_itself_and_ghost_tells_the_layout() -> None:
    """The ends of the scales."""
    photo, style = smooth(48, 64, 1), smooth(48, 64, 2)
    for measure in (ssim, edge_agreement, intensity):
        assert measure(photo, photo) == pytest.approx(1)
    assert ghost(photo, photo, style) == pytest.approx(0, abs=1e-6)
    assert ghost(style, photo, style) == pytest.approx(1)
    assert 0.2 < ghost((photo + style) / 2, photo, style) < 0.9


def test_bending_by_nothing_changes_nothing() -> None:
    """A shift of 0 px is the photo."""
    photo = smooth(40, 56, 3)
    assert torch.allclose(content_loss.bent(photo, 0.0), photo, atol=1e-5)


def test_tables_replace_tables_and_leave_the_prose() -> None:
    """What a person wrote around a table stays."""
    page = filled("Before.\n\n<!-- table a -->\nold\n<!-- end a -->\n\nAfter.\n", "a", "| new |")
    assert page == "Before.\n\n<!-- table a -->\n\n| new |\n\n<!-- end a -->\n\nAfter.\n"
    assert filled(page, "b", "| more |").startswith(page)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (123.4, "123"),
        (0.1234, "0.12"),
        (-0.0123, "-0.012"),
        (3e-6, "3e-6"),
    ],
)
def test_numbers_are_shown_in_as_many_digits_as_mean_something(value: float, text: str) -> None:
    """A cell is short."""
    assert shown(value) == text
