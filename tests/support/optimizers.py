"""Optimizers over flat buffers, and the settings that they are tried with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.schema import OptimizerConfig
from fastpeft.signals import Rates, Signals
from fastpeft.trainer.optim import make_optimizer

CONFIGS = {
    "defaults": OptimizerConfig(),
    "two_groups": OptimizerConfig(weight_decay=0.3, head_weight_decay=0.05, head_lr_ratio=5.0),
    "no_clipping": OptimizerConfig(max_grad_norm=0.0, beta1=0.8, beta2=0.95, eps=1e-6),
    "tight_clipping": OptimizerConfig(max_grad_norm=0.2, weight_decay=0.0, head_weight_decay=0.2),
}

# Two matrices of one shape, one of another; a head of a weight and a bias.
SHAPES = ((4, 10, 6), (4, 10, 6), (2, 7, 9))
HEAD_SHAPES = ((3, 6), (3,))


class Model:
    """Parameters in the flat buffers, and the same values apart from each other in fp64."""

    def __init__(self, seed: int, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        blocks = [
            SimpleNamespace(
                name=f"layer.{i}.query",
                layer=i,
                projection="query",
                lora_a=self.parameter(rank, num_in),
                lora_b=self.parameter(num_out, rank),
                scale=2.0,
            )
            for i, (rank, num_in, num_out) in enumerate(SHAPES)
        ]
        head = [self.parameter(*shape) for shape in HEAD_SHAPES]
        self.adapter = [p for block in blocks for p in (block.lora_a, block.lora_b)]
        self.head = head
        self.flat = FlatParameters(blocks, head)
        self.optimizer = make_optimizer(self.flat, config, dtype)

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self.generator))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.adapter + self.head

    def set_gradients(self, scale: float) -> list[torch.Tensor]:
        """Random ones; returns fp64 copies."""
        gradients = [torch.randn(p.shape, generator=self.generator) * scale for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad.copy_(gradient)
        return [gradient.double() for gradient in gradients]

    def step(self, lr: float, loss: float = 0.7) -> Signals:
        signals = Signals(loss=torch.tensor(loss), num_tokens=1)
        self.optimizer.step(signals, Rates(lr))
        return signals

    def snapshot(self) -> dict[str, torch.Tensor]:
        state = {name: tensor.clone() for name, tensor in self.optimizer.state().items()}
        state.pop("loss_scale", None)
        state.pop("good_steps", None)
        return state | {"flat": self.flat.data.clone()}
