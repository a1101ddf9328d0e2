"""Linear and k-NN probes of every stage of a network, always with the untrained network beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from localsim.analysis import plots
from localsim.analysis.controls import CONTROLS, with_controls
from localsim.analysis.extract import batch_features, collect_features, stream_features
from localsim.analysis.probes import ProbeScore, knn_probe, linear_probe, paired_bootstrap, sgd_probe
from localsim.analysis.sources import colour_and_crop
from localsim.analysis.tables import as_csv, matching
from localsim.data import AUGMENTATIONS, Batch, Data, ImageSet, ViewLoader, class_balanced, plain_batches
from localsim.errors import UserError, one_of
from localsim.files import write_json, write_text
from localsim.network import LocalNetwork
from localsim.opening import open_data, open_device

if TYPE_CHECKING:
    from localsim.runs import Run

PROTOCOLS = ("logistic", "paper")
BATCH = 256
FEATURE_BYTES = 4 * 2**30
"""Memory for the features of training images that logistic regression and k-NN see; on more images, a balanced part."""


@dataclass(frozen=True)
class ProbeRow:
    """The accuracy of one probe on one stage of one network.

    Attributes:
        network: the rule's name, `untrained` or `calibrated`.
        stage: its number, from 1.
        features: `raw` (the stage's map, averaged over positions) or `readout` (what its tap reads).
        probe: `linear` or `knn`.
        accuracy, low, high: share of test images, with its 95 % bootstrap interval over them.
        gain, gain_low, gain_high: accuracy minus the untrained network's on the same images, with the paired
            interval; None for controls.
        calibrated_gain, calibrated_gain_low, calibrated_gain_high: likewise over the calibrated control, where there
            is one: what learning added beyond batch-norm statistics.
        n_test: test images.
        chance: accuracy of guessing.
        settings: how the probe was made.
    """

    network: str
    stage: int
    features: str
    probe: str
    accuracy: float
    low: float
    high: float
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    calibrated_gain: float | None
    calibrated_gain_low: float | None
    calibrated_gain_high: float | None
    n_test: int
    chance: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class ProbeTable:
    """All probes of a network and of its untrained twin; prints itself as a table."""

    rows: tuple[ProbeRow, ...]

    def select(self, **fields: Any) -> list[ProbeRow]:
        """Return the rows with these values, e.g. `select(features="raw", probe="linear", network="blockwise")`."""
        return matching(self.rows, fields)

    @property
    def networks(self) -> list[str]:
        """The networks in the table, the controls first."""
        names = list(dict.fromkeys(row.network for row in self.rows))
        return [*(name for name in CONTROLS if name in names), *(name for name in names if name not in CONTROLS)]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> ProbeTable:
        """Return the table that `to_json` wrote down."""
        return cls(tuple(ProbeRow(**row) for row in rows))

    def to_csv(self) -> str:
        """Return the rows as comma-separated values, one header line, without the settings."""
        return as_csv(self.to_json(), [name for name in ProbeRow.__dataclass_fields__ if name != "settings"])

    def by_stage(self, probe: str, features: str, *, none: str = "-") -> tuple[list[str], dict[int, list[str]]]:
        """Return accuracies and gains over the controls as text: heads of columns, and by stage what is below them.

        Args:
            probe, features: which, see `ProbeRow`.
            none: in place of what was not measured.
        """
        rows = self.select(probe=probe, features=features)
        others = [name for name in self.networks if name not in CONTROLS]
        controls = [name for name in self.networks if name in CONTROLS]
        heads = [*controls, *(head for name in others for head in (name, *(f"gain over {c}" for c in controls)))]
        stages: dict[int, list[str]] = {}
        for stage in sorted({row.stage for row in rows}):
            found = {row.network: row for row in rows if row.stage == stage}
            cells = [_cell(found.get(name)) for name in controls]
            for name in others:
                row = found.get(name)
                cells += [_cell(row), *(_gain_cell(row, control) for control in controls)]
            stages[stage] = [none if cell is None else cell for cell in cells]
        return heads, stages

    def __str__(self) -> str:
        kinds = list(dict.fromkeys((row.probe, row.features) for row in self.rows))
        n_test, chance = self.rows[0].n_test, self.rows[0].chance
        blocks = [f"accuracy on {n_test} test images, 95 % interval over images; chance {chance:.3f}"]
        if "calibrated" in self.networks:
            blocks[0] += "\ncalibrated: untrained weights with the batch-norm statistics of training images"
        for probe, features in kinds:
            heads, stages = self.by_stage(probe, features)
            lines = [f"{probe} probe, {features} features", "  stage  " + "".join(f"{head:<25}" for head in heads)]
            for stage, cells in stages.items():
                lines.append(f"  {stage:>5}  " + "".join(f"{cell:<25}" for cell in cells))
            blocks.append("\n".join(line.rstrip() for line in lines))
        return "\n\n".join(blocks)


def probe(
    run: Run,
    *,
    data: Data | None = None,
    trained: LocalNetwork | None = None,
    protocol: str | None = None,
    images: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    report: str | None = None,
    name: str = "probe",
) -> ProbeTable:
    """Probe a run beside two controls, store table and plot in its folder, and return the table.

    The controls are the untrained network of the same seed, and `calibrated`: the same with the batch-norm statistics
    of training images, which a trained network has and an untrained one lacks (see `extract.calibrated`).

    Args:
        run: a run with a checkpoint.
        data: the images to probe on; by default the run's own.
        trained: the network, where it is in memory already.
        protocol, images: default to the configuration's.
        seed: of the probes.
        epochs, report: of the `paper` protocol, see `probe_networks`.
        name: of the files: `probe.json` and `probe.csv` are what `Run.probe()` returns.
    """
    config = run.config
    data = open_data(config) if data is None else data
    device = trained.device if trained is not None else open_device(config.device)
    grey, crop = colour_and_crop(config)
    table = probe_networks(
        with_controls(run, data, device, trained),
        data,
        image_size=config.image_size,
        protocol=protocol or (config.probe_protocol if config.probe_protocol != "none" else "logistic"),
        train_images=images or config.probe_images,
        seed=seed,
        precision=config.precision,
        workers=config.workers,
        grey=grey,
        crop=crop,
        epochs=epochs,
        report=report,
    )
    write_json(run.path / f"{name}.json", table.to_json())
    write_text(run.path / f"{name}.csv", table.to_csv())
    curves = {
        network: [
            (str(row.stage), row.accuracy, row.low, row.high)
            for row in table.select(network=network, features="raw", probe="linear")
        ]
        for network in reversed(table.networks)
    }
    # of a folder only its last part: a whole path leaves no room for the axes
    title = f"Linear probe of stages, {Path(data.name).name}"
    figure = plots.accuracy_by_stage(curves, title=title, chance=table.rows[0].chance)
    figures = run.path / "figures"
    plots.save(figure, figures / ("accuracy_by_stage.png" if name == "probe" else f"accuracy_by_stage-{name}.png"))
    return table


def probe_networks(
    networks: Mapping[str, LocalNetwork],
    data: Data,
    *,
    image_size: int,
    protocol: str = "logistic",
    train_images: int | None = None,
    seed: int = 0,
    precision: str = "full",
    workers: int = 0,
    grey: bool = False,
    crop: float | None = None,
    epochs: int | None = None,
    report: str | None = None,
) -> ProbeTable:
    """Probe every stage of every network on raw stage output and on readout output, one pass over the images each.

    Networks are put in evaluation mode, weights stay as they are.

    Args:
        networks: by name; one of them is `untrained`, which the others' gain is measured against.
        data: with labelled `probe_train` and `test`.
        image_size: side of the images, in pixels.
        protocol: `logistic` fits an L2-regularised logistic regression to convergence on unaugmented images. `paper`
            is that of Siddiqui et al. 2023: SGD 0.1, momentum 0.9, weight decay 1e-6, cosine, 100 epochs, batch 256,
            random crops and flips. Both add a weighted 20-NN probe.
            Of training images whose features exceed `FEATURE_BYTES`, logistic regression and k-NN see a part; the
            settings say how many.
        train_images: use this many of the training images, as evenly over the classes as they allow.
        seed: of the probes (not of the networks).
        precision: of the forward passes.
        workers: processes that decode streamed images.
        grey: show images without colour, for networks that were trained on none.
        crop: show the central square of this part of the images' side, for networks trained at that one scale.
        epochs: of `paper`, 100 if not given.
        report: for `paper`, the `last` epoch (if not given), or the `best` on the test images, as published
            (optimistic).

    Raises:
        UserError: the data have no labels, or an option is unknown.
    """
    if protocol not in PROTOCOLS:
        raise one_of("probe protocol", protocol, PROTOCOLS)
    if protocol != "paper" and not (epochs is None and report is None):
        raise UserError(f"epochs and report have no meaning for protocol {protocol}; allowed with: paper")
    if data.probe_train is None or data.test is None:
        raise UserError(f"data set {data.name!r} has no labelled training and test images to probe on")
    if "untrained" not in networks:
        raise ValueError("a probe needs the untrained network beside it")
    train = data.probe_train if train_images is None else class_balanced(data.probe_train, train_images, "train")
    num_classes = len(data.classes)

    def batches(images: ImageSet) -> Iterator[Batch]:
        return plain_batches(images, size=image_size, batch_size=BATCH, mean=data.mean, std=data.std, workers=workers,
                             device=device, grey=grey, crop=crop)  # fmt: skip

    scores: dict[tuple[str, int, str, str], ProbeScore] = {}
    for name, net in networks.items():
        net.eval()
        device = net.device
        kept = class_balanced(train, max(FEATURE_BYTES // bytes_per_image(net, image_size), num_classes * 20), "train")
        x_train, y_train = collect_features(net, batches(kept), precision=precision)
        x_test, y_test = collect_features(net, batches(data.test), precision=precision)
        assert y_train is not None and y_test is not None
        if protocol == "paper":
            fitted = _paper_probe(net, train, data, x_test, y_test, image_size=image_size, seed=seed,
                                  epochs=100 if epochs is None else epochs, precision=precision, workers=workers,
                                  grey=grey, crop=crop, report=report or "last")  # fmt: skip
        else:
            fitted = {
                key: linear_probe(x_train[key], y_train, x_test[key], y_test, num_classes=num_classes, seed=seed)
                for key in x_train
            }
        for (stage, features), score in fitted.items():
            scores[name, stage, features, "linear"] = score
            scores[name, stage, features, "knn"] = knn_probe(
                x_train[stage, features], y_train, x_test[stage, features], y_test, num_classes=num_classes,
                k=min(20, len(y_train)), seed=seed,
            )  # fmt: skip
    shared = {"protocol": protocol, "image_size": image_size, "precision": precision, "data": data.name, "grey": grey,
              "crop": crop}  # fmt: skip
    return ProbeTable(tuple(_row(key, score, scores, shared) for key, score in scores.items()))


def _paper_probe(
    net: LocalNetwork,
    train: ImageSet,
    data: Data,
    x_test: Mapping[tuple[int, str], Tensor],
    y_test: Tensor,
    *,
    image_size: int,
    seed: int,
    epochs: int,
    precision: str,
    workers: int,
    grey: bool,
    crop: float | None,
    report: str,
) -> dict[tuple[int, str], ProbeScore]:
    shown = replace(AUGMENTATIONS["crop_flip"], gray=float(grey))
    if crop is not None:
        shown = replace(shown, crop_scale=(crop**2, crop**2), crop_ratio=(1.0, 1.0))
    loader = ViewLoader(
        train, shown, size=image_size,
        batch_size=min(BATCH, len(train)), seed=seed, mean=data.mean, std=data.std, num_views=1, workers=workers,
        device=net.device,
    )  # fmt: skip

    def epoch_of_features(epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for features, batch in stream_features(net, loader.epoch(epoch), precision=precision):
            assert batch.labels is not None
            yield {_text(key): values for key, values in features.items()}, batch.labels

    on_device = {_text(key): values.to(net.device) for key, values in x_test.items()}
    scores = sgd_probe(
        epoch_of_features, on_device, y_test.to(net.device), num_classes=len(data.classes), epochs=epochs, seed=seed,
        report=report,  # type: ignore[arg-type]
    )  # fmt: skip
    made = {"n_train": len(train)}
    return {key: replace(scores[_text(key)], settings={**scores[_text(key)].settings, **made}) for key in x_test}


def bytes_per_image(net: LocalNetwork, image_size: int) -> int:
    """Return what the features of one image take in memory, of all stages and readouts."""
    features = batch_features(net, torch.zeros(1, 3, image_size, image_size, device=net.device))
    return sum(4 * x.shape[1] for x in features.values())


def _text(key: tuple[int, str]) -> str:
    return f"{key[0]} {key[1]}"


def _row(
    key: tuple[str, int, str, str],
    score: ProbeScore,
    scores: Mapping[tuple[str, int, str, str], ProbeScore],
    shared: Mapping[str, Any],
) -> ProbeRow:
    network, stage, features, probe = key
    gains: dict[str, float | None] = {}
    for control, prefix in (("untrained", ""), ("calibrated", "calibrated_")):
        base = scores.get((control, stage, features, probe))
        gain = low = high = None
        if network not in CONTROLS and base is not None:
            gain = score.accuracy - base.accuracy
            low, high = paired_bootstrap(np.asarray(score.correct), np.asarray(base.correct))
        gains |= {f"{prefix}gain": gain, f"{prefix}gain_low": low, f"{prefix}gain_high": high}
    return ProbeRow(
        network=network,
        stage=stage + 1,
        features=features,
        probe=probe,
        accuracy=score.accuracy,
        low=score.low,
        high=score.high,
        **gains,  # type: ignore[arg-type]
        n_test=score.n_test,
        chance=score.chance,
        settings={**shared, **score.settings},
    )


def _cell(row: ProbeRow | None) -> str | None:
    return None if row is None else f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _gain_cell(row: ProbeRow | None, control: str) -> str | None:
    if row is None:
        return None
    gains = (
        (row.gain, row.gain_low, row.gain_high)
        if control == "untrained"
        else (row.calibrated_gain, row.calibrated_gain_low, row.calibrated_gain_high)
    )
    return None if None in gains else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gains)
