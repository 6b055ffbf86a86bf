"""Muon for matrices and convolution kernels: momentum whose every update is made orthogonal (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton–Schulz step that pushes singular values towards 1
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return the nearest matrices with all singular values near 1, for a stack [N, rows, columns], rows ≤ columns."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(a * x, torch.baddbmm(b * gram, gram, gram, beta=1, alpha=c), x)
    return x


class Muon(torch.optim.Optimizer):
    """Muon over parameters of two or more dimensions; a kernel counts as the matrix [out, everything else].

    Same-shaped parameters are made orthogonal in one batched product, which `torch.optim.Muon` (matrices only, one
    at a time) does not do. Updates have the root mean square of AdamW's (0.2), so that learning rates mean the same.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                wide = update if update.shape[0] <= update.shape[1] else update.mT
                by_shape[wide.shape[0], wide.shape[1]].append((parameter, wide))
            for (_, columns), members in by_shape.items():
                stacked = orthogonalise(torch.stack([wide for _, wide in members]))
                for (parameter, _), update in zip(members, stacked, strict=True):
                    tall = parameter.shape[0] > parameter.flatten(1).shape[1]
                    step = (update.mT if tall else update).reshape(parameter.shape).to(parameter.dtype)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(step, alpha=group["lr"] * 0.2 * columns**0.5)
