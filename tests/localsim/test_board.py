import importlib.util

import pytest

from localsim.board import open_board

ROW = {"step": 5, "lr": 0.5, "loss": {"stage1": 2.0, "stage2": 3.0}}


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    open_board(tmp_path, 0)(ROW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard (extra [log]) is not installed"
)
def test_scalars_carry_the_names_of_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_board(tmp_path, 0)(ROW)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "lr", "loss/stage1", "loss/stage2"}
    (loss,) = events.Scalars("loss/stage2")
    assert (loss.step, loss.value) == (5, 3.0)
