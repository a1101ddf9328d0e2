"""Damaged, foreign and hostile run folders, and disks that are full: one sentence, and nothing lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_config, tiny_state, train_in

import localsim
from localsim import checksums, runs
from localsim.assembly import build_network
from localsim.config import Config
from localsim.errors import TrainingFailed, UserError
from localsim.optim import make_optimizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "trained"
    train_in(path)
    return path


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A run to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy")


def newest(path: Path) -> Path:
    folder = runs.newest_checkpoint(path)
    assert folder is not None
    return folder


def an_optimizer(config: Config) -> torch.optim.Optimizer:
    return make_optimizer(config.optimizer, build_network(config).parameters(), lr=0.1, weight_decay=0)


# -- damage -----------------------------------------------------------------------------------------------------------


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _halve(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _scramble(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 0x5A for byte in file.read_bytes()))


def _remove(file: Path) -> None:
    file.unlink()


DAMAGES = [_empty, _halve, _scramble, _remove]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["trunk.safetensors", "taps.safetensors"])
def test_damaged_weights_are_named_in_one_sentence(copy, name, damage):
    damage(newest(copy) / name)
    with pytest.raises(UserError, match=rf"00000010/{name}.* cannot be read: .") as caught:
        localsim.load_run(copy).network()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["optimizer.pt", "monitor.pt"])
def test_a_damaged_training_state_is_named_in_one_sentence(copy, name, damage):
    damage(newest(copy) / name)
    localsim.load_run(copy).network()  # whose weights are whole
    with pytest.raises(UserError, match=rf"00000010/{name} cannot be read: .") as caught:
        runs.load_training_state(newest(copy), an_optimizer(localsim.load_run(copy).config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"run"', '{"rule": "blockwise"}', '{"rool": 1}'])
def test_a_damaged_configuration_is_named_in_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json (cannot be read|is not a configuration)") as caught:
        localsim.load_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [_halve, _scramble])
def test_a_damaged_configuration_file_is_named(copy, damage):
    damage(copy / "config.json")
    with pytest.raises(UserError, match=r"config\.json cannot be read: ."):
        localsim.run(out=copy, resume=True, quiet=True)


def test_a_configuration_with_an_impossible_value_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "batch_size": "many"}))
    with pytest.raises(UserError, match="batch_size is 'many'"):
        localsim.load_run(copy)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"backbone": "resnet32"}, r"trunk\.safetensors: "),
        ({"projector": [9, 8]}, r"taps\.safetensors holds the heads of another architecture: .*size mismatch"),
        ({"rule": "layerwise"}, r"taps\.safetensors holds the heads of another architecture: "),
    ],
    ids=["trunk", "width", "number of taps"],
)
def test_a_checkpoint_of_another_architecture_is_refused(copy, tmp_path, other, told):
    net = build_network(tiny_config(**other))
    shutil.rmtree(copy / "checkpoints")
    runs.save_checkpoint(copy, 10, tiny_state(net))
    with pytest.raises(UserError, match=told) as caught:
        localsim.load_run(copy).network()
    assert "\n" not in str(caught.value)


def test_the_state_of_another_optimiser_is_refused(copy):
    config = dataclasses.replace(localsim.load_run(copy).config, optimizer="lars")
    net = build_network(config)
    other = make_optimizer("lars", list(net.parameters())[:3], lr=0.1, weight_decay=0)
    torch.save(other.state_dict(), newest(copy) / "optimizer.pt")
    checksums.write_record(newest(copy), 10)
    with pytest.raises(UserError, match=r"optimizer\.pt is the state of another optimiser: "):
        runs.load_training_state(newest(copy), an_optimizer(config))


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["optimizer.pt", "monitor.pt", "trunk.safetensors", "taps.safetensors"])
@pytest.mark.parametrize("write", [torch.save, lambda bomb, file: file.write_bytes(pickle.dumps(bomb))],
                         ids=["torch.save", "pickle"])  # fmt: skip
def test_loading_never_executes_code(copy, tmp_path, name, write):
    target = tmp_path / "executed"
    write(_Bomb(target), newest(copy) / name)
    checksums.write_record(newest(copy), 10)
    config = localsim.load_run(copy).config
    with pytest.raises(UserError, match=f"{name}.* cannot be read: ."):
        runs.load_weights(build_network(config), newest(copy))
        runs.load_training_state(newest(copy), an_optimizer(config))
    assert not target.exists()
    pickle.loads(pickle.dumps(_Bomb(target)))
    assert target.exists()  # the bomb is a live one


# -- disk full --------------------------------------------------------------------------------------------------------


def _no_space(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_space_in_rust(*_arguments: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _no_space_in_torch(*_arguments: object) -> None:
    raise RuntimeError(
        "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed: No space left on device"
    )


FULL = {
    "safetensors": (runs, "save_file", _no_space_in_rust),
    "open": (runs, "save_file", _no_space),
    "torch.save": (torch, "save", _no_space_in_torch),
    "json": (checksums, "write_json", _no_space),
    "fsync": (os, "fsync", _no_space),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_keeps_the_older_checkpoint_and_leaves_nothing_half_written(tmp_path, monkeypatch, where):
    net = build_network(tiny_config())
    optimizer = make_optimizer("sgd", net.parameters(), lr=0.1, weight_decay=0)
    older = runs.save_checkpoint(tmp_path, 5, tiny_state(net, optimizer))
    before = {file.name: file.read_bytes() for file in older.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(*FULL[where])
        told = r"checkpoint after step 6 could not be written \(.*No space left.*\); .*00000005 is kept; make room"
        with pytest.raises(TrainingFailed, match=told):
            runs.save_checkpoint(tmp_path, 6, tiny_state(net, optimizer))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    assert {file.name: file.read_bytes() for file in older.iterdir()} == before
    runs.save_checkpoint(tmp_path, 6, tiny_state(net, optimizer))
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["00000005", "00000006"]


def test_a_disk_that_is_full_from_the_start_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(UserError, match=r"No space left on device\); there is none yet; make room"):
        runs.save_checkpoint(tmp_path, 5, tiny_state(build_network(tiny_config())))
