"""Linear and k-NN probes of every stage of a network, always with the untrained network beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from localsim.analysis.features import collect_features, stream_features
from localsim.analysis.probes import ProbeScore, knn_probe, linear_probe, paired_bootstrap, sgd_probe
from localsim.data import AUGMENTATIONS, Batch, Data, ImageSet, ViewLoader, class_balanced, plain_batches
from localsim.errors import UserError, one_of
from localsim.network import LocalNetwork

PROTOCOLS = ("logistic", "paper")
CONTROLS = ("untrained", "calibrated")
"""Networks that have learned nothing: as initialised, and with batch-norm statistics taken from images."""
BATCH = 256
KNN_BANK = 50_000
"""Training images that the k-NN probe of the `paper` protocol keeps: all of ImageNet's features would take 60 GB."""


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
            interval; None for the untrained network itself.
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
    n_test: int
    chance: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class ProbeTable:
    """All probes of a network and of its untrained twin; prints itself as a table."""

    rows: tuple[ProbeRow, ...]

    def select(self, **fields: Any) -> list[ProbeRow]:
        """Return the rows with these values, e.g. `select(features="raw", probe="linear", network="blockwise")`."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in fields.items())]

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
        out = io.StringIO()
        names = [name for name in ProbeRow.__dataclass_fields__ if name != "settings"]
        writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.to_json())
        return out.getvalue()

    def __str__(self) -> str:
        kinds = list(dict.fromkeys((row.probe, row.features) for row in self.rows))
        n_test, chance = self.rows[0].n_test, self.rows[0].chance
        blocks = [f"accuracy on {n_test} test images, 95 % interval over images; chance {chance:.3f}"]
        if "calibrated" in self.networks:
            blocks[0] += "\ncalibrated: untrained weights with the batch-norm statistics of training images"
        for probe, features in kinds:
            rows = self.select(probe=probe, features=features)
            others = [name for name in self.networks if name not in CONTROLS]
            controls = [name for name in self.networks if name in CONTROLS]
            heads = [*controls, *(head for name in others for head in (name, "gain over untrained"))]
            lines = [f"{probe} probe, {features} features", "  stage  " + "".join(f"{head:<24}" for head in heads)]
            for stage in sorted({row.stage for row in rows}):
                found = {row.network: row for row in rows if row.stage == stage}
                cells = [_cell(found.get(name)) for name in controls]
                cells += [cell for name in others for cell in (_cell(found.get(name)), _gain_cell(found.get(name)))]
                lines.append(f"  {stage:>5}  " + "".join(f"{cell:<24}" for cell in cells))
            blocks.append("\n".join(line.rstrip() for line in lines))
        return "\n\n".join(blocks)


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
    epochs: int = 100,
    report: str = "last",
) -> ProbeTable:
    """Probe every stage of every network on raw stage output and on readout output, one pass over the images each.

    Networks are put in evaluation mode, weights stay as they are.

    Args:
        networks: by name; one of them is `untrained`, which the others' gain is measured against.
        data: with labelled `probe_train` and `test`.
        image_size: side of the images, in pixels.
        protocol: `logistic` fits an L2-regularised logistic regression to convergence on unaugmented images. `paper`
            is that of Siddiqui et al. 2023: SGD 0.1, momentum 0.9, weight decay 1e-6, cosine, 100 epochs, batch 256,
            random crops and flips. Both add a weighted 20-NN probe; with
            `paper` its neighbours are at most `KNN_BANK` training images.
        train_images: use this many of the training images, as evenly over the classes as they allow.
        seed: of the probes (not of the networks).
        precision: of the forward passes.
        workers: processes that decode streamed images.
        epochs: of `paper`.
        report: `last` epoch, or `best` on the test images as the paper did (optimistic); only for `paper`.

    Raises:
        UserError: the data have no labels, or an option is unknown.
    """
    if protocol not in PROTOCOLS:
        raise one_of("probe protocol", protocol, PROTOCOLS)
    if data.probe_train is None or data.test is None:
        raise UserError(f"data set {data.name!r} has no labelled training and test images to probe on")
    if "untrained" not in networks:
        raise ValueError("a probe needs the untrained network beside it")
    train = data.probe_train if train_images is None else class_balanced(data.probe_train, train_images, "train")
    num_classes = len(data.classes)

    def batches(images: ImageSet) -> Iterator[Batch]:
        return plain_batches(images, size=image_size, batch_size=BATCH, mean=data.mean, std=data.std, workers=workers,
                             device=device)  # fmt: skip

    scores: dict[tuple[str, int, str, str], ProbeScore] = {}
    for name, net in networks.items():
        net.eval()
        device = net.device
        kept = class_balanced(train, KNN_BANK, "train") if protocol == "paper" else train
        x_train, y_train = collect_features(net, batches(kept), precision=precision)
        x_test, y_test = collect_features(net, batches(data.test), precision=precision)
        assert y_train is not None and y_test is not None
        if protocol == "paper":
            fitted = _paper_probe(net, train, data, x_test, y_test, image_size=image_size, seed=seed, epochs=epochs,
                                  precision=precision, workers=workers, report=report)  # fmt: skip
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
    shared = {"protocol": protocol, "image_size": image_size, "precision": precision, "data": data.name}
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
    report: str,
) -> dict[tuple[int, str], ProbeScore]:
    loader = ViewLoader(
        train, AUGMENTATIONS["crop_flip"], size=image_size, batch_size=min(BATCH, len(train)), seed=seed,
        mean=data.mean, std=data.std, num_views=1, workers=workers, device=net.device,
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
    return {key: scores[_text(key)] for key in x_test}


def _text(key: tuple[int, str]) -> str:
    return f"{key[0]} {key[1]}"


def _row(
    key: tuple[str, int, str, str],
    score: ProbeScore,
    scores: Mapping[tuple[str, int, str, str], ProbeScore],
    shared: Mapping[str, Any],
) -> ProbeRow:
    network, stage, features, probe = key
    gain = gain_low = gain_high = None
    base = scores.get(("untrained", stage, features, probe))
    if network != "untrained" and base is not None:
        gain = score.accuracy - base.accuracy
        gain_low, gain_high = paired_bootstrap(np.asarray(score.correct), np.asarray(base.correct))
    return ProbeRow(
        network=network,
        stage=stage + 1,
        features=features,
        probe=probe,
        accuracy=score.accuracy,
        low=score.low,
        high=score.high,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        n_test=score.n_test,
        chance=score.chance,
        settings={**shared, **score.settings},
    )


def _cell(row: ProbeRow | None) -> str:
    return "-" if row is None else f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _gain_cell(row: ProbeRow | None) -> str:
    if row is None or row.gain is None:
        return "-"
    return f"{row.gain:+.3f} [{row.gain_low:+.3f}, {row.gain_high:+.3f}]"
