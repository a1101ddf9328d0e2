"""From run folders to tables and figures: what `localsim compare` does, as a function."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from localsim.analysis.catalogue import NAMED
from localsim.analysis.comparison import Comparison, compare
from localsim.analysis.regimes import LAYERS
from localsim.analysis.similarity import get_measure
from localsim.errors import UserError
from localsim.rng import key
from localsim.runs import load_run


def compare_runs(
    runs: Sequence[str],
    *,
    measure: str = "cka_debiased",
    layers: str = "ends",
    spatial: str = "mean",
    images: int = 1000,
    controls: str = "untrained",
    over_training: bool = False,
    resamples: int = 200,
    permutations: int = 100,
    seed: int = 0,
    rule: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    cache: str | None = None,
    out: str | None = None,
) -> list[Comparison]:
    """Compare runs by one or several measures, print the profiles, and keep tables and figures in a folder.

    Args:
        runs: folders, or names of networks as `features` takes them.
        measure: one name, or several with commas; the networks are run once for all of them.
        layers: one of `regimes.LAYERS`, or names of modules with commas.
        controls: one or both of `regimes.CONTROLS` with a comma, or `none`.
        rule: the file of a rule of one's own; executed.
        data, data_root, device: where the runs' images lie and the networks run now.
        out: the folder, with a folder for each measure; by default in `comparisons/`, named after the runs.
        spatial, images, over_training, resamples, permutations, seed, cache: see `compare` and `features`.

    Raises:
        UserError: something asked for cannot be done; the folder of a measure is there already.
    """
    measures = [get_measure(name) for name in dict.fromkeys(measure.split(","))]
    folder = Path(out) if out is not None else _default_folder(runs)
    for one in measures:
        if (folder / one.name).exists():
            raise UserError(f"{folder / one.name} exists already; choose another --out, or move it away")
    if rule is not None:
        from localsim.rules import get_rule

        get_rule(rule)
    subjects = [
        path if path.startswith(NAMED) else load_run(path).moved(data=data, data_root=data_root, device=device)
        for path in runs
    ]
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        for one in measures:
            began = time.monotonic()
            comparison = compare(
                *subjects,
                images=images,
                measure=one,
                layers=layers if layers in LAYERS else {"modules": layers.split(",")},
                controls=[] if controls == "none" else controls.split(","),
                over_training=over_training,
                resamples=resamples,
                permutations=permutations,
                seed=seed,
                spatial=spatial,
                device=device,
                cache=cache or temporary,
                progress=True,
            )
            kept = comparison.save(folder)
            print(f"{comparison}\n\n{time.monotonic() - began:.0f} s; table and figures in {kept}\n")
            made.append(comparison)
    return made


def _default_folder(runs: Sequence[str]) -> Path:
    names = "+".join(Path(run).name.replace(":", "-") for run in runs)
    # file systems allow names of 255 bytes
    return Path("comparisons") / (names if len(names) <= 100 else f"{names[:90]}-{key(names) % 16**6:06x}")
