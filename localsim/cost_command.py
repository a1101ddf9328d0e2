"""`localsim cost`: its options, and what it prints and writes. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsim.errors import UserError, one_of
from localsim.files import write_json

if TYPE_CHECKING:
    from localsim.config import Config
    from localsim.cost import Cost
    from localsim.scaling import Prediction

COST_EXAMPLES = """\
examples:
  localsim cost --rule blockwise --granularity 4 --preset imagenet    the published configuration, by stage
  localsim cost --rule blockwise,loco,end_to_end --granularity 1,2,4,8,block --plot cost.png
  localsim cost --rule blockwise --set recompute=units --batch-size 256    any setting of `localsim run`
  localsim cost --preset imagenet --granularity 4 --processes 8,64,512    time and messages on several processes
  localsim cost --rule loco --processes 2 --parallel blocks --machine here    the same for this very machine
"""


def add_cost_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command; all but those from --processes on are settings as in `localsim run`."""
    parser.add_argument("--rule", metavar="NAMES", help="blockwise (default), another, or several: blockwise,loco")
    parser.add_argument(
        "--granularity", metavar="K", help="how many stages, or network, stage, block; or several: 1,4,8"
    )
    parser.add_argument("--cuts", metavar="WHERE", help="auto, balanced, or unit blocks at which stages begin")
    parser.add_argument("--reach", metavar="N", type=int, help="how many stages down every loss's credit goes")
    parser.add_argument("--objective", metavar="NAME", help="what every tap minimises")
    parser.add_argument("--readout", metavar="NAME", help="global, local2x2, expand, expand3x3, ...")
    parser.add_argument("--preset", metavar="NAME", help="quick (default), cifar10, stl10, folder, imagenet")
    parser.add_argument("--backbone", metavar="NAME", help="resnet18/34/50/101, resnet20/32/110, vgg11, ...")
    parser.add_argument("--image-size", metavar="PX", type=int, help="side of the images")
    parser.add_argument("--batch-size", metavar="N", type=int, help="images in a batch")
    parser.add_argument("--precision", metavar="NAME", help="full or bf16")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], type=_setting,
                        help="any other setting of `localsim run`; may be repeated")  # fmt: skip
    parser.add_argument("--processes", metavar="N", help="predict a step on so many processes; or several: 8,64,512")
    parser.add_argument("--parallel", metavar="KIND",
                        help="what they divide: data, blocks (stages), blocks:P (stages in P groups, with copies); "
                             "without it, every way that fits")  # fmt: skip
    parser.add_argument("--machine", metavar="NAME",
                        help="a100 (default), a100-ethernet, h100, as assumed; here: this one, measured; or "
                             "FLOPS,BYTES_PER_S,SECONDS of a process and its messages")  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE", help="draw held bytes, arithmetic and gradient path: .png, .svg, .pdf"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers, those of every stage too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _setting(pair: str) -> str:
    """Return NAME=VALUE, unless it names a file of the command: beside settings, `report_costs` could not tell."""
    name = pair.partition("=")[0]
    if name in ("plot", "json", "processes", "machine"):
        from localsim.config import Config

        raise argparse.ArgumentTypeError(str(one_of("setting", name, Config.names())))
    return pair


def report_costs(
    rule: str | None = None,
    granularity: str | int | None = None,
    *,
    preset: str | None = None,
    processes: int | str | None = None,
    parallel: str | None = None,
    machine: str | None = None,
    plot: str | Path | None = None,
    json: str | Path | None = None,
    **settings: Any,
) -> list[Cost]:
    """Print what rules cost at granularities, and write it down where asked.

    Args:
        rule: names or files of rules, with commas; `blockwise` if not given.
        granularity: a number of stages or the name of a cut, or several with commas; by default what each rule says.
        preset: see `localsim.presets.resolve`.
        processes: a number of processes to predict a step on, or several with commas.
        parallel: what these divide, see `localsim.scaling.predictions`; by default every way.
        machine: what they run on, see `localsim.machines.machine`; by default `a100`.
        plot: a figure to write, .png, .svg or .pdf.
        json: a file to write, with everything that `localsim.cost.Cost` holds, and under `scaling`, where predictions
            are asked for, what `localsim.scaling.Prediction` does.
        settings: any field of `localsim.config.Config`.

    Returns:
        The costs that were printed.

    Raises:
        UserError: see `costs`, `localsim.scaling.predictions` and `localsim.machines.machine`; or a file exists already
            or is of an unknown format.
    """
    from localsim.analysis.canvas import FORMATS, save
    from localsim.cost_table import cost_table, stage_table

    for path in (Path(path) for path in (plot, json) if path is not None):
        if path.exists():
            raise UserError(f"{path} exists already; choose another name, or move it away")
    if plot is not None and Path(plot).suffix not in FORMATS:
        raise one_of("figure format", Path(plot).suffix, FORMATS)
    if not isinstance(granularity, str | int | None):
        raise UserError(f"granularity is {granularity!r}; allowed: a number or name of a cut, or several: 1,4,block")
    # as text whatever they are: --set gives numbers as numbers
    rules = ["blockwise"] if rule is None else str(rule).split(",")
    words = [None] if granularity is None else str(granularity).split(",")
    cuts = [int(word) if word is not None and word.isdecimal() else word for word in words]
    numbers = _numbers(processes, parallel, machine)
    costed, notes = _costed(rules, cuts, preset, settings)
    found = [cost for _, cost in costed]
    scaled = _scaled(costed, numbers, parallel, machine or "a100", notes) if numbers else None
    print(cost_table(found))
    if len(found) == 1:
        print(f"\nby stage:\n{stage_table(found[0])}")
    if scaled is not None:
        print(f"\npredicted, not measured, on {machine or 'a100'}:\n{scaled.text}")
    print("".join(f"\n{sentence}" for sentence in notes), end="\n" if notes else "")
    if json is not None:
        write_json(
            Path(json),
            [
                dataclasses.asdict(cost) | ({} if scaled is None else {"scaling": made})
                for cost, made in zip(found, scaled.records if scaled else [None] * len(found), strict=True)
            ],
        )
    if plot is not None:
        from localsim.analysis.cost_plots import cost_figure

        save(cost_figure(found), plot)
    return found


def costs(
    rules: Sequence[str], granularities: Sequence[int | str | None], preset: str | None, settings: Mapping[str, Any]
) -> tuple[list[Cost], list[str]]:
    """Return the costs of all rules at all granularities, and a sentence for everything that is left out.

    Of several rules, those that are of one cut only have one cost, that of their own.

    Args:
        rules: names or files of rules, see `localsim.rules.get_rule`.
        granularities: numbers or names of cuts; None is what the rule says.
        preset: see `localsim.presets.resolve`.
        settings: fields of `localsim.config.Config`, the same for all.

    Raises:
        UserError: what was asked has no meaning for a rule, or no combination exists.
    """
    costed, notes = _costed(rules, granularities, preset, settings)
    return [cost for _, cost in costed], notes


def _costed(
    rules: Sequence[str], granularities: Sequence[int | str | None], preset: str | None, settings: Mapping[str, Any]
) -> tuple[list[tuple[Config, Cost]], list[str]]:
    from localsim.cost import cost
    from localsim.presets import resolve
    from localsim.rules import get_rule

    configs, notes = [], []
    if settings.get("compile"):
        notes.append("these are the numbers without compile, whose kernels choose what they keep")
    for rule in rules:
        own = get_rule(rule).meaningless.get("granularity")
        if own is not None and len(rules) > 1 and list(granularities) != [None]:
            notes.append(f"{rule} has no granularity to choose: {own.partition(';')[0]}")
        cuts = [None] if own is not None and len(rules) > 1 else granularities
        try:
            configs += [resolve(rule, preset, {**settings, "granularity": cut}) for cut in cuts]
        except UserError as error:
            if len(rules) == 1:
                raise
            notes.append(f"{rule} is left out: {error}")
    found = []
    for config in configs:
        try:
            found.append((config, cost(config)))
        except UserError as error:
            if len(configs) == 1:
                raise
            notes.append(f"{config.rule} at granularity {config.granularity} is left out: {error}")
    if not found:
        raise UserError(notes[-1])
    return found, notes


def _numbers(processes: int | str | None, parallel: str | None, machine: str | None) -> list[int]:
    """Return the numbers of processes that are asked for."""
    if processes is None:
        for name, value in (("parallel", parallel), ("machine", machine)):
            if value is not None:
                raise UserError(f"--{name} says how several processes run; give --processes too")
        return []
    words = str(processes).split(",")
    if not all(word.isascii() and word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(f"--processes is {str(processes)!r}; allowed: whole numbers above 0, e.g. 8 or 8,64,512")
    return [int(word) for word in words]


@dataclasses.dataclass(frozen=True)
class _Scaled:
    text: str
    records: list[list[dict[str, Any]]]


def _scaled(
    costed: Sequence[tuple[Config, Cost]], numbers: Sequence[int], parallel: str | None, name: str, notes: list[str]
) -> _Scaled:
    """Return predictions for all configurations and numbers of processes; add a sentence for what is left out."""
    from localsim.cost_table import scaling_table
    from localsim.machines import machine
    from localsim.scaling import predictions

    rows, records = [], []
    here = None
    for config, cost in costed:
        here = here or machine(name, config)
        try:
            alone, *made = predictions(config, [1, *numbers], here, parallel)
        except UserError as error:
            if len(costed) == 1:
                raise
            stages = f"{len(cost.stages)} stage" + "s" * (len(cost.stages) > 1)
            notes.append(f"{config.rule} in {stages} is not predicted on several processes: {error}")
            records.append([])
            continue
        rows += [(cost, alone.images_per_second, one) for one in made]
        records.append([_plain(one) for one in made])
    if here is None or not rows:
        raise UserError(notes[-1])
    return _Scaled(f"{scaling_table(rows)}\n\n{here.name}: {here.source}.", records)


def _plain(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction for a file, its groups as the numbers of their stages, from 1."""
    groups = [[stage + 1 for stage in group] for group in prediction.groups]
    return dataclasses.asdict(prediction) | {"groups": groups}
