"""Muon: SGD with momentum whose update of each convolution is made orthogonal."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic
ITERATIONS = 5


def orthogonalise(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Moves the singular values of matrices close to 1 (about 0.7 to 1.2), and keeps the rest.

    Newton-Schulz iterations with the quintic of Jordan et al. (Muon: An optimizer for hidden layers
    in neural networks, 2024). All matrices are padded with zeros, which stay zeros, and go through
    them in one batch: the kernels are too small to pay for themselves one by one.

    Args:
        matrices: (rows, columns) of any sizes, on one device.
    """
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.T for matrix in matrices]
    rows, columns = (max(matrix.shape[side] for matrix in wide) for side in (0, 1))
    batch = torch.stack(
        [F.pad(m, (0, columns - m.shape[1], 0, rows - m.shape[0])).float() for m in wide]
    )
    batch = batch / (batch.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = batch @ batch.mT
        batch = torch.baddbmm(
            batch, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), batch, beta=a
        )
    results = [found[: m.shape[0], : m.shape[1]] for found, m in zip(batch, wide, strict=True)]
    return [
        result if len(matrix) <= matrix.shape[1] else result.T
        for result, matrix in zip(results, matrices, strict=True)
    ]


class Muon(torch.optim.Optimizer):
    """Momentum as in SGD; the update of a weight (outputs, ...) is then made orthogonal.

    As a matrix of `outputs` rows it is replaced by its orthogonal factor, times
    sqrt(max(1, outputs / columns)). Vectors (BatchNorm) take SGD's update at the same rate. Weight
    decay is decoupled from the gradients (Loshchilov, Hutter: Decoupled Weight Decay
    Regularization, 2019).

    Args:
        parameters: to learn.
        lr: learning rate.
        momentum: decay of the sum of gradients.
        nesterov: whether to look one step ahead.
        weight_decay: fraction of a parameter that a step at rate 1 takes away.
        networks: that each weight holds one behind the other, see `many.WideNetwork`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        networks: int = 1,
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        super().__init__(
            parameters, defaults | {"weight_decay": weight_decay, "networks": networks}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._move(parameters, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        updates: Sequence[Tensor] = momenta
        if group["nesterov"]:
            updates = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        updates = orthogonalise_weights(updates, group["networks"])
        rate = group["lr"]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(parameters, list(torch._foreach_mul(updates, rate)))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return cast(Tensor, state["momentum_buffer"])


def orthogonalise_weights(updates: Sequence[Tensor], networks: int) -> list[Tensor]:
    """Updates with those of weights (networks * outputs, ...) made orthogonal and scaled."""
    weights = [update for update in updates if update.dim() > 1]
    parts = [part.flatten(1) for weight in weights for part in weight.chunk(networks)]
    found = iter(orthogonalise(parts) if parts else ())
    results = []
    for update in updates:
        if update.dim() > 1:
            own = torch.cat([next(found) for _ in range(networks)])
            outputs, columns = len(own) // networks, own.shape[1]
            update = own.view(update.shape) * math.sqrt(max(1, outputs / columns))
        results.append(update)
    return results
