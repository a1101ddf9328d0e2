"""The benchmark of heads runs, and what it compares does the same."""

from __future__ import annotations

import torch

SCRIPT = "heads"


def test_a_line_for_both_with_their_difference(benchmark, capsys):
    options = ["--widths", "24", "--batches", "4", "16", "--repeats", "1", "--device", "cpu"]
    benchmark.main(options)
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 24")]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ("4", "plain"), ("4", "localsim"), ("16", "plain"), ("16", "localsim"),
    ]  # fmt: skip
    for row in rows:
        assert float(row[3]) > 0 and float(row[8]) > 0
        assert float(row[10]) < 1e-4


def test_both_move_the_weights_to_the_same_place(benchmark):
    moved = []
    for make in (benchmark.plain, benchmark.localsim):
        head = benchmark.make_head(24, "cpu")
        optimizer = benchmark.LARS(head.parameters(), lr=0.5, weight_decay=0.1)
        reads = list(torch.randn(2, 6, benchmark.READ, generator=torch.Generator().manual_seed(1)))
        if make is benchmark.plain:
            for parameter in head.parameters():  # LARS makes it with its first step
                optimizer.state[parameter]["mu"] = torch.zeros_like(parameter)
        for _ in range(3):
            seconds = benchmark.one_step(head, reads, make(head, optimizer, "full", "cpu"))
            assert list(seconds) == list(benchmark.PARTS)
        moved.append(list(head.parameters()))
    started = list(benchmark.make_head(24, "cpu").parameters())
    for plain, ours, start in zip(*moved, started, strict=True):
        assert not torch.equal(ours, start)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
