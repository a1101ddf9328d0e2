"""How a gradient crosses a layer: with its own weights (exact), or without carrying them back (weight transport).

Transports are forward hooks on convolutions, linear layers and batch norms. They leave every forward value, parameter,
name and `state_dict` as it is, and within each layer the parameters' gradients stay exact given the gradient at its
output; what changes is the gradient that goes on to the layer's input:

- `exact`: the layer's own derivative. Nothing is installed.
- `feedback_alignment` (Lillicrap et al. 2016, Nat. Commun. 7:13276): a fixed random B in place of the weights W.
- `sign_symmetric` (Liao, Leibo & Poggio 2016, AAAI, arXiv:1510.05067, "uniform sign-concordant feedback"):
  B = sign(W) mean|W|, with the W of the same forward pass.
- `direct_feedback` (Noekland 2016, NeurIPS, arXiv:1609.01596): none passes a convolution or linear layer. What such a
  layer reads hears a fixed random projection of the tap's error e instead, and so does the output of a stage. For a
  layer a whose f(a) the next one reads, this is the paper's direct feedback alignment,

      delta_a = (B e) * f'(a), element by element.

A batch norm is the layer gain * normalised(x) + bias. Its pathway back knows the batch statistics (in eval mode the
running ones) but not the learned gain: that is sign(gain) mean|gain| for sign-symmetric, 1 otherwise.

Everything between layers is exact: non-linearities and pooling pass the gradient with their true derivative, and a skip
connection passes it unchanged. Under direct feedback, too: a skip carries the error of the next place where one
arrives, so that a row of residual blocks hears, through its skips, all those above it in the stage. Only along such
skips does a gradient depend on layers above, by the non-linearities after their sums.

Which tap may change which stage is the credit matrix's affair and is the same under every transport: hooks act within
the graph of a stage, and the engine still decides whose error enters it. Layers of other kinds stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsim.distributed.norms import divided_norm
from localsim.errors import UserError, one_of
from localsim.network import Stage
from localsim.rng import generator

TRANSPORTS = ("exact", "feedback_alignment", "sign_symmetric", "direct_feedback")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_WEIGHTED = (nn.Conv2d, nn.Linear)
_active_reads: ContextVar[list[Tensor] | None] = ContextVar("active_reads", default=None)


def set_transport(
    modules: Iterable[tuple[str, nn.Module]], name: str, seed: int, error_width: int | None = None
) -> None:
    """Let gradients cross all convolutions, linear layers and batch norms among `modules` by the named transport.

    Call it once, on a freshly built network, before weights are loaded or trained: feedback weights take their scale
    from the initial weights, are a function of these, `seed` and the layer's name, and are not saved with the network.
    They follow `.to()`, `.double()` and `copy.deepcopy`. The projections of direct feedback depend on `seed` and name
    alone, and are drawn when first used.

    Args:
        modules: names and modules, as `nn.Module.named_modules` gives them; those of other kinds are passed over, as
            are stages unless the transport is `direct_feedback`.
        name: one of `TRANSPORTS`.
        seed: names the draw of the feedback weights.
        error_width: number of entries of a tap's error per image; needed by, and only read for, `direct_feedback`.

    Raises:
        UserError: the name is unknown, direct feedback has no error width of 1 or more, or a layer has a transport.
    """
    if name not in TRANSPORTS:
        raise one_of("transport", name, TRANSPORTS)
    if name == "exact":
        return
    if name == "direct_feedback" and (error_width is None or error_width < 1):
        raise UserError(f"direct_feedback needs the width of the error, not {error_width}; allowed: 1 or more")
    direct = name == "direct_feedback"
    for layer, module in modules:
        if not isinstance(module, (*_WEIGHTED, *_BATCH_NORMS, *((Stage,) if direct else ()))):
            continue
        if _has_transport(module):
            raise UserError(f"layer {layer} already has a transport; build the network anew to give it another")
        if direct and not isinstance(module, _BATCH_NORMS):
            vars(module)["projection_key"] = (seed, layer, error_width)
            if isinstance(module, Stage):
                module.register_forward_hook(_read_output)
            else:
                module.register_forward_pre_hook(_read_and_cut)
            continue
        if name == "feedback_alignment" and isinstance(module, _WEIGHTED):
            _draw_feedback(layer, module, seed)
        module.register_forward_pre_hook(_keep_and_cut)
        module.register_forward_hook(_feed_signs if name == "sign_symmetric" else _feed_fixed)


@contextmanager
def direct_reads() -> Iterator[list[Tensor]]:
    """Collect what direct feedback reads of the stages and layers that run inside the block, in the order they run.

    Read are the input of every convolution and linear layer and the output of every stage, where they have gradients.
    An entry is x_bar P^T of shape `(images, error_width)`, in the dtype of the weights also under autocast; x_bar
    `(images, channels)` is the mean of the map x over its positions and P `(error_width, channels)` is normal with
    variance 1 / channels, so that e P is about as long as e.

    The vector-Jacobian product of the entries' sum with an error e `(images, error_width)` therefore leaves the
    gradient e P / positions at every position of every map read. From there it goes through what made the map
    (non-linearity, pooling, batch norm, skip) to the weights of the layers below, and ends at the inputs of these. A
    map that several layers read hears the error of each.
    """
    reads: list[Tensor] = []
    before = _active_reads.set(reads)
    try:
        yield reads
    finally:
        _active_reads.reset(before)


# -- feedback weights -------------------------------------------------------------------------------------------------


def _draw_feedback(layer: str, module: nn.Module, seed: int) -> None:
    """Give a convolution or linear layer its B: normal, of the spread of its initial weights."""
    weight = cast(Tensor, module.weight)  # a parameter, or a buffer where a head has frozen it
    std = weight.detach().cpu().double().std(correction=0).item()
    if std == 0:  # all alike, as with an initialisation at zero
        std = 1 / math.sqrt(weight[0].numel())
    _register(module, std * torch.randn(weight.shape, generator=generator(seed, "feedback", layer)), weight)


def _projection(module: nn.Module, x: Tensor, channels: int) -> Tensor:
    """Return the P of a module that reads `x`, drawn now if this is the first time.

    A stage does not know its channels before it runs, and what reads the images or a stage's input never needs a P.
    """
    if "feedback" not in module._buffers:
        seed, layer, error_width = vars(module)["projection_key"]
        draw = torch.randn(error_width, channels, generator=generator(seed, "direct feedback", layer))
        weight = next(module.parameters(), x)
        _register(module, draw / math.sqrt(channels), weight)
    return module.get_buffer("feedback")


def _register(module: nn.Module, feedback: Tensor, like: Tensor) -> None:
    module.register_buffer("feedback", feedback.to(like.device, like.dtype), persistent=False)


# -- hooks: functions of the module alone, so that copies of a network have their own ---------------------------------


def _keep_and_cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    """Run the layer on a detached input, which carries the original to the forward hook."""
    (x,) = args
    if not (torch.is_grad_enabled() and x.requires_grad):
        return None
    cut = x.detach()
    # not on the module: a forward pass that fails would leave it there, and graphs cannot be deep-copied
    vars(cut)["uncut"] = x
    return (cut,)


def _feed_fixed(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
    x = vars(args[0]).pop("uncut", None)
    if x is None:
        return None
    return _Graft.apply(y, _pathway(module, x, module._buffers.get("feedback")))


def _feed_signs(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
    x = vars(args[0]).pop("uncut", None)
    if x is None:
        return None
    weight = cast(Tensor | None, module.weight)
    signs = None if weight is None else weight.detach().sign() * weight.detach().abs().mean()
    return _Graft.apply(y, _pathway(module, x, signs))


def _read_and_cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    (x,) = args
    _read(module, x, channel=-1 if isinstance(module, nn.Linear) else 1)
    return (x.detach(),)


def _read_output(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
    _read(module, y, channel=1)


def _read(module: nn.Module, x: Tensor, channel: int) -> None:
    reads = _active_reads.get()
    if reads is None or not (torch.is_grad_enabled() and x.requires_grad):
        return
    projection = _projection(module, x, x.shape[channel])
    with torch.autocast(x.device.type, enabled=False):
        maps = x.to(projection.dtype).movedim(channel, 1)
        reads.append(maps.flatten(2).mean(2) @ projection.T if maps.dim() > 2 else maps @ projection.T)


def _has_transport(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(hook in (_keep_and_cut, _read_and_cut, _read_output) for hook in hooks)


def _pathway(module: nn.Module, x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the layer's output for `x` with other weights and without bias; running statistics stay where they are."""
    if isinstance(module, nn.Conv2d):
        assert weight is not None
        return module._conv_forward(x, weight, None)
    if isinstance(module, nn.Linear):
        assert weight is not None
        return F.linear(x, weight)
    assert isinstance(module, _BATCH_NORMS)
    peers = getattr(module, "peers", None)
    if peers is not None and (module.training or module.running_mean is None):
        return divided_norm(x, weight, None, None, None, 0.0, module.eps, peers)
    if module.training or module.running_mean is None:
        return F.batch_norm(x, None, None, weight, training=True, eps=module.eps)
    return F.batch_norm(x, module.running_mean, module.running_var, weight, eps=module.eps)


class _Graft(torch.autograd.Function):
    """The values of `y` with the gradients of both `y` and `pathway`.

    What Ren et al. (2023, arXiv:2210.03310, released code) write as stop_gradient(y - pathway) + pathway, but with
    the bits of `y` and also where a pathway overflows.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, pathway: Tensor) -> Tensor:
        return y.clone()  # not y itself: a ReLU may work on it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad
