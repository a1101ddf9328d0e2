"""TensorBoard shows what `metrics.jsonl` holds, under the same names."""

from __future__ import annotations

import gc
import importlib.util
import json
import threading

import numpy as np
import pytest
import torch
from tiny import TINY

import localsim
from localsim import runs
from localsim.board import flat, open_board

ROW = {"step": 5, "lr": 0.5, "loss": {"stage1": 2.0, "stage2": 3.0}}
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard (extra [log]) is not installed"
)


def events_of(path, **sizes):
    """Return what TensorBoard itself reads of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, **sizes})
    events.Reload()
    return events


def test_a_row_has_one_number_per_name():
    assert flat(ROW) == {"step": 5, "lr": 0.5, "loss/stage1": 2.0, "loss/stage2": 3.0}


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    open_board(tmp_path, 0)(ROW)
    assert list(tmp_path.iterdir()) == []


@needs_tensorboard
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_stopped_and_resumed_shows_every_metric_once(tmp_path):
    """Stopped between two checkpoints: the rows after the last one were shown, dropped, and are shown again."""

    def pull_the_plug(row):
        if row["step"] == 8:
            raise RuntimeError("no power")

    path = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no power"):
        localsim.run("blockwise", out=path, quiet=True, probe_protocol="none", on_metrics=pull_the_plug, **TINY)
    assert runs.checkpoint_step(path) == 5 and runs.read_metrics(path)[-1]["step"] == 8
    run = localsim.run("blockwise", out=path, quiet=True, resume=True)
    rows = [flat(row) for row in run.metrics()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    events = events_of(path)
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row} >= {"loss/stage1", "held_bytes"}
    for name in rows[0]:
        told = [(event.step, event.value) for event in events.Scalars(name)]
        # TensorBoard keeps single precision
        assert told == [(row["step"], float(np.float32(row[name]))) for row in rows if name in row], name
    assert events.Tags()["images"] == ["figures/credit", "figures/views"]
    assert set(events.Tags()["tensors"]) == {"config/text_summary", "plan/text_summary"}


@needs_tensorboard
@pytest.mark.filterwarnings("ignore")
def test_configuration_plan_and_figures_are_shown_once(tmp_path):
    from localsim.analysis import plots
    from localsim.credit import Credit
    from localsim.files import write_json, write_text

    write_json(tmp_path / "config.json", {"rule": "blockwise"})
    write_text(tmp_path / "plan.txt", "rule blockwise\n  two spaces <b> | kept\n")
    plots.save(Credit.blockwise(3).draw(), tmp_path / "figures" / "credit.png")
    open_board(tmp_path, 0)(ROW)
    open_board(tmp_path, 5)({**ROW, "step": 6})
    events = events_of(tmp_path, images=0)
    assert set(events.Tags()["tensors"]) == {"config/text_summary", "plan/text_summary"}
    (plan,), (config,) = (events.Tensors(f"{name}/text_summary") for name in ("plan", "config"))
    (text,) = plan.tensor_proto.string_val
    assert text.decode() == "    rule blockwise\n      two spaces <b> | kept"
    assert json.loads(config.tensor_proto.string_val[0]) == {"rule": "blockwise"}
    assert events.Tags()["images"] == ["figures/credit"]
    (picture,) = events.Images("figures/credit")
    assert picture.encoded_image_string.startswith(b"\x89PNG") and min(picture.width, picture.height) > 100
    assert [event.step for event in events.Scalars("lr")] == [5, 6]


@needs_tensorboard
@pytest.mark.filterwarnings("ignore")
def test_files_are_closed_when_the_run_is_over(tmp_path):
    before = set(threading.enumerate())
    show = open_board(tmp_path, 0)
    show({"step": 1, "loss": {"stage1": torch.tensor(2.0).item()}})
    assert set(threading.enumerate()) > before
    del show
    gc.collect()
    assert set(threading.enumerate()) == before
