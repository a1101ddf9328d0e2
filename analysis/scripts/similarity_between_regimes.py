"""How alike is what networks learned by different rules, layer by layer, and how alike is it to having learned nothing?

    python -m localsim.analysis.scripts.similarity_between_regimes runs/blockwise runs/end_to_end

Compares what ends the backbone's own stages in every run, and in the untrained network of the same seed, on the runs'
test images. Runs that differ in nothing but their seed are one regime; two seeds of it show how much is chance. Prints
profiles over depth, and keeps them as a figure, with a table of all pairs of layers. About half a minute on two cores
for two runs of the preset quick.
"""

from dataclasses import asdict

from localsim.analysis import compare, plots
from localsim.analysis.scripts import Result, start
from localsim.runs import Run

MEASURE = "cka_debiased"  # or another of docs/measures.md
LAYERS = "ends"  # or stages, units, readouts, {"modules": ["layer2", "layer3.0.conv1"]}
IMAGES = 1000


def find(runs: list[Run]) -> Result:
    comparison = compare(*runs, images=IMAGES, measure=MEASURE, layers=LAYERS, resamples=200, permutations=100)
    return str(comparison), [asdict(row) for row in comparison.rows], plots.similarity_profiles(comparison)


if __name__ == "__main__":
    start(find, __file__)
