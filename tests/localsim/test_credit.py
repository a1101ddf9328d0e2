import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.credit import Credit
from localsim.errors import UserError


def table(text: str) -> np.ndarray:
    return np.array([[0 if c == "." else float(c) for c in row.split()] for row in text.strip().splitlines()])


@pytest.mark.parametrize(
    ("credit", "taps", "matrix"),
    [
        (Credit.end_to_end(4), (3,), "1 1 1 1"),
        (Credit.blockwise(4), (0, 1, 2, 3), "1 . . .\n. 1 . .\n. . 1 .\n. . . 1"),
        (Credit.overlapping(4), (1, 2, 3), "1 1 . .\n. 1 1 .\n. . 1 1"),
        (Credit.overlapping(4, reach=3), (2, 3), "1 1 1 .\n. 1 1 1"),
        (Credit.chunked(4, 2), (1, 3), "1 1 . .\n. . 1 1"),
        (Credit.chunked(5, 2), (1, 3, 4), "1 1 . . .\n. . 1 1 .\n. . . . 1"),
        (Credit.interlocking(4, 2), (0, 1, 2, 3), ". . . .\n1 . . .\n. 1 . .\n. . 1 1"),
        (Credit.deep_supervision(4), (0, 1, 2, 3), "1 . . .\n1 1 . .\n1 1 1 .\n1 1 1 1"),
        (Credit.banded(3, 2), (0, 1, 2), "1 . .\n1 1 .\n. 1 1"),
    ],
)
def test_constructors_draw_the_published_matrices(credit, taps, matrix):
    assert credit.taps == taps
    np.testing.assert_array_equal(credit.matrix, table(matrix))


def test_special_cases_coincide():
    assert Credit.overlapping(2, reach=2) == Credit.end_to_end(2)
    assert Credit.overlapping(5, reach=5) == Credit.end_to_end(5)
    assert Credit.chunked(5, 5) == Credit.end_to_end(5)
    assert Credit.chunked(5, 1) == Credit.blockwise(5) == Credit.interlocking(5, 1) == Credit.overlapping(5, 1)
    assert Credit.untrained(3).num_taps == 0


@pytest.mark.parametrize(
    ("matrix", "taps", "message"),
    [
        ([[1, 1]], (0,), r"credit\[0, 1\] is 1, but tap 0 reads stage 0"),
        ([[-1, 0]], (1,), r"credit\[0, 0\] is -1"),
        ([[float("nan"), 0]], (1,), r"credit\[0, 0\] is nan"),
        ([[1, 0], [0, 1]], (0,), "2 rows but 1 taps"),
        ([[1, 0]], (2,), "tap 0 reads stage 2; allowed: 0 to 1"),
        ([[1, 0], [1, 0]], (1, 0), "from the bottom up"),
        ([1, 2], (0,), "table with at least one stage"),
        ([["a"]], (0,), "rectangular table of numbers"),
    ],
)
def test_errors_name_the_offending_entry(matrix, taps, message):
    with pytest.raises(UserError, match=message):
        Credit(matrix, taps)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Credit.overlapping(4, 5),
        lambda: Credit.banded(4, 0),
        lambda: Credit.chunked(4, 5),
        lambda: Credit.interlocking(4, 0),
        lambda: Credit.blockwise(0),
    ],
)
def test_constructors_refuse_what_does_not_fit(make):
    with pytest.raises(UserError, match=r"allowed: 1"):
        make()


def test_matrix_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="read-only"):
        Credit.blockwise(2).matrix[0, 0] = 3


def test_gradient_path_in_stages_and_unit_blocks():
    units = [4, 4, 6, 3]  # ResNet-50: stem + 3 blocks, 4, 6, 3
    assert Credit.end_to_end(4).longest_path(units) == 17
    assert Credit.blockwise(4).longest_path(units) == 6
    assert Credit.overlapping(4).longest_path(units) == 10
    assert [Credit.overlapping(4).path_to(stage, units) for stage in range(4)] == [8, 10, 9, 3]
    # interlocking changes stage 1 from the tap on stage 2: the path runs through stage 2 although its entry is 0
    assert Credit.interlocking(4, 2).path_to(0, units) == 8
    assert Credit.untrained(4).longest_path(units) == 0
    with pytest.raises(UserError, match="3 unit counts were given for 4 stages"):
        Credit.blockwise(4).longest_path([1, 2, 3])


def test_graphs_alive():
    assert Credit.blockwise(5).max_alive() == 1
    assert Credit.overlapping(5, 2).max_alive() == 2
    assert Credit.overlapping(5, 3).max_alive() == 3
    assert Credit.end_to_end(5).max_alive() == 5
    assert Credit.deep_supervision(5).max_alive() == 5
    assert Credit.untrained(5).max_alive() == 0


@st.composite
def credits(draw) -> Credit:
    num_stages = draw(st.integers(1, 6))
    taps = sorted(draw(st.lists(st.integers(0, num_stages - 1), max_size=5)))
    weight = st.one_of(st.just(0.0), st.floats(0, 8, allow_subnormal=False))
    rows = [[draw(weight) if stage <= tap else 0.0 for stage in range(num_stages)] for tap in taps]
    return Credit(np.array(rows).reshape(len(taps), num_stages), tuple(taps))


@settings(deadline=None)
@given(credits())
def test_round_trip_through_a_configuration_file(credit):
    again = Credit.from_config(json.loads(json.dumps(credit.to_config())))
    assert again == credit
    assert hash(again) == hash(credit)


@settings(deadline=None)
@given(credits())
def test_longest_path_is_bounded_by_depth_and_alive_graphs_by_stages(credit):
    assert 0 <= credit.longest_path() <= credit.num_stages
    assert credit.longest_path() <= credit.max_alive() or credit.longest_path() == 0


def test_text_shows_stages_from_one():
    assert str(Credit.overlapping(3)).splitlines() == [
        "credit        1   2   3   (stage)",
        "  tap on   2   1   1   .",
        "  tap on   3   .   1   1",
    ]
    assert "nothing is trained" in str(Credit.untrained(2))


def test_a_broken_configuration_entry_is_named():
    with pytest.raises(UserError, match="lacks taps"):
        Credit.from_config({"num_stages": 2, "matrix": []})
