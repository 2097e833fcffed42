"""The scripted objective as a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nst_model import FeatureModel, Style, StylizeOptions, load_artifact, save_artifact
from nst_model.objective import interpreted

Picture = Callable[[int, int, int], torch.Tensor]


def test_saved_and_loaded_is_identical(tiny_model: FeatureModel, picture: Picture, tmp_path: Path) -> None:
    """Losses and gradient bit for bit, at a size other than the style's, and the metadata as it was."""
    options = StylizeOptions()
    objective = tiny_model.objective([tiny_model.style_targets(Style(picture(48, 40, 1)), options)], options)
    metadata = {"model": "vgg16", "weights_sha256": tiny_model.weights.sha256, "layers": list(options.style_layers)}

    save_artifact(objective, tmp_path / "objective.pt", metadata)
    loaded, found = load_artifact(tmp_path / "objective.pt")

    assert found == metadata
    image, content = picture(33, 57, 2)[None], picture(33, 57, 3)[None]
    with interpreted():  # as the optimizer runs it
        losses, gradient = objective.loss_and_gradient(image, objective.content_targets(content))
        again, gradient_again = loaded.loss_and_gradient(image, loaded.content_targets(content))
    assert all(torch.equal(one, other) for one, other in zip(losses, again, strict=True))
    assert torch.equal(gradient, gradient_again)


def test_artifact_needs_nothing_of_this_project(tiny_model: FeatureModel, picture: Picture, tmp_path: Path) -> None:
    """A process that only has torch loads it and takes a gradient."""
    options = StylizeOptions()
    objective = tiny_model.objective([tiny_model.style_targets(Style(picture(48, 40, 1)), options)], options)
    save_artifact(objective, tmp_path / "objective.pt", {})
    program = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch\n"
        f"module = torch.jit.load({str(tmp_path / 'objective.pt')!r})\n"
        "image = torch.full((1, 3, 32, 48), 0.5)\n"
        "losses, gradient = module.loss_and_gradient(image, module.content_targets(image))\n"
        "assert gradient.shape == image.shape and losses[0] > 0\n"
        "assert not any(name.startswith('nst_model') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
