import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis.geometry import participation_ratio


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_it_is_the_eigenvalue_formula(n, d, seed):
    x = np.random.default_rng(seed).normal(size=(n, d)) + 3
    values = np.linalg.eigvalsh(np.cov(x.T, ddof=1).reshape(d, d))
    assert participation_ratio(x) == pytest.approx(values.sum() ** 2 / np.square(values).sum(), rel=1e-9)
    assert 1 <= participation_ratio(x) + 1e-9 <= min(n - 1, d) + 1e-6


def test_known_values():
    axes = np.concatenate([np.eye(5), -np.eye(5)])
    assert participation_ratio(axes) == pytest.approx(5)
    assert participation_ratio(np.outer(np.arange(6.0), [1, 2, 3])) == pytest.approx(1)
    assert participation_ratio(np.full((4, 3), 0.1)) == 0


@pytest.mark.parametrize("x", [np.zeros(3), np.zeros((1, 3)), np.full((3, 3), np.nan)])
def test_what_is_no_cloud_is_refused(x):
    with pytest.raises(ValueError, match="finite"):
        participation_ratio(x)
