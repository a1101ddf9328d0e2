"""`localsim brain`: its options, and which public function they call. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse

from localsim.errors import UserError
from localsim.options import add_layers, add_where

BRAIN_EXAMPLES = """\
examples:
  localsim brain runs/first runs/second --recordings my/v4      every region, with controls
  localsim brain runs/* --recordings my/v4 --metric pls,rdm     by two metrics; seeds are one regime
  localsim brain torchvision:resnet50 --recordings my/v4 --image-size 112    a network that is no run
  localsim brain runs/first --recordings my/v4 --over-training  of a run with --set snapshot_every=1
  localsim brain runs/first --benchmark MajajHong2015public.IT-pls    a benchmark of Brain-Score
  localsim brain runs/* --recordings my/v4 --benchmark Cowley2026.V4-pls    with layers that the recordings choose
"""


def add_brain_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folders, or torchvision:NAME, timm:NAME")
    what = parser.add_argument_group("what they are compared with")
    what.add_argument("--recordings", metavar="DIR", action="append", default=[],
                      help="a folder of recordings, see docs/recordings.md; may be repeated")  # fmt: skip
    what.add_argument("--benchmark", metavar="ID",
                      help="a benchmark of Brain-Score, e.g. MajajHong2015public.IT-pls: every layer, or with "
                           "--recordings the layer that these choose; needs the extra [brain]")  # fmt: skip
    what.add_argument("--regions", metavar="NAMES", help="of the recordings, with commas (default: all)")
    what.add_argument("--bins", metavar="HOW", default="mean", help="time bins: their mean (default), or each")
    how = parser.add_argument_group("how")
    how.add_argument("--metric", metavar="NAME",
                     help="ridgecv (default), pls, ridge, cka, rdm (default for RDMs), rsa; or several: "
                          "pls,rdm")  # fmt: skip
    add_layers(how)
    how.add_argument("--spatial", metavar="HOW", default="upto4x4",
                     help="maps become vectors by regions (default upto4x4: 4x4, or the map where that is smaller), "
                          "mean, flatten, or project1000 (any number)")  # fmt: skip
    how.add_argument("--image-size", metavar="PX", type=int, help="show images at this size (default: as in training)")
    how.add_argument("--controls", metavar="NAMES", default="untrained,pixels,gabor,shuffled",
                     help="untrained,pixels,gabor,shuffled (default), calibrated, or none")  # fmt: skip
    how.add_argument("--over-training", action="store_true", help="every snapshot of the runs too")
    how.add_argument("--choose-stage", action="store_true",
                     help="also the best stage of each network, chosen by other images than score it")  # fmt: skip
    how.add_argument("--resamples", metavar="N", type=int,
                     help="draws of images and neurons for the 95 %% intervals (default 1000, of rdm, rsa, cka 200; "
                          "0: none)")  # fmt: skip
    how.add_argument("--seed", metavar="N", type=int, default=0,
                     help="of draws, shuffled images, projections, networks by name (default 0)")  # fmt: skip
    add_where(parser, "folder for tables and figures (default: brain/NAMES)")


def brain(arguments: argparse.Namespace) -> int:
    """Score runs against recordings, benchmarks, or benchmarks with layers that recordings choose."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "debug", "benchmark")}
    if not arguments.benchmark:
        if not arguments.recordings:
            raise UserError("brain needs either --recordings DIR or --benchmark ID, or both")
        from localsim.analysis.brain.command import score_runs

        score_runs(**given)
        return 0
    from localsim.analysis.brain.benchmarks import score_benchmarks, score_chosen_layers

    if arguments.recordings:
        score_chosen_layers(benchmark=arguments.benchmark, **given)
        return 0
    own = {"layers", "spatial", "image_size", "rule", "data", "data_root", "device", "out"}
    changed = _changed(arguments, own | {"runs", "benchmark", "debug", "command"})
    if unused := [name for name in changed if name != "controls"]:
        raise UserError(f"--{unused[0].replace('_', '-')} has no meaning for --benchmark without --recordings")
    options = {name: given[name] for name in own}
    if changed:  # by default those among the controls that are networks
        options["controls"] = [] if arguments.controls == "none" else arguments.controls.split(",")
    score_benchmarks(arguments.runs, arguments.benchmark, **options)
    return 0


def _changed(arguments: argparse.Namespace, allowed: set[str]) -> list[str]:
    """Return the options that were given another value than their default, but for those allowed."""
    parser = argparse.ArgumentParser()
    add_brain_options(parser)
    defaults = vars(parser.parse_args([]))
    return [name for name, value in vars(arguments).items() if name not in allowed and value != defaults[name]]
