"""A network's convolutions: where they are, what they see, how much their outputs matter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .forms import CONVS, TRANSPOSED, Shape
from .moments import Moments, is_convolution, samples, summed

BATCH = 32
"""inputs per batch where the calibration inputs come one by one"""
POSITIONS = 256
"""positions of each input that enter a layer's moments"""
GRADIENTS = 16
"""inputs of each batch that enter the gradients"""


class Inputs:
    """The calibration inputs as batches on a model's device, as often as they are needed."""

    def __init__(self, calibration: Any, model: nn.Module) -> None:
        parameter = next(model.parameters(), None)
        self._device = None if parameter is None else parameter.device
        self._dtype = torch.float32 if parameter is None else parameter.dtype
        if isinstance(calibration, Tensor):
            calibration = calibration.split(BATCH)
        elif isinstance(calibration, Dataset):
            calibration = DataLoader(calibration, batch_size=BATCH)
        elif not isinstance(calibration, Iterable):
            raise TypeError(
                f"`calibration` (a {type(calibration).__name__}) must be an iterable of inputs, "
                "batches or (input, label) pairs, or None"
            )
        elif iter(calibration) is calibration:
            calibration = list(calibration)  # a stream runs once only, and several passes follow
        self._batches: Iterable[Any] = calibration
        self._single, self._most = False, BATCH
        self.first = self._probe(model)
        self.count, self.batches = 0, 0
        for batch in self:
            self.count += len(batch)
            self.batches += 1

    def __iter__(self) -> Iterator[Tensor]:
        """The batches; single inputs, and batches of one, are joined where their sizes allow."""
        pending: list[Tensor] = []
        for item in self._batches:
            batch = self._input(item)[None] if self._single else self._input(item)
            full = len(pending) == self._most or len(batch) > 1
            if pending and (full or batch.shape != pending[0].shape):
                yield torch.cat(pending)
                pending = []
            if len(batch) > 1:
                yield batch
            else:
                pending.append(batch)
        if pending:
            yield torch.cat(pending)

    def _input(self, item: Any) -> Tensor:
        if isinstance(item, Sequence) and len(item):
            item = item[0]
        if not isinstance(item, Tensor):
            raise TypeError(
                f"`calibration` holds a {type(item).__name__}; its items must be tensors or "
                "pairs that begin with one"
            )
        return item.to(self._device, self._dtype if item.is_floating_point() else item.dtype)

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> Tensor:
        """Run the first item, as a batch if the model takes it so, else as one input."""
        item = next(iter(self._batches), None)
        if item is None:
            raise ValueError("`calibration` is empty; give at least one input")
        first = self._input(item)
        try:
            self._single = _runs_unbatched(model, first)
        except Exception as error:
            try:
                model(first[None])
            except Exception:
                raise ValueError(
                    f"`calibration`: the model rejects its first item, of shape "
                    f"{tuple(first.shape)}: {error}"
                ) from error
            self._single = True
        if not self._single and len(first) != 1:
            return first
        joined = next(iter(self))
        try:
            model(joined)
        except Exception:  # a model of one input at a time
            self._most = 1
            return next(iter(self))
        return joined


def _runs_unbatched(model: nn.Module, input: Tensor) -> bool:
    """Run a model, and say whether its first convolution was given an input without a batch."""
    missing: list[bool] = []

    def hook(conv: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        missing.append(inputs[0].dim() == len(conv.kernel_size) + 1)

    with _hooked((model.get_submodule(name), hook) for name in convolutions(model)):
        model(input)
    return missing[:1] == [True]


@dataclass(frozen=True)
class Site:
    """A convolution in its network."""

    name: str
    names: tuple[str, ...]
    """all names it is registered under"""
    shape: Shape | None
    """None for a transposed convolution"""
    calls: int
    """runs in a forward pass"""
    before: float
    """input positions per network input, over all runs"""
    after: float
    """output positions per network input, over all runs"""
    input_size: tuple[int, ...]
    """shape of the first run's input"""
    plain: bool = True
    """whether it computes its weight times its patches in its first run"""


def convolutions(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All convolutions of a model, as the first name of each and all its names."""
    names: dict[nn.Module, list[str]] = {}
    module: nn.Module
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*CONVS, *TRANSPOSED)):
            names.setdefault(module, []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


@torch.no_grad()
def trace(model: nn.Module, input: Tensor | None) -> list[Site]:
    """Find the convolutions, in the order they first run in; those that never run come last."""
    names = convolutions(model)
    runs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    plain: dict[str, bool] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(conv: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            runs.setdefault(name, []).append((inputs[0].to("meta"), output.to("meta")))
            if name not in plain:
                plain[name] = isinstance(conv, TRANSPOSED) or is_convolution(
                    conv, inputs[0], output
                )

        return hook

    if input is not None:
        with _hooked((model.get_submodule(name), record(name)) for name in names):
            model(input)
    sites = []
    for name in (*runs, *(name for name in names if name not in runs)):
        seen = runs.get(name, [])
        module: Any = model.get_submodule(name)
        sites.append(
            Site(
                name,
                names[name],
                None if isinstance(module, TRANSPOSED) else Shape.of(module),
                len(seen),
                sum(i.numel() / module.in_channels for i, _ in seen) / _length(input),
                sum(o.numel() / module.out_channels for _, o in seen) / _length(input),
                tuple(seen[0][0].shape) if seen else (),
                plain.get(name, True),
            )
        )
    return sites


def _length(input: Tensor | None) -> int:
    return 1 if input is None else len(input)


@contextmanager
def _hooked(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Ends a forward pass once the layer that was asked for has run."""


@torch.no_grad()
def _record(model: nn.Module, site: Site, input: Tensor, inputs: bool) -> list[Tensor]:
    """The inputs or outputs of a site's runs in one pass, which ends with the last of them."""
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        if len(seen) == site.calls:
            raise _Stop

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output)
        if len(seen) == site.calls:
            raise _Stop
        return output.clone()  # what follows may write in place

    module = model.get_submodule(site.name)
    if inputs:
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    try:
        model(input)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen


def collect(
    original: nn.Module, converted: nn.Module, site: Site, inputs: Iterable[Tensor], seed: int
) -> Moments:
    """Moments of a layer's inputs in the converted network and its outputs in the original one."""
    conv: Any = original.get_submodule(site.name)
    moments = Moments.zeros(Shape.of(conv), conv.weight.device)
    for batch in inputs:
        wanted = _record(original, site, batch, inputs=False)
        given = _record(converted, site, batch, inputs=True)
        for u, y in zip(given, wanted, strict=True):
            moments.add(*samples(conv, u, y, POSITIONS, seed))
    return checked(moments.reduced(), site)


@torch.no_grad()
def survey(
    model: nn.Module, sites: Sequence[Site], inputs: Iterable[Tensor], seed: int
) -> dict[str, Moments]:
    """Moments of the inputs of several layers of one network, in one pass."""
    found: dict[str, Moments] = {}

    def gather(site: Site) -> tuple[nn.Module, Callable[..., None]]:
        conv: Any = model.get_submodule(site.name)
        shape = Shape.of(conv)._replace(outputs=0)  # outputs follow from inputs by the weight
        moments = found[site.name] = Moments.zeros(shape, conv.weight.device)

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            patches = samples(conv, args[0], output, POSITIONS, seed)[0]
            moments.add(patches, patches[:, :0])

        return conv, hook

    with _hooked([gather(site) for site in sites]):
        for batch in inputs:
            model(batch)
    return {site.name: checked(found[site.name].reduced(), site) for site in sites}


def checked(moments: Moments, site: Site) -> Moments:
    """The moments, which must be finite."""
    if not (moments.gram.isfinite().all() and moments.cross.isfinite().all()):
        raise ValueError(
            f"the activations at layer `{site.name}` hold NaN or infinity on the `calibration` "
            "inputs; check the inputs and the weights before it"
        )
    return moments


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

    with _hooked((model.get_submodule(site.name), keep(site.name)) for site in sites):
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
        old, new = original(batch), converted(batch)
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


def replaced(model: nn.Module, names: Iterable[str], module: nn.Module) -> nn.Module:
    """Put a module under the given names; an empty name stands for the model itself."""
    for name in names:
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, to run and take apart."""
    return copy.deepcopy(model).eval()
