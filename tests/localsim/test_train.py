"""The training loop. `python tests/localsim/test_train.py` writes golden_losses.txt anew."""

from __future__ import annotations

import math
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import STEPS_PER_EPOCH, assert_same_tensors, checkpoint_tensors, python, timeless, tiny_config, tiny_loader
from tiny import train_in as train_tiny
from torch import Tensor, nn

from localsim import engine, runs
from localsim.assembly import build_network
from localsim.credit import Credit
from localsim.network import LocalNetwork
from localsim.optim import make_optimizer
from localsim.rng import key
from localsim.train import Interrupted, Schedule, TrainingFailed, rehearse, train

GOLDEN = Path(__file__).parent / "golden_losses.txt"
GOLDEN_STEPS = 20


def golden_rows(path: Path) -> list[list[float]]:
    """Return step and loss per tap of twenty steps."""
    train_tiny(path, epochs=GOLDEN_STEPS // STEPS_PER_EPOCH)
    return [[row["step"], *row["loss"].values()] for row in runs.read_metrics(path)]


def test_twenty_steps_give_the_losses_that_were_kept(tmp_path):
    kept = [[float(number) for number in line.split()] for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    now = golden_rows(tmp_path)
    assert len(now) == len(kept) == GOLDEN_STEPS
    for row, before in zip(now, kept, strict=True):
        assert row == pytest.approx(before, rel=1e-4), (
            "the losses of a tiny run have changed; where that is meant, write them anew with "
            "`python tests/localsim/test_train.py`"
        )


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("credit", [Credit.blockwise(3), Credit.overlapping(3), Credit.deep_supervision(3)], ids=str)
def test_stepping_each_stage_when_it_is_final_equals_stepping_all_at_the_end(optimizer, credit):
    config = tiny_config(credit=credit.to_config(), optimizer=optimizer)
    batches = list(tiny_loader(config).epoch(0))[:3]

    def trained(eager: bool) -> dict[str, Tensor]:
        net = build_network(config).train()
        chosen = make_optimizer(optimizer, net.parameters(), lr=0.01, weight_decay=1e-3)
        calls = []

        def apply(parameters: list[nn.Parameter]) -> None:
            calls.append(len(parameters))
            chosen.step()
            chosen.zero_grad()

        for step, batch in enumerate(batches):
            hooks = engine.Hooks(on_final=apply) if eager else None
            engine.backward(net, *batch.views, key=key("draws", step), hooks=hooks)
            if not eager:
                apply([])
        assert len(calls) == len(batches) * (3 + credit.num_taps if eager else 1)
        return net.state_dict()

    assert_same_tensors(trained(eager=True), trained(eager=False))


def test_the_learning_rate_in_the_metrics_is_warm_up_and_cosine_of_the_step(tmp_path):
    settings = {"epochs": 3, "warmup_epochs": 0.8, "lr": 0.4, "lr_scaling": "linear", "final_lr_factor": 0.01}
    train_tiny(tmp_path, optimizer="lars", **settings)
    peak, warmup, total = 0.4 * 8 / 256, 4, 15
    for row in runs.read_metrics(tmp_path):
        done = row["step"] - 1  # the rate of a step is that after as many finished ones
        q = (1 + math.cos(math.pi * (done - warmup) / (total - warmup))) / 2
        expected = peak * done / warmup if done < warmup else peak * (q + 0.01 * (1 - q))
        assert row["lr"] == pytest.approx(expected, rel=1e-12)
    assert row["step"] == total and row["epoch"] == 2


def test_max_steps_stops_early_and_leaves_the_schedule_as_it_is(tmp_path):
    train_tiny(tmp_path / "whole")
    train_tiny(tmp_path / "part", max_steps=7)
    whole, part = (runs.read_metrics(tmp_path / name) for name in ("whole", "part"))
    assert [row["step"] for row in part] == list(range(1, 8))
    assert timeless(part) == timeless(whole[:7])
    assert runs.checkpoint_step(tmp_path / "part") == 7


def test_max_steps_beyond_the_end_changes_nothing():
    assert Schedule.of(tiny_config(max_steps=1000), 5, 3) == Schedule.of(tiny_config(), 5, 3)


def test_lines_of_metrics_come_every_log_every_steps_and_at_the_end(tmp_path):
    train_tiny(tmp_path / "often")
    train_tiny(tmp_path / "seldom", log_every=4)
    often, seldom = (runs.read_metrics(tmp_path / name) for name in ("often", "seldom"))
    assert [row["step"] for row in seldom] == [4, 8, 10]
    for row, first in zip(seldom, (0, 4, 8), strict=True):
        for tap, loss in row["loss"].items():
            window = [line["loss"][tap] for line in often[first : row["step"]]]
            assert loss == pytest.approx(sum(window) / len(window), rel=1e-12)


@pytest.mark.parametrize("stopped_at", [4, 6])
def test_a_run_stopped_between_two_lines_and_resumed_writes_the_same_lines(tmp_path, stopped_at):
    train_tiny(tmp_path / "whole", log_every=4)
    train_tiny(tmp_path / "parts", log_every=4, max_steps=stopped_at)
    assert [row["step"] for row in runs.read_metrics(tmp_path / "parts")] == [4], "a stop writes no line of its own"
    train_tiny(tmp_path / "parts", log_every=4)
    whole, parts = (runs.read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [row["step"] for row in parts] == [4, 8, 10]
    assert timeless(parts) == timeless(whole)
    assert_same_tensors(checkpoint_tensors(tmp_path / "parts"), checkpoint_tensors(tmp_path / "whole"))


# -- what a run that fails leaves behind ------------------------------------------------------------------------------


def kept_steps(path: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (path / "checkpoints").iterdir())


def test_only_a_checkpoint_that_has_one_before_it_is_dropped_untried(tmp_path):
    train_tiny(tmp_path, checkpoint_minutes=0, max_steps=3)
    checkpoints = tmp_path / "checkpoints"
    assert runs.drop_untried_checkpoint(tmp_path, 4) == checkpoints / "00000003"
    assert kept_steps(tmp_path) == [2, 3], "a step has been made from the newest"
    assert runs.drop_untried_checkpoint(tmp_path, 3) == checkpoints / "00000002"
    assert runs.drop_untried_checkpoint(tmp_path, 2) == checkpoints / "00000002"
    assert kept_steps(tmp_path) == [2]
    assert runs.drop_untried_checkpoint(tmp_path / "none", 0) is None


class _FailsAfter:
    """An objective that is not a number from its call after `good` on."""

    def __init__(self, objective, good: int) -> None:
        self.objective, self.left = objective, good

    def __call__(self, embeddings, labels):
        self.left -= 1
        return self.objective(embeddings, labels) * (1 if self.left >= 0 else math.nan)


def fails_after(good: int):
    def alter(net: LocalNetwork) -> None:
        net.taps[1].objective = _FailsAfter(net.taps[1].objective, good)

    return alter


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint_a_step_was_made_from(tmp_path):
    # steps 1 to 6 succeed, step 7 fails on the weights of checkpoint 6: what is known to be good is checkpoint 5
    told = r"loss of tap stage2 is nan at step 7; .*00000005 is kept"
    with pytest.raises(TrainingFailed, match=told) as caught:
        train_tiny(tmp_path, alter=fails_after(6), checkpoint_minutes=0)
    assert "\n" not in str(caught.value)
    assert kept_steps(tmp_path) == [5]
    assert [row["step"] for row in runs.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all(x.isfinite().all() for x in checkpoint_tensors(tmp_path).values())
    # resumed without the fault, it is the run that never failed
    train_tiny(tmp_path)
    train_tiny(tmp_path.with_name("whole"))
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(tmp_path.with_name("whole")))
    assert timeless(runs.read_metrics(tmp_path)) == timeless(runs.read_metrics(tmp_path.with_name("whole")))


def test_a_failure_some_steps_after_a_checkpoint_keeps_that_checkpoint(tmp_path):
    with pytest.raises(TrainingFailed, match=r"at step 8; .*00000005 is kept"):
        train_tiny(tmp_path, alter=fails_after(7))
    assert kept_steps(tmp_path) == [5]


def test_a_failure_before_the_first_checkpoint_says_that_there_is_none(tmp_path):
    with pytest.raises(TrainingFailed, match=r"at step 3; a lower --lr may help; no checkpoint yet"):
        train_tiny(tmp_path, alter=fails_after(2))
    assert runs.newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("checkpoint_minutes", [0, 5.0])
def test_an_absurd_learning_rate_stops_the_run_and_never_keeps_weights_that_are_no_numbers(
    tmp_path, checkpoint_minutes
):
    settings = {"optimizer": "sgd", "lr": 1e25, "warmup_epochs": 0, "checkpoint_minutes": checkpoint_minutes}
    told = r"(the loss of tap stage\d is|the embeddings of tap stage\d are|is not finite after step) .*; "
    for _attempt in ("first", "resumed"):
        with pytest.raises(TrainingFailed, match=told) as caught:
            train_tiny(tmp_path, **settings)
        assert "\n" not in str(caught.value)
        if runs.newest_checkpoint(tmp_path) is not None:
            assert all(x.isfinite().all() for x in checkpoint_tensors(tmp_path).values())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss of the last step was a number, and nothing is computed from the weights it left."""

    class Spoils(torch.nn.Module):
        """Passes activity on; its gradient is infinite once `good` calls are over."""

        def __init__(self, head: nn.Module, good: int) -> None:
            super().__init__()
            self.head, self.left = head, good

        def forward(self, x: Tensor) -> Tensor:
            self.left -= 1
            z = self.head(x)
            if self.left < 0 and z.requires_grad:
                z.register_hook(lambda grad: grad * math.nan)
            return z

    def alter(net: LocalNetwork) -> None:
        net.taps[0].head = Spoils(net.taps[0].head, good=2 * 7)  # two views per step

    with pytest.raises(TrainingFailed, match=r"is not finite after step 8"):
        train_tiny(tmp_path, alter=alter, max_steps=8, log_every=100)
    assert kept_steps(tmp_path) == [5]
    assert all(x.isfinite().all() for x in checkpoint_tensors(tmp_path).values())


class _CollapsesAfter(nn.Module):
    """A head whose embeddings are all equal from its call after `good` training steps on."""

    def __init__(self, head: nn.Module, good: int) -> None:
        super().__init__()
        self.head, self.left = head, good

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        z = self.head(x)
        return z if self.left >= 0 else z * 0 + 1


def test_a_collapsed_tap_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    def alter(net: LocalNetwork) -> None:
        net.taps[2].head = _CollapsesAfter(net.taps[2].head, good=2 * 4)  # two views per step

    with pytest.raises(TrainingFailed, match=r"tap stage3 has collapsed at step 7: .*00000004 is kept"):
        train_tiny(tmp_path, alter=alter, checkpoint_minutes=0)
    assert kept_steps(tmp_path) == [3, 4]  # none of the three suspicious steps was kept


@pytest.mark.parametrize("rule", ["blockwise", "end_to_end"])
def test_a_rehearsal_changes_nothing_and_measures_something(rule):
    config = tiny_config(rule)
    net = build_network(config)
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.add_(3)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    generator = torch.get_rng_state()
    cost = rehearse(net, next(tiny_loader(config).epoch(0)), config)
    assert_same_tensors(net.state_dict(), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert cost.seconds > 0 and cost.held_bytes > 8 * 2 * 16 * 16 * 16 * 4  # one map of stage 1


def test_training_after_a_rehearsal_is_training(tmp_path):
    config = tiny_config(max_steps=3)
    train_tiny(tmp_path / "plain", max_steps=3)
    net, loader = build_network(config), tiny_loader(config)
    rehearse(net, next(loader.epoch(0)), config)
    (tmp_path / "rehearsed").mkdir()
    train(net, loader, config, tmp_path / "rehearsed", num_classes=10, progress=False)
    assert_same_tensors(checkpoint_tensors(tmp_path / "rehearsed"), checkpoint_tensors(tmp_path / "plain"))


def test_the_rules_of_one_seed_start_from_one_trunk_and_end_in_different_ones(tmp_path):
    trunks = {}
    for rule in ("blockwise", "end_to_end"):
        start = build_network(tiny_config(rule)).trunk_state_dict()
        trunks[rule] = start, train_tiny(tmp_path / rule, rule, max_steps=2).trunk_state_dict()
    (start, trained), (other_start, other_trained) = trunks.values()
    assert_same_tensors(start, other_start)
    assert not torch.equal(trained["conv1.weight"], other_trained["conv1.weight"])


def test_training_works_away_from_the_main_thread(tmp_path):
    """Signals cannot be caught there; a notebook's worker thread must be able to train all the same."""
    worker = threading.Thread(target=train_tiny, args=(tmp_path,), kwargs={"max_steps": 2})
    worker.start()
    worker.join()
    assert runs.checkpoint_step(tmp_path) == 2


def test_a_stop_asked_for_in_process_is_a_keyboard_interrupt_and_gives_the_handlers_back(tmp_path, monkeypatch):
    append = runs.append_metrics

    def interrupting(path: Path, row: dict) -> None:
        append(path, row)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runs, "append_metrics", interrupting)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        train_tiny(tmp_path)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert runs.checkpoint_step(tmp_path) == 3


_ENDLESS = """
import sys, pathlib, tiny
try:
    tiny.train_in(pathlib.Path(sys.argv[1]), epochs=2000)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_run_that_can_be_resumed(tmp_path, number):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with python(_ENDLESS, stopped) as process:
        deadline = time.monotonic() + 60
        while len(runs.read_metrics(stopped)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    step = runs.checkpoint_step(stopped)
    assert step >= 2 and runs.read_metrics(stopped)[-1]["step"] == step
    for path in (stopped, whole):
        train_tiny(path, epochs=2000, max_steps=step + 2)
    assert_same_tensors(checkpoint_tensors(stopped), checkpoint_tensors(whole))
    assert timeless(runs.read_metrics(stopped)) == timeless(runs.read_metrics(whole))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = [" ".join([str(step), *(f"{x:.9g}" for x in losses)]) for step, *losses in golden_rows(Path(folder))]
    GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}", file=sys.stderr)
