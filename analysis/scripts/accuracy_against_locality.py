"""Does a network learn less when its learning signals travel less far?

    python -m localsim.analysis.scripts.accuracy_against_locality runs/blockwise runs/end_to_end

Accuracy of the stored linear probes of raw stage output against the longest path that a gradient takes under a run's
credit matrix, in unit blocks. One panel for each end of a backbone's stage at which all runs have a probe, the
network's output last; none is chosen by its score, which would flatter whoever has more layers to choose from. Grey:
the untrained network as a line, and for each run `calibrated`, the same with batch-norm statistics of training images;
what is not above both was not learned. Bars and bands are 95 % intervals over test images. Takes seconds.
"""

from itertools import accumulate

from localsim.analysis.canvas import COLOURS, MARKERS, new_figure, styled
from localsim.analysis.controls import CONTROLS
from localsim.analysis.regimes import regime_names
from localsim.analysis.scripts import Result, as_text, start
from localsim.assembly import build_credit, build_trunk
from localsim.errors import UserError
from localsim.runs import Run

LINEAR = {"probe": "linear", "features": "raw"}


def find(runs: list[Run]) -> Result:
    configs = [run.config for run in runs]
    if len(setups := {f"{c.backbone} on {c.data}, {c.image_size} px" for c in configs}) > 1:
        raise UserError(f"accuracies of different backbones or images do not compare: {'; '.join(sorted(setups))}")
    shared, rows = set(build_trunk(configs[0])[0].natural_cuts[1:]), []
    for run, regime in zip(runs, regime_names(configs), strict=True):
        if (table := run.probe()) is None:
            raise UserError(f"{run.path} has not been probed; do it with `localsim probe {run.path}`")
        units = [len(stage) for stage in build_trunk(run.config)[1]]
        ends, path = list(accumulate(units)), build_credit(run.config, len(units)).longest_path(units)
        if not path:
            continue  # the untrained network stands beside every run
        shared = shared & set(ends) | {ends[-1]}
        for row in table.select(network=run.config.rule, **LINEAR):
            line = {"regime": regime, "seed": run.config.seed, "path": path, "unit": ends[row.stage - 1]}
            for name, network in {"accuracy": row.network, **{control: control for control in CONTROLS}}.items():
                for found in table.select(network=network, stage=row.stage, **LINEAR):
                    line |= {name: found.accuracy, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append({**line, "n": row.n_test, "chance": row.chance})
    rows = [row for row in rows if row["unit"] in shared]
    if not rows:
        raise UserError("none of the runs has learned anything: no gradient reaches a stage")
    head = f"linear probes after a unit block of {ends[-1]}, 95 % intervals over n images; path: a gradient's longest"
    return f"{head}\n{as_text(rows)}", rows, draw(rows, ends[-1])


@styled
def draw(rows: list[dict], units: int):
    regimes, places = (list(dict.fromkeys(row[name] for row in rows)) for name in ("regime", "unit"))
    figure, _ = new_figure(2.4 + 2 * len(places), 3.2, axes=False)
    panels = figure.subplots(1, len(places), sharex=True, sharey=True, squeeze=False)[0]
    handles = {}
    for axes, row in ((panels[places.index(row["unit"])], row) for row in rows):
        number = regimes.index(row["regime"])
        x = row["path"] + units / 60 * (number - (len(regimes) - 1) / 2)  # side by side where paths are equally long
        handles["untrained"] = axes.axhline(row["untrained"], color="#888888", linestyle="--", linewidth=1, zorder=1)
        axes.axhspan(row["untrained_low"], row["untrained_high"], color="#f0f0f0", zorder=0)
        style = {"color": COLOURS[number % len(COLOURS)], "fmt": MARKERS[number % len(MARKERS)]}
        for name, look in {"calibrated": {"color": "#888888", "fmt": "x"}, "accuracy": style}.items():
            if name in row:
                error = [[row[name] - row[f"{name}_low"]], [row[f"{name}_high"] - row[name]]]
                label = row["regime"] if name == "accuracy" else name
                handles[label] = axes.errorbar(x, row[name], yerr=error, markersize=4, elinewidth=1, **look)
    for axes, place in zip(panels, places, strict=True):
        axes.set_xticks(sorted({row["path"] for row in rows}))
        axes.set_title(f"after unit block {place}", fontsize=9.5)
    panels[0].set_ylabel("accuracy of linear probe")
    figure.supxlabel(f"longest path of a gradient, of {units} unit blocks")
    title = f"n = {rows[0]['n']} images\nbars: 95 % intervals"
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", title=title)
    return figure


if __name__ == "__main__":
    start(find, __file__)
