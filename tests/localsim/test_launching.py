"""Processes that train cells: how many at once and where, what a failure and a signal do, and jobs of a cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from localsim import launching
from localsim.errors import Interrupted, UserError
from localsim.launching import LOG, ClusterJob, cell_command, last_line, run_all, still_queued, submit_all

RECORD = (
    "import os, sys, time; from pathlib import Path\n"
    "here, device = sys.argv[1:]\n"
    "Path(here, 'device').write_text(device)\n"
    "Path(here, 'threads').write_text(os.environ.get('OMP_NUM_THREADS', 'unset'))\n"
)


def scripts(folder: Path, codes: dict[str, str]):
    """Return commands that run Python code in folders of these names, and their folders."""
    paths = {folder / name: code for name, code in codes.items()}
    for path in paths:
        path.mkdir()

    def command(path: Path, code: str):
        return lambda device: [sys.executable, "-S", "-c", RECORD + code, str(path), str(device)]

    return {path: command(path, code) for path, code in paths.items()}


class Watch:
    """Notes who began and ended."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.ended: dict[str, int] = {}
        self.at_once = self.most = 0

    def begin(self, path: Path) -> None:
        self.began.append(path.name)
        self.at_once += 1
        self.most = max(self.most, self.at_once)

    def end(self, path: Path, code: int, seconds: float) -> None:
        assert seconds > 0
        self.ended[path.name] = code
        self.at_once -= 1

    def run(self, commands, devices) -> None:
        run_all(commands, devices, began=self.begin, ended=self.end)


def test_a_failure_is_reported_and_stops_nobody(tmp_path):
    commands = scripts(
        tmp_path, {"a": "print('fine')", "b": "print('step 1'); sys.exit('localsim: it collapsed')", "c": ""}
    )
    watch = Watch()
    watch.run(commands, [None])
    assert watch.began == ["a", "b", "c"] and watch.most == 1
    assert watch.ended == {"a": 0, "b": 1, "c": 0}
    assert last_line(tmp_path / "b" / LOG) == "localsim: it collapsed"
    assert last_line(tmp_path / "a" / LOG) == "fine"
    assert last_line(tmp_path / "c" / LOG) == last_line(tmp_path / "nowhere") == "it printed nothing"


def test_the_last_line_of_a_progress_bar_is_what_it_showed_last(tmp_path):
    (tmp_path / LOG).write_text("start\n 10%\r 20%\r 30% \n\n")
    assert last_line(tmp_path / LOG) == "30%"


def test_devices_are_taken_in_turn_and_cores_are_shared(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "cores", lambda: 7)
    commands = scripts(tmp_path, dict.fromkeys("abcd", "time.sleep(0.3)"))
    watch = Watch()
    watch.run(commands, ["cuda:0", "cuda:1"])
    assert watch.most == 2 and set(watch.ended.values()) == {0}
    used = [(path / "device").read_text() for path in commands]
    assert used[:2] == ["cuda:0", "cuda:1"] and set(used) == {"cuda:0", "cuda:1"}
    assert {(path / "threads").read_text() for path in commands} == {"3"}


def test_threads_that_were_chosen_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    commands = scripts(tmp_path, {"a": "", "b": ""})
    Watch().run(commands, [None, None])
    assert {(path / "threads").read_text() for path in commands} == {"5"}
    assert launching.threads_of_each(2) is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launching.threads_of_each(1) is None and launching.threads_of_each(10_000) == 1


SLOW = (
    "import signal\n"
    "def stop(*_): Path(here, 'stopped').write_text('in order'); sys.exit(130)\n"
    "signal.signal(signal.SIGTERM, stop)\n"
    "Path(here, 'ready').touch(); time.sleep(60)"
)


def interrupt_when(ready: Path, number: int) -> threading.Thread:
    def wait() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request) -> Iterator[int]:
    """A signal that is heeded, even where a shell started the tests in the background and so without Ctrl-C."""
    before = signal.getsignal(request.param)
    signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_stops_the_processes_in_order_and_starts_no_more(tmp_path, number):
    commands = scripts(tmp_path, {"a": SLOW, "b": "", "c": ""})
    before = signal.getsignal(number)
    watch = Watch()
    thread = interrupt_when(tmp_path / "a" / "ready", number)
    with pytest.raises(Interrupted):
        watch.run(commands, [None])
    thread.join()
    assert (tmp_path / "a" / "stopped").read_text() == "in order"
    assert watch.began == ["a"] and watch.ended == {}, "what a signal stopped has not failed"
    assert signal.getsignal(number) is before


def test_nobody_is_left_behind_by_an_error(tmp_path):
    commands = scripts(tmp_path, {"a": SLOW})

    def fail(path: Path) -> None:
        while not (path / "ready").exists():
            time.sleep(0.02)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run_all(commands, [None], began=fail, ended=lambda *_: None)
    assert (tmp_path / "a" / "stopped").exists()


def test_the_command_of_a_cell():
    command = cell_command(
        Path("out/cell"), "/a/rule.py", {"workers": 2, "device": "auto", "data_root": "/a b"}, "cuda:1"
    )
    assert command[:7] == [sys.executable, "-m", "localsim", "run", "--resume", "--out", "out/cell"]
    assert command[7:] == [
        "--rule", "/a/rule.py", "--set", "workers=2", "--set", 'device="cuda:1"', "--set", 'data_root="/a b"',
    ]  # fmt: skip
    assert cell_command(Path("c"), None, {})[3:] == ["run", "--resume", "--out", "c"]


# -- jobs of a cluster ------------------------------------------------------------------------------------------------


def test_a_cluster_job_says_why_it_failed(tmp_path):
    (command,) = scripts(tmp_path, {"a": "sys.exit('localsim: out of memory')"}).values()
    with pytest.raises(RuntimeError, match="exit code 1: localsim: out of memory"):
        ClusterJob(command(None), tmp_path / "a")()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_cluster_job_whose_time_is_over_stops_its_process_and_goes_on_later(tmp_path):
    """As submitit does it: `checkpoint` is called by a signal, within the wait of the job itself.

    Signals that Slurm sends to all processes of a job reach submitit alone.
    """
    pytest.importorskip("submitit")
    (command,) = scripts(tmp_path, {"a": SLOW.replace("SIGTERM", "SIGINT")}).values()
    job = ClusterJob(command(None), tmp_path / "a")
    again, alive = [], []

    def over() -> None:
        while not (tmp_path / "a" / "ready").exists():
            time.sleep(0.02)
        assert job.process is not None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            job.process.send_signal(number)
        time.sleep(0.2)
        alive.append((Path("/proc") / str(job.process.pid)).exists())
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda *_: again.append(job.checkpoint()))
    thread = threading.Thread(target=over)
    try:
        thread.start()
        with pytest.raises(RuntimeError, match="exit code 130: it printed nothing"):
            job()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert alive == [True] and (tmp_path / "a" / "stopped").read_text() == "in order"
    assert [(one.function.command, one.function.path) for one in again] == [(job.command, job.path)]
    again[0].dump(tmp_path / "submitted.pkl")


# submitit lets go of the processes that it started
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_jobs_are_submitted_through_submitit(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    commands = scripts(tmp_path, {"a": "", "b": ""})
    folder = tmp_path / "slurm"
    submitted = submit_all(
        {path: partial(make, "here") for path, make in commands.items()},
        folder, "local", {"timeout_min": 1, "partition": "gpu", "slurm_qos": "high"},
    )  # fmt: skip
    jobs = {path.name: {"cluster": "local", "id": number} for path, number in submitted}
    assert list(jobs) == ["a", "b"]
    end = time.monotonic() + 120
    while len(list(folder.glob("*_result.pkl"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [(path / "device").read_text() for path in commands] == ["here", "here"]
    assert still_queued(jobs, folder) == {}
    monkeypatch.setattr(submitit.LocalJob, "done", lambda job: job.job_id == jobs["a"]["id"])
    assert still_queued(jobs, folder) == {"b": jobs["b"]["id"]}
    assert still_queued({}, folder) == {}


def test_what_a_cluster_lacks_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a job of a cluster needs a time limit in minutes: --slurm-set timeout_min="):
        list(submit_all({}, tmp_path, "local", {}))
    pytest.importorskip("submitit")
    for cluster, options, sentence in (
        ("slurm", {}, "cluster 'slurm' cannot be used: Could not detect \"srun\""),
        ("moon", {}, "cluster 'moon' cannot be used: AutoExecutor doesn't know any executor named moon"),
        ("local", {"colour": 1}, "cluster 'local' cannot be used: "),
        ("local", {"gpus_per_node": "many"}, 'Parameter "gpus_per_node" expected type'),
    ):
        if cluster == "slurm":
            monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="cannot be used") as caught:
            list(submit_all({}, tmp_path, cluster, {"timeout_min": 1, **options}))
        assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_without_submitit_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"jobs of a cluster need submitit: pip install 'localsim\[slurm\]'"):
        list(submit_all({}, tmp_path, "slurm", {"timeout_min": 1}))
