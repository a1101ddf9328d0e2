"""Scores as tables, as JSON, as text and in a folder."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from tiny import train_in

from localsim.analysis import brain
from localsim.analysis.brain import figures
from localsim.analysis.brain.ceilings import Ceiling
from localsim.analysis.brain.contrasts import all_differences
from localsim.analysis.brain.metrics import get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.scores import BrainScore, BrainScores
from localsim.data import ImageSet
from localsim.errors import UserError

SHORT = {"epochs": 1, "train_images": 16, "warmup_epochs": 0, "snapshot_every": 1}
N = 40


def recorded(name: str, seed: int, trials: int = 4, neurons: int = 6) -> Recording:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (N, 3, 16, 16), dtype=np.uint8)
    signal = pixels.mean((2, 3)) @ rng.normal(size=(3, neurons))
    responses = signal[:, :, None] + rng.normal(size=(N, neurons, trials))
    regions = ("V4",) * 4 + ("IT",) * 2
    return Recording(name, ImageSet(torch.from_numpy(pixels), None, None), responses, regions=regions,
                     citation="Nobody 2026")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, rule in (("one", "blockwise"), ("end", "end_to_end")):
        train_in(folder / name, rule, **SHORT)
    return folder


@pytest.fixture(scope="module")
def scores(runs) -> BrainScores:
    return brain.score(
        runs / "one", runs / "end", recordings=[recorded("A", 0), recorded("B", 1, trials=1)], resamples=20,
        controls=["untrained", "pixels", "shuffled"], over_training=True, choose_stage=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def local(runs) -> BrainScores:
    return brain.score(runs / "one", recordings=recorded("A", 0), resamples=0, controls=[])


def test_there_is_a_row_for_every_score(scores):
    assert len(scores.rows) == len(scores.scores) == len(scores.layers) * 3 * 2
    for row, ((recording, region, layer), one) in zip(scores.rows, scores.scores.items(), strict=True):
        assert (row.metric, row.recording, row.region) == ("ridgecv", recording, region)
        assert (row.regime, row.seed, row.step) == (layer.regime, layer.seed, layer.step)
        assert (row.layer, row.depth, row.value, row.chance) == (layer.name, layer.depth, one.value, one.chance)
        assert (row.low, row.high) == one.interval and (row.n, row.neurons) == (one.n, one.neurons)
        assert (row.ceiling is None) == (row.ceiled is None) == (recording != "A"), "B has one trial, so no mean either"
    ended = [row for row in scores.rows if row.regime == "blockwise" and row.step is None]
    assert {row.epoch for row in ended} == {1.0} and all(row.weight_updates for row in ended)


def test_the_table_as_text_is_the_table(scores):
    rows = list(csv.DictReader(io.StringIO(scores.to_csv())))
    assert len(rows) == len(scores.rows)
    for text, row in zip(rows, scores.rows, strict=True):
        assert float(text["value"]) == row.value and text["layer"] == row.layer
        assert text["seed"] == ("" if row.seed is None else str(row.seed))
        assert text["ceiling"] == ("" if row.ceiling is None else repr(row.ceiling))


def test_json_holds_everything_and_no_nan(scores):
    made = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert set(made) == {"metric", "record", "rows", "differences", "best_stages"}
    assert made["metric"]["name"] == "ridgecv" and made["metric"]["over"] == scores.metric.over
    one = recorded("A", 0)
    assert made["record"]["recordings"]["A"] == {
        "n": N, "of": "neurons", "citation": "Nobody 2026", "degrees": None, "images": one.images_hash,
        "answers": one.answers_hash,
    }  # fmt: skip
    assert made["record"]["metric"] == {
        "options": {"splits": 10, "train_size": 0.9}, "shuffles": 1,
    }  # fmt: skip
    assert made["record"]["pooled"] == [
        {"recording": "all", "region": region, "of": ["A", "B"]} for region in ("V4", "IT")
    ]
    assert [row["value"] for row in made["rows"]] == [row.value for row in scores.rows]
    assert len(made["differences"]) == len(all_differences(scores)) == 3 * 3 * 2 * 3
    assert [row["each"] for row in made["differences"]] == [list(one.each) for one in all_differences(scores)]
    # three networks as they ended, two recordings of two regions
    assert len(made["best_stages"]) == 3 * 2 * 2
    assert {row["regime"] for row in made["best_stages"]} == {"untrained", "blockwise", "end_to_end"}
    assert all(sum(row["chosen"].values()) == 5 for row in made["best_stages"])


@pytest.mark.parametrize(
    ("name", "options", "shuffles"),
    [
        ("pls", {"splits": 4, "train_size": 0.5, "components": 3}, 1),
        ("ridge", {"splits": 4, "train_size": 0.9}, 1),
        ("rdm", {}, 20),
    ],
)
def test_what_a_metric_was_made_with_is_in_the_record(name, options, shuffles):
    x = {"one": np.random.default_rng(0).normal(size=(N, 5))}
    metric = get_metric(name, **options)
    found = brain.score(x, recordings=recorded("A", 0), metric=metric, resamples=0, controls=["shuffled"])
    made = json.loads(json.dumps(found.to_json()))
    assert made["record"]["metric"] == {"options": options, "shuffles": shuffles}


def test_a_matrix_is_of_one_network(scores):
    names = [layer.name for layer in scores.finished("blockwise")]
    found = scores.matrix("blockwise")
    assert list(found) == [(name, region) for region in ("V4", "IT") for name in names]
    (layer,) = [layer for layer in scores.finished("blockwise") if layer.name == names[1]]
    assert found[names[1], "IT"] == scores.score("all", "IT", layer).value
    assert set(scores.matrix("pixels")) == {("pixels", "V4"), ("pixels", "IT")}


def test_a_mean_over_recordings_has_a_ceiling_where_all_have_one():
    def one(value: float, ceiling: float | None, draws: np.ndarray) -> BrainScore:
        made = None if ceiling is None else Ceiling(ceiling, "consistency", None)
        ceiled = None if ceiling is None else value**2 / ceiling
        return BrainScore(value, draws, 0.1, made, ceiled, 20, 3, -1, 1, "" if ceiling else "one trial")

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4000)) * 0.1
    mean = BrainScore.mean([one(0.4, 0.8, first), one(0.6, 0.9, second)], 33)
    assert (mean.value, mean.chance, mean.n, mean.neurons) == (0.5, 0.1, 33, 6) and mean.ceiling is not None
    assert mean.ceiling.value == pytest.approx(0.85)
    assert mean.ceiled == pytest.approx((0.16 / 0.8 + 0.36 / 0.9) / 2)
    # the standard error of the mean of two independent recordings
    assert mean.interval == pytest.approx((0.5 - 1.96 * 0.1 / 2**0.5, 0.5 + 1.96 * 0.1 / 2**0.5), abs=0.01)
    partly = BrainScore.mean([one(0.4, 0.8, first), one(0.6, None, second)], 33)
    assert partly.ceiling is None and partly.ceiled is None and partly.unceiled == "one trial"


def test_it_prints_scores_chance_ceilings_and_differences(scores):
    printed = str(scores)
    assert printed.startswith("ridgecv: Pearson's r of neurons with held-out predictions by ridge regression")
    assert printed.splitlines()[0].endswith(f"; 95 % intervals over {scores.metric.over}")
    for region, neurons in (("V4", 8), ("IT", 4)):
        ceiling = scores.score("A", region, scores.layers[0]).ceiling
        assert ceiling is not None
        assert (
            f"\n{region}, mean over 2 recordings: 80 images, {neurons} neurons; ceiling {ceiling.value:.3f} in A "
            "(internal consistency of neurons, Spearman-Brown, over 4 trials) only\n"
        ) in printed
    layer = scores.finished("blockwise")[0]
    one = scores.score("all", "V4", layer)
    assert one.interval is not None
    low, high = one.interval
    assert (
        f"blockwise seed 0 {layer.name}   {one.value:+.3f} [{low:.3f}, {high:.3f}]  shuffled {one.chance:+.3f}\n"
        in printed
    )
    for title in ("blockwise minus untrained", "blockwise minus end_to_end", "end_to_end minus untrained"):
        assert printed.count(f"  {title}, 1 pair of networks of the same seed:\n") == 2
    (difference,) = [
        one for one in all_differences(scores)
        if (one.recording, one.region, one.layer) == ("all", "IT", layer.name)
        and (one.regime, one.reference) == ("blockwise", "end_to_end")
    ]  # fmt: skip
    assert f"    {layer.name:<12} {difference}\n" in printed
    assert printed.count("best stage of blockwise: ") == 2 and " of 10" in printed, "folds of both recordings"
    assert "step" not in printed and "no end_to_end run was given" not in printed


def test_of_a_single_recording_the_ceiling_is_printed_or_why_there_is_none(scores, local):
    x = {"one": np.random.default_rng(0).normal(size=(N, 5))}
    with_ceiling = brain.score(x, recordings=recorded("A", 0), resamples=0, controls=[])
    one = with_ceiling.score("A", "V4", with_ceiling.layers[0])
    assert f"of ceiling {one.ceiled:+.3f}\n" in str(with_ceiling)
    without = str(brain.score(x, recordings=recorded("B", 0, trials=1), resamples=0, controls=[]))
    assert "\nV4, B: 40 images, 4 neurons; no ceiling: the recording's trials were averaged, or each image" in without
    assert "of ceiling" not in without and "shuffled" not in without and "[" not in without
    assert "95 %" not in without


def test_without_an_end_to_end_run_it_says_how_to_make_one(local, scores):
    assert str(local).endswith(
        "\n\nno end_to_end run was given to hold these against: `localsim run --rule end_to_end` makes one"
    )
    x = {"one": np.random.default_rng(0).normal(size=(N, 5))}
    arrays = brain.score(x, recordings=recorded("A", 0), resamples=0, controls=[])
    assert "end_to_end" not in str(arrays), "of networks that are no runs, no run can be asked for"


def test_a_local_rule_is_held_against_backpropagation_without_an_untrained_network_too(runs):
    both = brain.score(runs / "one", runs / "end", recordings=recorded("A", 0), resamples=0, controls=[])
    assert {(one.regime, one.reference) for one in all_differences(both)} == {("blockwise", "end_to_end")}
    assert "blockwise minus end_to_end, " in str(both)


def test_it_is_saved_once(scores, tmp_path, monkeypatch):
    def one_figure(_):
        from matplotlib.figure import Figure

        return {"regimes": Figure()}

    monkeypatch.setattr(figures, "brain_figures", one_figure)
    path = scores.save(tmp_path / "made")
    assert path == tmp_path / "made" / "ridgecv"
    assert {file.name for file in path.iterdir()} == {
        "scores.csv", "differences.csv", "best_stages.csv", "brain.json", "regimes.png", "regimes.svg",
    }  # fmt: skip
    assert (path / "scores.csv").read_text() == scores.to_csv()
    assert json.loads((path / "brain.json").read_text()) == json.loads(json.dumps(scores.to_json()))
    rows = list(csv.DictReader(io.StringIO((path / "differences.csv").read_text())))
    assert [float(row["value"]) for row in rows] == [one.value for one in all_differences(scores)]
    assert [float(row["each"]) for row in rows] == pytest.approx([one.value for one in all_differences(scores)], 1e-5)
    best = list(csv.DictReader(io.StringIO((path / "best_stages.csv").read_text())))
    assert len(best) == len(scores.best)
    assert best[0]["chosen"] == " ".join(f"{name}:{times}" for name, times in scores.best[0].chosen.items())
    with pytest.raises(UserError, match="ridgecv exists already; choose another folder, or move it away"):
        scores.save(tmp_path / "made")


def test_without_differences_and_best_stages_there_are_no_rows_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "brain_figures", lambda _: {})
    x = {"one": np.random.default_rng(0).normal(size=(N, 5))}
    path = brain.score(x, recordings=recorded("A", 0), resamples=0, controls=[]).save(tmp_path)
    assert {file.name for file in path.iterdir()} == {"scores.csv", "differences.csv", "brain.json"}
    assert len((path / "differences.csv").read_text().splitlines()) == 1, "the names of the columns"
