"""How far a network's outputs move, and how much each layer's outputs matter to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .following import hooked
from .moments import summed
from .sites import Site

GRADIENTS = 16
"""inputs of each batch that enter the gradients"""


def fisher(
    model: nn.Module, sites: Sequence[Site], inputs: Iterable[Tensor], seed: int
) -> dict[str, Tensor]:
    """Summed outer products of the gradients at each layer's outputs, per network input.

    The gradients are of the log-probability of labels drawn from the network's own outputs, so
    their second moment is the Fisher information: half its product with the second moment of a
    small error is the KL divergence that the error causes. Kronecker-factored as in Martens and
    Grosse (2015). Outputs that are no logits are taken as the mean of a Gaussian of their own
    energy, so that the divergence is the relative squared error.

    Returns:
        `[G, N, N]` per layer, in float64.
    """
    if not sites:
        return {}
    sums: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor]] = {}
    count = 0

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.requires_grad_()
            outputs.setdefault(name, []).append(output)
            return output.clone()  # an activation in place would write over what is differentiated

        return hook

    with hooked((model.get_submodule(site.name), keep(site.name)) for site in sites):
        for batch in inputs:
            generator = torch.Generator().manual_seed(seed)
            for part in batch[:GRADIENTS].split(GRADIENTS // 2):
                outputs.clear()
                with torch.enable_grad():
                    value = _surprise(model(part), generator)
                names = [name for name, seen in outputs.items() for _ in seen]
                wanted = [output for seen in outputs.values() for output in seen]
                slopes = torch.autograd.grad(value, wanted, allow_unused=True)
                for name, slope in zip(names, slopes, strict=True):
                    if slope is not None:
                        sums[name] = sums.get(name, 0) + _outer(slope, model.get_submodule(name))
                count += len(part)
    total = torch.tensor(float(count), dtype=torch.float64)
    summed(total, *(sums[name] for name in sorted(sums)))
    return {name: value / total.item() for name, value in sums.items()}


def _outer(slope: Tensor, conv: Any) -> Tensor:
    channels = slope.movedim(-1 - len(conv.kernel_size), 0).flatten(1).double()
    grouped = channels.unflatten(0, (conv.groups, -1))
    product: Tensor = grouped @ grouped.mT
    return product


def _surprise(output: Any, generator: torch.Generator) -> Tensor:
    flat = tensors(output)
    if is_logits(output):
        logits = flat[0]
        labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
        return F.cross_entropy(logits, labels[:, 0].to(logits.device), reduction="sum")
    total = torch.zeros(())
    for tensor in flat:
        if not tensor.ndim:  # a number about the whole batch
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        energy = tensor.detach().square().sum() / len(tensor)
        total = total.to(tensor) + (noise * tensor).sum() * (2 / energy.clamp_min(1e-30)).sqrt()
    return total


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, however it is nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, Sequence) or isinstance(output, str):
        return []
    return [tensor for part in output for tensor in tensors(part)]


def is_logits(output: Any) -> bool:
    """Whether an output is one score per class, `[N, classes]`."""
    return isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1


@torch.no_grad()
def divergence(converted: nn.Module, original: nn.Module, inputs: Iterable[Tensor]) -> float:
    """How far the outputs moved: mean KL divergence of logits, else relative squared error."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in inputs:
        old, new = original(batch.clone()), converted(batch)  # some write into what they are given
        if is_logits(old):
            old, new = old.double().log_softmax(1), new.double().log_softmax(1)
            sums[0] += F.kl_div(new, old, log_target=True, reduction="sum").item()
            sums[1] += len(old)
        else:
            for a, b in zip(tensors(old), tensors(new), strict=True):
                sums[0] += (a.double() - b.double()).square().sum().item()
                sums[1] += a.double().square().sum().item()
    summed(sums)
    return (sums[0] / sums[1].clamp_min(1e-300)).item()
