"""The last pass: all converted layers together, towards the original's outputs, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.preserving import copied
from ..failures import in_a_line, is_out_of_memory
from ..outputs import Outputs
from ..progress import progress as progress_bar
from .calibration import Inputs
from .following import Run, followed
from .forms import SeparatedConv
from .moments import summed
from .sensitivity import compared, divergence, finite, is_logits, kl, tensors
from .varying import varied

STEPS, SAMPLES = 600, 64
"""optimiser steps, and inputs in each"""
WORK = 1e12
"""multiply-adds to spend; networks too large for a twentieth of the steps are left as they are"""
RATE = 0.02
"""largest step of a weight relative to its tensor's root mean square"""
LAYERS = 0.3
"""weight of the layers' errors beside the divergence of the outputs"""
TEMPERATURE = 4.0
"""of the outputs that are compared (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)"""
KEPT = 1024
"""inputs held in memory"""


def refined(
    converted: nn.Module,
    original: nn.Module,
    inputs: Inputs,
    macs: float,
    seed: int,
    progress: bool,
    outputs: Outputs = "auto",
) -> nn.Module | None:
    """Move the weights of all converted layers together to where the outputs are the original's.

    The sequential fit settles each layer before the ones after it; what they could take up of its
    error is lost. Adam (Kingma and Ba 2015, arXiv:1412.6980) lowers

        T² KL(p_T ‖ p'_T) + Σ λ ‖z' − z‖² / E‖z − E z‖²,

    p_T the softmax of the outputs over T, z what becomes of the outputs of each converted layer,
    behind its batch norm, sum and activation. The steps see variations of the inputs, never the
    same twice, for a few hundred inputs are learned by heart. A step takes the same share of each
    batch, so it does not depend on how batches are divided among processes.

    Args:
        converted: the converted network in eval mode; it is left as it was.
        original: the network it comes from, in eval mode.
        inputs: calibration inputs.
        macs: multiply-adds per input of a step: one pass of the original, three of the other.
        seed: of every draw.
        progress: whether to show a progress bar.
        outputs: what the network's outputs are.

    Returns:
        A refined copy, or None where it is no better on variations that no step has seen, or the
        network is too large, or takes no parts of a batch.
    """
    names = [name for name, m in converted.named_modules() if isinstance(m, SeparatedConv)]
    if not names or macs * SAMPLES * STEPS / 20 > WORK:
        return None
    if inputs.whole:
        inputs.note("the network takes batches of one size only, so there was no last pass")
        return None
    count = summed(torch.tensor(float(inputs.count))).item()
    share = min(1.0, KEPT / count)
    kept = [batch[: max(1, math.floor(share * len(batch)))] for batch in inputs]
    part = min(1.0, SAMPLES / (share * count))
    drawn = summed(torch.tensor(float(sum(_drawn(batch, part) for batch in kept)))).item()
    steps = max(1, int(min(STEPS, WORK / max(macs * drawn, 1.0))))
    moved, teacher, shown = copied(converted), original, kept
    if any(parameter.dtype == torch.float16 for parameter in converted.parameters()):
        # squares overflow in it, and Adam's ε is 0
        moved, teacher = moved.float(), copied(original).float()
        shown = [batch.float() if batch.is_floating_point() else batch for batch in kept]
        if failure := _failure(teacher, shown[0]):
            inputs.note(f"the network runs in float16 alone, so there was no last pass ({failure})")
            return None
    scales = _variances(teacher, names, shown)
    names = [name for name in names if name in scales]  # the others run on none of them
    if not names:
        return None
    weights, rates = _parameters(moved, names, scales)
    moved.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    groups = [{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    with progress_bar("refining", steps, "step", shown=progress) as bar:
        for step in range(steps):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(step / steps)
            slopes = [torch.zeros_like(weight) for weight in weights]
            for batch, goal, ends in _lessons(teacher, names, inputs, shown, part, generator):
                goal = compared(goal, outputs)
                with torch.enable_grad():
                    loss = _loss(moved, goal, ends, scales, batch, outputs) / drawn
                if not loss.requires_grad:
                    return None  # the outputs do not depend on the weights, or hide how
                found = torch.autograd.grad(loss, weights, allow_unused=True)
                for slope, more in zip(slopes, found, strict=True):
                    if more is not None:
                        slope += more
            summed(*slopes)
            for weight, slope in zip(weights, slopes, strict=True):
                weight.grad = slope
            optimiser.step()
            bar.update()
    result = copied(converted)
    _take_over(result, moved, names)
    fresh = _fresh(original, inputs, kept, generator)
    after, before = (divergence(net, original, fresh, outputs) for net in (result, converted))
    return result if after < before else None


@torch.no_grad()
def _failure(model: nn.Module, batch: Tensor) -> str:
    """Why a network does not run; it may cast what it is given, or ask for a type."""
    try:
        model(batch.clone())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return in_a_line(error)
    return ""


@torch.no_grad()
def _take_over(result: nn.Module, moved: nn.Module, names: Iterable[str]) -> None:
    """Copy the parameters of the named layers, from float32 where that was needed."""
    for name in names:
        pair = (network.get_submodule(name).parameters() for network in (result, moved))
        for parameter, value in zip(*pair, strict=True):
            parameter.copy_(value)


def _fresh(
    original: nn.Module, inputs: Inputs, kept: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Variations that no step has seen, where the network takes some."""

    def drawn() -> list[Tensor]:
        batches = _draws(kept, 1.0, generator, inputs.varied is not False)
        return [part for batch in batches for part in batch.split(SAMPLES)]

    found = drawn()
    with torch.no_grad():
        if inputs.varied is not False and any(inputs.taken(original, b) is None for b in found):
            return drawn()
    return found


def _lessons(
    original: nn.Module,
    names: list[str],
    inputs: Inputs,
    batches: list[Tensor],
    part: float,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Any, dict[str, list[Run]]]]:
    """What a step sees, what the original returns there, and what becomes of its layers' outputs.

    Once the network rejects variations, the inputs stand for themselves.
    """
    vary = inputs.varied is not False
    for batch in _draws(batches, part, generator, vary):
        with torch.no_grad(), followed(original, names) as wanted:
            goal = inputs.taken(original, batch) if vary else original(batch.clone())
        if goal is None:
            break
        yield batch, goal, wanted
    else:
        return
    yield from _lessons(original, names, inputs, batches, part, generator)


def _drawn(batch: Tensor, part: float) -> int:
    return max(1, round(part * len(batch)))


def _draws(
    batches: Iterable[Tensor], part: float, generator: torch.Generator, vary: bool = True
) -> Iterator[Tensor]:
    """The variations that a step sees, or the inputs themselves, joined where sizes allow."""
    seed = int(torch.randint(2**31, (), generator=generator))
    found: dict[torch.Size, list[Tensor]] = {}
    for batch in batches:
        same = torch.Generator().manual_seed(seed)  # the same draw for each batch
        count = _drawn(batch, part)
        first, second = (torch.randperm(len(batch), generator=same)[:count] for _ in range(2))
        taken = batch[first]
        if vary and batch.is_floating_point():  # there is nothing between indices
            taken = varied(taken, batch[second], same)
        found.setdefault(taken.shape[1:], []).append(taken)
    for group in found.values():
        yield torch.cat(group)


def _schedule(time: float) -> float:
    """Up within a tenth of the time, then down to nothing on a cosine."""
    return time / 0.1 if time < 0.1 else 0.5 * (1 + math.cos(math.pi * (time - 0.1) / 0.9))


@torch.no_grad()
def _variances(
    model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Variance of each channel's values, averaged over the channels of each layer, per value."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with followed(model, names) as runs:
            model(batch.clone())  # some write into what they are given
        for name, end in _ends(runs):
            channel = end.dim() - 1 - _dims(model, name)
            values = end.double().movedim(channel, 0).flatten(1)
            moments = [torch.full_like(values[:, 0], values.shape[1])]
            moments += [values.sum(1), values.square().sum(1)]
            sums[name] = sums.get(name, 0) + torch.stack(moments)
    result = {}
    for name in sorted(sums):
        count, first, second = summed(sums[name])
        result[name] = (second / count - (first / count).square()).mean().clamp_min(1e-30)
    return result


def _ends(runs: dict[str, list[Run]]) -> Iterator[tuple[str, Tensor]]:
    """What became of each layer's outputs, run by run."""
    for name, those in runs.items():
        for run in those:
            assert run.end is not None
            yield name, run.end


def _common(*runs: dict[str, list[Run]]) -> Iterator[tuple[tuple[str, Tensor], ...]]:
    """The ends of the runs that two networks share; what runs may depend on the inputs."""
    for name in runs[0]:
        yield from zip(*(_ends({name: each[name]}) for each in runs), strict=False)


def _dims(model: nn.Module, name: str) -> int:
    conv: Any = model.get_submodule(name)
    return len(conv.kernel_size)


def _parameters(
    model: nn.Module, names: Iterable[str], variances: dict[str, Tensor]
) -> tuple[list[nn.Parameter], list[float]]:
    """The parameters of the converted layers, and the most that a step may move each by.

    Weights move relative to their own size, biases relative to the deviation of the outputs.
    """
    weights, rates = [], []
    for name in names:
        for key, parameter in model.get_submodule(name).named_parameters():
            size = variances[name] if key.endswith("bias") else parameter.square().mean()
            weights.append(parameter)
            rates.append(RATE * float(size.detach().sqrt()))
    return weights, rates


def _loss(
    converted: nn.Module,
    goal: Any,
    wanted: dict[str, list[Run]],
    variances: dict[str, Tensor],
    batch: Tensor,
    outputs: Outputs,
) -> Tensor:
    """Summed over the batch."""
    with followed(converted, wanted) as reached:
        output = compared(converted(batch), outputs)
    if is_logits(goal):
        new, old = ((z / TEMPERATURE).log_softmax(1) for z in (output, goal))
        loss = TEMPERATURE**2 * kl(new, old)
    else:
        loss = torch.zeros((), device=batch.device)
        for new, old in zip(tensors(output), tensors(goal), strict=True):
            old, new = finite(old, new)
            energy = old.square().sum().clamp_min(1e-30)
            loss = loss + len(batch) * (new - old).square().sum() / energy
    for (name, new), (_, old) in _common(reached, wanted):
        scale = variances[name].to(new.dtype) * old.numel() / len(batch)
        loss = loss + LAYERS * (new - old).square().sum() / scale
    return loss
