"""How far a network's outputs move, and how much each layer's outputs matter to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..failures import warn
from ..outputs import Outputs
from .following import hooked
from .moments import summed
from .sites import Site, not_finite

GRADIENTS = 16
"""inputs of each batch that enter the gradients"""


def fisher(
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Iterable[Tensor],
    seed: int,
    outputs: Outputs = "auto",
    whole: bool = False,
) -> dict[str, Tensor]:
    """Summed outer products of the gradients at each layer's outputs, per network input.

    The gradients are of the log-probability of labels drawn from the network's own outputs, so
    their second moment is the Fisher information: half its product with the second moment of a
    small error is the KL divergence that the error causes. Kronecker-factored as in Martens and
    Grosse (2015). Outputs that are no logits are taken as the mean of a Gaussian of their own
    energy, so that the divergence is the relative squared error. Where the outputs hide how they
    depend on the layers, as under `torch.no_grad`, each layer's own outputs are taken so.

    Args:
        model: the network, in eval mode.
        sites: the layers.
        inputs: batches.
        seed: of every draw.
        outputs: what the network's outputs are.
        whole: whether batches go in as they are, for networks of one batch size.

    Returns:
        `[G, N, N]` per layer, in float64.

    Raises:
        ValueError: what a layer is given, or the network returns, is not finite.
    """
    if not sites:
        return {}
    sums: dict[str, Tensor] = {}
    made: dict[str, list[Tensor]] = {}
    energies: dict[str, Tensor] = {}
    count = 0

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not given[0].isfinite().all():
                raise not_finite(name)
            if not (output.requires_grad or output.is_inference()):
                output = output.requires_grad_()
            made.setdefault(name, []).append(output)
            return output.clone()  # an activation in place would write over what is differentiated

        return hook

    with hooked((model.get_submodule(site.name), keep(site.name)) for site in sites):
        for batch in inputs:
            generator = torch.Generator().manual_seed(seed)
            parts = (batch,) if whole else batch[:GRADIENTS].split(GRADIENTS // 2)
            for part in parts:
                made.clear()
                with torch.enable_grad():
                    value = _surprise(compared(model(part), outputs), generator)
                count += len(part)
                if not value.requires_grad:
                    for name, seen in made.items():
                        energy = torch.stack([out.detach().double().square().sum() for out in seen])
                        energies[name] = energies.get(name, 0) + energy.sum()
                    continue
                pairs = [(name, output) for name, seen in made.items() for output in seen]
                pairs = [(name, output) for name, output in pairs if output.requires_grad]
                if not pairs:
                    continue  # none of the layers runs on these inputs
                slopes = torch.autograd.grad(value, [out for _, out in pairs], allow_unused=True)
                for (name, _), slope in zip(pairs, slopes, strict=True):
                    if slope is not None:
                        sums[name] = sums.get(name, 0) + _outer(slope, model.get_submodule(name))
    total = torch.tensor(float(count), dtype=torch.float64)
    if energies and not sums:
        warn(
            "the outputs of `model` hide how they depend on its layers (`no_grad`, `detach`, whole "
            "numbers): each layer is weighed by its own outputs, and there is no last pass"
        )
        summed(total, *(energies[name] for name in sorted(energies)))
        return {name: _alike(e / total, model.get_submodule(name)) for name, e in energies.items()}
    summed(total, *(sums[name] for name in sorted(sums)))
    return {name: value / total.item() for name, value in sums.items()}


def _alike(energy: Tensor, conv: Any) -> Tensor:
    """The Fisher information of a Gaussian whose mean is a layer's output, of its own energy."""
    eye = torch.eye(conv.out_channels // conv.groups).to(energy)
    return (2 / energy.clamp_min(1e-300) * eye).repeat(conv.groups, 1, 1)


def _outer(slope: Tensor, conv: Any) -> Tensor:
    channels = slope.movedim(-1 - len(conv.kernel_size), 0).flatten(1).double()
    grouped = channels.unflatten(0, (conv.groups, -1))
    product: Tensor = grouped @ grouped.mT
    return product


def _surprise(output: Any, generator: torch.Generator) -> Tensor:
    flat = tensors(output)
    if any(tensor.isnan().any() for tensor in flat):
        raise _undefined("NaN")
    if is_logits(output):
        logits = flat[0]
        if (logits.amax(1).abs() == math.inf).any():  # some may be -inf, not all of an input's
            raise _undefined("infinity")
        labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
        return F.cross_entropy(logits, labels[:, 0].to(logits.device), reduction="sum")
    total = torch.zeros(())
    for tensor in flat:
        if not tensor.ndim:  # a number about the whole batch
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        if not tensor.isfinite().all():  # what is masked tells nothing
            tensor = tensor.masked_fill(~tensor.isfinite(), 0)
        energy = tensor.detach().square().sum() / len(tensor)
        total = total.to(tensor) + (noise * tensor).sum() * (2 / energy.clamp_min(1e-30)).sqrt()
    return total


def _undefined(what: str) -> ValueError:
    return ValueError(
        f"the outputs of `model` hold {what} on the `calibration` inputs; check the inputs and the "
        "weights"
    )


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, however it is nested; complex as pairs."""
    if isinstance(output, Tensor):
        if output.is_complex():
            return [torch.view_as_real(output)]
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif not isinstance(output, Sequence) or isinstance(output, str):
        return []
    return [tensor for part in output for tensor in tensors(part)]


def is_logits(output: Any) -> bool:
    """Whether an output is one score per class, `[N, classes]`."""
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.dim() == 2
        and output.shape[1] > 1
    )


class Returned(NamedTuple):
    """What a network returns, as far as comparing it depends on that."""

    words: str
    is_comparable: bool
    has_logits: bool

    @classmethod
    def of(cls, output: Any) -> Returned:
        """What an output is."""
        words = f"a {type(output).__name__}"
        if isinstance(output, Tensor):
            words = f"a tensor {list(output.shape)} of {output.dtype}"
        return cls(words, bool(tensors(output)), is_logits(output))

    def compared_as(self, outputs: Outputs, name: str = "model") -> Outputs:
        """How such outputs are compared: as "logits" or "values".

        Args:
            outputs: what they are by the user's word.
            name: the argument that the network came from.

        Raises:
            ValueError: they cannot be compared, or not so.
        """
        if not self.is_comparable:
            raise ValueError(
                f"`{name}` returns {self.words}; its outputs are compared, so it must return a "
                "floating-point tensor, or tuples, lists, dicts or dataclasses with some"
            )
        if outputs == "logits" and not self.has_logits:
            raise ValueError(
                f"`outputs` (='logits') needs a network that returns one score per class, "
                f"[N, classes]; `{name}` returns {self.words}"
            )
        return "logits" if self.has_logits and outputs != "values" else "values"


def compared(output: Any, outputs: Outputs) -> Any:
    """An output as it is compared: one that is no logits by the user's word is put in a list."""
    return [output] if outputs == "values" else output


def kl(new: Tensor, old: Tensor) -> Tensor:
    """Summed KL divergence of log-probabilities; what has none in the original adds nothing."""
    gone = old == -math.inf
    new, old = new.masked_fill(gone, 0), old.masked_fill(gone, 0)
    return F.kl_div(new, old, log_target=True, reduction="sum")


def finite(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Those of two tensors' values that are finite in the first."""
    told = old.isfinite()
    return (old, new) if told.all() else (old[told], new[told])


@torch.no_grad()
def divergence(
    converted: nn.Module,
    original: nn.Module,
    inputs: Iterable[Tensor],
    outputs: Outputs = "auto",
) -> float:
    """How far the outputs moved: mean KL divergence of logits, else relative squared error."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in inputs:  # some write into what they are given
        old, new = (compared(model(batch.clone()), outputs) for model in (original, converted))
        if is_logits(old):
            old, new = old.double().log_softmax(1), new.double().log_softmax(1)
            sums[0] += kl(new, old).item()
            sums[1] += len(old)
        else:
            for a, b in zip(tensors(old), tensors(new), strict=True):
                a, b = finite(a, b)
                sums[0] += (a.double() - b.double()).square().sum().item()
                sums[1] += a.double().square().sum().item()
    summed(sums)
    return (sums[0] / sums[1].clamp_min(1e-300)).item()
