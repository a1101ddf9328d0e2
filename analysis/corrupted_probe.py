"""How much of what a probe reads from every stage survives common corruptions of the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localsim.analysis.controls import CONTROLS, with_controls
from localsim.analysis.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from localsim.analysis.extract import RAW, batch_features, collect_features
from localsim.analysis.probes import MIN_TEST_IMAGES, LinearProbe, fit_linear_probe
from localsim.analysis.sources import colour_and_crop
from localsim.analysis.stage_probe import BATCH, FEATURE_BYTES, bytes_per_image
from localsim.analysis.statistics import COVERAGE, resample
from localsim.analysis.tables import as_csv, matching
from localsim.data import Batch, Data, ImageSet, class_balanced, plain_batches
from localsim.errors import UserError, one_of
from localsim.files import write_json, write_text
from localsim.network import LocalNetwork
from localsim.opening import open_data, open_device
from localsim.rng import key
from localsim.runs import Run, opened_run, writing

CLEAN, MEAN = "clean", "mean"
"""Rows that stand for no single corruption: the images as they are, and the mean over corruptions and severities."""
RESAMPLES = 2000
LONGEST_IN_NAME = 40
_RESAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class RobustnessRow:
    """The accuracy of a stage's linear probe, fitted on clean images, on corrupted ones.

    Intervals are 95 % bootstrap intervals over test images: one draw of images serves all rows, so differences, ratios
    and means are of the same images. A network that names next to nothing loses next to nothing: read `retention`
    beside `accuracy`, and both beside the controls'.

    Attributes:
        network: the rule's name, `untrained` or `calibrated`.
        stage: its number, from 1.
        corruption: its name; `clean`; or `mean`, over all corruptions and severities, each counting alike.
        category: `noise`, `blur`, `weather` or `digital`; None for `clean` and `mean`.
        severity: 1 to 5; 0 for `clean`; None for the mean over severities.
        accuracy, low, high: share of test images named correctly, with its interval.
        retention, retention_low, retention_high: accuracy / clean accuracy of the same probe; None where a clean
            accuracy of zero is among the draws.
        gain, gain_low, gain_high: accuracy minus the untrained network's; None for controls.
        calibrated_gain, calibrated_gain_low, calibrated_gain_high: likewise over the calibrated control.
        mce, mce_low, mce_high: of the row `mean`, where a reference was given: mean over corruptions of
            error / reference error.
        n_test: test images.
        chance: accuracy of guessing.
    """

    network: str
    stage: int
    corruption: str
    category: str | None
    severity: int | None
    accuracy: float
    low: float
    high: float
    retention: float | None
    retention_low: float | None
    retention_high: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    calibrated_gain: float | None
    calibrated_gain_low: float | None
    calibrated_gain_high: float | None
    mce: float | None
    mce_low: float | None
    mce_high: float | None
    n_test: int
    chance: float


@dataclass(frozen=True)
class RobustnessTable:
    """The robustness of every stage of a network and of its controls; prints itself as a table.

    Attributes:
        rows: one per network, stage, corruption and severity, and the means.
        settings: how it was made: images, seed, the corruptions' parameters at this image size, the probes' penalties.
    """

    rows: tuple[RobustnessRow, ...]
    settings: dict[str, Any]

    def select(self, **fields: Any) -> list[RobustnessRow]:
        """Return the rows with these values, e.g. `select(network="blockwise", corruption="fog", severity=None)`."""
        return matching(self.rows, fields)

    def to_json(self) -> dict[str, Any]:
        """Return settings and rows as plain dictionaries."""
        return {"settings": self.settings, "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> RobustnessTable:
        """Return the table that `to_json` wrote down."""
        return cls(tuple(RobustnessRow(**row) for row in table["rows"]), dict(table["settings"]))

    def to_csv(self) -> str:
        """Return the rows as comma-separated values, one header line, without the settings."""
        return as_csv([asdict(row) for row in self.rows], list(RobustnessRow.__dataclass_fields__))

    def __str__(self) -> str:
        first = self.rows[0]
        stages = list(dict.fromkeys(row.stage for row in self.rows))
        severities = ", ".join(map(str, self.settings["severities"]))
        blocks = [
            f"accuracy of linear probes fitted on clean images, on {first.n_test} corrupted test images\n"
            f"mean over severities {severities}; 95 % interval over images; chance {first.chance:.3f}; frost: "
            f"{self.settings['frost']}\nretention: mean over corruptions / clean"
        ]
        for network in dict.fromkeys(row.network for row in self.rows):
            heads = "".join(f"{f'stage {stage}':<22}" for stage in stages)
            lines = [f"{network}\n  {'corruption':<18}{heads}"]
            shown = [row for row in self.select(network=network) if row.severity in (None, 0)]
            for name in dict.fromkeys(row.corruption for row in shown):
                cells = [_cell(row.accuracy, row.low, row.high) for row in shown if row.corruption == name]
                lines.append(f"  {name:<18}" + "".join(f"{cell:<22}" for cell in cells))
            means = [row for row in shown if row.corruption == MEAN]
            for what in ("retention", "mce"):
                cells = [_cell(*(getattr(row, what + end) for end in ("", "_low", "_high"))) for row in means]
                if what == "retention" or means[0].mce is not None:
                    lines.append(f"  {what:<18}" + "".join(f"{cell:<22}" for cell in cells))
            blocks.append("\n".join(line.rstrip() for line in lines))
        return "\n\n".join(blocks)


def robustness(
    run: Run | str | Path,
    *,
    data: Data | None = None,
    trained: LocalNetwork | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    stages: Sequence[int] | None = None,
    images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    reference: Mapping[str, float] | None = None,
    name: str | None = None,
) -> RobustnessTable:
    """Probe a run's stages on corrupted test images beside its controls, and store `<name>.json` and `<name>.csv`.

    The files lie in the run's folder. By default their name is `robustness` and the options that differ from the
    defaults, as in `robustness-corruptions=fog-severities=1+5.json`; what is long is shortened to six digits made from
    it. Files that exist are never replaced.

    For every stage, `probes.linear_probe` is fitted on the pooled output for clean training images, and evaluated on
    the test images as they are and under each corruption and severity (Hendrycks & Dietterich 2019, section 4, there
    for whole classifiers). With the images and seed of a stored probe of protocol `logistic`, the clean accuracy is
    that probe's. Corruptions are laid over images of the size the network sees, before they are normalised; memory
    holds one corrupted batch at a time.

    Args:
        run: a run with a checkpoint, or its folder; of a rule without taps, only the controls are probed.
        data: the images; by default the run's own.
        trained: the network, where it is in memory already.
        corruptions: names in `corruptions.CORRUPTIONS`, all by default.
        severities: of 1 to 5.
        stages: from 0; all by default.
        images: training images of the probe, as evenly over the classes as they allow; by default the configuration's
            `probe_images`.
        test_images: use this many of the test images, likewise; all by default.
        seed: of the probes, the corruptions and the intervals.
        reference: error of a reference classifier by corruption, its mean over the severities, such as AlexNet's on
            ImageNet-C; with it, the rows `mean` carry an mCE (equation 1 of the paper, not in per cent). Needs all five
            severities.
        name: of the files, in place of the default.

    Raises:
        UserError: an unknown corruption, severity or stage, one given twice, too few test images, data without labels,
            a reference that misses a corruption, files that exist, or a run that is being written.
    """
    run = opened_run(run)
    names = _chosen("corruption", list(CORRUPTIONS) if corruptions is None else corruptions, tuple(CORRUPTIONS))
    levels = _chosen("severity", severities, SEVERITIES)
    _check_reference(reference, names, levels)
    limit = run.config.probe_images if images is None else images
    if name is None:
        asked = {"corruptions": (names, list(CORRUPTIONS)), "severities": (levels, list(SEVERITIES)),
                 "stages": (None if stages is None else [*stages], None), "images": (limit, run.config.probe_images),
                 "test_images": (test_images, None), "seed": (seed, 0), "reference": (reference, None)}  # fmt: skip
        name = "-".join(["robustness", *(_named(o, value) for o, (value, usual) in asked.items() if value != usual)])
    stored, listed = (run.path / f"{name}.{end}" for end in ("json", "csv"))
    with writing(run.path):
        for file in (stored, listed):
            if file.exists():
                raise UserError(f"{file} exists already; give another name, or move it away to make it anew")
        table = _measured(run, data, trained, names, levels, stages, limit, test_images, seed, reference)
        write_json(stored, table.to_json())
        write_text(listed, table.to_csv())
    return table


def _named(option: str, value: Any) -> str:
    """Return an option and its value as part of a file's name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, Mapping) or len(text) > LONGEST_IN_NAME:
        text = f"{key(str(value)) % 16**6:06x}"
    return f"{option}={text}"


def _measured(
    run: Run, data: Data | None, trained: LocalNetwork | None, names: list[str], levels: list[int],
    stages: Sequence[int] | None, limit: int | None, test_images: int | None, seed: int,
    reference: Mapping[str, float] | None,
) -> RobustnessTable:  # fmt: skip
    """Return the table of `robustness`, whose arguments these are, of `limit` training images."""
    config = run.config
    conditions = [(CLEAN, 0), *((corruption, severity) for corruption in names for severity in levels)]
    data = open_data(config) if data is None else data
    if data.probe_train is None or data.test is None:
        raise UserError(f"data set {data.name!r} has no labelled training and test images to probe on")
    test = data.test if test_images is None else class_balanced(data.test, test_images, "test")
    if len(test) < MIN_TEST_IMAGES:
        raise UserError(f"robustness needs at least {MIN_TEST_IMAGES} test images, not {len(test)}")
    train = data.probe_train if limit is None else class_balanced(data.probe_train, limit, "train")
    device = trained.device if trained is not None else open_device(config.device)
    networks = with_controls(run, data, device, trained)
    places = list(range(len(networks["untrained"].stages)))
    chosen = places if stages is None else _chosen("stage", stages, places)

    grey, crop = colour_and_crop(config)
    shown = partial(plain_batches, size=config.image_size, batch_size=BATCH, workers=config.workers)
    seen = partial(shown, mean=data.mean, std=data.std, device=device, grey=grey)
    probes: dict[tuple[str, int], LinearProbe] = {}
    hits: dict[tuple[str, int, str, int], list[np.ndarray]] = {}
    for network, net in networks.items():
        kept = max(FEATURE_BYTES // bytes_per_image(net, config.image_size), len(data.classes) * 20)
        x_train, y_train = collect_features(
            net, seen(class_balanced(train, kept, "train"), crop=crop), precision=config.precision
        )
        x_test, y_test = collect_features(net, seen(test, crop=crop), precision=config.precision)
        assert y_train is not None and y_test is not None
        for stage in chosen:
            fitted = fit_linear_probe(x_train[stage, RAW], y_train, num_classes=len(data.classes), seed=seed)
            probes[network, stage] = fitted
            hits[network, stage, CLEAN, 0] = [_hits(fitted, x_test[stage, RAW], y_test)]
    for batch in shown(test, mean=(0, 0, 0), std=(1, 1, 1), crop=crop):  # values between 0 and 1
        pixels = (batch.views[0] * 255).round().to(torch.uint8)
        for corruption, severity in conditions[1:]:
            changed = corrupt(pixels, corruption, severity, seed=seed, indices=batch.indices)
            for corrupted in seen(ImageSet(changed, None, batch.labels)):
                _evaluate(networks, probes, corrupted, (corruption, severity), config.precision, hits)

    correct = np.stack(
        [
            np.stack([np.concatenate(hits[network, stage, *condition]) for condition in conditions])
            for network, stage in probes
        ]
    )
    settings = {
        "data": data.name, "image_size": config.image_size, "precision": config.precision, "grey": grey, "crop": crop,
        "seed": seed, "resamples": RESAMPLES, "corruptions": names, "severities": levels,
        "frost": "procedural", "reference": None if reference is None else dict(reference),
        "parameters": {c: [CORRUPTIONS[c].parameters(s, config.image_size) for s in levels] for c in names},
        "penalties": {f"{network} {stage + 1}": fitted.penalty for (network, stage), fitted in probes.items()},
        "n_train": len(train),
    }  # fmt: skip
    rows = _rows(list(probes), conditions, correct, seed, 1 / len(data.classes), reference)
    return RobustnessTable(tuple(rows), settings)


def _evaluate(
    networks: Mapping[str, LocalNetwork],
    probes: Mapping[tuple[str, int], LinearProbe],
    batch: Batch,
    condition: tuple[str, int],
    precision: str,
    hits: dict[tuple[str, int, str, int], list[np.ndarray]],
) -> None:
    """Add to `hits` which images of a corrupted batch every probe names correctly."""
    assert batch.labels is not None
    for network, net in networks.items():
        features = batch_features(net, batch.views[0], precision=precision)
        for (owner, stage), fitted in probes.items():
            if owner == network:
                found = _hits(fitted, features[stage, RAW].cpu(), batch.labels.cpu())
                hits.setdefault((network, stage, *condition), []).append(found)


def _hits(fitted: LinearProbe, x: Tensor, labels: Tensor) -> np.ndarray:
    if not x.isfinite().all():
        raise UserError(f"{int((~x.isfinite()).sum())} features of test images are NaN or infinite (of {x.numel()})")
    return (fitted.answers(x) == labels).numpy()


def _rows(
    probed: Sequence[tuple[str, int]],
    conditions: Sequence[tuple[str, int]],
    correct: np.ndarray,
    seed: int,
    chance: float,
    reference: Mapping[str, float] | None,
) -> Iterator[RobustnessRow]:
    """Yield the rows of every probe; `correct` is `(probes, conditions, n)` bool."""
    names = list(dict.fromkeys(corruption for corruption, _ in conditions[1:]))
    labels: list[tuple[str, int | None]] = [*conditions, *((corruption, None) for corruption in names), (MEAN, None)]
    # every row is a weighted mean of conditions, and so is each of its draws
    weights = np.array([[_weight(label, condition) for condition in conditions] for label in labels])
    weights /= weights.sum(axis=1, keepdims=True)
    accuracy, draws = _resampled(correct, seed)
    accuracy, draws = accuracy @ weights.T, draws @ weights.T
    for place, (network, stage) in enumerate(probed):
        for row, (corruption, severity) in enumerate(labels):
            here, there = accuracy[place, row], draws[:, place, row]
            clean, clean_draws = accuracy[place, 0], draws[:, place, 0]
            fields = _interval("", here, there, "accuracy")
            kept = (here / clean, there / clean_draws) if clean_draws.min() > 0 and clean > 0 else (None, None)
            fields |= _interval("retention", *kept)
            for control, prefix in zip(CONTROLS, ("gain", "calibrated_gain"), strict=True):
                base = probed.index((control, stage)) if (control, stage) in probed else None
                if network in CONTROLS or base is None:
                    fields |= _interval(prefix, None, None)
                else:
                    fields |= _interval(prefix, here - accuracy[base, row], there - draws[:, base, row])
            if reference is None or corruption != MEAN:
                fields |= _interval("mce", None, None)
            else:
                of = [labels.index((name, None)) for name in names]
                norm = 1 / np.array([reference[name] for name in names])
                fields |= _interval(
                    "mce", ((1 - accuracy[place, of]) * norm).mean(), ((1 - draws[:, place, of]) * norm).mean(axis=1)
                )
            category = CORRUPTIONS[corruption].category if corruption in CORRUPTIONS else None
            yield RobustnessRow(
                network=network, stage=stage + 1, corruption=corruption, category=category, severity=severity,
                **fields, n_test=correct.shape[-1], chance=chance,
            )  # fmt: skip


def _weight(label: tuple[str, int | None], condition: tuple[str, int]) -> float:
    if label[1] is not None:
        return float(label == condition)
    return float(condition[0] == label[0] or (label[0] == MEAN and condition[0] != CLEAN))


def _resampled(correct: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over images `(probes, conditions)` and those of resamples of them `(r, probes, conditions)`."""
    n = correct.shape[-1]
    flat = np.ascontiguousarray(correct.reshape(-1, n).T.astype(np.float32))  # sums below 2^24 are exact
    counts = (np.bincount(drawn, minlength=n) for drawn in resample(n, RESAMPLES, seed))
    draws = [
        np.stack(list(islice(counts, _RESAMPLES_AT_ONCE))).astype(np.float32) @ flat
        for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    return correct.mean(axis=-1), (np.concatenate(draws).astype(np.float64) / n).reshape(-1, *correct.shape[:-1])


def _interval(prefix: str, value: Any, draws: np.ndarray | None, field: str = "") -> dict[str, Any]:
    """Return a value and its interval as fields of a row."""
    low = high = None
    if draws is not None:
        value = float(value)
        low, high = map(float, np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]))
    ends = [f"{prefix}_{end}" if prefix else end for end in ("low", "high")]
    return {field or prefix: value, ends[0]: low, ends[1]: high}


def _chosen(what: str, given: Sequence[Any], allowed: Sequence[Any]) -> list[Any]:
    for value in given:
        if value not in allowed:
            raise one_of(what, value, allowed)
    if not given or len(set(given)) < len(given):
        raise UserError(f"{what} {list(given)} must name at least one, each once")
    return list(given)


def _check_reference(reference: Mapping[str, float] | None, names: Sequence[str], levels: Sequence[int]) -> None:
    if reference is None:
        return
    missing = [name for name in names if name not in reference]
    if missing or sorted(levels) != list(SEVERITIES):
        raise UserError(f"a reference needs an error for each corruption and all severities 1 to 5; missing: {missing}")
    for name in names:
        if not 0 < reference[name] <= 1:
            raise UserError(f"reference error {reference[name]} of {name} must lie above 0 and at most at 1")


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
