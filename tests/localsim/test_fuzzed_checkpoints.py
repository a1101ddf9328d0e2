"""Fuzzed checkpoints and metrics: an error sentence or success, no executed code, no damage taken for weights."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import STEPS, command, fuzz, make_run, outcome, refused, without_pictures
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import assert_same_tensors, checkpoint_tensors

import localsim
from localsim import checksums, runs
from localsim.errors import UserError
from localsim.experiment import prepare
from localsim.optim import make_optimizer
from localsim.train import train

FILES = ("trunk.safetensors", "taps.safetensors", "optimizer.pt", "monitor.pt", "progress.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    return make_run(tmp_path_factory.mktemp("fuzzed") / "run")


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"{STEPS:08d}"


def resume(run: Path) -> tuple[int, str]:
    return command("run", "--out", str(run), "--resume")


def put_back(run: Path, whole: Path) -> None:
    """Make the checkpoints of a copy those of the run again."""
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(whole / "checkpoints", run / "checkpoints")


# -- damage -----------------------------------------------------------------------------------------------------------


def damage(file: Path, kind: str, place: int, noise: bytes) -> bool:
    """Damage a file; return whether it is another file now."""
    data = file.read_bytes()
    place %= len(data)
    if kind in ("missing", "folder", "swapped"):
        other = file.with_name(FILES[(FILES.index(file.name) + 1 + place) % len(FILES)]).read_bytes()
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "swapped":
            file.write_bytes(other)
            return other != data
        return True
    damaged = {
        "cut": data[:place],
        "flipped": data[:place] + bytes([data[place] ^ (1 << len(noise) % 8)]) + data[place + 1 :],
        "over": data[:place] + noise + data[place + len(noise) :],
        "between": data[:place] + noise + data[place:],
        "alone": noise,
        "longer": data + noise,
    }[kind]
    file.write_bytes(damaged)
    return damaged != data


KINDS = ("cut", "flipped", "over", "between", "alone", "longer", "missing", "folder", "swapped")
# where the head of a file is, where its end, and anywhere
PLACES = st.integers(0, 400) | st.integers(1, 1000).map(lambda back: -back) | st.integers(0, 10**6)
DAMAGE = st.tuples(st.sampled_from(FILES), st.sampled_from(KINDS), PLACES, st.binary(max_size=12))


def test_damage_is_never_taken_for_weights(whole, run):
    """Every damage to weights is told, whatever byte it is in; damage to another file leaves the weights' right."""
    expected = localsim.load_run(whole).network().state_dict()

    def check(case: tuple[str, str, int, bytes]) -> None:
        name, how = case[0], case[1:]
        file = newest(run) / name
        data = file.read_bytes()
        changed = damage(file, *how)
        loaded = outcome(localsim.load_run(run).network)
        if changed and name.endswith("safetensors"):
            assert isinstance(loaded, UserError) and f"{STEPS:08d}/{name} cannot be read: " in str(loaded)
            assert str(loaded).endswith(f"; remove {newest(run)} to go on from step {STEPS - 1}")
        elif not isinstance(loaded, UserError):
            assert_same_tensors(loaded.state_dict(), expected)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(data)

    fuzz(250, DAMAGE, check)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_final_bits_stay(whole, run, monkeypatch):
    without_pictures(monkeypatch)
    expected = checkpoint_tensors(whole)

    def check(case: tuple[str, str, int, bytes]) -> None:
        put_back(run, whole)
        name, how = case[0], case[1:]
        changed = damage(newest(run) / name, *how)
        damaged = not checksums.is_whole(newest(run))
        assert damaged == changed or name == "progress.json"  # which may have lost what was worth nothing
        code, said = resume(run)
        assert code == 0
        told = (
            f"localsim: checkpoint {newest(run)} is damaged and was set aside as damaged-{STEPS:08d}; the run goes on"
        )
        assert said == f"{told} from step {STEPS - 1}" * damaged
        assert (run / "checkpoints" / f"damaged-{STEPS:08d}").is_dir() == damaged
        assert_same_tensors(checkpoint_tensors(run), expected)

    fuzz(20, DAMAGE, check)


def test_where_every_checkpoint_is_damaged_all_stay(whole, run, monkeypatch):
    without_pictures(monkeypatch)

    def check(cases: list[tuple[str, str, int, bytes]]) -> None:
        put_back(run, whole)
        folders = sorted((run / "checkpoints").iterdir())
        changed = [damage(folder / case[0], *case[1:]) for folder, case in zip(folders, cases, strict=True)]
        code, said = resume(run)
        if all(changed) and not any(checksums.is_whole(folder) for folder in folders):
            assert code == 2 and f"{newest(run)}" in said
            assert sorted((run / "checkpoints").iterdir()) == folders

    fuzz(20, st.lists(DAMAGE, min_size=STEPS, max_size=STEPS), check)


def test_old_checkpoints_without_sums(whole, run, monkeypatch):
    """Damage cannot always be known there, but never ends in a traceback."""
    (newest(run) / "progress.json").write_text(f'{{"step": {STEPS}}}')
    config = localsim.load_run(run).config
    expected = checkpoint_tensors(whole)
    assert_same_tensors(checkpoint_tensors(run), expected)
    net = localsim.load_run(run).network()

    def check(case: tuple[str, str, int, bytes]) -> None:
        name, how = case[0], case[1:]
        file = newest(run) / name
        data = file.read_bytes()
        damage(file, *how)
        optimizer = make_optimizer(config.optimizer, net.parameters(), lr=0.1, weight_decay=0)
        outcome(lambda: runs.load_weights(net, newest(run)))
        outcome(lambda: runs.load_training_state(newest(run), optimizer))
        if file.is_dir():
            file.rmdir()
        file.write_bytes(data)

    fuzz(200, DAMAGE.filter(lambda case: case[0] != "progress.json"), check)


# -- whole files of something else ------------------------------------------------------------------------------------

LEAVES: list[Any] = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), "x", "", b"x", [], {}, (), [None], {"lr": 1}, {0: {}}, torch.zeros(()),
    torch.zeros(0), torch.zeros(2, 3), torch.zeros(2, 10), torch.full((), -3.0), torch.full((), float("nan")),
    torch.zeros(1, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3).to_sparse(),
    torch.device("cpu"), torch.float16, torch.Size([1]),
]  # fmt: skip


def altered(state: Any, picks: list[int], how: str, value: Any) -> Any:
    """Return nested dictionaries and lists with one entry, found by `picks`, replaced, removed or doubled."""
    if not isinstance(state, dict | list) or not state or not picks:
        return value
    state = copy.copy(state)
    keys = list(state) if isinstance(state, dict) else list(range(len(state)))
    chosen = keys[picks[0] % len(keys)]
    inner = state[chosen]
    if len(picks) > 1 and isinstance(inner, dict | list) and inner:
        state[chosen] = altered(inner, picks[1:], how, value)
    elif how == "removed":
        del state[chosen]
    elif how == "more" and isinstance(state, dict):
        state["more"] = value
    elif how == "more" and isinstance(state, list):
        state.append(value)
    else:
        state[chosen] = value
    return state


ALTERED = st.tuples(
    st.lists(st.integers(0, 30), max_size=5), st.sampled_from(["other", "removed", "more"]), st.sampled_from(LEAVES)
)


@pytest.mark.parametrize("name", ["optimizer.pt", "monitor.pt"])
def test_training_states_of_something_else(name, run):
    """What is accepted is trained with for a step, which ends well or as a step can: its loss may be no number."""
    config = localsim.load_run(run).config
    prepared = prepare(config)
    before = run / "checkpoints" / f"{STEPS - 1:08d}"
    plain = torch.load(before / name, weights_only=True)

    def check(case: tuple[list[int], str, Any]) -> None:
        shutil.rmtree(newest(run), ignore_errors=True)
        torch.save(altered(plain, *case), before / name)
        checksums.write_record(before, STEPS - 1)
        step = outcome(lambda: train(prepared.net, prepared.loader, config, run, num_classes=10, progress=False))
        assert newest(run).exists() == (step == STEPS)

    fuzz(70, ALTERED, check)


DTYPES = [torch.float64, torch.float16, torch.int8, torch.bool, torch.int64, torch.bfloat16]
TENSORS = st.tuples(
    st.sampled_from(FILES[:2]),
    st.integers(0, 30),
    st.sampled_from(["missing", "more", "renamed", "flat", "empty", "nan", "transposed", *DTYPES]),
)


def test_weights_of_something_else(whole, run):
    plain = {name: runs.load_tensors(newest(whole) / name) for name in FILES[:2]}

    def check(case: tuple[str, int, Any]) -> None:
        name, pick, how = case
        tensors = dict(plain[name])
        chosen = list(tensors)[pick % len(tensors)]
        x = tensors[chosen]
        if how in ("missing", "renamed"):
            del tensors[chosen]
        if how in ("more", "renamed"):
            tensors["more"] = x.clone()
        if how == "flat":
            tensors[chosen] = x.reshape(-1, 1, 1).clone()
        if how == "transposed":
            tensors[chosen] = x.mT.contiguous() if x.ndim > 1 else x[None]
        if how == "empty":
            tensors[chosen] = x.new_empty(0)
        if how == "nan" and x.is_floating_point():
            tensors[chosen] = torch.full_like(x, float("nan"))
        if isinstance(how, torch.dtype):
            tensors[chosen] = x.to(how)
        (newest(run) / name).write_bytes(save(tensors))
        checksums.write_record(newest(run), STEPS)
        loaded = outcome(localsim.load_run(run).network)
        counter = chosen.endswith("num_batches_tracked")
        same_shape = tensors.keys() == plain[name].keys() and tensors[chosen].shape == x.shape
        assert isinstance(loaded, UserError) != same_shape or counter
        (newest(run) / name).write_bytes(save(plain[name]))

    fuzz(100, TENSORS, check)


# -- code -------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def bombs(canary: Path) -> list[Bomb]:
    """Return objects each of which, unpickled, makes the file `canary`."""
    code = f"open({str(canary)!r}, 'w').close()"
    return [
        Bomb(Path.touch, canary),
        Bomb(open, str(canary), "w"),
        Bomb(exec, code),
        Bomb(eval, code),
        Bomb(os.open, str(canary), os.O_CREAT),
        Bomb(torch.save, 1, str(canary)),
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_bombs_are_live(tmp_path):
    for bomb in bombs(tmp_path / "canary"):
        pickle.loads(pickle.dumps(bomb))
        (tmp_path / "canary").unlink()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_that_is_loaded_executes_code(whole, run, tmp_path):
    canary = tmp_path / "canary"
    live = bombs(canary)
    states = {name: torch.load(newest(whole) / name, weights_only=True) for name in FILES[2:4]}
    config = localsim.load_run(run).config
    net = localsim.load_run(run).network()

    def check(case: tuple[str, int, list[int], str, str]) -> None:
        name, number, picks, how, format = case
        state = altered(states.get(name, {}), picks, how, live[number])
        file, data = newest(run) / name, (newest(run) / name).read_bytes()
        buffer = io.BytesIO()
        if format == "pickle":
            pickle.dump(state, buffer)
        else:
            torch.save(state, buffer, _use_new_zipfile_serialization=format == "zip")
        file.write_bytes(buffer.getvalue())
        if name != "progress.json":
            checksums.write_record(newest(run), STEPS)
        optimizer = make_optimizer(config.optimizer, net.parameters(), lr=0.1, weight_decay=0)
        told = [
            outcome(lambda: runs.load_weights(net, newest(run))),
            outcome(lambda: runs.load_training_state(newest(run), optimizer)),
            outcome(localsim.load_run(run).network),
        ]
        assert not canary.exists()
        assert any(isinstance(one, UserError) for one in told) or how == "removed"
        file.write_bytes(data)

    formats = st.sampled_from(["pickle", "zip", "old"])
    hows = st.sampled_from(["other", "more", "removed"])
    picks = st.lists(st.integers(0, 30), max_size=5)
    fuzz(120, st.tuples(st.sampled_from(FILES), st.integers(0, len(live) - 1), picks, hows, formats), check)


# -- metrics ----------------------------------------------------------------------------------------------------------

LINES = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(str.encode),
    st.sampled_from([b"{}", b"[1]", b"null", b'{"step": 1}', b'{"step": "1", "loss": {}}', b'{"step": 1, "loss": 3}',
                     b'{"step": 1, "loss": {"stage1": "x"}}', b'{"step": true, "loss": {}}', b"[" * 99_999,
                     b'{"step": -1, "loss": {"stage9": NaN}}', b'{"step": ' + b"9" * 5000 + b', "loss": {}}']),
)  # fmt: skip


def test_garbage_in_the_metrics(whole, run, monkeypatch):
    plain = (whole / "metrics.jsonl").read_bytes().splitlines()

    def check(case: tuple[list[bytes], int, bytes]) -> None:
        lines, place, end = case
        (run / "metrics.jsonl").write_bytes(b"\n".join([*plain[:place], *lines, *plain[place:]]) + end)
        rows = outcome(localsim.load_run(run).metrics)
        assert isinstance(rows, list) or f"{run / 'metrics.jsonl'}, line " in str(rows)
        outcome(lambda: runs.forget_metrics_after(run, 1))

    fuzz(
        150, st.tuples(st.lists(LINES, max_size=3), st.integers(0, STEPS), st.sampled_from([b"", b"\n", b"\0"])), check
    )


# -- what was found ---------------------------------------------------------------------------------------------------


def test_folders_that_are_no_steps_are_passed_over(run):
    for name in ("00000010 copy", "1e9", "5.old", "00000007"):  # the last one a file
        (run / "checkpoints" / name).mkdir() if name != "00000007" else (run / "checkpoints" / name).touch()
        (run / "snapshots" / name).mkdir(parents=True)
    opened = localsim.load_run(run)
    assert (opened.step, opened.snapshots) == (STEPS, [7])


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    moved = newest(run).rename(run / "checkpoints" / "00000009")
    told = (
        f"{moved / 'progress.json'} cannot be read: it is not the record of step 9; remove {moved} to go on from step 1"
    )
    assert refused(localsim.load_run(run).network) == told


def test_a_record_names_no_files_elsewhere(run):
    (newest(run) / "progress.json").write_text(f'{{"step": {STEPS}, "sha256": {{"../../../secret": "0"}}}}')
    assert "progress.json cannot be read: it is not the record" in refused(localsim.load_run(run).network)


def test_a_second_damaged_checkpoint_of_one_step_is_set_aside_too(whole, run):
    for name in ("damaged-00000002", "damaged-00000002-2"):
        put = shutil.copytree(newest(whole), newest(run), dirs_exist_ok=True)
        (put / "taps.safetensors").write_bytes(b"")
        with pytest.warns(UserWarning, match=f"is damaged and was set aside as {name}; the run goes on from step 1"):
            checksums.set_damaged_aside(run)
        assert (run / "checkpoints" / name / "taps.safetensors").read_bytes() == b""
