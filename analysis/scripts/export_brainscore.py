"""Make of a run a plugin folder that Brain-Score can score, or that can be submitted to it.

    python -m localsim.analysis.scripts.export_brainscore runs/blockwise --out my_plugin --regions V4=stage2,IT=stage3
    python -m localsim.analysis.scripts.export_brainscore runs/mine --rule my_rule.py --which untrained \
        --out my_plugin --regions IT=stage3

The folder holds weights, code, region-layer map, test and README, see `localsim.analysis.brain.plugin`. Layers are
stages (from 1), readouts, unit blocks or modules; take for each region one that another recording chose, not the one
that is to be scored. Takes seconds.
"""

import argparse
import sys
from pathlib import Path

from localsim.analysis.brain.plugin import export_plugin
from localsim.analysis.spatial import POOLED
from localsim.errors import UserError
from localsim.rules import get_rule
from localsim.runs import load_run


def regions(text: str) -> dict[str, str]:
    """Return the mapping that `V4=stage2,IT=stage3` stands for."""
    parts = [part.partition("=") for part in text.split(",")]
    if bad := [name + sign + layer for name, sign, layer in parts if not (name and layer)]:
        raise UserError(f"--regions has {bad[0]!r}; allowed: REGION=LAYER, several with commas between")
    if len({name for name, _, _ in parts}) < len(parts):
        raise UserError(f"--regions {text} names a region twice; allowed: one layer for each")
    return {name: layer for name, _, layer in parts}


def start(argv: list[str] | None = None) -> None:
    """Export the run named on the command line; ends with exit code 2 and one sentence where that cannot be done."""
    parser = argparse.ArgumentParser(prog="export_brainscore", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the plugin folder, which is made")
    parser.add_argument("--regions", metavar="R=LAYER,...", required=True, help="the layer that stands for each region")
    parser.add_argument("--identifier", metavar="NAME", help="to register it under (default: it has the weights' hash)")
    parser.add_argument("--degrees", metavar="N", type=float, default=8, help="width of images in degrees of visual "
                        "angle (default: 8)")  # fmt: skip
    parser.add_argument("--spatial", metavar="HOW", default=POOLED, help="upto4x4 (default), mean, 2x2 (any k x k), "
                        "flatten or projectN")  # fmt: skip
    parser.add_argument("--which", metavar="WHICH", default="trained", help="trained (default), untrained, or the step "
                        "of a snapshot")  # fmt: skip
    parser.add_argument("--rule", metavar="FILE", help="the file of a rule of your own, for a run made with it; "
                        "executed")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="where the run's folder of images lies now")
    parser.add_argument("--data-root", metavar="DIR", help="where the run's named data set lies now")
    given = parser.parse_args(argv)
    try:
        if given.rule is not None:
            get_rule(given.rule)
        identifier = export_plugin(
            load_run(given.run).moved(data=given.data, data_root=given.data_root),
            given.out,
            region_layers=regions(given.regions),
            identifier=given.identifier,
            degrees=given.degrees,
            spatial=given.spatial,
            which=int(given.which) if given.which.isdecimal() else given.which,
        )
    except UserError as error:
        print(f"export_brainscore: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{identifier} is in {given.out}, see its README.md")


if __name__ == "__main__":
    start()
