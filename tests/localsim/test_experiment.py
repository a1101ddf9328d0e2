from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TINY, assert_same_tensors, tiny_config, tiny_settings

import localsim
from localsim import experiment
from localsim.analysis import probe
from localsim.credit import Credit
from localsim.data.images import decode
from localsim.errors import UserError
from localsim.rules import own_rules

BLOCKS = ("layerwise", "lcl", "clapp", "clapp_dfb", "lpl", "predsim", "auglocal")
STAGES = {rule.name: 10 if rule.name in BLOCKS else 3 for rule in own_rules()}  # of a ResNet-20
# unit blocks that the longest gradient crosses, where it is not one stage's
LONGEST = {"untrained": 0, "end_to_end": 10, "loco": 7, "stopgrad_overlap": 7, "chunked": 7, "interlocking": 7,
           "deep_supervision": 10}  # fmt: skip


@pytest.fixture(scope="module", params=STAGES)
def finished(request, tmp_path_factory) -> localsim.Run:
    return localsim.run(
        request.param, out=tmp_path_factory.mktemp("runs") / "run", quiet=True, **tiny_settings(request.param)
    )


def pngs(folder: Path, number: int, size: int = 16, vary: bool = False) -> None:
    """Write pictures of noise; `vary` gives them different sizes, so that they are streamed."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(folder.name))
    for i in range(number):
        side = size + (i % 3 if vary else 0)
        pixels = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_probe_of_every_stage(finished):
    run = localsim.load_run(finished.path)
    rule, num_stages = run.config.rule, STAGES[run.config.rule]
    table = run.probe()
    assert table is not None
    assert table.networks == ["untrained", "calibrated", *([rule] if rule != "untrained" else [])]
    for network in table.networks:
        for kind in ("linear", "knn"):
            rows = table.select(network=network, features="raw", probe=kind)
            assert [row.stage for row in rows] == list(range(1, num_stages + 1))
            assert all(0 <= row.low <= row.accuracy <= row.high <= 1 and row.n_test == 40 for row in rows)
    read = {row.stage for row in table.select(features="readout")}
    assert read == {tap.stage + 1 for tap in run.network().taps if tap.readout.kind == "vector"}
    assert table.to_csv() == (run.path / "probe.csv").read_text()


def test_a_run_keeps_its_metrics_and_its_network(finished):
    run = localsim.load_run(finished.path)
    net, start = run.network(), run.network("untrained")
    assert run.config == finished.config and len(net.stages) == STAGES[run.config.rule]
    if run.config.rule == "untrained":
        assert run.metrics() == [] and run.step == 0
        assert_same_tensors(net.state_dict(), start.state_dict())
        return
    assert [row["step"] for row in run.metrics()] == list(range(1, 11)) and run.step == 10
    names = {f"stage{tap.stage + 1}" for tap in net.taps}
    assert set().union(*(row["loss"] for row in run.metrics())) == names
    if run.config.schedule == "simultaneous":
        assert all(set(row["loss"]) == names for row in run.metrics())
    # every parameter of every stage has moved: no stage was left out
    pairs = zip(net.stages.named_parameters(), start.stages.parameters(), strict=True)
    assert [name for (name, trained), before in pairs if torch.equal(trained, before)] == []


def test_figures_are_pictures(finished):
    figures = {file.name for file in (finished.path / "figures").iterdir()}
    assert figures == {"views.png", "credit.png", "accuracy_by_stage.png"} | ({"loss.png"} if finished.step else set())
    for name in figures:
        file = finished.path / "figures" / name
        assert file.read_bytes().startswith(b"\x89PNG")
        pixels = decode(file)
        assert min(pixels.shape[1:]) > 100 and pixels.float().std() > 5


def test_the_plan_says_what_the_run_does(finished):
    plan = (finished.path / "plan.txt").read_text()
    rule, num_stages = finished.config.rule, STAGES[finished.config.rule]
    assert plan.splitlines()[0] == f"rule {rule} on resnet20 at 16 px, preset quick, seed 0"
    cuts = re.findall(r"^ +(\d+)  (stem|layer\d\.\d) ", plan, flags=re.MULTILINE)
    assert [int(stage) for stage, _ in cuts] == list(range(1, num_stages + 1)) and cuts[0][1] == "stem"
    assert "gradient path" in plan and str(finished.network().credit) in plan
    longest = LONGEST.get(rule, 1 if num_stages == 10 else 4)
    assert f"longest gradient path: {longest} of 10 unit blocks" in plan
    assert "data: embedded, 40 training images, 40 test images, 10 classes" in plan
    if rule == "untrained":
        assert "nothing is trained" in plan
        return
    assert re.search(
        r"training: 2 epochs, 10 steps of 8 images x [12] views, adamw, peak learning rate [\d.e-]+,", plan
    )
    assert re.search(r"measured cost: \d+\.\d\d s per step( of the last phase)?, \d+ MiB of activations", plan)
    assert "then: linear (protocol logistic) and k-NN probes of every stage" in plan
    assert "parameters: trunk 269,072, readouts and heads " in plan
    if "barlow_twins" in plan:
        # 0.024 * (d (1 + 1 / (n - 1)) + 0.0051 d (d - 1) / (n - 1)) with d = n = 8
        level = 0.024 * (8 * 8 / 7 + 0.0051 * 8)
        assert f"a normal loss: {level:.3g} or more is what a tap that has learned nothing gives" in plan


def test_a_plan_names_the_cifar_stem(tmp_path):
    config = tiny_config(backbone="resnet18", stem="cifar", train_images=16, probe_protocol="none")
    lines = experiment.prepare(config).plan.splitlines()
    assert lines[0] == "rule blockwise on resnet18 at 16 px with the CIFAR stem, preset quick, seed 0"
    assert not any(line.startswith("then:") for line in lines)


def test_what_is_printed_is_the_plan_the_table_and_where_it_lies(tmp_path, capsys):
    run = localsim.run(out=tmp_path / "run", max_steps=2, **TINY)
    captured = capsys.readouterr()
    assert (run.path / "plan.txt").read_text() in captured.out
    assert str(run.probe()) in captured.out and f"run folder: {run.path}" in captured.out
    assert "trained 2 steps" in captured.out and "skipped" not in captured.out
    assert re.search(r"^step 2/2  loss stage1 \d+\.\d{3} stage2 .* lr 0\.\d+ ", captured.err, flags=re.MULTILINE)


def test_quiet_prints_nothing(tmp_path, capsys):
    localsim.run("untrained", out=tmp_path / "run", quiet=True, **tiny_settings("untrained"))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_hook_sees_every_row_of_metrics_and_a_run_that_it_ends_can_be_resumed(tmp_path):
    rows = []

    def watch(row):
        rows.append(dict(row))
        assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]) == row  # written before
        if len(rows) == 7:
            raise ConnectionError("the tracker is gone")

    settings = {**TINY, "probe_protocol": "none", "quiet": True, "out": tmp_path / "run"}
    with pytest.raises(ConnectionError):
        localsim.run("blockwise", on_metrics=watch, **settings)
    run = localsim.run(on_metrics=watch, resume=True, out=tmp_path / "run", quiet=True)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10]  # again from the epoch's checkpoint
    assert rows[:5] + rows[7:] == run.metrics()


def test_a_probe_can_be_left_out_and_made_later(tmp_path, capsys):
    run = localsim.run("untrained", out=tmp_path / "run", probe_protocol="none", **tiny_settings("untrained"))
    printed = capsys.readouterr().out
    assert run.probe() is None and "not probed" in printed and "then: linear" not in printed
    table = probe(run, protocol="paper", images=20, epochs=2, seed=3)
    assert run.probe() == table
    for row in table.select(probe="linear"):
        assert {name: row.settings[name] for name in ("protocol", "epochs", "report", "seed")} == {
            "protocol": "paper", "epochs": 2, "report": "last", "seed": 3,
        }  # fmt: skip


@pytest.mark.parametrize("finished", ["end_to_end"], indirect=True)
def test_probing_a_loaded_run_gives_the_table_that_was_kept(finished):
    kept = finished.probe()
    assert localsim.analysis.probe is probe
    assert probe(localsim.load_run(finished.path)) == kept


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_matrix_of_ones_own_survives_in_the_configuration(tmp_path):
    credit = Credit([[1, 0, 0], [0.25, 0.5, 0], [0, 0, 2]], (0, 1, 2))
    path = tmp_path / "run"
    localsim.run(out=path, credit=credit, quiet=True, max_steps=1, probe_protocol="none", **TINY)
    run = localsim.load_run(path)
    assert run.network().credit == credit and str(credit) in (path / "plan.txt").read_text()
    localsim.run(out=path, credit=credit, resume=True, quiet=True, max_steps=2)
    assert run.step == 2
    with pytest.raises(UserError, match="was started with credit="):
        localsim.run(out=path, credit=Credit.blockwise(3), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rule": "backprop"}, "unknown rule 'backprop'"),
        ({"data": "no/such/folder"}, "unknown data set 'no/such/folder'"),
        ({"credit": Credit.blockwise(4)}, "credit matrix has 4 stages but the network has 3"),
        ({"granularity": 17}, "17"),
        ({"batch_size": 64}, "batch_size is 64, but there are only 40 images"),
        ({"warmup_epochs": 2}, r"warmup_epochs is 2, which must be below epochs \(2\)"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"augmentation": "none at all"}, "unknown augmentation"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"optimizer": "adamw", "momentum": 1.0}, "momentum 1.0 of adamw must be below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_said_before_a_folder_is_made(tmp_path, settings, told):
    """Else a mistyped setting would leave a folder that refuses the corrected one."""
    path = tmp_path / "run"
    with pytest.raises(UserError, match=told):
        localsim.run(**{"out": path, "quiet": True, **TINY, **settings})
    assert not path.exists()


DIFFERENT = [
    {"rule": "layerwise"},
    {"granularity": 2},
    {"granularity": "block"},
    {"cuts": "layer2.0"},
    {"cuts": "layer3.0"},
    {"cuts": "balanced", "granularity": 2},
    {"reach": 2},
    {"seed": 1},
    {"preset": "cifar10"},
    {"data": "embedded", "epochs": 3},
    {"backbone": "resnet20"},
    {"noise": "none"},
    {"lr": 0.1},
    {"readout": "global"},
    {"credit": Credit.blockwise(4).to_config()},
    {"objective_options": {"lambda_": 0.1}},
]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "plan.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a run; choose another --out"):
        localsim.run("blockwise", out=tmp_path, quiet=True, **TINY)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.txt"]


def test_runs_of_different_settings_have_different_folders_and_of_equal_ones_the_same():
    def folder(settings: dict) -> Path:
        given = {"rule": "blockwise", "preset": None, **settings}
        return experiment._default_folder(localsim.presets.resolve(given.pop("rule"), given.pop("preset"), given))

    folders = [folder(settings) for settings in [{}, *DIFFERENT]]
    assert len(set(folders)) == len(folders)
    assert all(path.parent == Path("runs") and re.fullmatch(r"[\w.+=-]+", path.name) for path in folders)
    assert folder({"max_steps": 3, "workers": 2}) == folder({}) == folder({"lr": 0.003})


def test_without_out_a_run_goes_below_runs_and_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {**tiny_settings("untrained"), "probe_protocol": "none"}
    first = localsim.run("untrained", quiet=True, **settings)
    assert first.path.parent == Path("runs") and first.path.is_dir()
    with pytest.raises(UserError, match="already holds a run"):
        localsim.run("untrained", quiet=True, **settings)
    assert localsim.run("untrained", quiet=True, resume=True, **settings).path == first.path


# -- folders of images ------------------------------------------------------------------------------------------------


def folder_settings(data: Path) -> dict:
    return {name: value for name, value in TINY.items() if not name.endswith("_images")} | {
        "data": str(data), "augmentation": "small", "epochs": 1, "warmup_epochs": 0.0,
    }  # fmt: skip


def test_a_flat_folder_of_images_is_trained_on_and_not_probed(tmp_path, capsys):
    pngs(tmp_path / "photos", 17)
    run = localsim.run(out=tmp_path / "run", **folder_settings(tmp_path / "photos"))
    printed = capsys.readouterr().out
    assert run.step == 2 and run.probe() is None
    assert "then: linear" not in printed
    assert "17 training images, no labels, no probe" in printed and "nothing to probe" in printed
    assert all("online_probe" not in row for row in run.metrics())
    assert not (run.path / "figures" / "accuracy_by_stage.png").exists()


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_corrupt_image_is_left_out_named_and_counted(tmp_path, capsys, streamed):
    data = tmp_path / "photos"
    for name in ("cats", "horses"):
        pngs(data / "train" / name, 17, vary=streamed)
        pngs(data / "val" / name, 8, vary=streamed)
    (data / "train" / "cats" / "003.png").write_bytes(b"not a picture")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # a batch of 17: every image is drawn in the two batches of the epoch
        run = localsim.run(out=tmp_path / "run", **folder_settings(data) | {"batch_size": 16 if not streamed else 17})
    skipped = [str(warning.message) for warning in caught if "skipped an unreadable image" in str(warning.message)]
    assert skipped and all(re.search(r"cats/003\.png", message) for message in skipped)
    assert len(caught) == len(skipped)
    assert "skipped 1 unreadable images" in capsys.readouterr().out
    table = run.probe()
    assert run.step == 2 and table is not None and table.rows[0].n_test == 16
    assert table.rows[0].settings["n_train"] == 33


def test_config_json_alone_rebuilds_the_network(finished, tmp_path):
    shutil.copy(finished.path / "config.json", tmp_path)
    rebuilt = localsim.load_run(tmp_path).network("untrained")
    assert_same_tensors(rebuilt.state_dict(), finished.network("untrained").state_dict())
    assert json.loads((tmp_path / "config.json").read_text()) == tiny_config(finished.config.rule).to_json()


def test_the_folder_that_the_readme_names():
    for rule, name in (
        ("blockwise", "blockwise-g4-quick-s0"),
        ("loco", "loco-g4-quick-s0"),
        ("clapp", "clapp-g4-quick-s0"),
    ):
        assert (
            experiment._default_folder(localsim.presets.resolve(rule, None, {"granularity": 4})) == Path("runs") / name
        )


@pytest.mark.parametrize("rule", ["greedy_supervised", "loco", "clapp", "lpl", "predsim"])
def test_every_kind_of_loss_can_be_planned_one_after_the_other(rule):
    plan = experiment.prepare(tiny_config(rule, schedule="sequential", epochs=4)).plan
    assert re.search(r"sequential: \d+ taps, one after the other from the lowest up, about \d+ steps each", plan)


def test_views_of_one_size_for_all_are_no_local_views():
    with pytest.raises(UserError, match="view_strength receptive_field changes nothing: every tap's stage sees all of"):
        experiment.prepare(tiny_config("lcl", backbone="resnet18", granularity=4))


def test_two_classes_on_a_line_are_no_collapse(tmp_path):
    """Two logits that tell two classes apart have rank 1: the better the classifier, the more so."""
    for name, level in (("dark", 0), ("light", 255)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (level, i, i)).save(folder / f"{i:02d}.png")
    settings = folder_settings(tmp_path / "photos") | {"epochs": 8, "probe_protocol": "none", "lr": 0.01}
    run = localsim.run("predsim", out=tmp_path / "run", quiet=True, **settings)
    assert min(run.metrics()[-1]["embedding_rank"].values()) < 1.1, "there is something to mistake"


@pytest.mark.parametrize(
    ("settings", "remedy"), [({"image_size": 16}, "larger images"), ({"patches": "16:4"}, "larger patches")]
)
def test_bf16_convolutions_that_torch_gets_wrong_are_refused(settings, remedy):
    """A strided 3x3 convolution on a map of one position: part of its weights' gradient is never written."""
    config = tiny_config(**{"backbone": "resnet18", "precision": "bf16", "image_size": 32, **settings})
    with pytest.raises(UserError, match=f"layer4.0 of resnet18 gets maps of one position.*precision=full, {remedy} or"):
        experiment.prepare(config)
    experiment.prepare(tiny_config(backbone="resnet18", precision="bf16", image_size=32))
    experiment.prepare(dataclasses.replace(config, precision="full"))


def test_a_run_that_max_steps_stops_says_so(tmp_path, capsys):
    settings = {**TINY, "probe_protocol": "none"}
    localsim.run(out=tmp_path / "run", max_steps=3, **settings)
    printed = capsys.readouterr().out
    assert "3 of 10 steps of 8 images" in printed
    assert "stopped by max_steps after 3 of 10 steps; continue with --resume" in printed
    localsim.run(out=tmp_path / "run", resume=True)
    printed = capsys.readouterr().out
    assert "continued after step 3 of 10" in printed and "stopped" not in printed


def test_the_probe_of_a_run_that_goes_on_is_not_taken_for_that_of_its_end(tmp_path):
    run = localsim.run("blockwise", out=tmp_path / "run", quiet=True, **{**TINY, "max_steps": 5})
    early = run.probe()
    localsim.run(out=run.path, resume=True, quiet=True, max_steps=7, probe_protocol=None)
    assert json.loads((run.path / "probe-step5.json").read_text()) == early.to_json()
    assert (run.path / "probe-step5.csv").exists()
    assert run.probe() is not None and run.probe() != early


def test_a_plan_names_taps_that_change_no_stage_and_losses_by_tap(tmp_path):
    assert "taps stage1 change no stage" in experiment.prepare(tiny_config("interlocking")).plan
    plan = experiment.prepare(tiny_config(objective="cross_entropy,simclr,simclr")).plan
    assert "2.3 (stage1), 2.71 (stage2), 2.71 (stage3) or more is what a tap that has learned nothing gives" in plan
    assert "and the untrained one" not in plan and "of this network and of the untrained one" in (
        experiment.prepare(tiny_config("lpl", backbone="vgg11", image_size=32)).plan
    )


@pytest.mark.parametrize(
    ("rule", "options"), [("clapp", {"skip": 0}), ("clapp_dfb", {"sampling": "either"}), ("infopro", {"task": 2.0})]
)
def test_a_run_is_resumed_by_the_words_that_started_it(tmp_path, rule, options):
    """Although its configuration keeps the rule's own options beside those that were given."""
    settings = {**tiny_settings(rule), "probe_protocol": "none", "objective_options": options}
    localsim.run(rule, out=tmp_path / "run", quiet=True, max_steps=1, **settings)
    assert localsim.run(rule, out=tmp_path / "run", quiet=True, resume=True, max_steps=2, **settings).step == 2
    with pytest.raises(UserError, match="was started with objective_options="):
        localsim.run(
            rule, out=tmp_path / "run", quiet=True, resume=True, objective_options={"pair": "below", "task": 3.0}
        )
