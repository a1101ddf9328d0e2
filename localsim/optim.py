"""Optimisers and the learning-rate schedule: LARS as published with Barlow Twins, SGD, AdamW; warm-up and cosine."""

# torch documents its _foreach functions, underscore or not
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from localsim.errors import UserError, one_of

OPTIMIZERS = ("lars", "sgd", "adamw")
LARGE = 2**22
"""Entries that LARS makes a copy of at a time: 16 MB of float32. On the CPU larger weights are stepped uncopied where
their layout and norms allow it, see `_norms`."""


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: every weight's step is proportional to that weight's own norm.

    For a parameter w of two or more dimensions with gradient g and momentum buffer mu (zero at first)::

        g  <- g + weight_decay * w
        g  <- g * eta * |w| / |g|      (unscaled where either norm is zero)
        mu <- momentum * mu + g
        w  <- w - lr * mu

    Parameters of at most one dimension (biases, normalisation gains) get neither weight decay nor scaling. Parameters
    without a gradient are skipped, their momentum untouched, so that stages may be stepped one at a time. Gradients are
    left as they were. Of large weights on the CPU, scale and decay go into the momentum directly, with |g| from inner
    products: the same to rounding, without a copy of the gradient. Norms are taken row by row first, see `_length`.

    Source: You, Gitman & Ginsburg 2017, "Large batch training of convolutional networks", Algorithm 1; this order of
    operations is that of the released Barlow Twins code (Zbontar et al. 2021), whose test for the exempted parameters
    is "exactly one dimension": it differs for scalars only, of which its networks have none.

    Raises:
        UserError: a hyper-parameter is negative or not finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        for name, value in defaults.items():
            _not_negative(name, value)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step over all parameters that have a gradient; return the closure's loss, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [weight for weight in group["params"] if weight.grad is not None]
            self._update([weight for weight in held if weight.ndim <= 1], group, scaled=False)
            others = [weight for weight in held if weight.ndim > 1 and not self._update_large(weight, group)]
            for batch in _batches(others):
                self._update(batch, group, scaled=True)
        return loss

    def _momentum(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(weight)
        return state["mu"]

    def _update(self, weights: list[torch.Tensor], group: dict[str, Any], *, scaled: bool) -> None:
        """Take the step of whole tensors, together."""
        if not weights:
            return
        changes = [cast(torch.Tensor, weight.grad) for weight in weights]
        if scaled:
            changes = list(torch._foreach_add(changes, weights, alpha=group["weight_decay"]))
            sizes, lengths = _lengths(weights), _lengths(changes)
            # torch.where instead of `if`: a branch on the norms would wait for the device at every parameter
            scales = torch.where((sizes > 0) & (lengths > 0), group["eta"] * sizes / lengths, torch.ones_like(sizes))
            torch._foreach_mul_(changes, list(scales))
        momenta = [self._momentum(weight) for weight in weights]
        # no fused kernel: torch's reads memory in order, and the layouts of a weight and its gradient may differ
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, changes)
        torch._foreach_add_(weights, momenta, alpha=-group["lr"])

    def _update_large(self, weight: torch.Tensor, group: dict[str, Any]) -> bool:
        """Take the step of a large weight on the CPU, where memory is what it waits for; False leaves it undone."""
        gradient, decay = cast(torch.Tensor, weight.grad), group["weight_decay"]
        norms = _norms(weight, gradient, decay)
        if norms is None:
            return False
        scale = group["eta"] * norms[0] / norms[1]
        momentum = self._momentum(weight)
        momentum.mul_(group["momentum"]).add_(gradient, alpha=scale).add_(weight, alpha=scale * decay)
        weight.add_(momentum, alpha=-group["lr"])
        return True


def _lengths(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return |x| of every tensor."""
    if tensors[0].device.type == "cpu":
        return torch.stack([_length(tensor) for tensor in tensors])
    return torch.stack(torch._foreach_norm(tensors))


def _length(tensor: torch.Tensor) -> torch.Tensor:
    """Return |x| by way of its rows: on the CPU torch's norm of 67 M float32 numbers is 0.6 % off, as it adds them up
    one after the other."""
    norm = torch.linalg.vector_norm
    return norm(norm(tensor, dim=tuple(range(1, tensor.ndim))))


def _norms(weight: torch.Tensor, gradient: torch.Tensor, decay: float) -> tuple[float, float] | None:
    """Return |w| and |g + decay * w| of a large weight on the CPU without forming the sum.

    |g + decay w|^2 = |g|^2 + 2 decay g.w + decay^2 |w|^2

    None where a copy costs little (few entries, or another device), for layouts that have no dot product, where the
    terms cancel to less than half, so that rounding would show, and where a norm is 0 or not finite.
    """
    if weight.device.type != "cpu" or weight.numel() < LARGE:
        return None
    if not (weight.is_contiguous() and gradient.is_contiguous()):
        return None
    size, length = _length(weight).item(), _length(gradient).item()
    apart = length**2 + (decay * size) ** 2
    squared = apart
    if decay:
        squared += 2 * decay * torch.dot(weight.view(-1), gradient.view(-1)).item()
    if size > 0 and 0 < squared < math.inf and squared >= apart / 2:
        return size, math.sqrt(squared)
    return None


def _batches(weights: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield lists of neighbours, alike in kind, that have at most `LARGE` entries in all; a larger weight alone."""
    batch: list[torch.Tensor] = []
    entries = 0
    for weight in weights:
        entries += weight.numel()
        if batch and (entries > LARGE or (weight.device, weight.dtype) != (batch[0].device, batch[0].dtype)):
            yield batch
            batch, entries = [], weight.numel()
        batch.append(weight)
    if batch:
        yield batch


def make_optimizer(
    name: str, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Return the optimiser of that name, with weight decay on the parameters of two or more dimensions only.

    Biases and normalisation gains (at most one dimension) form a second parameter group whose weight decay is 0, for
    all three optimisers alike.

    Args:
        name: one of `OPTIMIZERS`.
        params: the parameters to train.
        lr: learning rate; a schedule sets `group["lr"]` at each step.
        weight_decay: added to the gradient (lars, sgd) or decoupled from it (adamw, Loshchilov & Hutter 2019).
        momentum: of lars and sgd; for adamw it is beta1, with beta2 = 0.999.

    Raises:
        UserError: the name is unknown, a number is negative or not finite, adamw's momentum is not below 1, or there
            is nothing to train.
    """
    if name not in OPTIMIZERS:
        raise one_of("optimizer", name, OPTIMIZERS)
    for what, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum)):
        _not_negative(what, value)
    listed = list(params)
    if not listed:
        raise UserError("there are no parameters to optimise")
    weights = [p for p in listed if p.ndim > 1]
    others = [p for p in listed if p.ndim <= 1]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((weights, weight_decay), (others, 0.0))
        if members
    ]
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if momentum >= 1:
        raise UserError(f"momentum {momentum} of adamw must be below 1")
    # fused: one pass over the memory instead of about ten, on the CPU as on CUDA
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=True)


_STATE = {"LARS": {"mu"}, "SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
"""What each optimiser keeps of a parameter."""


def load_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Load what `optimizer.state_dict()` returned in another process; hyper-parameters stay those of `optimizer`.

    Raises:
        UserError: it is the state of another optimiser, or of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    given, entries = (state.get(name) if isinstance(state, dict) else None for name in ("param_groups", "state"))
    if not (isinstance(given, list) and isinstance(entries, dict) and all(isinstance(group, dict) for group in given)):
        raise UserError("it holds no state of parameters")
    if [group.get("params") for group in given] != [group["params"] for group in groups]:
        raise UserError("its groups of parameters are others")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, entry in entries.items():
        if type(index) is not int or not 0 <= index < len(weights) or not isinstance(entry, dict):
            raise UserError(f"it has an entry {index!r} that is no parameter's")
        if entry and set(entry) != _STATE[type(optimizer).__name__]:
            raise UserError(f"of parameter {index} it holds {', '.join(map(str, entry))}")
        for name, value in entry.items():
            shape = () if name == "step" else weights[index].shape
            if not (isinstance(value, torch.Tensor) and value.shape == shape and value.is_floating_point()):
                raise UserError(f"{name} of parameter {index} is no tensor of {tuple(shape)} numbers")
            if name == "step" and not value >= 0:
                raise UserError(f"parameter {index} was stepped {value.item():g} times")
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int, final_factor: float) -> float:
    """Return the learning rate of a step: linear warm-up from 0, then a cosine from `base` to `base * final_factor`.

    While step < warmup_steps it is base * step / warmup_steps; from there on, with
    q = (1 + cos(pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2, it is
    base * q + base * final_factor * (1 - q). Source: the released Barlow Twins code (Zbontar et al. 2021), where
    warm-up takes 10 epochs and final_factor is 0.001.

    Args:
        step: 0 for the first step; `total_steps` is where the cosine ends.
        base: the learning rate at the end of warm-up.
        total_steps: steps of the whole training.
        warmup_steps: steps of warm-up, fewer than `total_steps`; 0 for none.
        final_factor: the last learning rate as a share of `base`.

    Raises:
        UserError: warm-up is not shorter than training, or the step lies outside 0..total_steps.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UserError(f"warm-up of {warmup_steps} steps must be at least 0 and less than all {total_steps} steps")
    if not 0 <= step <= total_steps:
        raise UserError(f"step {step} lies outside the schedule of 0 to {total_steps} steps")
    if step < warmup_steps:
        return base * step / warmup_steps
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    return base * q + base * final_factor * (1 - q)


def scaled_lr(lr: float, batch: int) -> float:
    """Return the learning rate for a global batch, `lr * batch / 256` (Goyal et al. 2017, section 2.1)."""
    return lr * batch / 256


def _not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} {value} must be a finite number that is not negative")
