"""CLAPP, CLAPP++ with direct feedback and LPL as a neuroscientist writes them down, against what the engine does.

The reference is numpy and knows no gradients: it runs the network forward, and changes every synapse by products of
what the two cells it joins have at hand. For synapse i -> j of one layer, summed over images, patches and positions s,

    Δw_ji = Σ (signal at the dendrite of cell j) × (ρ'(a_j,s) / S, if s is the largest of its pool) × x_i,s

where a_j is the potential of cell j, ρ the rectifier, x_i the layer's own input and S the number of positions that the
readout averages: the cell's activity for a patch (or an image) is z_j = mean over s of maxpool(ρ(a_j))_s. A bias is a
synapse with x = 1. Only the signal at the dendrite, an array like z, differs between the rules. The engine's `.grad` is
minus the change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from localsim import engine
from localsim.assembly import build
from localsim.network import LocalNetwork, Tap
from localsim.rng import keyed

NUM_IMAGES, KEY, NUM_LAYERS = 12, 11, 6
PATCH, STRIDE, GRID, SIZE = 16, 8, 4, 40
STEPS, SKIP = (1, 2), 1  # k + SKIP < GRID
TOLERANCE = 1e-10

Gate = Callable[[float, np.ndarray], np.ndarray]
Updates = dict[str, np.ndarray]


def hinge_gate(y: float, u: np.ndarray) -> np.ndarray:
    """The third factor of CLAPP: y is global to an image (fixation +1, saccade -1), times whether y u is below 1."""
    return y * (y * u < 1)


def always_open(y: float, u: np.ndarray) -> np.ndarray:
    """What CLAPP's third factor would be without its threshold: y."""
    return np.full_like(u, y)


@dataclass(frozen=True)
class Layer:
    """What one layer of cells has at hand, for n patches or images.

    `surround` is x, the 3 x 3 around each position (im2col), `(n, inputs, height, width, 3, 3)`. `sensitivity` is what
    potential adds to the cell's z, ρ'(a) / S or 0, `(n, cells, height, width)`. `z` is the mean output, `(n, cells)`.
    """

    surround: np.ndarray
    sensitivity: np.ndarray
    z: np.ndarray

    def change(self, dendrite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return Δw `(cells, inputs, 3, 3)` and Δb `(cells,)` for signals `(n, cells)` at the dendrites."""
        post = dendrite[:, :, None, None] * self.sensitivity
        return np.tensordot(post, self.surround, axes=([0, 2, 3], [0, 2, 3])), post.sum((0, 2, 3))


def respond(weight: np.ndarray, bias: np.ndarray, pooled: bool, x: np.ndarray) -> tuple[Layer, np.ndarray]:
    """Run one layer on `(n, inputs, height, width)`; return what it has at hand and its output map."""
    surround = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    potential = (np.tensordot(surround, weight, axes=([1, 4, 5], [1, 2, 3])) + bias).transpose(0, 3, 1, 2)
    out, slope = np.maximum(potential, 0), 1.0 * (potential > 0)
    if pooled:
        n, cells, height, width = out.shape
        pools = out.reshape(n, cells, height // 2, 2, width // 2, 2).swapaxes(3, 4).reshape(n, cells, -1, 4)
        wins = 1.0 * (np.arange(4) == pools.argmax(-1)[..., None])
        wins = wins.reshape(n, cells, height // 2, width // 2, 2, 2).swapaxes(3, 4)
        slope, out = slope * wins.reshape(out.shape), pools.max(-1).reshape(n, cells, height // 2, width // 2)
    return Layer(surround, slope / out[0, 0].size, out.mean((2, 3))), out


def forward(net: LocalNetwork, x: np.ndarray) -> list[Layer]:
    """Run all layers on patches or images `(n, 3, size, size)`."""
    layers = []
    for stage in net.stages:
        weight, bias = (p.detach().numpy() for p in stage.parameters())
        pooled = any(isinstance(part, torch.nn.MaxPool2d) for part in stage.modules())
        layer, x = respond(weight, bias, pooled, x)
        layers.append(layer)
    return layers


def cut(images: np.ndarray) -> np.ndarray:
    """Return all patches, `(n * rows * columns, 3, PATCH, PATCH)`."""
    views = sliding_window_view(images, (PATCH, PATCH), axis=(2, 3))[:, :, ::STRIDE, ::STRIDE]
    return views.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)


def ring() -> np.ndarray:
    """Return the other image of every image by the next draw: its neighbour in a shuffled ring."""
    order = torch.randperm(NUM_IMAGES).numpy()
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return other


def draws(tap: int, sampling: str) -> list[tuple[np.ndarray, list[tuple[float, np.ndarray]]]]:
    """Return for both views the other images, and for y = +1 and y = -1 how much every image counts."""
    drawn = []
    with keyed(KEY, "objective", tap):
        for _ in range(2):
            other = ring()
            if sampling == "both":
                counts = [(y, np.full(NUM_IMAGES, 1 / NUM_IMAGES)) for y in (1.0, -1.0)]
            else:
                fixates = torch.rand(NUM_IMAGES).numpy() < 0.5
                counts = [(y, side / max(side.sum(), 1)) for y, side in ((1.0, fixates), (-1.0, ~fixates))]
            drawn.append((other, counts))
    return drawn


def network(rule: str, seed: int = 0, **settings: Any) -> LocalNetwork:
    """Return a rule's network of 8 to 20 cells per layer in float64, with biases other than zero."""
    net = build(rule, preset="quick", backbone="vgg6", backbone_width=0.02, **settings).double()
    assert len(net.stages) == len(net.taps) == NUM_LAYERS
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.stages.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def random_views(size: int, seed: int = 1) -> list[np.ndarray]:
    """Return two views `(NUM_IMAGES, 3, size, size)` of the same coloured tiles; noise alone would all look alike."""
    rng = np.random.default_rng(seed)
    shape = NUM_IMAGES, 3, size // STRIDE, size // STRIDE
    shared = rng.normal(size=shape)
    tiles = [np.kron(shared + 0.5 * rng.normal(size=shape), np.ones((STRIDE, STRIDE))) for _ in range(2)]
    return [3 * view + rng.normal(size=view.shape) for view in tiles]


def spread_scores(tap: Tap, z: np.ndarray, context: np.ndarray, seed: int) -> None:
    """Draw the tap's matrices W so that scores u = z · W c have mean 0 and deviation 1.5: gates open and shut."""
    rng = np.random.default_rng(seed)
    middle = np.outer(z.mean(0), context.mean(0))

    def scores(w: np.ndarray) -> np.ndarray:
        return np.einsum("bj,ji,bi->b", z, w, context)

    with torch.no_grad():
        for matrix in tap.head.parameters():
            w = rng.normal(size=tuple(matrix.shape[:2]))
            w -= middle * scores(w).mean() / scores(middle).mean()
            matrix.copy_(torch.tensor(1.5 * w / scores(w).std()).reshape(matrix.shape))


def engine_updates(net: LocalNetwork, views: list[np.ndarray], key: int = KEY) -> Updates:
    """Return minus the engine's gradient of every parameter."""
    net.zero_grad(set_to_none=True)
    engine.backward(net, *map(torch.tensor, views), key=key)
    return {name: -parameter.grad.numpy() for name, parameter in net.named_parameters() if parameter.grad is not None}


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the relative difference, in the Euclidean norm."""
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_equal(expected: Updates, made: Updates) -> None:
    """Assert that exactly the expected parameters change, each of them, and by what is expected."""
    assert expected.keys() == made.keys()
    assert all(np.abs(change).max() > 0 for change in made.values())
    errors = {name: error(expected[name], made[name]) for name in made}
    assert all(e < TOLERANCE for e in errors.values()), errors


def of_layer(index: int, by_view: list[tuple[np.ndarray, np.ndarray]]) -> Updates:
    """Return the changes of a layer's weight and bias, summed over views, by name."""
    names = [f"stages.{index}.units.0.parts.0.{part}" for part in ("weight", "bias")]
    return {name: np.sum(parts, axis=0) for name, parts in zip(names, zip(*by_view, strict=True), strict=True)}


def clapp_updates(
    net: LocalNetwork, views: list[np.ndarray], sampling: str, asymmetric: bool, gate: Gate = hinge_gate
) -> Updates:
    """Return the changes that CLAPP's rule makes; the tests below state it."""
    seen = [forward(net, cut(view)) for view in views]
    updates: Updates = {}
    for index, tap in enumerate(net.taps):
        matrices = {name: p.detach().numpy()[:, :, 0, 0] for name, p in tap.head.named_parameters()}
        changes = {name: np.zeros_like(w) for name, w in matrices.items()}
        by_view = []
        for layers, (other, counts) in zip(seen, draws(index, sampling), strict=True):
            layer = layers[index]
            z = layer.z.reshape(NUM_IMAGES, GRID, GRID, -1)
            dendrite = np.zeros_like(z)
            for k in STEPS:
                down = k + SKIP
                to_target = f"matrices.{k - 1}.weight"
                to_context = f"context_matrices.{k - 1}.weight" if asymmetric else to_target
                context = z[:, : GRID - down]
                places = len(views) * len(STEPS) * context.shape[1] * GRID
                for y, share in counts:
                    source = np.arange(NUM_IMAGES) if y > 0 else other
                    target = z[source, down:]
                    rate = share[:, None, None] / places

                    prediction = context @ matrices[to_target].T
                    third = rate * gate(y, (target * prediction).sum(-1))
                    # a ring: each image is the other of one only, so no entry is added to twice
                    dendrite[source, down:] += third[..., None] * prediction
                    changes[to_target] += np.einsum("brs,brsj,brsi->ji", third, target, context)

                    retrodiction = target @ matrices[to_context]
                    third = rate * gate(y, (retrodiction * context).sum(-1))
                    dendrite[:, : GRID - down] += third[..., None] * retrodiction
                    if asymmetric:
                        changes[to_context] += np.einsum("brs,brsj,brsi->ji", third, target, context)
            by_view.append(layer.change(dendrite.reshape(layer.z.shape)))
        updates |= of_layer(index, by_view)
        updates |= {f"taps.{index}.head.{name}": change[:, :, None, None] for name, change in changes.items()}
    return updates


def clapp(sampling: str, asymmetric: bool = False) -> tuple[LocalNetwork, list[np.ndarray]]:
    net = network(
        "clapp",
        patches=f"{PATCH}:{STRIDE}",
        image_size=SIZE,
        objective_options={"sampling": sampling, "asymmetric": asymmetric},
        head_options={"asymmetric": asymmetric},
    )
    views = random_views(SIZE)
    for index, layer in enumerate(forward(net, cut(views[0]))):
        spread_scores(net.taps[index], layer.z, layer.z, seed=index)
    return net, views


@pytest.mark.parametrize("sampling", ["both", "either"])
def test_clapp_is_a_three_factor_rule(sampling):
    """One matrix per step (Illing et al. 2021): with a context c, z at row r, and a target z, that at row r + k + skip,

        Δw_ji ∝ γ (W_k c)_j    ρ'(a_j) x_i   at the target: the dendrite of j carries the prediction
        Δw_ji ∝ γ (W_k^T z)_j  ρ'(a_j) x_i   at the context: and, later or earlier, the same backwards
        ΔW_k  ∝ γ z c^T

        γ = y 1[y u < 1],    u = z^T W_k c

    y = +1 with the image's own target, y = -1 with that of one other image, the same in all places and steps. Every
    place of R_k, every image that counts for that y, every step and every view has equal weight: 1 / (R_k n_y K V).
    "both": all images count for both y. "either": a coin per image and view decides for which.
    """
    net, views = clapp(sampling)
    assert_equal(clapp_updates(net, views, sampling, asymmetric=False), engine_updates(net, views))


@pytest.mark.parametrize("sampling", ["both", "either"])
def test_clapp_without_weight_transport_is_a_three_factor_rule(sampling):
    """Two matrices per step (Illing et al. 2021): nothing is carried by a transpose that it did not learn.

        Δw_ji ∝ γ1 (W1_k c)_j    ρ'(a_j) x_i   at the target,     ΔW1_k ∝ γ1 z c^T,    γ1 = y 1[y z^T W1_k c < 1]
        Δw_ji ∝ γ2 (W2_k^T z)_j  ρ'(a_j) x_i   at the context,    ΔW2_k ∝ γ2 z c^T,    γ2 = y 1[y z^T W2_k c < 1]

    W2_k^T is the matrix from z to the dendrites of c, learned by the Hebbian product of just these two. Weights of
    places, images, steps and views as with one matrix; both matrices share the other image and the coin.
    """
    net, views = clapp(sampling, asymmetric=True)
    assert_equal(clapp_updates(net, views, sampling, asymmetric=True), engine_updates(net, views))


def test_clapp_needs_its_gate_and_its_own_draws():
    """With γ = y in place of γ = y 1[y u < 1], or the draws of another key, every layer and matrix differs."""
    net, views = clapp("either")
    made = engine_updates(net, views)
    ungated = clapp_updates(net, views, "either", asymmetric=False, gate=always_open)
    for other in (ungated, engine_updates(net, views, key=KEY + 1)):
        assert min(error(other[name], made[name]) for name in made) > 0.01


def feedback_updates(net: LocalNetwork, views: list[np.ndarray], lateral: bool, gate: Gate = hinge_gate) -> Updates:
    """Return the changes that CLAPP++ with direct feedback makes; the test below states them."""
    seen = [forward(net, view) for view in views]
    updates: Updates = {}
    for index, tap in enumerate(net.taps):
        (matrix,) = (p.detach().numpy() for p in tap.head.parameters())
        dendrites = [np.zeros_like(layers[index].z) for layers in seen]
        matrix_change = np.zeros_like(matrix)
        for view, (other, counts) in enumerate(draws(index, "both")):
            context = np.concatenate([seen[view][-1].z, *[seen[view][index].z] * lateral], axis=1)
            prediction = context @ matrix.T
            for y, share in counts:
                source = np.arange(NUM_IMAGES) if y > 0 else other
                target = seen[1 - view][index].z[source]
                third = share / len(views) * gate(y, (target * prediction).sum(1))
                dendrites[1 - view][source] += third[:, None] * prediction
                matrix_change += np.einsum("b,bj,bi->ji", third, target, context)
        by_view = [layers[index].change(dendrite) for layers, dendrite in zip(seen, dendrites, strict=True)]
        updates |= of_layer(index, by_view)
        updates[f"taps.{index}.head.matrix.weight"] = matrix_change
    return updates


@pytest.mark.parametrize("lateral", [False, True])
def test_direct_feedback_is_a_three_factor_rule(lateral):
    """The context is the activity c of the highest layer for the other view; nothing changes at the context.

        Δw_ji ∝ γ (B c)_j ρ'(a_j) x_i,    ΔB ∝ γ z c^T,    γ = y 1[y z^T B c < 1]

    (Wu et al. 2026). Both views are targets in turn, images and views have equal weight: 1 / (n V). With `lateral`, c
    is followed by the layer's own activity for that other view, through more columns of B.
    """
    net = network("clapp_dfb", image_size=32, head_options={"lateral": lateral})
    views = random_views(32)
    of_one, of_other = (forward(net, view) for view in views)
    for index, tap in enumerate(net.taps):
        context = np.concatenate([of_one[-1].z, *[of_one[index].z] * lateral], axis=1)
        spread_scores(tap, of_other[index].z, context, seed=index)
    made = engine_updates(net, views)
    assert_equal(feedback_updates(net, views, lateral), made)
    ungated = feedback_updates(net, views, lateral, gate=always_open)
    assert min(error(ungated[name], made[name]) for name in made) > 0.01


def statistics(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance (n - 1) of every cell over the images."""
    return z.mean(0), z.var(0, ddof=1)


def lpl_updates(
    net: LocalNetwork,
    views: list[np.ndarray],
    known: list[tuple[np.ndarray, np.ndarray]] | None = None,
    shuffled: bool = False,
    weights: tuple[float, float, float] = (1.0, 1.0, 10.0),
) -> Updates:
    """Return the changes that LPL makes with the known statistics of every layer, or those of each view itself."""
    (pull, push, decorrelation), eps = weights, 1e-4
    seen = [forward(net, view) for view in views]
    updates: Updates = {}
    for index in range(NUM_LAYERS):
        partner = np.arange(NUM_IMAGES)
        if shuffled:
            with keyed(KEY, "objective", index):
                partner = ring()
        z1, z2 = (layers[index].z for layers in seen)
        num_cells = z1.shape[1]
        by_view = []
        # the second view is pulled by the image whose partner it is
        for layers, z, before in zip(seen, (z1, z2), (z2[partner], z1[np.argsort(partner)]), strict=True):
            mean, var = known[index] if known else statistics(z)
            deviation = z - mean
            covariance = deviation.T @ deviation / (NUM_IMAGES - 1)
            np.fill_diagonal(covariance, 0)
            predictive = pull * 2 * (before - z) / (NUM_IMAGES * num_cells)
            hebbian = push * deviation / (var + eps) / ((NUM_IMAGES - 1) * num_cells)
            lateral = deviation @ covariance / ((NUM_IMAGES - 1) * (num_cells**2 - num_cells))
            by_view.append(layers[index].change(predictive + hebbian - 2 * decorrelation * lateral))
        updates |= of_layer(index, by_view)
    return updates


@pytest.mark.parametrize("positives", ["augmented", "shuffled"])
def test_lpl_is_a_predictive_and_hebbian_rule(positives):
    """LPL with the statistics of the batch (Halvagal & Zenke 2023, Methods; the code's normalisation):

        Δw_ji ∝ [ 2 pull (z'_j - z_j) / (n M) + push (z_j - m_j) / ((v_j + eps) (n - 1) M)
                  - 2 decorrelation Σ_{k ≠ j} C_jk (z_k - m_k) / ((n - 1) (M² - M)) ] ρ'(a_j) x_i

    for both views of n images, where z' is the activity of the same M cells for the other view (of a random other image
    if shuffled), and m, v, C are mean, variance and covariance of the view over the images.
    """
    net, views = network("lpl", image_size=32, objective_options={"positives": positives}), random_views(32)
    made = engine_updates(net, views)
    assert_equal(lpl_updates(net, views, shuffled=positives == "shuffled"), made)
    for weights in ((0.0, 1.0, 10.0), (1.0, 0.0, 10.0), (1.0, 1.0, 0.0)):
        mutilated = lpl_updates(net, views, shuffled=positives == "shuffled", weights=weights)
        assert min(error(mutilated[name], made[name]) for name in made) > 0.01, weights


def test_lpl_with_statistics_of_the_step_before_is_local_in_time():
    """The same rule, but no cell needs the batch at hand for its own statistics (head `stale_statistics`):

        Δw_ji ∝ [ 2 pull (z'_j - z_j) / (n M) + push (z_j - m_j) / ((v_j + eps) (n - 1) M)
                  - 2 decorrelation Σ_{k ≠ j} C_jk (z_k - m_k) / ((n - 1) (M² - M)) ] ρ'(a_j) x_i
        C_jk = Σ_b (z_bj - m_j) (z_bk - m_k) / (n - 1)

    where m and v are the means, over both views of the step before, of mean and variance; the first step has its own.
    """
    net = network("lpl", image_size=32, head="stale_statistics")
    first, second = random_views(32, seed=1), random_views(32, seed=2)
    assert_equal(lpl_updates(net, first), engine_updates(net, first))
    of_first = zip(*(map(statistics, (layer.z for layer in forward(net, view))) for view in first), strict=True)
    known = [((m1 + m2) / 2, (v1 + v2) / 2) for (m1, v1), (m2, v2) in of_first]
    made = engine_updates(net, second)
    assert_equal(lpl_updates(net, second, known), made)
    of_now = lpl_updates(net, second)
    assert min(error(of_now[name], made[name]) for name in made) > 0.01
