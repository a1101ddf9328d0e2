import subprocess
import sys

import pytest

from localsim.cli import main, make_parser

FLAGS = {
    "run": "--rule --granularity --cuts --reach --objective --readout --noise --preset --backbone --data --data-root "
    "--epochs --batch-size --lr --seed --set --out --resume --device --debug",
    "probe": "--protocol --epochs --report --images --seed --debug",
    "rules": "--stages --debug",
}


def subparsers():
    (actions,) = [action for action in make_parser()._actions if action.dest == "help" or hasattr(action, "choices")][
        1:
    ]
    return actions.choices


def test_the_flags_are_frozen():
    """A flag is a promise to scripts: change this table only on purpose, and never beyond 20 flags a command."""
    for name, parser in subparsers().items():
        flags = [o for action in parser._actions for o in action.option_strings if o not in ("-h", "--help")]
        assert sorted(flags) == sorted(FLAGS[name].split())
        assert len(flags) <= 20
    assert set(subparsers()) == set(FLAGS)


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
        ("--rule hebb", "unknown rule 'hebb'; allowed: blockwise, layerwise, end_to_end, untrained"),
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


def test_run_probe_and_resume_from_the_command_line(capsys, tmp_path):
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
    assert main(["probe", str(out), "--protocol", "paper", "--epochs", "1", "--images", "30"]) == 0
    assert "knn probe, readout features" in capsys.readouterr().out
    assert main(["probe", str(out), "--protocol", "guess"]) == 2
    assert "unknown probe protocol 'guess'; allowed: logistic, paper" in capsys.readouterr().err


def test_rules_lists_papers_and_matrices(capsys):
    assert main(["rules"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("blockwise", "layerwise", "end_to_end", "untrained", "arXiv 2302.01647"))
    assert main(["rules", "end_to_end", "--stages", "3"]) == 0
    assert "  tap on   3   1   1   1" in capsys.readouterr().out
    assert main(["rules", "hebb"]) == 2


def test_a_clone_works_without_installation(tmp_path):
    """rules/ and analysis/ stand beside localsim/ there, and nothing but the clone is on the path."""
    import shutil
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    for name in ("localsim", "rules", "analysis"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import localsim.rules, localsim.analysis; print(localsim.rules.__file__, localsim.analysis.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "rules/__init__.py"), str(tmp_path / "analysis/__init__.py")]
