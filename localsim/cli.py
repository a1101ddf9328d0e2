"""The command line: parse, call one public function, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from localsim.brain_command import BRAIN_EXAMPLES, add_brain_options, brain
from localsim.compare_command import COMPARE_EXAMPLES, add_compare_options, compare
from localsim.cost_command import COST_EXAMPLES, add_cost_options
from localsim.errors import Interrupted, TrainingFailed, UserError, out_of_memory
from localsim.options import add_debug, given, int_or_word
from localsim.report_command import REPORT_EXAMPLES, add_report_options, report
from localsim.sweep_command import SWEEP_ABOUT, SWEEP_EXAMPLES, add_sweep_options, sweep_command

ABOUT = """\
How far must a learning signal travel?

localsim cuts a network into stages, attaches losses to some of them, and lets a credit matrix say which loss may
change which stage: from one loss per block to backpropagation.
"""

RUN_EXAMPLES = """\
examples:
  localsim run --rule blockwise --granularity 4        five minutes on two cores: the embedded data set, ResNet-50
  localsim run --rule end_to_end --seed 1              backpropagation, the control
  localsim run --rule blockwise --reach 2              every loss also changes the stage below its own
  localsim run --objective vicreg --reach 2 --granularity 8    another loss, another reach, another cut
  localsim run --rule loco --set schedule=sequential   one loss after the other, from the lowest up
  localsim run --rule end_to_end --set transport=feedback_alignment    backpropagation without its weights
  localsim run --rule my_rule.py                       a rule of your own, see docs/add_a_rule.md
  localsim run --rule layerwise --data cifar10         the cifar10 preset; images are looked for in --data-root
  localsim run --data my/images --set image_size=96    any folder of images
  localsim run --preset imagenet --data-root /data     the published configuration, 300 epochs
  localsim run --out runs/first --resume               continue where a run was stopped, bit for bit
"""

PROBE_EXAMPLES = """\
examples:
  localsim probe runs/first                            logistic regression and k-NN on every stage
  localsim probe runs/first --protocol paper           SGD, 100 epochs, crops and flips (Siddiqui et al. 2023)
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (training failed), 2 (something asked for cannot be done), 130."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_rest, **_more: print(f"localsim: {message}", file=sys.stderr)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except KeyboardInterrupt as stopped:
        kept = (str(stopped) or "continue with --resume") if isinstance(stopped, Interrupted) else "by Ctrl-C"
        if not getattr(stopped, "said_elsewhere", False):
            print(f"localsim: stopped; {kept}", file=sys.stderr)
        return 130
    except UserError as error:
        if arguments.debug:
            raise
        if not getattr(error, "said_elsewhere", False):
            print(f"localsim: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingFailed) else 2
    except (MemoryError, RuntimeError) as error:
        if arguments.debug or not out_of_memory(error):
            raise
        print("localsim: out of memory; a smaller --batch-size, projector or image_size needs less", file=sys.stderr)
        return 1
    except OSError as error:
        if arguments.debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        hint = "; complete checkpoints are kept, make room and continue with --resume" * (error.errno == errno.ENOSPC)
        print(f"localsim: {error.strerror or error}{where}{hint}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(prog="localsim", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    run = _command(commands, "run", "train a rule, probe every stage, draw the figures", RUN_EXAMPLES, _run)
    what = run.add_argument_group("what is learned where")
    what.add_argument(
        "--rule", metavar="NAME", help="blockwise (default), another of `localsim rules`, or path/to/your_rule.py"
    )
    what.add_argument("--granularity", metavar="K", type=int_or_word,
                      help="how many stages: a number, or network, stage (the backbone's own), block")  # fmt: skip
    what.add_argument("--cuts", metavar="WHERE",
                      help="auto, balanced (by held activations), or the unit blocks at which stages begin: "
                           "layer2.0,layer3.0")  # fmt: skip
    what.add_argument("--reach", metavar="N", type=int, help="how many stages down every loss's credit goes")
    what.add_argument("--objective", metavar="NAME",
                      help="what every tap minimises: barlow_twins, vicreg, simclr, infonce, hinge, lpl, "
                           "cross_entropy, supcon, ...; or one per tap: simclr,vicreg")  # fmt: skip
    what.add_argument(
        "--readout",
        metavar="NAME",
        help="global, local2x2 (any k x k), expand, expand3x3, subsample, residual2, map, patches",
    )
    what.add_argument("--noise", metavar="KIND:SIGMA", help="none, or all, hw, channel with a sigma, e.g. all:0.25")
    much = run.add_argument_group("how much")
    much.add_argument(
        "--preset", metavar="NAME", help="quick (default without --data), cifar10, stl10, folder, imagenet"
    )
    much.add_argument("--backbone", metavar="NAME", help="resnet18/34/50/101, resnet20/32/110 (CIFAR), vgg11, vgg6, "
                      "preact_resnet50, or one that a rule file registers")  # fmt: skip
    much.add_argument(
        "--data", metavar="NAME", help="embedded, cifar10, cifar100, stl10, imagenet, or a folder of images"
    )
    much.add_argument("--data-root", metavar="DIR", help="where named data sets lie or are downloaded to")
    much.add_argument("--epochs", metavar="N", type=int, help="passes over the training images")
    much.add_argument("--batch-size", metavar="N", type=int, help="images in a batch")
    much.add_argument(
        "--lr", metavar="X", type=float, help="peak learning rate (per 256 images where lr_scaling is linear)"
    )
    much.add_argument("--seed", metavar="N", type=int, help="of initialisation, order, views and noise (default 0)")
    much.add_argument("--set", metavar="NAME=VALUE", action="append", default=[],
                      help="any other setting, e.g. --set precision=full; may be repeated")  # fmt: skip
    how = run.add_argument_group("how it is run")
    how.add_argument("--out", metavar="DIR", help="the run folder (default: runs/RULE-...)")
    how.add_argument("--resume", action="store_true", help="continue the run in the folder")
    how.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:N")
    how.add_argument("--parallel", metavar="KIND", help="what the processes that torchrun started divide: data "
                     "(default), blocks, blocks:P")  # fmt: skip
    add_debug(how)

    probe = _command(commands, "probe", "linear and k-NN accuracy of every stage, beside the untrained network",
                     PROBE_EXAMPLES, _probe)  # fmt: skip
    probe.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    probe.add_argument("--rule", metavar="FILE", help="the file of a rule of your own, for runs made with it; executed")
    probe.add_argument("--protocol", metavar="NAME", help="logistic, or paper (default: what the run's preset says)")
    probe.add_argument("--epochs", metavar="N", type=int, help="of the paper protocol (default 100)")
    probe.add_argument(
        "--report", metavar="WHICH", help="paper protocol: last epoch (default) or best on the test images"
    )
    probe.add_argument("--images", metavar="N", type=int, help="training images that the probes see (default: all)")
    probe.add_argument("--seed", metavar="N", type=int, help="of the probes (default 0)")
    probe.add_argument("--data", metavar="DIR", help="where the run's folder of images lies now")
    probe.add_argument("--data-root", metavar="DIR", help="where the run's named data set lies now")
    probe.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N (default: the run's)")
    add_debug(probe)

    about = "similarity of layers within and between runs, as tables and plots"
    add_compare_options(_command(commands, "compare", about, COMPARE_EXAMPLES, compare))

    sweep = _command(
        commands, "sweep", "a grid of configurations: plan, train, one table", SWEEP_EXAMPLES, sweep_command
    )
    sweep.description = SWEEP_ABOUT
    add_sweep_options(sweep)
    about = "runs against neural recordings, or benchmarks of Brain-Score"
    add_brain_options(_command(commands, "brain", about, BRAIN_EXAMPLES, brain))
    add_cost_options(_command(commands, "cost", "what a step of a rule costs, before training and without data",
                              COST_EXAMPLES, _cost))  # fmt: skip
    about = "one HTML page on runs: to look at, send, print"
    add_report_options(_command(commands, "report", about, REPORT_EXAMPLES, report))

    rules = _command(commands, "rules", "the rules, their papers and credit matrices", "", _rules)
    rules.add_argument("name", metavar="NAME", nargs="?", help="only this rule")
    rules.add_argument("--stages", metavar="K", type=int, default=4, help="draw the matrices for so many stages")
    add_debug(rules)
    return parser


def _command(
    commands: Any, name: str, summary: str, examples: str, function: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=function)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from localsim.experiment import run

    run(**given(arguments))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from localsim.analysis.stage_probe import probe
    from localsim.runs import load_run, writing

    if arguments.rule:
        from localsim.rules import get_rule

        get_rule(arguments.rule)
    moved = {name: getattr(arguments, name) for name in ("data", "data_root", "device")}
    options = {name: getattr(arguments, name) for name in ("protocol", "images", "seed", "epochs", "report")}
    options = {name: value for name, value in options.items() if value is not None}
    # with options of its own a probe has a file of its own, and never replaces the run's
    name = "-".join(["probe", *(f"{option}={value}" for option, value in options.items())])
    for path in arguments.runs:
        run = load_run(path).moved(**moved)
        with writing(run.path):
            table = probe(run, **options, name=name)
        print(f"{run.path / name}.json\n{table}\n")
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from localsim.cost_command import report_costs

    report_costs(**given(arguments))
    return 0


def _rules(arguments: argparse.Namespace) -> int:
    from localsim.rules import get_rule, rules
    from localsim.rules.choices import choose

    for rule in [get_rule(arguments.name)] if arguments.name else rules.values():
        print(f"{rule.name}: {rule.summary}")
        print(f"  paper: {rule.paper}")
        chosen = choose(rule, {})
        print(f"  cut: {rule.granularity}; readout {chosen['readout']}, head {chosen['head']}, "
              f"objective {chosen['objective']}, noise {rule.noise}")  # fmt: skip
        if rule.settings:
            print("  also: " + ", ".join(f"{name}={value}" for name, value in rule.settings.items()))
        try:
            drawn = str(rule.credit(arguments.stages))
        except UserError as error:  # a matrix for other numbers of stages must not end the list
            drawn = f"no credit matrix for {arguments.stages} stages: {error}"
        print("  " + drawn.replace("\n", "\n  ") + "\n")
    return 0
