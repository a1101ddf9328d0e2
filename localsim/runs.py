"""The run folder: everything needed to know, resume and analyse a run, readable without localsim.

| file | what |
|---|---|
| `config.json` | the resolved configuration |
| `environment.json` | versions, machine and command line of every start |
| `plan.txt` | cuts, credit and cost, as printed at the start |
| `metrics.jsonl` | one JSON object per line: losses, learning rate, throughput, ranks, online probes |
| `checkpoints/00000350/` | after 350 steps: `trunk.safetensors` (torchvision's names), `taps.safetensors` (readouts and heads), `optimizer.pt`, `monitor.pt`, `progress.json` (the step, and the SHA-256 of the others) |
| `snapshots/00000350/` | weights alone, `trunk.safetensors`, `taps.safetensors` and `progress.json`, kept for good (setting `snapshot_every`) |
| `probe.json`, `probe.csv` | accuracy of every stage, with intervals and settings |
| `figures/` | plots |
| `tensorboard/` | the same metrics, where TensorBoard is installed |
| `lock` | held by the one process that writes |

Every file is written whole or not at all, except that lines are appended to `metrics.jsonl`, whose readers leave out a
last line that was cut short; a checkpoint folder appears under its name only when it is complete.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from localsim import checksums
from localsim.config import Config
from localsim.errors import TrainingFailed, UserError, one_of
from localsim.files import cause, read_json, write_json, write_text
from localsim.optim import load_state

if TYPE_CHECKING:
    from localsim.analysis.stage_probe import ProbeTable
    from localsim.network import LocalNetwork


@dataclass(frozen=True)
class Run:
    """A run folder, opened for reading.

    Attributes:
        path: the folder.
        config: the resolved configuration.
    """

    path: Path
    config: Config

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, oldest first; a last line that a crash cut short is left out."""
        return read_metrics(self.path)

    @property
    def step(self) -> int:
        """How many steps the newest checkpoint has seen; 0 without one."""
        return checkpoint_step(self.path)

    @property
    def snapshots(self) -> list[int]:
        """The steps after which weights were kept for good, in order (setting `snapshot_every`)."""
        return [int(folder.name) for folder in checksums.step_folders(self.path / "snapshots")]

    def network(self, which: str | int = "trained") -> LocalNetwork:
        """Return the network in evaluation mode.

        Args:
            which: `trained` (the newest checkpoint), `untrained` (its initialisation), or one of `snapshots`.

        Raises:
            UserError: anything else, or weights that cannot be read or are of another architecture.
        """
        from localsim.assembly import build_network

        folder = self.weights(which)
        net = build_network(self.config)
        if which != "untrained" and len(net.taps):
            if folder is None:
                raise UserError(f"{self.path} has no checkpoint yet; continue it with `localsim run --resume`")
            load_weights(net, folder)
        return net.eval()

    def weights(self, which: str | int = "trained") -> Path | None:
        """Return the folder with the weights of a network, see `network`, or None where nothing was kept of it."""
        if which not in (allowed := ("trained", "untrained", *self.snapshots)):
            raise one_of("network", which, allowed)
        if which == "untrained":
            return None
        return newest_checkpoint(self.path) if which == "trained" else self.path / "snapshots" / f"{which:08d}"

    def moved(self, **settings: Any) -> Run:
        """Return the run with other values of `data`, `data_root` or `device`, of those that are not None."""
        given = {name: value for name, value in settings.items() if value is not None}
        return replace(self, config=replace(self.config, **given))

    def probe(self) -> ProbeTable | None:
        """Return the probe results stored with the run, or None if it has not been probed."""
        from localsim.analysis.stage_probe import ProbeTable

        path = self.path / "probe.json"
        return ProbeTable.from_json(read_json(path)) if path.exists() else None


def load_run(path: str | Path) -> Run:
    """Open the run folder `path`; UserError if it is none."""
    path = Path(path)
    if (path / "sweep.json").is_file():
        raise UserError(f"{path} is a sweep, not a run; its runs are the folders in it: {path}/*-seed*")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.json")
    return Run(path, Config.from_json(read_json(path / "config.json"), path / "config.json"))


def opened_run(run: Run | str | Path) -> Run:
    """Return a run, given itself or its folder; UserError if it is neither."""
    if isinstance(run, str | Path):
        return load_run(run)
    if not isinstance(run, Run):
        raise UserError(f"a run is needed, not an object of type {type(run).__name__}; allowed: a Run or its folder")
    return run


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the folder's lock; UserError if another process has it. The system frees it when a process dies."""
    taken = f"{path} is being written by another process; wait for it, or choose another --out"
    # a look at a sweep's plan holds it for a moment
    with locked(path / "lock", "run", taken, seconds=1):
        yield


@contextmanager
def locked(file: Path, what: str, taken: str, *, seconds: float = 0) -> Iterator[None]:
    """Hold the lock `file` of a folder of `what`, which is made.

    Raises:
        UserError: with the sentence `taken`, another process still has it after so many seconds; or the folder cannot
            be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(file, timeout=seconds)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(taken) from None
    except OSError as error:
        raise UserError(f"{what} folder {file.parent} cannot be written: {cause(error)}") from None
    try:
        yield
    finally:
        lock.release()


def start_run(path: Path, config: Config) -> Run:
    """Write the configuration of a new run; UserError if the folder holds a run already."""
    refuse_existing(path)
    write_json(path / "config.json", config.to_json())
    return Run(path, config)


def refuse_existing(path: Path) -> None:
    """Raise UserError if the folder holds a run."""
    if (path / "config.json").exists():
        raise UserError(f"{path} already holds a run; continue it with --resume, or choose another --out")


def record_environment(path: Path, processes: int = 1) -> None:
    """Add versions, machine, processes and command line of this start to `environment.json`."""
    import numpy
    import torchvision

    from localsim import __version__

    file = path / "environment.json"
    starts = read_json(file) if file.exists() else []
    if not isinstance(starts, list):
        raise UserError(f"{file} cannot be read: it is no list of starts")
    starts.append(
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "localsim": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "host": socket.gethostname(),
            "processor": platform.machine(),
            "processes": processes,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "resumed_from_step": checkpoint_step(path),
        }
    )
    write_json(file, starts)


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to `metrics.jsonl`."""
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def set_probe_aside(path: Path, step: int) -> None:
    """Rename the probe of a run that had been cut short and goes on, `probe-step100.json`: it is not of its end."""
    for suffix in (".json", ".csv"):
        if (file := path / f"probe{suffix}").exists():
            file.rename(path / f"probe-step{step}{suffix}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of `metrics.jsonl`."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            said = line.strip()[:80].decode(errors="replace")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{file}, line {number} is not JSON: {said!r}") from None
            if not (isinstance(row, dict) and type(row.get("step")) is int and _are_numbers(row.get("loss", {}))):
                raise UserError(f"{file}, line {number} is no row of metrics: {said!r}")
            rows.append(row)
    return rows


def _are_numbers(losses: Any) -> bool:
    return isinstance(losses, dict) and all(isinstance(loss, int | float) for loss in losses.values())


def forget_metrics_after(path: Path, step: int) -> None:
    """Drop the lines that a resumed run will write again."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


KEPT_CHECKPOINTS = 2
"""Two, so that one from which training has gone on without failing is always there."""

# -- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint after `step` steps, then remove all but the newest two; on failure the older ones stay.

    Its files are the same for any number of processes. `state` is that of the whole network, see
    `localsim.distributed.parts.joined`.

    Raises:
        TrainingFailed: the disk does not take it.
    """

    def write(folder: Path) -> None:
        _save_weights(folder, state)
        torch.save(state["optimizer"], folder / "optimizer.pt")
        torch.save(state["monitor"], folder / "monitor.pt")

    final = _write_folder(path, "checkpoint", step, write)
    for older in checksums.step_folders(final.parent)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(older, ignore_errors=True)
    return final


def save_snapshot(path: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Keep the weights after `step` steps for good; a snapshot that exists already stays as it is."""
    return _write_folder(path, "snapshot", step, lambda folder: _save_weights(folder, state))


def _save_weights(folder: Path, state: Mapping[str, Any]) -> None:
    save_file(_plain(state["trunk"]), folder / "trunk.safetensors")
    save_file(_plain(state["taps"]), folder / "taps.safetensors")


def _write_folder(path: Path, kind: str, step: int, write: Callable[[Path], None]) -> Path:
    """Make `<kind>s/<step>/` of the run folder, whole or not at all."""
    root = path / f"{kind}s"
    final = root / f"{step:08d}"
    partial = root / f".{step:08d}.partial"
    if final.exists():
        return final
    root.mkdir(exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        checksums.write_record(partial, step)
        for file in partial.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        partial.rename(final)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as an internal error of its archive
        reason = "No space left on device" if shutil.disk_usage(root).free < 2**20 else cause(error)
        shutil.rmtree(partial, ignore_errors=True)
        kept = newest_checkpoint(path)
        raise TrainingFailed(
            f"the {kind} after step {step} could not be written ({reason}); "
            + (f"{kept} is kept" if kept else "there is none yet")
            + "; make room and continue with --resume"
        ) from error
    return final


def drop_untried_checkpoint(path: Path, step: int) -> Path | None:
    """Remove the checkpoint of `step` if an older one exists, and return the newest that is left."""
    newest = newest_checkpoint(path)
    if newest and int(newest.name) == step and len(checksums.step_folders(newest.parent)) > 1:
        shutil.rmtree(newest)
    return newest_checkpoint(path)


def newest_checkpoint(path: Path) -> Path | None:
    """Return the folder of the newest complete checkpoint."""
    return next(reversed(checksums.step_folders(path / "checkpoints")), None)


def checkpoint_step(path: Path) -> int:
    """Return how many steps the newest checkpoint has seen; 0 without one."""
    folder = newest_checkpoint(path)
    return int(folder.name) if folder else 0


def load_weights(net: LocalNetwork, folder: Path) -> None:
    """Load trunk and taps of a checkpoint folder.

    Raises:
        UserError: a file is missing, damaged, or of another architecture.
    """
    trunk, taps = (load_tensors(folder / name) for name in ("trunk.safetensors", "taps.safetensors"))
    try:
        net.load_trunk_state_dict(trunk)
    except UserError as error:
        raise UserError(f"{folder / 'trunk.safetensors'}: {error}") from None
    try:
        net.taps.load_state_dict(taps)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder / 'taps.safetensors'} holds the heads of another architecture: {first}") from None


def load_training_state(
    folder: Path, optimizer: torch.optim.Optimizer | None, part: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Load the optimiser's state in place and return the monitor's; UserError if a file is missing or damaged.

    `part` picks what the optimiser is to have of the state, where that is less than all.
    """
    if optimizer is not None:
        state = load_plain(folder / "optimizer.pt")
        state = state if part is None else part(state)
        try:
            load_state(optimizer, state)
        except UserError as error:
            raise UserError(f"{folder / 'optimizer.pt'} is the state of another optimiser: {error}") from None
    return load_plain(folder / "monitor.pt")


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_tensors(path: Path) -> dict[str, Tensor]:
    return _loaded(path, load_file)


def load_plain(path: Path) -> Any:
    return _loaded(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))


def _loaded(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        checksums.check(path)
        return load(path)
    except Exception as error:  # a damaged archive surfaces as any of half a dozen types, pickle's own among them
        told = str(error) if isinstance(error, UserError) else f"{path} cannot be read: {cause(error)}"
        raise UserError(told + checksums.way_on(path.parent)) from None
