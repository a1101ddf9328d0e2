"""How many dimensions do features fill, from the lowest layers to the highest, after learning by different rules?

    python -m localsim.analysis.scripts.dimensionality_by_depth runs/blockwise runs/end_to_end

Participation ratio and effective rank (`localsim.analysis.geometry`) of what ends the backbone's own stages, averaged
over positions, in every run and in the untrained network of the same seed, with 95 % intervals over images. Both depend
on the number of images, which is the same for all. Half a minute on two cores for two runs of the preset quick.
"""

from localsim.analysis import geometry, plots
from localsim.analysis.regimes import common_images, open_subjects
from localsim.analysis.scripts import Result, as_text, start
from localsim.runs import Run

QUANTITIES = ("participation_ratio", "effective_rank")  # or others that `geometry.describe` gives
LAYERS = "ends"  # or stages, units, readouts, {"modules": ["layer2", "layer3.0.conv1"]}
IMAGES = 1000


def find(runs: list[Run]) -> Result:
    images = common_images(runs, IMAGES)
    several = len({run.config.seed for run in runs}) > 1
    rows, drawn = [], {}
    for network in open_subjects(runs):
        lines = drawn[f"{network.regime} seed {network.seed}" if several else network.regime] = []
        features, layers = network.read(images, LAYERS)
        for layer in layers:
            x = features[layer.name]
            found = [row for row in geometry.describe(x, resamples=100) if row.quantity in QUANTITIES]
            lines.append((layer.name, found))
            row = {"regime": layer.regime, "seed": layer.seed, "layer": layer.name, "depth": layer.depth,
                   "width": x.shape[1], "n": len(x)}  # fmt: skip
            for one in found:
                row |= {one.quantity: one.value, f"{one.quantity}_low": one.low, f"{one.quantity}_high": one.high}
            rows.append(row)
    figure = plots.geometry_by_stage(drawn, quantities=QUANTITIES)
    return f"dimensions that features fill, 95 % intervals over n images\n{as_text(rows)}", rows, figure


if __name__ == "__main__":
    start(find, __file__)
