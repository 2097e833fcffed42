"""Regenerate the studies: pictures, plots, numbers, and the tables of their pages."""

from __future__ import annotations

import argparse
from pathlib import Path

from nst_model import DEFAULT_MODEL, FeatureModel, load_weights
from studies import content_loss, which_loss, why_gram
from studies.lab import Lab
from studies.report import Report

STUDIES = {"why-gram": why_gram.run, "content-loss": content_loss.run, "which-loss": which_loss.run}
DOCS = Path(__file__).resolve().parent.parent / "docs" / "studies"


def main() -> None:
    """Run the studies that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"Of {', '.join(STUDIES)}; all by default.")
    parser.add_argument("--size", type=int, default=192, help="Longer edge of the pictures, pixels.")
    parser.add_argument("--iterations", type=int, default=20, help="Iterations at each scale.")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N.")
    parser.add_argument("--out", type=Path, default=DOCS, help="Folder of the pages.")
    given = parser.parse_args()
    if unknown := set(given.studies) - set(STUDIES):
        parser.error(f"no such study: {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    lab = Lab(FeatureModel(load_weights(DEFAULT_MODEL), given.device), given.size, given.iterations)
    for name in given.studies or STUDIES:
        print(name, flush=True)
        STUDIES[name](lab, Report(given.out, name))


if __name__ == "__main__":
    main()
