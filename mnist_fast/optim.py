"""The optimisers: SGD, AdamW and Muon."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_fast.config import Config

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic
ITERATIONS = 5


def build_optimizer(config: Config, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of parameters, in a form that a CUDA graph can hold.

    Args:
        config: optimiser and hyperparameters.
        parameters: what is trained.
    """
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        betas, on_gpu = (config.momentum, config.beta2), parameters[0].is_cuda
        return torch.optim.AdamW(parameters, betas=betas, fused=True, capturable=on_gpu, **common)
    common |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.optimizer == "muon":
        return Muon(parameters, **common)
    return torch.optim.SGD(parameters, fused=True, **common)


def first_state(config: Config, parameter: Tensor) -> dict[str, Tensor]:
    """The optimiser's state of a parameter, as its first step would create it."""
    if config.optimizer == "adamw":
        step = torch.zeros((), device=parameter.device)
        moments = [torch.zeros_like(parameter, requires_grad=False) for _ in range(2)]
        return {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    if config.momentum or config.optimizer == "muon":
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    return {}


class FlatSGD:
    """SGD, as `torch.optim.SGD` has it, of parameters that lie in one tensor.

    Torch's is slower for many small tensors, and imports torch's compiler, which takes seconds.

    Args:
        config: momentum, Nesterov's or not, and weight decay.
        weights: float32 (parameters,).
        gradient: likewise.
        rate: learning rate, a scalar tensor.
    """

    def __init__(self, config: Config, weights: Tensor, gradient: Tensor, rate: Tensor):
        self.config, self.weights, self.gradient, self.rate = config, weights, gradient, rate
        self.momentum = torch.zeros_like(weights)

    def step(self) -> None:
        """One step against the gradient."""
        config, weights, gradient = self.config, self.weights, self.gradient
        if config.weight_decay:
            gradient = gradient.add(weights, alpha=config.weight_decay)
        update = gradient
        if config.momentum:
            update = self.momentum.mul_(config.momentum).add_(gradient)
        if config.nesterov:
            update = gradient.add(update, alpha=config.momentum)
        weights.addcmul_(update, self.rate, value=-1)


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
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        super().__init__(parameters, defaults | {"weight_decay": weight_decay})

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
        updates = orthogonalise_weights(updates)
        rate = group["lr"]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(parameters, list(torch._foreach_mul(updates, rate)))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return cast(Tensor, state["momentum_buffer"])


def orthogonalise_weights(updates: Sequence[Tensor]) -> list[Tensor]:
    """The updates; those of weights (outputs, ...) are made orthogonal and scaled."""
    parts = [update.flatten(1) for update in updates if update.dim() > 1]
    found = iter(orthogonalise(parts) if parts else ())
    results = []
    for update in updates:
        if update.dim() > 1:
            own = next(found)
            outputs, columns = own.shape
            update = own.contiguous().view(update.shape) * math.sqrt(max(1, outputs / columns))
        results.append(update)
    return results


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
