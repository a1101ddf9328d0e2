"""The benchmark of several processes starts what it says, and divides the right numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from localsim.cli import make_parser

SCRIPT = "parallel"


def test_every_way_is_a_command_that_localsim_takes(benchmark):
    tried = benchmark.ways([4, 2, 1], ["data", "blocks"], num_stages=2)
    assert [(way.processes, way.parallel, way.groups) for way in tried] == [
        (1, "data", 1),
        (2, "data", 1),
        (2, "blocks:2", 2),
        (4, "data", 1),
        (4, "blocks:2", 2),
    ]
    for way in tried:
        python, _, *words = benchmark.command(way, ["--set", 'cuts="layer3.1"'], 12, 2, Path("out"))
        assert python == sys.executable
        if way.processes > 1:
            start = words.index("-m") + 1
            assert words[: start - 1] == [
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(way.processes),
            ]
            words = words[start:]
        assert words[0] == "localsim"
        told = make_parser().parse_args(words[1:])
        assert (told.parallel or "data") == way.parallel
        assert "max_steps=12" in told.set


def test_times_one_are_ratios_within_a_repeat(benchmark):
    one, two = benchmark.ways([2], ["data"], num_stages=2)
    made = benchmark.predict(
        benchmark.profiles_of_shares(tiny_config(), {1})[1][0],
        benchmark.in_one_node("made", "by hand", 1e9, 1e9, 1e9, 0.0),
        [range(3)],
    )
    # the machine was half as fast in the second repeat
    table = benchmark.lines([one, two], {one: [10.0, 5.0, 10.0], two: [18.0, 9.0, 19.0]}, [made, made])
    cells = [cell.strip() for cell in table[-1].split("|")[1:-1]]
    assert cells[:2] == ["2", "data"] and cells[3:6] == ["18.0", "9.0 to 19.0", "1.80"]
    assert float(cells[6]) == pytest.approx(made.images_per_second / 10, abs=0.005)
    assert float(cells[7]) == pytest.approx(18 / made.images_per_second, abs=0.005)


def test_the_first_line_of_metrics_is_left_out(benchmark, monkeypatch):
    def run(command, **_options):
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        rows = [{"step": 2, "images_per_second": 1.0}, *({"step": n, "images_per_second": n * 1.0} for n in (4, 6, 8))]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.rate(benchmark.Way(1, "data"), [], 8, 2, 1) == 6.0
