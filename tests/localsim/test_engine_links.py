"""One step whose stages run in several parts that tell each other what is needed, and nothing before it is needed."""

import copy
import threading
from itertools import pairwise, permutations
from queue import Queue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import KEY, assert_close, credits, engine_gradients, make_net, make_views, published

from localsim import engine
from localsim.credit import Credit
from localsim.network import LocalNetwork

SECONDS = 60
"""After so long nobody waits any more for what does not come."""


class Parts:
    """Runs a step in threads, of which one works while the others wait: each has some stages, and links to the others.

    Attributes:
        diary: what every part did, in order: ("ran", stage), "told" the part below, "heard" the part above.
    """

    def __init__(self, net: LocalNetwork, borders: list[int]) -> None:
        self.net = net
        self.parts = [range(*pair) for pair in pairwise([0, *borders, len(net.stages)])]
        # as between processes: what one part tells another comes in the order it was sent
        self.boxes = {pair: Queue() for pair in permutations(range(len(self.parts)), 2)}
        self.diary: list[list] = [[] for _ in self.parts]
        self.errors: list[BaseException] = []
        self.working = threading.Lock()  # tests' nets draw from torch's default generator

    def backward(self, views: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
        """Return the gradients of a step."""
        ends = [_Ends(self, part) for part in range(len(self.parts))]
        threads = [threading.Thread(target=self._run, args=(end, views, options)) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None}

    def _run(self, ends: "_Ends", views: list[torch.Tensor], options) -> None:
        try:
            with self.working:
                stages = ends.stages
                entering = ends.waited(ends.part - 1, stages.start - 1) if ends.part else views
                engine.backward(
                    self.net, *entering, key=KEY, start=stages.start, stop=stages.stop,
                    hooks=engine.Hooks(on_stage=ends.on_stage), links=ends, **options,
                )  # fmt: skip
        except BaseException as error:
            self.errors.append(error)

    def told_when(self, part: int) -> tuple | str | None:
        """Return what a part did last before it told the one below; None where it told nothing."""
        diary = self.diary[part]
        return diary[diary.index("told") - 1] if "told" in diary else None


class _Ends:
    """The links of one part."""

    def __init__(self, all_parts: Parts, part: int) -> None:
        self.all, self.part, self.stages = all_parts, part, all_parts.parts[part]

    def waited(self, source: int, what: object):
        self.all.working.release()
        try:
            came, message = self.all.boxes[source, self.part].get(timeout=SECONDS)
        finally:
            self.all.working.acquire()
        assert came == what, f"{came} came where {what} was waited for"
        return message

    def on_stage(self, stage: int, outputs: list[torch.Tensor], _alive: tuple[int, ...]) -> None:
        self.all.diary[self.part].append(("ran", stage))
        if stage == self.stages.stop - 1 and stage + 1 < len(self.all.net.stages):
            self.all.boxes[self.part, self.part + 1].put((stage, outputs))
        for part, run in enumerate(self.all.parts[: self.part]):
            if any(tap.stage in run and tap.context == stage for tap in self.all.net.taps):
                self.all.boxes[self.part, part].put((stage, outputs))

    def context(self, stage: int) -> list[torch.Tensor]:
        return self.waited(next(part for part, run in enumerate(self.all.parts) if stage in run), stage)

    def receive_signals(self):
        self.all.diary[self.part].append("heard")
        return self.waited(self.part + 1, "signals")

    def send_signals(self, signals) -> None:
        self.all.diary[self.part].append("told")
        self.all.boxes[self.part, self.part - 1].put(("signals", signals))


@settings(deadline=None, max_examples=60)
@given(st.one_of(credits(), published()), st.data(), st.booleans())
def test_parts_of_a_network_learn_what_it_learns_in_one_piece(credit, data, eager):
    num = credit.num_stages
    borders = sorted(data.draw(st.sets(st.integers(1, num - 1), max_size=3))) if num > 1 else []
    contexts = {tap: data.draw(st.integers(top, num - 1)) for tap, top in enumerate(credit.taps)}
    chosen = data.draw(st.sets(st.sampled_from(sorted(contexts)), max_size=2))
    net, views = make_net(credit, contexts={tap: contexts[tap] for tap in chosen}), make_views()
    whole = copy.deepcopy(net)
    parts = Parts(net, borders)
    assert_close(parts.backward(views, eager=eager), engine_gradients(whole, views))
    for part, stages in enumerate(parts.parts):
        crossed = bool(credit.crossing(stages.start))
        assert parts.diary[part].count("told") == int(crossed), "one message where credit crosses, else none"
        assert parts.diary[part].count("heard") == int(bool(credit.crossing(stages.stop)))


@pytest.mark.parametrize(
    ("credit", "borders", "told"),
    [
        # every loss reaches one stage down: what it says there need not wait for the loss above
        (Credit.overlapping(4, 2), [1, 2, 3], [None, ("ran", 1), ("ran", 2), ("ran", 3)]),
        (Credit.overlapping(5, 2), [2], [None, ("ran", 2)]),
        # two stages down: all but the highest pass on what comes from above too
        (Credit.overlapping(5, 3), [1, 2, 3, 4], [None, "heard", "heard", "heard", ("ran", 4)]),
        (Credit.overlapping(5, 3), [2, 4], [None, ("ran", 3), ("ran", 4)]),
        (Credit.end_to_end(4), [1, 3], [None, "heard", ("ran", 3)]),
        (Credit.blockwise(4), [1, 2], [None, None, None]),
        # the lowest stage hears from the second alone, the second from both of the losses above it
        (Credit([[1, 1, 0, 0], [0, 1, 1, 0], [0, 2, 2, 1]], (1, 2, 3)), [1, 2], [None, ("ran", 1), ("ran", 3)]),
    ],
)  # fmt: skip
def test_signals_go_down_as_soon_as_no_loss_to_come_has_a_part_in_them(credit, borders, told):
    parts = Parts(make_net(credit), borders)
    parts.backward(make_views())
    assert [parts.told_when(part) for part in range(len(parts.parts))] == told


def test_signals_wait_for_maps_that_are_to_go_the_same_way():
    credit = Credit.overlapping(
        4, 2
    )  # the tap on the second stage reads the highest map, which comes from the same part
    parts = Parts(make_net(credit, contexts={0: 3}), [2])
    parts.backward(make_views())
    assert parts.told_when(1) == ("ran", 3)


def test_signals_wait_for_a_loss_that_reads_what_comes_from_above():
    credit = Credit.overlapping(4, 2)  # taps on stages 2, 3 and 4; the second reads the highest map
    parts = Parts(make_net(credit, contexts={1: 3}), [2, 3])
    parts.backward(make_views())
    assert [parts.told_when(part) for part in range(3)] == [None, "heard", ("ran", 3)]
