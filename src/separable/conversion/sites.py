"""A network's convolutions: where they are, what they see, what follows them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cost.preserving import copied
from .following import NOTHING, Sequel, Stop, followed, hooked
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
    """runs in a forward pass, the first one in which it runs"""
    before: float
    """input positions per network input, over all runs"""
    after: float
    """output positions per network input, over all runs"""
    input_size: tuple[int, ...]
    """shape of the first run's input"""
    weights: int = 0
    """how many numbers its weight holds"""
    params: int = 0
    """how many its weight and bias hold, less what a layer before it holds"""
    geometry: str = ""
    """how its kernel moves"""
    tied: str = ""
    """a module that holds one of its parameters too"""
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


def trace(model: nn.Module, input: Tensor | None, further: Iterable[Tensor] = ()) -> list[Site]:
    """Find the convolutions, in the order they first run in; those that never run come last.

    Args:
        model: the network.
        input: a batch to run it on, if there is one.
        further: batches for layers that do not run on the first; each is described by the first
            batch on which it runs.
    """
    names = convolutions(model)
    found: dict[str, Site] = {}
    order: list[str] = []
    for batch in () if input is None else itertools.chain([input], further):
        place = 0  # a layer that runs late comes behind the one that it ran after
        for name, site in _traced(model, names, batch).items():
            if name not in found:
                found[name] = site
                order.insert(place, name)
            place = order.index(name) + 1
        if len(found) == len(names):
            break
    order += (name for name in names if name not in found)
    holders = _holders(model)
    result, counted = [], set[int]()
    for name in order:
        module: Any = model.get_submodule(name)
        site = found.get(name) or Site(name, names[name], _shape(module), 0, 0.0, 0.0, ())
        own = [part for part in (module.weight, module.bias) if part is not None]
        params = sum(part.numel() for part in own if id(part) not in counted)
        counted |= {id(part) for part in own if isinstance(part, nn.Parameter)}
        others = (each for part in own for each in holders.get(id(part), ()))
        tied = next((each for each in others if each not in names[name]), "")
        told = {"weights": module.weight.numel(), "params": params, "tied": tied}
        result.append(dataclasses.replace(site, geometry=geometry(module), **told))
    return result


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return holders


def geometry(conv: Any) -> str:
    """How a convolution's kernel moves, in words; as of a converted one."""
    keys = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return ", ".join(f"{key}={getattr(conv, key)!r}" for key in keys)


def _shape(module: Any) -> Shape | None:
    return None if isinstance(module, TRANSPOSED) else Shape.of(module)


@torch.no_grad()
def _traced(model: nn.Module, names: dict[str, tuple[str, ...]], input: Tensor) -> dict[str, Site]:
    """The convolutions that run in one pass, in their order."""
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

    with (
        hooked((model.get_submodule(name), record(name)) for name in names),
        followed(model, names, keep=False) as follow,
    ):
        model(input.clone())
    sites = {}
    for name, seen in runs.items():
        module: Any = model.get_submodule(name)
        sites[name] = Site(
            name,
            names[name],
            _shape(module),
            len(seen),
            sum(i.numel() / module.in_channels for i, _ in seen) / len(input),
            sum(o.numel() / module.out_channels for _, o in seen) / len(input),
            tuple(seen[0][0].shape),
            plain=plain[name],
            sequel=follow[name][0].sequel if len(seen) == 1 else NOTHING,
        )
    return sites


@torch.no_grad()
def _record(model: nn.Module, site: Site, input: Tensor, inputs: bool) -> list[Tensor]:
    """The inputs or outputs of a site's runs in one pass, which ends with the last of them."""
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((*args, *kwargs.values())[0])
        if len(seen) == site.calls:
            raise Stop

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output)
        if len(seen) == site.calls:
            raise Stop
        return output.clone()  # what follows may write in place

    module = model.get_submodule(site.name)
    if inputs:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        model(input.clone())  # some write into what they are given
    except Stop:
        pass
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def _beside(model: nn.Module, site: Site, input: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """A site's input, its output, and the branch added to it, of one pass where there is one."""
    given: list[Tensor] = []
    made: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        given.append(args[0])
        made.append(output.clone())  # what follows may write in place

    with (
        hooked([(model.get_submodule(site.name), keep)]),
        followed(model, [site.name], until_sum=True) as runs,
    ):
        model(input.clone())  # some write into what they are given
    other = runs[site.name][0].beside if given else None
    return None if other is None else (given[0], made[0], other)


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
            wanted, given = (_beside(model, self.site, batch) for model in (original, converted))
            if wanted is not None and given is not None:  # what runs may depend on the inputs
                yield Seen(given[0], wanted[1], wanted[2], given[2])
            return
        made = _record(original, self.site, batch, inputs=False)
        inputs = _record(converted, self.site, batch, inputs=True)
        yield from (Seen(u, y) for u, y in zip(inputs, made, strict=False))


@torch.no_grad()
def collect(
    runs: Runs, seed: int, layer: nn.Module | None = None, before: Moments | None = None
) -> Moments:
    """Moments of a layer's inputs in the converted network and of the outputs it should have.

    Those are the original's, less what another branch adds too much. Where what follows makes the
    same of other outputs, they are the nearest ones to what the layer returned after the last fit.

    Args:
        runs: of the layer.
        seed: of the draw of positions.
        layer: the layer as it was fitted last, if it was.
        before: the moments that it was fitted to.
    """
    conv, sequel = runs.conv, runs.site.sequel
    moments = Moments.zeros(Shape.of(conv), conv.weight.device, gram=before is None)
    for u, y, old, new in runs:
        if sequel.matters:
            beside = None if old is None or new is None else (old, new)
            reached = None if layer is None else layer(u)
            y = sequel.goal(y, reached, beside, len(conv.kernel_size))
        moments.add(*samples(conv, u, y, POSITIONS, seed))
    moments = moments.reduced()
    if before is not None:  # of the same inputs
        moments = dataclasses.replace(moments, gram=before.gram)
    return checked(moments, runs.site)


@torch.no_grad()
def input_moments(
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
    """The moments, which must be of some samples, and finite."""
    if not moments.count:
        raise ValueError(
            f"layer `{site.name}` does not run on the `calibration` inputs in the network "
            "converted so far; keep it dense with `skip` or `plan.edited`"
        )
    if not (moments.gram.isfinite().all() and moments.cross.isfinite().all()):
        raise not_finite(site.name)
    return moments


def not_finite(name: str) -> ValueError:
    """The error of a layer that is given what no fit can use."""
    return ValueError(
        f"the activations at layer `{name}` hold NaN or infinity on the `calibration` inputs; "
        "check the inputs and the weights before it"
    )


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
    return copied(model).eval()
