"""A style as a file, in the place of its pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from nst_model import (
    ExportGraph,
    ExportSpec,
    FeatureModel,
    InvalidArtifact,
    InvalidImage,
    InvalidOption,
    KeptStyle,
    Style,
    StyleCard,
    StyleFile,
    StylizeOptions,
    prepare_style,
    read_description,
    stylize,
)
from nst_model.artifact import Fp32, sealed_safetensors
from nst_model.exports import graph_module
from nst_model.stylization import Stylization
from nst_model.weights import FeatureWeights
from tests.conftest import picture_bytes
from tests.model.graphs import distance

Picture = Callable[[int, int, int], Tensor]

OPTIONS = StylizeOptions(size_px=64, first_size_px=32, iterations=2, precision="fp32")  # type: ignore[arg-type]


@pytest.fixture
def kept(tiny_model: FeatureModel, picture: Picture) -> StyleFile:
    """A style of one picture at 32, 45 and 64 px."""
    return prepare_style(tiny_model, [Style(picture(64, 48, 1), name="ab" * 32)], OPTIONS, display_name="The [wave] ≈")


def test_written_and_read_is_identical(kept: StyleFile) -> None:
    """Card and moments, bit for bit; and the same style is the same bytes."""
    data = kept.to_bytes()
    again = StyleFile.from_bytes(data)
    assert again.card == kept.card
    assert again.card.display_name == "The [wave] ≈"
    assert again.card.sizes_px == (32, 45, 64)
    for size_px, layers in kept.moments.items():
        for layer, moments in layers.items():
            for name, tensor in moments.items():
                assert torch.equal(again.moments[size_px][layer][name], tensor)
    assert again.to_bytes() == data
    assert StyleCard.of(read_description(data)) == kept.card


def test_run_with_a_file_is_the_run_with_the_pictures(
    tiny_model: FeatureModel, kept: StyleFile, picture: Picture
) -> None:
    """Bit for bit at every scale, for each of the losses on moments."""
    content = picture(64, 56, 2)
    for loss in ("gram", "covariance", "mean_std", "wasserstein"):
        options = dataclasses.replace(OPTIONS, style_loss=loss)
        with_picture = list(stylize(tiny_model, content, [Style(picture(64, 48, 1))], options))
        with_file = list(stylize(tiny_model, content, [KeptStyle(kept, 64)], options))
        assert len(with_picture) == len(with_file) > 6
        for one, other in zip(with_picture, with_file, strict=True):
            assert torch.equal(one.picture, other.picture)
            assert one.loss == other.loss


def test_several_pictures_are_kept_mixed(tiny_model: FeatureModel, picture: Picture) -> None:
    """By weight, and exactly: the run is the one that mixes them itself. With what they were and their shares."""
    styles = [
        Style(picture(64, 48, 1), 3.0, "ab" * 32),
        Style(picture(40, 64, 2), 1.0, "cd" * 32),
    ]
    file = StyleFile.from_bytes(prepare_style(tiny_model, styles, OPTIONS).to_bytes())
    assert [(image.sha256[:4], image.share) for image in file.card.images] == [("abab", 0.75), ("cdcd", 0.25)]
    content = picture(56, 64, 3)
    mixed = list(stylize(tiny_model, content, styles, OPTIONS))
    with_file = list(stylize(tiny_model, content, [KeptStyle(file, 64)], OPTIONS))
    assert torch.equal(mixed[-1].picture, with_file[-1].picture)


def test_files_and_pictures_go_together(tiny_model: FeatureModel, kept: StyleFile, picture: Picture) -> None:
    """Some styles of a run may be files, each with its weight and its region."""
    content, other = picture(64, 56, 2), Style(picture(64, 64, 5), 2.0)
    half = torch.zeros(64, 56)
    half[:, :28] = 1
    for region in (None, half):
        wanted = [Style(picture(64, 48, 1), 0.5, region=region), other]
        given = [KeptStyle(kept, 64, 0.5, region), other]
        pictures = [list(stylize(tiny_model, content, styles, OPTIONS))[-1].picture for styles in (wanted, given)]
        assert torch.equal(*pictures)


def test_graph_makes_a_style_file(tiny_weights: FeatureWeights, tiny_model: FeatureModel, picture: Picture) -> None:
    """What the graph `grams` yields has the names and, to rounding, the values of what is in a style file."""
    options = dataclasses.replace(OPTIONS, padding="zeros", first_size_px=64)
    style = picture(64, 48, 1)
    file = prepare_style(tiny_model, [Style(style)], options)
    module = graph_module(tiny_weights, ExportSpec(model="vgg16", graph=ExportGraph.GRAMS))
    for name, tensor in module(style[None]).items():
        layer, _, moment = name.partition(".")
        assert distance(tensor[0], file.moments[64][layer][moment]) < 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"style_loss": "direct"},
            "style_loss must be one of covariance, gram, mean_std, wasserstein for a style file",
        ),
        ({"color": "luminance"}, "color luminance needs the style's picture, and a style file has only its moments"),
        ({"init": "style_statistics"}, "init style_statistics needs the style's picture"),
        ({"pooling": "average"}, "pooling must be max, as in the style file, not average"),
        ({"padding": "zeros"}, "padding must be mirror, as in the style file, not zeros"),
        (
            {"style_layers": {"relu1_2": 1}},
            r"style_layers\[relu1_2\] is not in the style file, which has relu1_1, relu2",
        ),
        ({"first_size_px": 16}, "size_px needs the style at 23 px; the style file has it at 32, 45, 64 px"),
    ],
)
def test_run_that_a_file_cannot_serve_is_refused(
    tiny_model: FeatureModel, kept: StyleFile, picture: Picture, changed: dict[str, object], message: str
) -> None:
    """Before it begins, and with what the file has."""
    options = dataclasses.replace(OPTIONS, **changed)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match=message):
        Stylization(tiny_model, picture(64, 56, 2), [KeptStyle(kept, 64)], options)


def test_size_beside_the_picture_counts(tiny_model: FeatureModel, kept: StyleFile, picture: Picture) -> None:
    """A style may be smaller than the picture, if the file has those sizes; its own edge is what counts."""
    options = dataclasses.replace(OPTIONS, first_size_px=64)
    half = list(stylize(tiny_model, picture(64, 56, 2), [KeptStyle(kept, 32)], options))
    assert half[-1].loss != list(stylize(tiny_model, picture(64, 56, 2), [KeptStyle(kept, 64)], options))[-1].loss
    with pytest.raises(InvalidOption, match="needs the style at 40 px"):
        Stylization(tiny_model, picture(64, 56, 2), [KeptStyle(kept, 40)], options)


def test_file_of_other_weights_is_refused(tiny_model: FeatureModel, kept: StyleFile, picture: Picture) -> None:
    """By the model's name, by the SHA-256 of its weights, and by its channels."""
    content = picture(64, 56, 2)
    for card, message in (
        (dataclasses.replace(kept.card, model="vgg19"), "model must be vgg19, which the style file was made with, not"),
        (dataclasses.replace(kept.card, weights_sha256="0" * 64), "model vgg16 has weights [0-9a-f]{64} here, and the"),
    ):
        with pytest.raises(InvalidOption, match=message):
            Stylization(tiny_model, content, [KeptStyle(StyleFile(card, kept.moments), 64)], OPTIONS)
    for edge in kept.card.sizes_px:
        cut = {name: tensor[..., :3] for name, tensor in kept.moments[edge]["relu2_1"].items()}
        moments = kept.moments | {edge: {**kept.moments[edge], "relu2_1": cut}}
        with pytest.raises(InvalidOption, match=r"style_layers\[relu2_1\] has 6 channels, and 3 in the style file"):
            Stylization(tiny_model, content, [KeptStyle(StyleFile(kept.card, moments), 64)], OPTIONS)


def test_run_cannot_be_steered_away_from_its_file(tiny_model: FeatureModel, kept: StyleFile, picture: Picture) -> None:
    """Layers that the file lacks are refused on the way, too, and the run goes on as it was."""
    run = Stylization(tiny_model, picture(64, 56, 2), [KeptStyle(kept, 64)], OPTIONS)
    iterates = iter(run)
    next(iterates)
    with pytest.raises(InvalidOption, match=r"style_layers\[relu3_2\] is not in the style file"):
        run.steer(style_layers={"relu3_2": 1.0})
    run.steer(style_layers={"relu3_1": 1.0})
    assert list(iterates)[-1].style_losses.keys() == {"relu3_1"}


def test_run_with_a_file_is_taken_up_again(tiny_model: FeatureModel, kept: StyleFile, picture: Picture) -> None:
    """To the bit, as with pictures."""
    content = picture(64, 56, 2)
    whole = list(Stylization(tiny_model, content, [KeptStyle(kept, 64)], OPTIONS))
    first = Stylization(tiny_model, content, [KeptStyle(kept, 64)], OPTIONS)
    iterates = iter(first)
    for _ in range(4):
        next(iterates)
    second = Stylization(tiny_model, content, [KeptStyle(kept, 64)], OPTIONS)
    second.restore(first.state())
    assert torch.equal(list(second)[-1].picture, whole[-1].picture)


def test_files_that_are_no_style_are_refused(kept: StyleFile) -> None:
    """Those of graphs, of tensors that are missing, not square or not finite, of words where numbers belong."""
    described = read_description(kept.to_bytes())
    mean, gram = Fp32((2,), bytes(8)), Fp32((2, 2), bytes(16))
    two = {**described, "sizes_px": [64], "layers": ["relu1_1"]}
    for tensors, description, message in (
        ({}, {**described, "kind": "graph"}, "the file is no style but a graph"),
        ({}, described, "lacks the moments of relu1_1 at 32 px"),
        ({"64.relu1_1.mean": mean, "64.relu1_1.gram": mean}, two, "lacks the moments of relu1_1 at 64 px"),
        ({"64.relu1_1.mean": mean, "64.relu1_1.gram": gram}, {**two, "pooling": "min"}, "lacks or has wrong: 'min'"),
        ({"64.relu1_1.mean": mean, "64.relu1_1.gram": gram}, {**two, "sizes_px": "x"}, "lacks or has wrong"),
        (
            {"64.relu1_1.mean": mean, "64.relu1_1.gram": Fp32((2, 2), b"\xff" * 16)},
            two,
            "moments of relu1_1 at 64 px are not finite",
        ),
        ({"64.relu1_1.mean": Fp32((9,), bytes(8)), "64.relu1_1.gram": gram}, two, "cannot be read"),
    ):
        with pytest.raises(InvalidArtifact, match=message):
            StyleFile.from_bytes(sealed_safetensors(tensors, description))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sizes_px": []}, "sizes_px must be 1 to 32, not 0"),
        ({"sizes_px": [64] * 20_000}, "sizes_px must be 1 to 32, not 20000"),
        ({"sizes_px": [-5, 32]}, "sizes_px must be at least 16"),
        ({"sizes_px": [32, 32, 64]}, "sizes_px must ascend"),
        ({"sizes_px": [64, 32]}, "sizes_px must ascend"),
        ({"sizes_px": [float("1e400")]}, "cannot be read"),
        ({"layers": []}, "layers must name one at least"),
        ({"layers": ["relu1_1", "banana"]}, "layers must be vgg16's, .* not relu1_1, banana"),
        ({"layers": ["relu1_1", "relu1_1"]}, "layers must be vgg16's, each once"),
        ({"layers": "relu1_1"}, "layers must be vgg16's"),
        ({"images": []}, "shares must be 0 to 1 and sum to 1"),
        ({"images": [{"sha256": "ab" * 32, "share": -3}, {"sha256": "ab" * 32, "share": 4}]}, "shares must be 0 to 1"),
        ({"images": [{"sha256": "ab" * 32, "share": 0.5}]}, "shares must be 0 to 1 and sum to 1, not 0.5"),
        ({"images": [{"sha256": "../../etc/passwd", "share": 1}]}, "sha256 must have 64 hexadecimal digits"),
        ({"weights_sha256": "no"}, "sha256 must have 64 hexadecimal digits"),
        ({"display_name": "\x1b[31mred"}, r"display_name must be one line of text, not '\\x1b\[31mred'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_descriptions_that_no_style_can_have_are_refused(
    kept: StyleFile, said: dict[str, object], message: str
) -> None:
    """Sizes, layers, shares, hashes and names that are not such as this project writes."""
    described = read_description(kept.to_bytes())
    with pytest.raises(InvalidArtifact, match=message):
        StyleFile.from_bytes(sealed_safetensors({}, described | said))


def test_nothing_is_written_that_could_not_be_read(kept: StyleFile) -> None:
    """A card that `from_bytes` would refuse makes no file."""
    with pytest.raises(InvalidArtifact, match="sizes_px must ascend"):
        StyleFile(dataclasses.replace(kept.card, sizes_px=(64, 32, 45)), kept.moments).to_bytes()


def test_pictures_that_cannot_be_prepared_are_refused(tiny_model: FeatureModel, picture: Picture) -> None:
    """None, two of different size, none that counts, layers that do not exist."""
    style = Style(picture(64, 48, 1))
    for styles, options, message in (
        ([], OPTIONS, "styles must have one longer edge, not none px"),
        ([style, Style(picture(32, 30, 1))], OPTIONS, "styles must have one longer edge, not 32, 64 px"),
        ([dataclasses.replace(style, weight=0)], OPTIONS, "styles must have at least one weight above 0"),
        *(
            (
                [style, dataclasses.replace(style, weight=weight)],
                OPTIONS,
                rf"styles\[1\].weight must be finite .* {weight}",
            )
            for weight in (math.inf, math.nan, -1.0)
        ),
        (
            [style],
            dataclasses.replace(OPTIONS, style_layers={"relu9_9": 1}),
            "relu9_9.* is no layer of the feature model",
        ),
    ):
        with pytest.raises(InvalidOption, match=message):
            prepare_style(tiny_model, styles, options)
    with pytest.raises(InvalidOption, match="display_name must be one line of text"):
        prepare_style(tiny_model, [style], OPTIONS, display_name="two\nlines")
    with pytest.raises(InvalidImage, match="must have shape"):
        prepare_style(tiny_model, [Style(picture(64, 48, 1)[:2])], OPTIONS)


def test_style_is_made_at_the_command_line(tiny_weights_file: Path, tmp_path: Path) -> None:
    """Of image files, turned upright, by weight; whatever cannot be is said in one line."""
    (tmp_path / "wave.png").write_bytes(picture_bytes(70, 50, seed=1))
    turned = Image.open(tmp_path / "wave.png").transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nst_model", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run("fetch", "vgg16", "--file", tiny_weights_file).returncode == 0
    wave = ["style", "wave.png", "--model", "vgg16", "--size", "64", "--first-size", "32", "-o"]
    assert run(*wave, "a.style.safetensors", "--name", "Wave").stdout == "a.style.safetensors\n"
    file = StyleFile.from_bytes((tmp_path / "a.style.safetensors").read_bytes())
    assert (file.card.display_name, file.card.sizes_px) == ("Wave", (32, 45, 64))
    assert file.card.images[0].sha256 == hashlib.sha256((tmp_path / "wave.png").read_bytes()).hexdigest()
    assert run("style", "turned.png", *wave[2:], "b").returncode == 0
    turned_file = StyleFile.from_bytes((tmp_path / "b").read_bytes())
    assert torch.equal(file.moments[64]["relu3_1"]["gram"], turned_file.moments[64]["relu3_1"]["gram"])
    for arguments, message in (
        (
            (*wave, "c", "--weight", "1", "--weight", "2"),
            "weight must be given for each image or for none, not 2 for 1",
        ),
        ((*wave, "no/c"), "output: there is no folder 'no'"),
        ((*wave, "."), "output: '.' is a folder; name a file in it"),
        ((*wave, "c", "--style-layers", "relu1_1,relu9_1"), "relu9_1] is no layer"),
        (("style", "a.style.safetensors", *wave[2:], "c"), "a.style.safetensors is no image of the formats JPEG, PNG"),
        (("style", "nowhere.png", *wave[2:], "c"), "No such file or directory"),
    ):
        failed = run(*arguments)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "c").exists()
