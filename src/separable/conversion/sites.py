"""A network's convolutions: where they are, what they see, what follows them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .following import NOTHING, Run, Sequel, Stop, followed, hooked
from .forms import CONVS, TRANSPOSED, Shape
from .moments import Moments, is_convolution, samples

KEPT_BYTES = 1 << 30
"""of a layer's inputs and outputs on all inputs that are kept for further fits"""
POSITIONS = 256
"""positions of each input that enter a layer's moments"""


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
    weights: int = 0
    """how many numbers its weight holds"""
    plain: bool = True
    """whether it computes its weight times its patches in its first run"""
    sequel: Sequel = NOTHING
    """what follows it, where it runs once"""


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

    follow: dict[str, list[Run]] = {}
    if input is not None:
        with (
            hooked((model.get_submodule(name), record(name)) for name in names),
            followed(model, names, keep=False) as follow,
        ):
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
                module.weight.numel(),
                plain.get(name, True),
                follow[name][0].sequel if len(seen) == 1 else NOTHING,
            )
        )
    return sites


def _length(input: Tensor | None) -> int:
    return 1 if input is None else len(input)


@torch.no_grad()
def _record(model: nn.Module, site: Site, input: Tensor, inputs: bool) -> list[Tensor]:
    """The inputs or outputs of a site's runs in one pass, which ends with the last of them."""
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        if len(seen) == site.calls:
            raise Stop

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output)
        if len(seen) == site.calls:
            raise Stop
        return output.clone()  # what follows may write in place

    module = model.get_submodule(site.name)
    if inputs:
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    try:
        model(input)
    except Stop:
        pass
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def _beside(model: nn.Module, site: Site, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A site's input, its output, and the branch that is added to it, of one pass."""
    given: list[Tensor] = []
    made: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        given.append(args[0])
        made.append(output.clone())  # what follows may write in place

    with (
        hooked([(model.get_submodule(site.name), keep)]),
        followed(model, [site.name], until_sum=True) as runs,
    ):
        model(input)
    other = runs[site.name][0].beside
    assert other is not None
    return given[0], made[0], other


class Seen(NamedTuple):
    """What a layer meets in a run."""

    input: Tensor
    """in the converted network"""
    output: Tensor
    """in the original"""
    beside: Tensor | None = None
    """what is added to it there"""
    beside_now: Tensor | None = None
    """what is added to it in the converted network"""


class Runs:
    """A layer's inputs in the converted network, and its outputs in the original one.

    Each pass over them takes a pass of both networks over all inputs; those of a layer that is
    fitted again are kept where they fit into memory.
    """

    def __init__(
        self, original: nn.Module, converted: nn.Module, site: Site, inputs: Iterable[Tensor]
    ) -> None:
        """Of the layer `site` on batches `inputs`; `converted` is converted up to the layer."""
        self.conv: Any = original.get_submodule(site.name)
        self.site = site
        self._networks, self._inputs = (original, converted), inputs
        self._kept: list[Seen] | None = None

    def __iter__(self) -> Iterator[Seen]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Seen] = []
        room = KEPT_BYTES if self.site.sequel.cuts else 0
        for batch in self._inputs:
            for seen in self._run(batch):
                room -= sum(tensor.nbytes for tensor in seen if tensor is not None)
                if room > 0:
                    kept.append(seen)
                else:
                    kept.clear()
                yield seen
        if room > 0:
            self._kept = kept

    def _run(self, batch: Tensor) -> Iterator[Seen]:
        original, converted = self._networks
        if self.site.sequel.summed:
            (_, y, old), (u, _, new) = (
                _beside(model, self.site, batch) for model in (original, converted)
            )
            yield Seen(u, y, old, new)
            return
        wanted = _record(original, self.site, batch, inputs=False)
        given = _record(converted, self.site, batch, inputs=True)
        yield from (Seen(u, y) for u, y in zip(given, wanted, strict=True))


@torch.no_grad()
def collect(
    runs: Runs, seed: int, form: nn.Module | None = None, before: Moments | None = None
) -> Moments:
    """Moments of a layer's inputs in the converted network and of the outputs it should have.

    Those are the original's, less what another branch adds too much. Where what follows makes the
    same of other outputs, they are the nearest ones to what the layer returned after the last fit.

    Args:
        runs: of the layer.
        seed: of the draw of positions.
        form: the layer as it was fitted last, if it was.
        before: the moments that it was fitted to.
    """
    conv, sequel = runs.conv, runs.site.sequel
    moments = Moments.zeros(Shape.of(conv), conv.weight.device, gram=before is None)
    for u, y, old, new in runs:
        if sequel.matters:
            beside = None if old is None or new is None else (old, new)
            reached = None if form is None else form(u)
            y = sequel.goal(y, reached, beside, len(conv.kernel_size))
        moments.add(*samples(conv, u, y, POSITIONS, seed))
    moments = moments.reduced()
    if before is not None:  # of the same inputs
        moments = dataclasses.replace(moments, gram=before.gram)
    return checked(moments, runs.site)


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

    with hooked([gather(site) for site in sites]):
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
