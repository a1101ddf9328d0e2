import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from localsim.cli import main, make_parser

FLAGS = {
    "run": "--rule --granularity --cuts --reach --objective --readout --noise --preset --backbone --data --data-root "
    "--epochs --batch-size --lr --seed --set --out --resume --device --parallel --debug",
    "probe": "--rule --protocol --epochs --report --images --seed --data --data-root --device --debug",
    "compare": "--measure --layers --spatial --images --controls --over-training --resamples --permutations --seed "
    "--rule --data --data-root --device --cache --out --debug",
    "brain": "--recordings --benchmark --regions --bins --metric --layers --spatial --image-size --controls "
    "--over-training --choose-stage --resamples --seed --rule --data --data-root --device --cache --out --debug",
    "cost": "--rule --granularity --cuts --reach --objective --readout --preset --backbone --image-size --batch-size "
    "--precision --set --processes --parallel --machine --plot --json --debug",
    "sweep": "--rule --granularity --reach --objective --preset --backbone --data --data-root --epochs --seed --seeds "
    "--set --out --plan --jobs --devices --slurm --slurm-set --debug",
    "report": "--title --measure --images --brain --without --out --rule --data --data-root --device --cache --debug",
    "rules": "--stages --debug",
}


def subparsers():
    (actions,) = [action for action in make_parser()._actions if action.dest == "help" or hasattr(action, "choices")][
        1:
    ]
    return actions.choices


def test_the_flags_are_frozen():
    """A flag is a promise to scripts: change this table only on purpose, and never beyond 21 flags a command."""
    for name, parser in subparsers().items():
        flags = [o for action in parser._actions for o in action.option_strings if o not in ("-h", "--help")]
        assert sorted(flags) == sorted(FLAGS[name].split())
        assert len(flags) <= 21
    assert set(subparsers()) == set(FLAGS)


def test_options_of_a_probe_that_are_not_given_are_not_passed_on():
    """Else the defaults of the command line would hide those of the function, and the name of the file would grow."""
    arguments = make_parser().parse_args(["probe", "runs/first"])
    names = ("protocol", "epochs", "report", "images", "seed", "data", "data_root", "device")
    assert {name: getattr(arguments, name) for name in names} == dict.fromkeys(names)


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys; from localsim.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "--granularity" in done.stdout


def test_python_m_localsim_is_the_command():
    done = subprocess.run([sys.executable, "-m", "localsim", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "How far must a learning signal travel?" in done.stdout


TINY = "--backbone resnet20 --set image_size=16 --set projector=[8,8] --set expand_width=8 --set train_images=32 " \
       "--set test_images=20 --set batch_size=8 --epochs 1 --set warmup_epochs=0 --set precision=full"  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--rule hebb", "unknown rule 'hebb'; allowed: untrained, end_to_end, blockwise, layerwise, lcl, loco"),
        ("--granularity 99", "granularity 99 is finer than the 17 unit blocks of resnet50"),
        ("--granularity 0", "granularity 0"),
        ("--granularity fine", "granularity 'fine'"),
        ("--cuts layer9", "layer9"),
        ("--reach 9", "reach 9 does not fit 4 stages; allowed: 1 to 4"),
        ("--rule end_to_end --reach 2", "--reach 2 has no meaning for rule end_to_end: its one loss always reaches"),
        ("--rule untrained --noise all:0.1", "--noise all:0.1 has no meaning for rule untrained: it has no loss"),
        ("--noise all:-1", "noise sigma is -1.0; allowed: numbers >= 0"),
        ("--noise loud:1", "unknown noise 'loud'; allowed: none, or KIND:SIGMA with KIND of all, hw, channel"),
        ("--readout local9x9", "readout local9x9 needs maps of 9x9 or more"),
        ("--objective mse", "unknown objective 'mse'; allowed: barlow_twins"),
        ("--preset huge", "unknown preset 'huge'; allowed: quick, cifar10, stl10, folder, imagenet"),
        ("--backbone resnet9000", "unknown backbone 'resnet9000'; allowed: "),
        ("--data no/such/folder", "unknown data set 'no/such/folder': it is neither one of"),
        ("--epochs 0", "epochs is 0; allowed: numbers above 0"),
        ("--batch-size 1", "batch_size is 1; allowed: numbers from 2"),
        ("--lr -1", "lr is -1.0; allowed: numbers above 0"),
        ("--set speed=9", "unknown setting 'speed'; allowed: "),
        ("--set speed", "--set 'speed' is not of the form NAME=VALUE"),
        ("--seed 1 --set seed=2", "seed is given twice: by --seed and by --set"),
        ("--set augmentation=wild", "unknown augmentation 'wild'; allowed: "),
        ("--device abacus", "device 'abacus' is not available"),
        ("--resume --out nowhere", "nowhere is not a run folder: it has no config.json"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--set noise=5", "noise is 5; allowed: text"),
        ("--set credit=3", "credit is 3; allowed: a mapping of names to values"),
        ("--set cuts=3", "cuts is 3; allowed: text"),
        ("--set objective=[2]", "objective is [2]; allowed: text"),
        ("--set projector=[true]", "projector is [True]; allowed: a list of whole numbers above 0"),
        ("--set projector=[]", "projector is []; allowed: a list of whole numbers above 0"),
        ("--set data=3", "data is 3; allowed: text"),
        ("--set data=[3]", "data is [3]; allowed: text"),
        ("--set data_root=7", "data_root is 7; allowed: the path of a folder"),
        ("--set augmentation=[1]", "augmentation is [1]; allowed: text"),
        ("--set objective_options=3", "objective_options is 3; allowed: a mapping of names to values"),
        ("--set precision=[1]", "precision is [1]; allowed: "),
        ("--set optimizer={}", "optimizer is {}; allowed: text"),
        ("--set epochs=[2]", "epochs is [2]; allowed: numbers above 0"),
        ("--set rule=[1]", "rule is [1]; allowed: text"),
        ("--set preset=[1]", "preset is [1]; allowed: text"),
        ("--set granularity=[4]", "granularity is [4]; allowed: a number, network, stage, block"),
        ("--set credit={}", "the credit entry lacks num_stages, taps, matrix"),
        (
            '--set credit={"num_stages":4,"taps":3,"matrix":[]}',
            "the credit entry needs num_stages (a number), taps and matrix (lists)",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["run", *arguments.split()])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not captured.out
    assert list(tmp_path.iterdir()) == [], "nothing is left behind by a run that never began"


def test_debug_shows_the_traceback():
    from localsim.errors import UserError

    with pytest.raises(UserError):
        main(["run", "--rule", "hebb", "--debug"])


def test_run_probe_and_resume_from_the_command_line(capsys, tmp_path, one_thread):
    out = tmp_path / "first"
    assert main(["run", *TINY.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("gradient path", "tap on   1", "a normal loss", "linear probe, raw features", "gain"):
        assert part in printed
    assert main(["run", *TINY.split(), "--out", str(out)]) == 2
    assert "already holds a run; continue it with --resume, or choose another --out" in capsys.readouterr().err
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert main(["run", "--out", str(out), "--resume", "--epochs", "2"]) == 2
    assert "was started with epochs=1, not 2" in capsys.readouterr().err

    kept = {file.name: file.read_bytes() for file in out.glob("probe*")}
    assert set(kept) == {"probe.json", "probe.csv"}
    assert main(["probe", str(out), "--protocol", "paper", "--epochs", "1", "--images", "30"]) == 0
    printed = capsys.readouterr().out
    name = "probe-protocol=paper-images=30-epochs=1"
    assert printed.startswith(f"{out / name}.json\n") and "knn probe, readout features" in printed
    new = {file.name for file in out.glob("probe*")} - set(kept)
    assert new == {f"{name}.json", f"{name}.csv"}
    assert {row["settings"]["protocol"] for row in json.loads((out / f"{name}.json").read_text())} == {"paper"}
    assert (out / "figures" / f"accuracy_by_stage-{name}.png").exists()
    assert {file: (out / file).read_bytes() for file in kept} == kept, "the run's own probe stays as it is"

    assert main(["probe", str(out), "--seed", "1", "--device", "cpu"]) == 0
    assert "probe-seed=1.json" in capsys.readouterr().out and (out / "probe-seed=1.json").exists()
    (out / "probe.json").unlink()
    assert main(["probe", str(out)]) == 0, "without options it is the run's own probe that is made anew"
    assert (out / "probe.json").read_bytes() == kept["probe.json"]

    before = sorted(file.name for file in out.iterdir())
    for wrong, told in [
        ("--protocol guess", "unknown probe protocol 'guess'; allowed: logistic, paper"),
        ("--epochs 3", "epochs and report have no meaning for protocol logistic; allowed with: paper"),
        ("--report best", "epochs and report have no meaning for protocol logistic; allowed with: paper"),
        ("--protocol logistic --epochs 3", "epochs and report have no meaning for protocol logistic"),
        ("--protocol paper --report first", "unknown report 'first'; allowed: last, best"),
        ("--device abacus", "device 'abacus' is not available"),
        ("--data no/such/folder", "unknown data set 'no/such/folder'"),
    ]:
        assert main(["probe", str(out), *wrong.split()]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1
    assert sorted(file.name for file in out.iterdir()) == before


def test_a_matrix_of_ones_own_can_be_set(capsys, tmp_path):
    from localsim.credit import Credit
    from localsim.runs import load_run

    credit = Credit([[1, 0, 0], [0.25, 0.5, 0], [0, 0, 2]], (0, 1, 2))
    out = tmp_path / "run"
    setting = f"credit={json.dumps(credit.to_config())}"
    free = ["--set", "max_steps=1", "--set", "probe_protocol=none"]
    assert main(["run", *TINY.split(), "--set", setting, *free, "--out", str(out)]) == 0
    assert str(credit) in capsys.readouterr().out
    assert load_run(out).network().credit == credit


def test_a_folder_of_images_is_kept_by_its_full_path_and_can_have_moved(capsys, tmp_path, monkeypatch, one_thread):
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 17), ("val", 8)):
        for kind in ("cats", "horses"):
            folder = tmp_path / "here" / "photos" / split / kind
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path / "here")
    settings = "--backbone resnet20 --set image_size=16 --set projector=[8,8] --set expand_width=8 --batch-size 16 " \
               "--epochs 1 --set max_steps=1 --set precision=full --set probe_protocol=none"  # fmt: skip
    assert main(["run", "--data", "photos", *settings.split(), "--out", "run"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["data"] == str(tmp_path / "here" / "photos") and config["preset"] == "folder"

    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    run = Path("../here/run")
    assert main(["probe", str(run)]) == 0
    kept = (run / "probe.json").read_bytes()

    shutil.move(tmp_path / "here" / "photos", "moved")
    capsys.readouterr()
    assert main(["probe", str(run)]) == 2
    assert "photos" in capsys.readouterr().err
    (run / "probe.json").unlink()
    assert main(["probe", str(run), "--data", "moved"]) == 0
    made = json.loads((run / "probe.json").read_text())
    accuracy = [[(r["network"], r["stage"], r["accuracy"]) for r in rows] for rows in (made, json.loads(kept))]
    assert accuracy[0] == accuracy[1], "the same images, wherever they lie"
    assert json.loads((run / "config.json").read_text()) == config, "a probe does not change what the run was"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: not enough memory: you tried to ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ..."),
    ],
    ids=["python", "cpu", "cuda"],
)
def test_out_of_memory_is_one_sentence(error, capsys, tmp_path, monkeypatch):
    from localsim import engine

    def hungry(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(engine, "backward", hungry)
    out = tmp_path / "run"
    assert main(["run", *TINY.split(), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "localsim: out of memory; a smaller --batch-size, projector or image_size needs less\n"
    assert not captured.out and not out.exists()
    with pytest.raises(type(error)):
        main(["run", *TINY.split(), "--out", str(out), "--debug"])


def test_a_bug_is_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    from localsim import engine

    def broken(*_args, **_kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(engine, "backward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(["run", *TINY.split(), "--out", str(tmp_path / "run")])


def test_rules_lists_papers_and_matrices(capsys):
    assert main(["rules"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("blockwise", "layerwise", "end_to_end", "untrained", "arXiv 2302.01647"))
    assert main(["rules", "end_to_end", "--stages", "3"]) == 0
    assert "  tap on   3   1   1   1" in capsys.readouterr().out
    assert main(["rules", "hebb"]) == 2


def test_a_clone_works_without_installation(tmp_path):
    """rules/ and analysis/ stand beside localsim/ there, and nothing but the clone is on the path."""
    root = Path(__file__).resolve().parents[2]
    for name in ("localsim", "rules", "analysis"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import localsim.rules, localsim.analysis; print(localsim.rules.__file__, localsim.analysis.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "rules/__init__.py"), str(tmp_path / "analysis/__init__.py")]
