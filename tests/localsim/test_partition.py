from __future__ import annotations

import re
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from localsim.backbones import Backbone, UnitBlock, build_backbone
from localsim.errors import UserError
from localsim.partition import cut_table, format_cut_table, partition

built = cache(build_backbone)


@pytest.fixture
def resnet50():
    return built("resnet50")


def toy(widths, natural_cuts=(0,)):
    """A row of convolution + ReLU units; widths below zero close the unit with a max-pool."""
    units = []
    for i, (before, after) in enumerate(pairwise([3, *widths])):
        parts = [nn.Conv2d(abs(before), abs(after), 3, padding=1), nn.ReLU(inplace=True)]
        if after < 0:
            parts.append(nn.MaxPool2d(2, ceil_mode=True))
        units.append(UnitBlock(f"unit{i}", [(f"unit{i}.{j}", part) for j, part in enumerate(parts)]))
    return Backbone("toy", tuple(units), natural_cuts)


def every_partition(num_units, num_stages):
    for later in combinations(range(1, num_units), num_stages - 1):
        yield tuple(range(a, b) for a, b in pairwise([0, *later, num_units]))


def held_by_a_real_forward(units, x):
    """Bytes that autograd really saves on the CPU for a stage that starts from the detached `x`; and its output."""
    own = {t.untyped_storage().data_ptr() for unit in units for t in (*unit.parameters(), *unit.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for unit in units:
            x = unit(x)
    return sum(size for _, size in saved.values()), x


def largest(backbone, stages, image_size):
    return max(row.held_bytes for row in cut_table(backbone, stages, image_size))


def test_four_stages_of_resnet50_are_its_own(resnet50):
    natural = (range(4), range(4, 8), range(8, 14), range(14, 17))
    for granularity in (None, 4, "4", "stage"):
        assert partition(resnet50, granularity) == natural
    assert partition(resnet50, "network") == partition(resnet50, 1) == (range(17),)
    assert partition(resnet50, "block") == partition(resnet50, 17) == tuple(range(i, i + 1) for i in range(17))
    # one stage per residual block, the stem with the first
    assert partition(resnet50, 16) == (range(2), *(range(i, i + 1) for i in range(2, 17)))
    assert partition(resnet50, 3) == (range(6), range(6, 12), range(12, 17))


def test_natural_stages_of_vgg_are_its_pooling_groups():
    stages = partition(built("vgg11"), 5)
    assert stages == (range(1), range(1, 2), range(2, 4), range(4, 6), range(6, 8))


@settings(deadline=None)
@given(num_units=st.integers(1, 60), data=st.data())
def test_other_numbers_of_stages_are_as_even_as_possible(num_units, data):
    num_stages = data.draw(st.integers(1, num_units))
    units = tuple(UnitBlock(f"unit{i}", [(f"unit{i}", nn.Identity())]) for i in range(num_units))
    stages = partition(Backbone("toy", units, (0,)), num_stages)
    assert len(stages) == num_stages
    assert [i for stage in stages for i in stage] == list(range(num_units))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, 12).flatmap(lambda c: st.sampled_from([c, c, -c])), min_size=1, max_size=6),
    data=st.data(),
)
def test_balanced_cuts_are_the_best_of_all(widths, data):
    backbone = toy(widths)
    num_stages = data.draw(st.integers(1, len(widths)))
    found = partition(backbone, num_stages, "balanced", image_size=12)
    everything = list(every_partition(len(widths), num_stages))
    assert found in everything
    assert largest(backbone, found, 12) == min(largest(backbone, stages, 12) for stages in everything)


def test_balanced_cuts_of_resnet50_hold_less_than_its_natural_stages(resnet50):
    balanced = partition(resnet50, 4, "balanced")
    assert partition(resnet50, None, "balanced") == partition(resnet50, "stage", "balanced") == balanced
    assert largest(resnet50, balanced, 224) < 0.7 * largest(resnet50, partition(resnet50, 4), 224)


def test_balanced_cuts_follow_the_image_size():
    # small images make the fixed cost of batch statistics weigh more
    backbone = built("resnet18")
    assert partition(backbone, 4, "balanced", image_size=224) != partition(backbone, 4, "balanced", image_size=8)


def test_balanced_has_no_choice_with_one_stage_or_one_unit_each():
    assert partition(toy([4, 4, 4]), "block", "balanced") == (range(1), range(1, 2), range(2, 3))
    assert partition(toy([4, 4, 4]), "network", "balanced") == (range(3),)


@pytest.mark.parametrize("cuts", ["layer2.0,layer3.0,layer4.0", " layer2.0, layer3.0 ,layer4.0"])
@pytest.mark.parametrize("granularity", [None, 4, "4", "stage"])
def test_listed_cuts_begin_the_stages(resnet50, cuts, granularity):
    assert partition(resnet50, granularity, cuts) == partition(resnet50, "stage")


def test_listed_cuts_need_not_be_natural(resnet50):
    assert partition(resnet50, cuts="layer1.0,layer4.2") == (range(1), range(1, 16), range(16, 17))


ALLOWED = "allowed: 1 to 17, network, stage, block"


@pytest.mark.parametrize(
    ("granularity", "cuts", "message"),
    [
        (99, "auto", f"granularity 99 is finer than the 17 unit blocks of resnet50; {ALLOWED}"),
        ("99", "balanced", f"granularity 99 is finer than the 17 unit blocks of resnet50; {ALLOWED}"),
        (0, "auto", f"granularity 0 is no number of stages of resnet50; {ALLOWED}"),
        (-3, "auto", f"granularity -3 is no number of stages of resnet50; {ALLOWED}"),
        ("-3", "auto", f"granularity '-3' is no number of stages of resnet50; {ALLOWED}"),
        ("layers", "auto", f"granularity 'layers' is no number of stages of resnet50; {ALLOWED}"),
        (2.0, "auto", f"granularity 2.0 is no number of stages of resnet50; {ALLOWED}"),
        (True, "auto", f"granularity True is no number of stages of resnet50; {ALLOWED}"),
        (
            None,
            "stem,layer2.0",
            "cuts 'stem,layer2.0' lists stem, where the first stage of resnet50 begins anyway; leave it out",
        ),
        (
            None,
            "layer2.0,layer2.0",
            "cuts 'layer2.0,layer2.0' lists layer2.0 twice; allowed: every unit block once",
        ),
        (
            None,
            "layer3.0,layer2.0",
            "cuts 'layer3.0,layer2.0' lists layer2.0 after layer3.0, but it comes before it in resnet50; "
            "allowed: unit blocks once each, in the order of the network",
        ),
        (
            4,
            "layer2.0,layer3.0",
            "granularity 4 contradicts cuts 'layer2.0,layer3.0', which make 3 stages; allowed: 3, or no granularity",
        ),
        (99, "layer2.0", f"granularity 99 is finer than the 17 unit blocks of resnet50; {ALLOWED}"),
    ],
)
def test_wrong_cuts_are_refused_in_a_sentence(resnet50, granularity, cuts, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        partition(resnet50, granularity, cuts)


@pytest.mark.parametrize(("cuts", "name"), [("layer2", "layer2"), ("unit1,", ""), ("even", "even")])
def test_unknown_cuts_are_refused_with_the_unit_blocks_that_exist(cuts, name):
    message = f"toy has no unit block {name!r} to cut at; allowed: auto, balanced, or a comma list of unit1, unit2"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        partition(toy([1, 1, 1]), cuts=cuts)


def test_balanced_refuses_images_too_small_for_the_network():
    with pytest.raises(UserError, match="image size 16 is too small for vgg11: "):
        partition(built("vgg11"), 2, "balanced", image_size=16)


def test_cut_table_of_resnet50(resnet50):
    rows = cut_table(resnet50, partition(resnet50, 4), 225)
    assert [row.stage for row in rows] == [1, 2, 3, 4]
    assert [(row.first, row.last) for row in rows] == [
        ("stem", "layer1.2"),
        ("layer2.0", "layer2.3"),
        ("layer3.0", "layer3.5"),
        ("layer4.0", "layer4.2"),
    ]
    assert [row.num_units for row in rows] == [4, 4, 6, 3]
    assert [row.channels for row in rows] == [256, 512, 1024, 2048]
    assert [row.stride for row in rows] == [4, 8, 16, 32]
    assert [row.map_size for row in rows] == [(57, 57), (29, 29), (15, 15), (8, 8)]
    assert sum(row.num_parameters for row in rows) == 23_508_032


@pytest.mark.parametrize(("name", "size"), [("resnet50", 32), ("vgg11_bn", 32), ("vgg11", 40), ("resnet20", 32)])
@pytest.mark.parametrize("granularity", ["network", 3, "block"])
def test_held_bytes_are_those_of_a_real_stage(name, size, granularity):
    backbone = built(name)
    stages = partition(backbone, granularity)
    x = torch.randn(2, 3, size, size)
    for row, stage in zip(cut_table(backbone, stages, size), stages, strict=True):
        held, x = held_by_a_real_forward([backbone.units[i] for i in stage], x)
        assert row.held_bytes == held // 2


def test_table_is_aligned_text():
    backbone = toy([4, -8, 16])
    rows = cut_table(backbone, (range(2), range(2, 3)), 1024)
    # stage 1 keeps its input, two rectified maps and int64 pool indices; stage 2 its input and one rectified map
    mib = [12 + 16 + 32 + 16, 8 + 16]
    assert [row.held_bytes for row in rows] == [size * 2**20 for size in mib]
    assert format_cut_table(rows, [2, 1]) == "\n".join(
        [
            "stage  from   to     unit blocks  channels  stride      map  parameters  held MiB/image  gradient path",
            "    1  unit0  unit1            2         8       2  512x512         408           76.00              2",
            "    2  unit2  unit2            1        16       2  512x512       1,168           24.00              1",
        ]
    )
    assert "gradient path" not in format_cut_table(rows)
    with pytest.raises(ValueError, match="zip"):
        format_cut_table(rows, [1])
