"""Section: how many dimensions the layers of the runs fill."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from localsim.analysis import geometry
from localsim.analysis.controls import CONTROLS
from localsim.analysis.depth_plots import geometry_by_stage
from localsim.analysis.extract import has_batch_norm
from localsim.analysis.geometry import GeometryRow
from localsim.analysis.regimes import Layer, common_images, open_subjects
from localsim.analysis.report.asked import Asked
from localsim.analysis.report.elements import Part, Section, Table, in_interval, listed, parts_or_note, picture
from localsim.analysis.report.reported import Reported, usable_runs
from localsim.analysis.statistics import check_resamples

QUANTITIES = {"participation_ratio": "participation ratio", "effective_rank": "effective rank"}
RESAMPLES = 100
Found = dict[Layer, tuple[int, dict[str, GeometryRow]]]
"""By layer: how wide it is, and the quantities."""


def section(runs: Sequence[Reported], asked: Asked) -> Section:
    """Return the section."""
    return Section(
        "geometry", "Geometry",
        "How many dimensions the features of what ends the backbone's own stages fill on the runs' own test images, "
        "beside the untrained and the calibrated network. Both numbers grow with the number of images, so they can be "
        "compared at the same n only; more dimensions are neither better nor worse. Intervals are 95 % over images (of "
        "halves of them) at this n.",
        parts_or_note(lambda: _described(runs, asked), "Not computed"),
    )  # fmt: skip


def _described(runs: Sequence[Reported], asked: Asked) -> list[Part]:
    usable = usable_runs(runs)
    images = common_images([run.run for run in usable], asked.images)
    check_resamples(len(images), RESAMPLES)
    # what has no batch norm has no calibrated control
    calibrate = all(has_batch_norm(run.run.network("untrained")) for run in usable)
    found: Found = {}
    controls = CONTROLS if calibrate else CONTROLS[:1]
    subjects = open_subjects([run.run for run in usable], controls=controls)
    for network in tqdm(subjects, desc="geometry", disable=None if asked.progress else True):
        features, layers = network.read(images, "ends", device=asked.device, cache=asked.cache)
        for layer in layers:
            x = features[layer.name]
            rows = geometry.describe(x, resamples=RESAMPLES)
            found[layer] = x.shape[1], {row.quantity: row for row in rows if row.quantity in QUANTITIES}
    drawn: dict[str, list[tuple[str | float, list[GeometryRow]]]] = {}
    first = {layer.regime: layer.seed for layer in reversed(found)}
    for layer, (_, rows) in found.items():
        if layer.seed == first[layer.regime]:
            drawn.setdefault(layer.regime, []).append((layer.depth, list(rows.values())))
    caption = (
        "Participation ratio and effective rank against depth. Bars are 95 % intervals over images; of a regime with "
        "several seeds the first is drawn, the table has all."
    )
    figure = geometry_by_stage(drawn, quantities=list(QUANTITIES))
    return [picture(figure, _alt(found, first), caption), _table(found, len(images))]


def _alt(found: Found, first: dict[str, int | None]) -> str:
    told = []
    for regime, seed in reversed(first.items()):
        rows = [
            (layer, rows["effective_rank"].value)
            for layer, (_, rows) in found.items()
            if (layer.regime, layer.seed) == (regime, seed) and "effective_rank" in rows
        ]
        if rows:
            (low, start), (high, end) = rows[0], rows[-1]
            told.append(f"{regime} {start:.3g} at {low.name}, {end:.3g} at {high.name}")
    return f"Dimensions that features fill, against depth. Effective rank: {listed(told)}"


def _table(found: Found, n: int) -> Table:
    names = list(dict.fromkeys(layer.name for layer in found))
    networks = list(dict.fromkeys((layer.regime, layer.seed) for layer in found))
    rows = []
    for quantity, title in QUANTITIES.items():
        for regime, seed in networks:
            mine = {layer.name: rows.get(quantity) for layer, (_, rows) in found.items()
                    if (layer.regime, layer.seed) == (regime, seed)}  # fmt: skip
            cells = [mine.get(name) for name in names]
            rows.append([
                f"{regime}, seed {seed}", title,
                *("–" if one is None else in_interval(one.value, one.low, one.high, ".1f") for one in cells),
            ])  # fmt: skip
    widths = {layer.name: width for layer, (width, _) in found.items()}
    return Table(
        f"Dimensions by layer, with 95 % intervals; n = {n} images, so that {n - 1} is the most there can be, and the "
        "layer's width.",
        ["network", "quantity", *(f"{name} (width {widths[name]})" for name in names)], rows, names=(0, 1),
    )  # fmt: skip
