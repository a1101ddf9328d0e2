from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import filelock
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from tiny import (
    STEPS_PER_EPOCH,
    TINY,
    assert_same_tensors,
    checkpoint_tensors,
    python,
    timeless,
    tiny_config,
    tiny_state,
    train_in,
)

import localsim
from localsim import runs
from localsim.assembly import build_network
from localsim.config import Config
from localsim.errors import UserError

LOGGED = {"log_every": 2}  # so that a checkpoint may lie between two lines of metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing disturbed; not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    localsim.run(out=path, quiet=True, **TINY | LOGGED)
    return path


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The same run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


def newest(path: Path) -> Path:
    folder = runs.newest_checkpoint(path)
    assert folder is not None
    return folder


# -- what is in the folder --------------------------------------------------------------------------------------------


def test_a_finished_run_holds_these_files_and_no_others(finished):
    files = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    files = {file for file in files if not file.startswith("tensorboard/")}  # where it is installed
    checkpoints = [f"checkpoints/{step:08d}" for step in (5, 10)]
    saved = ("trunk.safetensors", "taps.safetensors", "optimizer.pt", "monitor.pt", "progress.json")
    assert files == {
        *("config.json", "environment.json", "plan.txt", "metrics.jsonl", "probe.json", "probe.csv", "lock"),
        *(f"{folder}/{name}" for folder in checkpoints for name in saved),
        *(f"figures/{name}.png" for name in ("views", "loss", "credit", "accuracy_by_stage")),
    }


def test_the_folder_can_be_read_without_localsim(finished):
    config = json.loads((finished / "config.json").read_text())
    assert {name: config[name] for name in TINY | LOGGED} == TINY | LOGGED
    assert config["rule"] == "blockwise" and config["seed"] == 0
    (start,) = json.loads((finished / "environment.json").read_text())
    assert start["torch"] == torch.__version__ and start["localsim"] == localsim.__version__
    assert start["resumed_from_step"] == 0 and start["command"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 1]
    for line in lines:
        assert set(line["loss"]) == set(line["online_probe"]) == {"stage1", "stage2", "stage3"}
        assert line["held_bytes"] > 0 and line["images_per_second"] > 0


def test_a_run_is_opened_from_itself_or_its_folder(finished):
    run = localsim.load_run(finished)
    assert runs.opened_run(run) is run
    assert runs.opened_run(finished) == run == runs.opened_run(str(finished))
    for bad, said in ((None, "NoneType; allowed: a Run or its folder"), ("nowhere", "nowhere is not a run folder")):
        with pytest.raises(UserError, match=said):
            runs.opened_run(bad)


def test_load_run_gives_back_configuration_step_and_networks(finished):
    run = localsim.load_run(finished)
    assert run.config == tiny_config(**LOGGED) and run.step == 10 and run.path == finished
    trained, untrained = run.network(), run.network("untrained")
    assert not trained.training and not untrained.training
    saved = checkpoint_tensors(finished)
    assert_same_tensors({f"trunk.safetensors: {k}": x for k, x in trained.trunk_state_dict().items()},
                        {k: x for k, x in saved.items() if k.startswith("trunk")})  # fmt: skip
    assert_same_tensors({f"taps.safetensors: {k}": x for k, x in trained.taps.state_dict().items()},
                        {k: x for k, x in saved.items() if k.startswith("taps")})  # fmt: skip
    assert_same_tensors(untrained.state_dict(), build_network(run.config).state_dict())
    with pytest.raises(UserError, match="unknown network 'best'; allowed: trained, untrained"):
        run.network("best")


def test_snapshots_keep_the_weights_of_every_nth_epoch(finished, tmp_path):
    run = localsim.run(out=tmp_path / "kept", quiet=True, snapshot_every=2, **TINY | LOGGED | {"epochs": 4})
    assert run.snapshots == [2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH]
    assert_same_tensors(run.network(run.snapshots[-1]).state_dict(), run.network().state_dict())
    halfway, final = (dict(run.network(step).named_parameters()) for step in run.snapshots)
    assert not all(torch.equal(halfway[name], final[name]) for name in final)
    with pytest.raises(UserError, match="unknown network 7; allowed: trained, untrained, 10, 20"):
        run.network(7)
    assert localsim.load_run(finished).snapshots == []


def test_a_resumed_run_has_the_snapshots_of_an_uninterrupted_one(tmp_path):
    settings = {**TINY, "snapshot_every": 1}
    whole = localsim.run(out=tmp_path / "whole", quiet=True, **settings)
    localsim.run(out=tmp_path / "parts", quiet=True, max_steps=STEPS_PER_EPOCH + 1, **settings)
    parts = localsim.run(out=tmp_path / "parts", quiet=True, resume=True, snapshot_every=1)
    assert whole.snapshots == parts.snapshots == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    for step in whole.snapshots:
        assert_same_tensors(whole.network(step).state_dict(), parts.network(step).state_dict())


def test_the_trunk_loads_into_torchvisions_network(tmp_path):
    """The file is torchvision's checkpoint but for the classifier: the same outputs, under the same names."""
    net = build_network(tiny_config(backbone="resnet18")).eval()
    folder = runs.save_checkpoint(tmp_path, 1, tiny_state(net))
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()  # type: ignore[assignment]
    model.load_state_dict(load_file(folder / "trunk.safetensors"), strict=True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), net(x).mean((2, 3)))


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is not a run folder: it has no config\.json"):
            localsim.load_run(path)


# -- resume -----------------------------------------------------------------------------------------------------------


class _Crash(Exception):
    pass


@pytest.mark.parametrize(("minutes", "restarts_from"), [(5, STEPS_PER_EPOCH), (0, 7)], ids=["epoch end", "mid-epoch"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch, minutes, restarts_from):
    append = runs.append_metrics

    def crash(path: Path, row: dict) -> None:
        append(path, row)
        if row["step"] == 8:
            raise _Crash

    with monkeypatch.context() as patched, pytest.raises(_Crash):
        patched.setattr(runs, "append_metrics", crash)
        train_in(tmp_path, **LOGGED, checkpoint_minutes=minutes)
    assert runs.checkpoint_step(tmp_path) == restarts_from
    net = train_in(tmp_path, **LOGGED)
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(finished))
    assert_same_tensors(net.state_dict(), localsim.load_run(finished).network().state_dict())
    assert timeless(runs.read_metrics(tmp_path)) == timeless(runs.read_metrics(finished))
    for name in ("optimizer.pt", "monitor.pt"):
        here, there = (torch.load(newest(path) / name, weights_only=True) for path in (tmp_path, finished))
        torch.testing.assert_close(here, there, rtol=0, atol=0)


def test_only_the_two_newest_checkpoints_are_kept(tmp_path):
    train_in(tmp_path, checkpoint_minutes=0, max_steps=4)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["00000003", "00000004"]


_KILLED = """
import os, pathlib, signal, sys, time, tiny
from localsim import runs
torch_save = runs.torch.save
def hang(state, file):
    if "00000008" in str(file):
        print("saving", flush=True)
        time.sleep(600)
    torch_save(state, file)
runs.torch.save = hang
tiny.train_in(pathlib.Path(sys.argv[1]), log_every=2, checkpoint_minutes=0)
"""


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_to_the_same_weights(finished, tmp_path):
    with python(_KILLED, tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
        with pytest.raises(UserError, match="being written by another process"):
            train_in(tmp_path, **LOGGED)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / ".00000008.partial" / "trunk.safetensors").exists()
    assert runs.checkpoint_step(tmp_path) == 7
    localsim.run(out=tmp_path, resume=True, quiet=True)
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(finished))
    assert timeless(runs.read_metrics(tmp_path)) == timeless(runs.read_metrics(finished))
    assert localsim.load_run(tmp_path).probe() == localsim.load_run(finished).probe()
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert len(kept) == 2 and kept[1] == "00000010", "nothing half-written is left"
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["resumed_from_step"] for start in starts] == [7]


def test_resume_refuses_what_contradicts_the_run_and_takes_what_does_not_change_its_numbers(copy):
    before = checkpoint_tensors(copy)
    for setting, told in (
        ({"lr": 0.5}, r"lr=0\.003, not 0\.5; resume it without --lr"),
        ({"projector": [8, 9]}, r"projector=\[8, 8\], not \[8, 9\]"),
        ({"rule": "end_to_end"}, "rule='blockwise', not 'end_to_end'"),
        ({"preset": "cifar10"}, "preset='quick', not 'cifar10'"),
        ({"log_every": 3}, "log_every=2, not 3; resume it without --log-every"),
    ):
        with pytest.raises(UserError, match=told):
            localsim.run(out=copy, resume=True, quiet=True, **setting)
    with pytest.raises(UserError, match="workers is -1"):
        localsim.run(out=copy, resume=True, quiet=True, workers=-1)
    again = localsim.run("blockwise", out=copy, resume=True, quiet=True, lr=0.003, checkpoint_minutes=1, max_steps=99)
    assert again.config.checkpoint_minutes == 1 and again.config.max_steps == 99
    assert_same_tensors(checkpoint_tensors(copy), before)
    assert timeless(runs.read_metrics(copy))[-1]["step"] == 10


def test_resume_refuses_a_setting_that_does_not_exist(copy):
    with pytest.raises(UserError, match=r"unknown setting 'learning_rate'; allowed: .*lr, "):
        localsim.run(out=copy, resume=True, quiet=True, learning_rate=0.1)


def test_a_tuple_is_as_good_as_the_list_that_config_json_makes_of_it(tmp_path):
    runs.start_run(tmp_path, tiny_config(projector=(8, 8)))
    config = localsim.load_run(tmp_path).config
    assert config == tiny_config(projector=(8, 8))
    assert config.changed_by({"projector": (8, 8)}) == {}


def test_a_run_whose_disk_fills_up_can_be_continued(finished, tmp_path, monkeypatch):
    save = runs.save_file

    def filling(state: dict, file: Path) -> None:
        if "00000007" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="00000006 is kept"):
        patched.setattr(runs, "save_file", filling)
        train_in(tmp_path, **LOGGED, checkpoint_minutes=0)
    train_in(tmp_path, **LOGGED)
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(finished))


def test_configurations_survive_their_file(tmp_path):
    config = tiny_config(objective_options={"lambda_": 0.01}, cuts="layer1.1,layer3.0", max_steps=3)
    runs.start_run(tmp_path, config)
    assert localsim.load_run(tmp_path).config == config
    assert Config.from_json(config.to_json(), "here") == config


# -- one writer, nothing overwritten ----------------------------------------------------------------------------------


def test_a_second_writer_is_refused_with_a_sentence_and_the_first_goes_on(tmp_path):
    with runs.writing(tmp_path):
        with pytest.raises(UserError, match="is being written by another process; wait for it, or choose another"):
            with runs.writing(tmp_path):
                pass
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / "lock", timeout=0).acquire()
    with runs.writing(tmp_path):
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(_Crash), runs.writing(tmp_path):
        raise _Crash
    with runs.writing(tmp_path):
        pass


def test_a_finished_run_is_not_overwritten(copy):
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="already holds a run; continue it with --resume, or choose another --out"):
        localsim.run(out=copy, quiet=True, **TINY)
    with pytest.raises(UserError, match="already holds a run"):
        runs.start_run(copy, tiny_config())
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path):
    runs.append_metrics(tmp_path, {"step": 1, "loss": {"stage1": 0.1}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": {"sta')
    assert runs.read_metrics(tmp_path) == [{"step": 1, "loss": {"stage1": 0.1}}]
    runs.forget_metrics_after(tmp_path, 5)
    runs.append_metrics(tmp_path, {"step": 2, "loss": {}})
    assert [row["step"] for row in runs.read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": {}}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not JSON: '\{\"st'"):
        runs.read_metrics(tmp_path)


def test_lines_after_a_step_are_forgotten_and_the_others_kept_to_the_last_digit(tmp_path):
    rows = [{"step": step, "lr": step / 3, "loss": {"stage1": 0.1 + step}} for step in (10, 20, 30)]
    for row in rows:
        runs.append_metrics(tmp_path, row)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    runs.forget_metrics_after(tmp_path, 20)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:2]
    runs.forget_metrics_after(tmp_path, 0)
    assert runs.read_metrics(tmp_path) == []


def test_metrics_never_hold_a_number_that_json_has_not(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.append_metrics(tmp_path, {"step": 1, "lr": float("nan")})
