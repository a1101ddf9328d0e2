"""`localsim compare`: its options, and which public function they call. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse

from localsim.options import add_layers, add_where

COMPARE_EXAMPLES = """\
examples:
  localsim compare runs/first runs/second              debiased CKA of what ends the backbone's own stages
  localsim compare runs/* --measure cka_debiased,rsa   by two measures; runs that differ in seed alone are one regime
  localsim compare runs/first --over-training          of a run with --set snapshot_every=1: each snapshot
  localsim compare runs/* --layers units --images 500  every unit block, on 500 test images
"""


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or torchvision:NAME, timm:NAME")
    what = parser.add_argument_group("what is compared, and how")
    what.add_argument("--measure", metavar="NAME", default="cka_debiased",
                      help="cka_debiased (default), cka, cka_rbf, rsa, procrustes, svcca, predictivity, "
                           "mutual_knn, ...; or several: cka,rsa. An unknown name lists all")  # fmt: skip
    add_layers(what)
    what.add_argument("--spatial", metavar="HOW", default="mean",
                      help="maps become vectors by their mean (default), 2x2 (any k x k), flatten, or project1000 (any "
                           "number)")  # fmt: skip
    what.add_argument(
        "--images", metavar="N", type=int, default=1000, help="test images, or all if they are fewer (default 1000)"
    )
    what.add_argument("--controls", metavar="NAMES", default="untrained",
                      help="untrained (default), calibrated, both with a comma, or none")  # fmt: skip
    what.add_argument("--over-training", action="store_true", help="every snapshot of the runs too")
    what.add_argument("--resamples", metavar="N", type=int, default=200,
                      help="draws of images for the 95 %% intervals (default 200, 0: none)")  # fmt: skip
    what.add_argument("--permutations", metavar="N", type=int, default=100,
                      help="mismatched orders of the images for the tables' chance level (default 100, "
                           "0: none)")  # fmt: skip
    what.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws (default 0)")
    add_where(parser, "folder for tables and figures (default: comparisons/NAMES)")


def compare(arguments: argparse.Namespace) -> int:
    """Measure the similarity of the layers of runs; print and save tables and figures."""
    from localsim.analysis.comparing import compare_runs

    compare_runs(**{name: value for name, value in vars(arguments).items() if name not in ("command", "debug")})
    return 0
