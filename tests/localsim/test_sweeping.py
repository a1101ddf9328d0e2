"""A sweep trains what is missing and nothing else, survives interruption, and ends with a table of what is finished."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import filelock
import pytest
import torch
from tiny import TINY, assert_same_tensors, checkpoint_tensors, tiny_config, train_in

from localsim import rules, runs, sweep_work
from localsim.analysis import sweeps
from localsim.errors import Interrupted, UserError
from localsim.sweep_plan import Measured, all_together, factor, minutes, predict
from localsim.sweeping import sweep

STEPS = 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sweep of two cells in real processes, of which one was begun elsewhere and stopped after four steps."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sweep") / "first"
    train_in(out / "by hand", granularity=3, max_steps=4)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("builtins.print", lambda *words, **_how: said.append(" ".join(map(str, words))))
        result = sweep(granularity=[3, 2], seeds=1, out=out, jobs=2, **TINY)
    return result, "\n".join(said)


def test_every_cell_is_trained_and_probed(trained):
    result, _ = trained
    assert [one.cell.name for one in result.cells] == ["by hand", "granularity2-seed0"]
    assert {one.state for one in result.cells} == {"finished"} and not result.failed
    for run in result.runs:
        assert run.step == STEPS and run.probe() is not None
        assert (run.path / "log.txt").read_text().startswith("rule blockwise on resnet20")


def test_a_cell_that_was_stopped_ends_with_the_weights_of_one_that_was_not(trained, tmp_path):
    result, _ = trained
    train_in(tmp_path / "at once", granularity=3)
    assert_same_tensors(checkpoint_tensors(result.cells[0].cell.path), checkpoint_tensors(tmp_path / "at once"))


def test_it_ends_with_a_table_of_all_cells(trained):
    result, said = trained
    assert {row.granularity for row in result.table.rows} == {2, 3}
    assert str(result.table) in said
    assert (result.path / "table.csv").exists() and list((result.path / "figures").glob("*.png"))


def test_the_plan_and_the_progress_are_told(trained):
    _, said = trained
    head, first, second, _, counted, time_left = said.splitlines()[:6]
    assert head.split() == "cell state stages path held MiB steps s/step min left".split()
    assert re.match(r"by hand +at step 4 +3 +4 +\d+ +10 +\d+\.\d\d +\d", first)
    assert re.match(r"granularity2-seed0 +new +2 +5 +\d+ +10 ", second)
    assert counted == "2 cells: 1 begun, 1 new"
    assert re.fullmatch(r"about \d+\.\d min of training, 2 at a time; probes come on top", time_left)
    assert "[1/2] by hand continued\n[2/2] granularity2-seed0 started\n" in said
    assert re.search(
        r"\[2/2\] granularity2-seed0 finished \(linear probe of the last stage: untrained 0\.\d+ \[.*blockwise 0\.\d+ "
        r"\[0\.\d+, 0\.\d+\]\) in \d+\.\d min",
        said,
    )


def test_what_is_finished_is_not_trained_again(trained, capsys, monkeypatch):
    result, _ = trained
    before = {path: path.stat().st_mtime_ns for path in result.path.rglob("*") if path.parts[-2].startswith("0000")}
    monkeypatch.setattr("localsim.sweeping.measure", None)  # nor measured
    monkeypatch.setattr(sweep_work, "run_all", lambda commands, *_rest, **_how: commands and pytest.fail("trains"))
    monkeypatch.setattr(sweeps, "sweep_table", StandIn)
    assert sweep(out=result.path).table.names == ["by hand", "granularity2-seed0"]
    assert "2 cells: 2 finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) > 5
    # what a cell took in all, over its steps alone: now known
    monkeypatch.setattr("localsim.sweeping.measure", lambda config: Measured(2, 5, STEPS, True, 2**20, 60.0))
    planned = sweep(granularity=[3, 2, 4], out=result.path, plan=True, jobs=2, **TINY)
    assert [one.state for one in planned.cells] == ["finished", "finished", "new"]
    assert re.search(r"with probes, 2 at a time: [\d.]+ times the training alone, as in the 2 cells that have ended",
                     capsys.readouterr().out)  # fmt: skip


# -- without processes ------------------------------------------------------------------------------------------------


class StandIn:
    """In the place of the table."""

    def __init__(self, found) -> None:
        self.names = [run.path.name for run in found]

    def __str__(self) -> str:
        return f"table of {self.names}"

    def save(self, folder: Path) -> Path:
        return folder


def finish(path: Path, step: int = STEPS) -> None:
    (path / "checkpoints" / f"{step:08d}").mkdir(parents=True, exist_ok=True)
    if step == STEPS:
        (path / "probe.json").write_text("[]")


class Unreal:
    """In the place of measuring and training: a minute for every step, and no time; what was asked of it is noted."""

    def __init__(self) -> None:
        self.commands: dict[str, list[str]] = {}
        self.codes: dict[str, int] = {}  # of cells that are to fail
        self.stop_after: int | None = None
        self.measured: list[int | str | None] = []

    def measure(self, config):
        self.measured.append(config.granularity)
        if config.reach == 4:
            raise UserError("reach 4 does not fit")
        return Measured(2, 5, STEPS, config.probe_protocol != "none", 2**20, 60.0)

    def run_all(self, commands, devices, *, began, ended):
        self.commands = {}
        for number, (path, make) in enumerate(commands.items()):
            if number == self.stop_after:
                raise Interrupted
            self.commands[path.name] = command = make(devices[number % len(devices)])
            began(path)
            if code := self.codes.get(path.name, 0):
                (path / "log.txt").write_text("step 3\nlocalsim: tap 1 has collapsed\n")
            else:
                limits = [int(word.partition("=")[2]) for word in command if word.startswith("max_steps")]
                finish(path, *limits)
            ended(path, code, 1200.0)


@pytest.fixture
def unreal(monkeypatch):
    made_up = Unreal()
    monkeypatch.setattr(sweeps, "sweep_table", StandIn)
    monkeypatch.setattr("localsim.sweeping.measure", made_up.measure)
    monkeypatch.setattr(sweep_work, "run_all", made_up.run_all)
    return made_up


def test_a_sweep_is_extended_by_asking_for_more(unreal, tmp_path):
    out = tmp_path / "s"
    sweep(granularity=[1, 2], out=out, quiet=True)
    assert set(unreal.commands) == {"granularity1-seed0", "granularity2-seed0"}
    assert unreal.measured == [1, 2]
    result = sweep(granularity=[1, 2, 3], seeds=2, out=out, quiet=True)
    assert list(unreal.commands) == [
        "granularity3-seed0", "granularity1-seed1", "granularity2-seed1", "granularity3-seed1",
    ]  # fmt: skip
    assert unreal.measured == [1, 2, 3], "once for all seeds, and never again"
    result = sweep(granularity=2, objective="vicreg", seed=3, out=out, quiet=True)
    assert list(unreal.commands) == ["seed3"]
    assert len(result.cells) == len(result.table.names) == 7, "all that was ever asked for"
    asked = json.loads((out / "sweep.json").read_text())["asked"]
    assert [len(values["granularity"]) for values in asked] == [3, 1], "what is asked for again is kept once"


def test_it_goes_on_where_it_was_stopped(unreal, tmp_path):
    out = tmp_path / "s"
    unreal.stop_after = 1
    with pytest.raises(
        Interrupted, match=re.escape(f"1 of 3 cells are finished; continue with: localsim sweep --out {out}")
    ):
        sweep(granularity=[1, 2, 3], out=out, workers=2, quiet=True)
    unreal.stop_after = None
    result = sweep(out=out, quiet=True)
    assert list(unreal.commands) == ["granularity2-seed0", "granularity3-seed0"]
    assert {one.cell.config.workers for one in result.cells} == {2}
    assert all("workers=2" in command for command in unreal.commands.values())


def test_a_failure_is_kept_and_named(unreal, tmp_path, capsys):
    unreal.codes = {"granularity2-seed0": 1}
    result = sweep(granularity=[1, 2, 3], out=tmp_path / "s")
    said = capsys.readouterr().out
    assert result.failed == {"granularity2-seed0": "localsim: tap 1 has collapsed"}
    assert result.table.names == ["granularity1-seed0", "granularity3-seed0"]
    assert "[2/3] granularity2-seed0 failed after 20.0 min: localsim: tap 1 has collapsed" in said
    assert "granularity2-seed0 failed after step 0: localsim: tap 1 has collapsed; see" in said
    unreal.codes = {}
    assert not sweep(out=tmp_path / "s", quiet=True).failed
    assert list(unreal.commands) == ["granularity2-seed0"]


def test_a_cell_that_memory_has_no_room_for_is_left_out(unreal, tmp_path, capsys, monkeypatch):
    def measure(config):
        if config.granularity == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        if config.granularity == 5:
            raise RuntimeError("a mistake of ours")
        return unreal.measure(config)

    monkeypatch.setattr("localsim.sweeping.measure", measure)
    result = sweep(granularity=[1, 2], out=tmp_path / "s")
    assert [one.cell.name for one in result.cells] == ["granularity2-seed0"]
    assert "granularity1 is left out: a step does not fit into memory here" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="mistake"):
        sweep(granularity=[5, 2], out=tmp_path / "t", quiet=True)


def test_a_rule_file_that_has_changed_is_refused(unreal, tmp_path, monkeypatch):
    """Its configuration is the same, what was trained is not."""
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    monkeypatch.setattr(rules, "_sources", dict(rules._sources))
    file = tmp_path / "swept_once.py"
    text = (
        "from localsim.credit import Credit\nfrom localsim.rules.rule import Rule\n"
        "RULE = Rule(name='swept_once', summary='.', paper='.', credit=Credit.banded)\n"
    )
    file.write_text(text)
    sweep(rule=file, granularity=2, out=tmp_path / "s", quiet=True)
    sweep(out=tmp_path / "s", quiet=True)
    file.write_text(text + "# another idea\n")
    with pytest.raises(UserError, match=r"swept_once\.py has changed since this sweep began"):
        sweep(out=tmp_path / "s", quiet=True)


def test_the_time_left_learns_from_what_cells_took(unreal, tmp_path, capsys):
    """A cell took 20 minutes for the 10 minutes of its steps: so will the others."""
    sweep(granularity=[1, 2, 3], out=tmp_path / "s")
    said = capsys.readouterr().out
    assert "about 30.0 min of training, one at a time; probes come on top" in said
    assert re.findall(r"about ([\d.]+) min left", said) == ["40.0", "20.0"]
    sweep(granularity=[1, 2, 3, 5], out=tmp_path / "s", plan=True)
    assert "about 20.0 min with probes, one at a time: 2.00 times the training" in capsys.readouterr().out


def test_cells_that_do_not_compare_have_no_table(unreal, tmp_path, capsys, monkeypatch):
    def refuse(_runs):
        raise UserError("runs are of backbones resnet20, resnet32")

    monkeypatch.setattr(sweeps, "sweep_table", refuse)
    result = sweep(backbone=["resnet20", "resnet32"], out=tmp_path / "s")
    assert "there is no table of all cells: runs are of backbones resnet20, resnet32" in capsys.readouterr().out
    assert result.table is None and len(result.runs) == 2


def test_a_limit_of_steps_holds_for_one_call(unreal, tmp_path, capsys):
    result = sweep(granularity=[1, 2], out=tmp_path / "s", max_steps=4)
    said = capsys.readouterr().out
    assert [one.in_words for one in result.cells] == ["at step 4", "at step 4"] and result.table is None
    assert "[1/2] granularity1-seed0 stopped at step 4 of 10 in 20.0 min; about" in said
    assert "no cell is finished and probed: there is no table" in said
    assert "granularity2-seed0 is not finished: at step 4" in said
    assert runs.load_run(tmp_path / "s" / "granularity1-seed0").config.max_steps is None
    assert {one.state for one in sweep(out=tmp_path / "s", quiet=True).cells} == {"finished"}
    assert not any(word.startswith("max_steps") for word in unreal.commands["granularity1-seed0"])


def test_a_cell_without_its_probe_is_not_finished(unreal, tmp_path):
    (result,) = sweep(out=tmp_path / "s", granularity=2, quiet=True).cells
    (result.cell.path / "probe.json").unlink()
    assert [one.state for one in sweep(out=tmp_path / "s", plan=True, quiet=True).cells] == ["begun"]
    # and where none is wanted, none is missed
    sweep(out=tmp_path / "t", granularity=2, probe_protocol="none", quiet=True)
    (tmp_path / "t" / "seed0" / "probe.json").unlink()
    (one,) = sweep(out=tmp_path / "t", quiet=True).cells
    assert one.state == "finished" and unreal.commands == {}


def test_a_plan_makes_nothing(unreal, tmp_path, capsys):
    result = sweep(granularity=[1, 2], out=tmp_path / "s", plan=True)
    assert [one.state for one in result.cells] == ["new", "new"] and result.table is None
    assert list(tmp_path.iterdir()) == []


def test_cells_that_make_no_sense_are_left_out(unreal, tmp_path, capsys):
    result = sweep(granularity=[1, 2], reach=[1, 4], seeds=2, out=tmp_path / "s")
    assert [one.cell.config.reach for one in result.cells] == [1] * 4
    said = capsys.readouterr().out
    assert "granularity1-reach4, granularity2-reach4 are left out: reach 4 does not fit" in said
    with pytest.raises(UserError, match="is left out: reach 4 does not fit"):
        sweep(reach=4, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_devices_take_cells_in_turn(unreal, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("localsim.sweeping.open_device", opened.append)
    sweep(granularity=[1, 2], out=tmp_path / "s", devices=["cuda:0", "cuda:1"], quiet=True)
    assert opened == ["cuda:0", "cuda:1"]
    assert [command[-1] for command in unreal.commands.values()] == ['device="cuda:0"', 'device="cuda:1"']


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "holds no sweep yet; say what varies, e.g. --granularity 1,2,4 --seeds 3"),
        ({"seeds": 2, "seed": 1}, "seeds and seed contradict each other"),
        ({"seeds": 0}, "seeds is 0; allowed: whole numbers above 0"),
        ({"jobs": 0}, "jobs is 0; allowed: whole numbers above 0"),
        ({"jobs": 2, "devices": ["cpu"]}, "devices decides how many cells are trained at once"),
        ({"device": "cpu", "devices": ["cpu"]}, "leave out jobs and device"),
        ({"devices": ["abacus"]}, "device 'abacus' is not available"),
        ({"jobs": 2, "slurm": True}, "jobs and devices have no meaning with slurm"),
        ({"slurm_set": {"timeout_min": 1}}, "slurm_set has no meaning without slurm"),
        ({"speed": [1]}, "unknown setting 'speed'"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(given, sentence, unreal, tmp_path):
    with pytest.raises(UserError, match=re.escape(sentence)):
        sweep(out=tmp_path / "s", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_and_a_damaged_file_are_refused(unreal, tmp_path):
    sweep(out=tmp_path / "s", granularity=2, quiet=True)
    with pytest.raises(UserError, match="seed0 is a run folder; a sweep needs a folder of its own"):
        sweep(out=tmp_path / "s" / "seed0", granularity=2)
    (tmp_path / "s" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json cannot be read: JSONDecodeError"):
        sweep(out=tmp_path / "s", granularity=2)


def test_two_sweeps_do_not_work_in_one_folder_at_once(unreal, tmp_path):
    sweep(out=tmp_path / "s", granularity=2, quiet=True)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_locked_elsewhere, (tmp_path / "s" / "sweep.lock", tmp_path / "s")).endswith("with --plan")
    sweep(out=tmp_path / "s", quiet=True)


def _locked_elsewhere(lock: Path, out: Path) -> str:
    with filelock.FileLock(lock):
        sweep(out=out, plan=True, quiet=True)
        try:
            sweep(out=out, quiet=True)
        except UserError as error:
            return str(error)
    return ""


def test_a_cell_that_another_process_trains_is_left_to_it(unreal, tmp_path):
    out = tmp_path / "s"
    unreal.stop_after = 0
    with pytest.raises(Interrupted):
        sweep(granularity=[1, 2], out=out, quiet=True)
    unreal.stop_after = None
    with filelock.FileLock(made(out / "granularity2-seed0") / "lock"):
        result = sweep(out=out, quiet=True)
    assert [one.in_words for one in result.cells] == ["finished", "at step 0, in another process"]
    assert list(unreal.commands) == ["granularity1-seed0"]


def made(path: Path) -> Path:
    path.mkdir()
    return path


def test_jobs_of_a_cluster_are_submitted_once_and_collected(unreal, tmp_path, capsys, monkeypatch):
    """Nothing is computed where they are submitted."""
    out, queued = tmp_path / "s", {}
    monkeypatch.setattr("localsim.sweeping.measure", None)
    monkeypatch.setattr("localsim.sweeping.predict", lambda config: Measured(2, 5, STEPS, True))
    monkeypatch.setattr(
        "localsim.sweeping.still_queued", lambda jobs, folder: {n: queued[n] for n in jobs if n in queued}
    )

    def submit_all(commands, folder, cluster, options):
        assert (folder, cluster, options) == (out / "slurm", "local", {"timeout_min": 9})
        for number, (path, make) in enumerate(commands.items(), start=71):
            assert make()[-4:] == ["run", "--resume", "--out", str(path)]
            queued[path.name] = str(number)
            yield path, str(number)

    monkeypatch.setattr(sweep_work, "submit_all", submit_all)
    on_cluster = {"slurm": "local", "slurm_set": {"timeout_min": 9}}
    result = sweep(granularity=[2, 3], out=out, **on_cluster)
    assert "granularity2-seed0 is job 71\ngranularity3-seed0 is job 72\n" in capsys.readouterr().out
    assert [one.in_words for one in result.cells] == ["job 71", "job 72"]
    sweep(out=out, **on_cluster)
    said = capsys.readouterr().out
    assert "2 cells: 2 queued" in said and "is job" not in said
    # one is finished, one has failed and is sent again
    finish(out / "granularity2-seed0")
    (out / "granularity3-seed0" / "log.txt").write_text("localsim: no GPU\n")
    queued.clear()
    assert sweep(out=out, **on_cluster).table.names == ["granularity2-seed0"]
    said = capsys.readouterr().out
    assert "granularity3-seed0: job 72 has ended: localsim: no GPU\ngranularity3-seed0 is job 71\n" in said


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_a_prediction_says_what_a_measurement_does(trained):
    result, _ = trained
    for one in result.cells:
        told = predict(one.cell.config)
        assert (told.stages, told.path, told.steps, told.probed) == (
            one.measured.stages, one.measured.path, one.measured.steps, True,
        )  # fmt: skip
        assert told.held_bytes == pytest.approx(one.measured.held_bytes, rel=0.01) and told.seconds is None


def test_nothing_is_trained_where_no_loss_is():
    told = predict(tiny_config("untrained"))
    assert (told.stages, told.path, told.steps, told.held_bytes) == (3, 0, 0, None)


def test_jobs_at_once_end_when_the_last_one_does():
    assert all_together([], 3) == 0
    assert all_together([3, 1, 1, 1], 1) == 6
    assert all_together([3, 1, 1, 1], 2) == 3
    assert all_together([1, 1, 3], 2) == 4
    assert factor([(9, 0)]) is None and factor([(4, 2), (9, 3), (50, 5)]) == 3
    assert minutes(90) == "1.5 min" and minutes(7200) == "2.0 h"
