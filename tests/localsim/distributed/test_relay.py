"""What goes between processes that run different stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from tiny import tiny_config
from torch import Tensor

from localsim.assembly import build_network
from localsim.distributed.messages import Channel
from localsim.distributed.relay import Relay
from localsim.signals import Signal


class Told:
    """A channel that keeps what was sent."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def send(self, tensors: Sequence[Tensor], notes: Any = ()) -> None:
        self.tensors = list(tensors)


def test_a_message_lies_on_one_device():
    """Its reader waits for all of it there: on a GPU, with another library than for what lies on the CPU."""
    below = Told()
    relay = Relay(build_network(tiny_config("loco")), range(1, 3), cast(Channel, below), None, [])
    grads = [torch.empty(2, 8, 4, 4, device="meta") for _view in range(2)]
    relay.send_signals([Signal(np.array([1.0]), grads)])
    assert [tensor.device.type for tensor in below.tensors] == ["meta"] * 3
