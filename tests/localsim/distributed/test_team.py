"""Who does what: places among processes, groups of stages, what is refused, and what is agreed on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from tiny import tiny_config

from localsim.assembly import build_network
from localsim.config import Config
from localsim.distributed.launch import Place, find_place
from localsim.distributed.messages import Channel, exchange, packed, unpacked
from localsim.distributed.team import Team, join, stage_groups
from localsim.errors import UserError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables", [TORCHRUN, SLURM])
def test_the_place_is_what_the_launcher_says(variables):
    assert find_place(variables) == Place(rank=3, size=8, local_rank=1)


@pytest.mark.parametrize("variables", [{}, {k: v for k, v in SLURM.items() if not k.startswith("MASTER")}])
def test_a_process_that_nobody_launched_is_alone(variables):
    assert find_place(variables) is None


def test_one_process_is_alone_however_it_was_started():
    assert find_place({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": "x"}, "RANK is 'x'; allowed: a number"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is None"),
        ({"MASTER_PORT": None}, "RANK is set but MASTER_PORT is not"),
        ({"RANK": "8"}, "RANK is 8; allowed: 0 to WORLD_SIZE - 1, which is 7"),
    ],
)
def test_incomplete_variables_are_a_sentence(change, told):
    variables = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(UserError, match=told):
        find_place(variables)


@pytest.mark.parametrize(
    ("parallel", "processes", "stages", "groups"),
    [("data", 8, 4, 1), ("blocks", 4, 4, 4), ("blocks", 2, 4, 2), ("blocks", 8, 4, 4), ("blocks:2", 8, 4, 2)],
)
def test_groups_of_stages(parallel, processes, stages, groups):
    assert stage_groups(parallel, processes, stages) == groups


@pytest.mark.parametrize(
    ("parallel", "processes", "stages", "told"),
    [
        ("rows", 2, 4, "unknown parallel 'rows'; allowed: data, blocks, blocks:P"),
        ("blocks:0", 2, 4, "unknown parallel 'blocks:0'"),
        ("blocks", 1, 4, "parallel blocks needs several processes; start .* or let one go on with --parallel data"),
        ("blocks", 6, 4, "cannot divide 4 stages among 6 processes; allowed: blocks:P with P of 1, 2, 3"),
        ("blocks:8", 8, 4, "allowed: blocks:P with P of 1, 2, 4"),
    ],
)
def test_groups_that_cannot_be(parallel, processes, stages, told):
    with pytest.raises(UserError, match=told):
        stage_groups(parallel, processes, stages)


def arranged(size: int, config: Config, num_stages: int = 3) -> Team:
    team = Team(Place(1, size, 1))
    team.arrange(config, num_stages)
    return team


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"compile": True}, "compile True cannot be had on 2 processes"),
        ({"schedule": "sequential", "feature_cache": True}, "feature_cache True cannot be had on 2 processes"),
        ({"schedule": "sequential", "parallel": "blocks"}, "schedule sequential leaves nothing to do side by side"),
        (
            {"rule": "deep_supervision", "views": 40, "parallel": "blocks"},
            "views is 40; allowed under blocks: 31 or less",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings, told):
    with pytest.raises(UserError, match=told):
        arranged(2, tiny_config(**settings))


def test_direct_feedback_is_not_sent_from_where_nothing_is_trained():
    """Its errors are made where the taps are, for the layers that hear them."""
    net = build_network(config := tiny_config("loco", transport="direct_feedback", parallel="blocks:2"))
    for stage in list(net.stages)[1:]:
        stage.requires_grad_(False)
    team = arranged(2, config)
    with pytest.raises(
        UserError, match=r"^stages 2 to 3 have nothing to train, and direct feedback sends nothing down"
    ):
        team.groups = (range(1), range(1, 3))
        team.take_part(net)


def test_a_batch_needs_two_images_for_every_share():
    with pytest.raises(UserError, match="batch_size is 8; allowed on 5 shares: 10 or more"):
        arranged(5, tiny_config())


def test_shares_and_stages_of_a_process():
    team = arranged(2, tiny_config())
    assert (team.copy, team.copies, team.groups) == (1, 2, None)
    team = arranged(2, tiny_config(parallel="blocks"))
    assert team.groups is not None
    assert (team.copies, [stage for run in team.groups for stage in run]) == (1, [0, 1, 2])


# -- messages ---------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_packed_comes_out_again(value):
    assert unpacked(packed(value)) == value


def tensors() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, 5, 6, generator=draw)
    return [
        maps,
        maps.contiguous(memory_format=torch.channels_last),
        maps.double()[:, ::2],
        maps.bfloat16(),
        torch.arange(7),
        torch.tensor(2.5),
        torch.empty(0, 3),
    ]


def send_or_receive(rank: int, size: int) -> bool:
    with join(30):
        channel = Channel(1 - rank, torch.device("cpu"))
        if rank == 0:
            for number in range(3):
                channel.send(tensors(), [number, -1])
            channel.flush()
            return exchange({"rank": rank}, size) == [{"rank": 0}, {"rank": 1}]
        for number in range(3):
            found, notes = channel.receive()
            assert notes == [number, -1]
            for ours, theirs in zip(tensors(), found, strict=True):
                assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
            assert found[1].is_contiguous(memory_format=torch.channels_last) and not found[1].is_contiguous()
        return exchange({"rank": rank}, size) == [{"rank": 0}, {"rank": 1}]


def test_messages_keep_values_kinds_layouts_and_order():
    assert on_processes(2, send_or_receive) == [True, True]


def fail_on_one(rank: int, size: int, failing: tuple[int, ...]) -> tuple[str, bool]:
    with join(30) as team:
        try:
            with team.together():
                if rank in failing:
                    raise UserError("no such file")
        except UserError as error:
            return str(error), getattr(error, "said_elsewhere", False)
        return "went on", False


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ((), [("went on", False)] * 2),
        ((1,), [("process 1 of 2: no such file", True), ("no such file", False)]),
        ((0, 1), [("no such file", False), ("no such file", True)]),
    ],
)
def test_what_fails_on_one_process_fails_on_all_and_is_said_once(failing, told):
    assert on_processes(2, fail_on_one, failing) == told
