"""`localsim sweep`: its options, and what they mean to `localsim.sweep`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from localsim.errors import UserError, one_of
from localsim.options import add_debug, int_or_word, pair

SWEEP_ABOUT = """\
Train every combination of lists of settings, each in a run folder of its own, and end with one table and figures.

Every setting may be a list. Lists of --rule, --granularity, --reach, --preset, --backbone, --epochs and --seed have
commas; --objective, --data and --set NAME=VALUE, whose values may hold commas themselves, are lists when repeated. What
has no option here goes by --set: cuts, readout, noise, batch_size, lr, projector, ... Combinations that make no sense,
such as a reach beyond the number of stages, are left out and named. Cells are trained seed by seed, so that a sweep
that is interrupted holds whole comparisons.
"""

SWEEP_EXAMPLES = """\
examples:
  localsim sweep --granularity 1,2,4,8,16 --reach 1,2,4 --seeds 3 --out sweeps/reach --plan    how long will it take?
  localsim sweep --granularity 1,2,4,8,16 --reach 1,2,4 --seeds 3 --out sweeps/reach           train, end with a table
  localsim sweep --out sweeps/reach                    go on where it was stopped; what is finished is skipped
  localsim sweep --granularity 1,2,4,8,16 --reach 8 --seeds 3 --out sweeps/reach    more of the same
  localsim sweep --rule blockwise,end_to_end,my_rule.py --seed 0,5 --data cifar10 --out sweeps/rules
  localsim sweep --objective vicreg --objective simclr,vicreg,vicreg,vicreg --out sweeps/losses    commas: one per tap
  localsim sweep --set lr=1e-3 --set lr=3e-3 --set batch_size=128 --out sweeps/rates
  localsim sweep --granularity 1,2,4 --out sweeps/gpus --devices cuda:0,cuda:1    one cell at a time on each
  localsim sweep --out sweeps/reach --slurm --slurm-set timeout_min=240 --slurm-set partition=gpu
"""

_SETTINGS = ("rule", "granularity", "reach", "objective", "preset", "backbone", "data", "data_root", "epochs", "seed")
_HOW = ("out", "seeds", "jobs", "devices", "plan", "slurm", "slurm_set", "quiet")


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    what = parser.add_argument_group("what varies")
    _list(what, "--rule", "NAMES", "blockwise (default), others of `localsim rules`, paths of rules of your own", str)
    _list(what, "--granularity", "K,K", "numbers of stages, or network, stage (the backbone's own), block", int_or_word)
    _list(what, "--reach", "N,N", "how many stages down every loss's credit goes", int)
    what.add_argument(
        "--objective", metavar="NAME", action="append", help="what every tap minimises; repeat for a list"
    )
    _list(what, "--preset", "NAMES", "quick (default without --data), cifar10, stl10, folder, imagenet", str)
    _list(what, "--backbone", "NAMES", "resnet18/34/50/101, resnet20/32/110 (CIFAR), vgg11, vgg6, ...", str)
    what.add_argument("--data", metavar="NAME", action="append",
                      help="embedded, cifar10, cifar100, stl10, imagenet, or a folder; repeat for a list")  # fmt: skip
    what.add_argument("--data-root", metavar="DIR", help="where named data sets lie or are downloaded to")
    _list(what, "--epochs", "N,N", "passes over the training images", int)
    _list(what, "--seed", "N,N", "the seeds themselves", int)
    what.add_argument("--seeds", metavar="N", type=int, help="so many seeds: 3 means 0, 1 and 2 (default: seed 0)")
    what.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], type=_setting,
                      help="any other setting of `localsim run`; a NAME that is repeated is a list")  # fmt: skip
    how = parser.add_argument_group("how it is run")
    how.add_argument("--out", metavar="DIR", required=True, help="the sweep's folder; every cell is a run folder in it")
    how.add_argument("--plan", action="store_true", help="print the cells and how long they take, and make nothing")
    how.add_argument("--jobs", metavar="N", type=int, help="cells trained at once, which share the cores (default 1)")
    _list(how, "--devices", "NAMES", "train one cell at a time on each: cuda:0,cuda:1", str)
    how.add_argument("--slurm", action="store_true", help="submit every cell as a Slurm job; needs the extra [slurm]")
    how.add_argument("--slurm-set", metavar="NAME=VALUE", action="append", default=[], type=_named,
                     help="of every job: timeout_min, partition, gpus_per_node, cpus_per_task, ...; "
                          "may be repeated")  # fmt: skip
    add_debug(how)


def sweep_command(arguments: argparse.Namespace) -> int:
    """Carry out the command and return its exit code: 1 if a cell failed."""
    given = sweep_arguments(arguments)
    from localsim.sweeping import sweep

    return 1 if sweep(**given).failed else 0


def sweep_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `localsim.sweep` that options mean; UserError for a setting that is given twice."""
    settings: dict[str, list[Any]] = {}
    for name, value in arguments.set:
        settings.setdefault(name, []).append(value)
    named = {name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None}
    for name in settings:
        if name in named:
            raise UserError(f"{name} is given twice: by --{name.replace('_', '-')} and by --set")
    how = {name: getattr(arguments, name) for name in _HOW if name != "quiet"}
    return {**how, "slurm_set": dict(arguments.slurm_set), **settings, **named}


def _list(group: Any, flag: str, metavar: str, text: str, kind: Callable[[str], Any]) -> None:
    """Add an option whose values are joined by commas; repeated, it goes on."""

    def values(given: str) -> Sequence[Any]:
        return [kind(word.strip()) for word in given.split(",")]

    values.__name__ = kind.__name__  # in argparse's own message
    group.add_argument(flag, metavar=metavar, action="extend", type=values, help=text)


def _named(text: str) -> tuple[str, Any]:
    try:
        return pair(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _setting(text: str) -> tuple[str, Any]:
    """Return NAME=VALUE, unless it names an option of the command: beside settings, `sweep` could not tell."""
    name, value = _named(text)
    if name in _HOW:
        from localsim.config import Config

        raise argparse.ArgumentTypeError(str(one_of("setting", name, Config.names())))
    return name, value
