"""What other counters say of a model beside the account, and where the differences come from."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from prettytable import PrettyTable
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from tqdm import tqdm

from .account import Account, Format, check_format, draw
from .counters import COUNTERS, Counter
from .counting import count, unwrap
from .inputs import Inputs, Sizes, make_inputs
from .preserving import copied, train_flags, untouched
from .walk import tensors_in


@dataclass(frozen=True)
class Difference:
    """Where a counter differs from the account.

    Attributes:
        where: class of the modules, or "between modules" for what is called outside of them.
        calls: how often such modules are called; 0 between modules.
        theirs: what the counter says of them.
        ours: their multiply-accumulates.
        why: the reason, as far as the figures tell it.
    """

    where: str
    calls: int
    theirs: int
    ours: int
    why: str


@dataclass(frozen=True)
class Opinion:
    """What one counter says.

    Attributes:
        counter: its name.
        version: version of its package.
        convention: what it counts, and how its figure became MACs.
        macs: its figure for the whole batch; None where it raised.
        differences: what makes up the difference to the account, largest first; they add up to it.
        error: what it raised, None where it did not.
    """

    counter: str
    version: str
    convention: str
    macs: int | None
    differences: tuple[Difference, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Crosscheck:
    """The account beside other counters; printing it draws the tables.

    Attributes:
        account: ours.
        opinions: one per installed counter.
        missing: packages that are not installed.
    """

    account: Account
    opinions: tuple[Opinion, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON."""
        return {
            "macs": self.account.macs,
            "is_lower_bound": self.account.is_lower_bound,
            "opinions": [asdict(opinion) for opinion in self.opinions],
            "missing": list(self.missing),
        }

    def to_string(self, format: Format = "table") -> str:
        """Draw it as "table" (text), "json", "csv" (the figures alone), "markdown" or "html".

        Raises:
            ValueError: `format` is none of these.
        """
        check_format(format)
        if format == "json":
            return json.dumps(self.to_dict(), indent=2)
        parts = [draw(self._figures_table(), format)]
        if format == "csv":
            return parts[0]
        if any(opinion.differences for opinion in self.opinions):
            parts.append(draw(self._differences_table(), format))
        if self.missing:
            parts.append(
                f"Not installed: {', '.join(self.missing)}; "
                "pip install 'separable[crosscheck]' brings them."
            )
        return "\n\n".join(parts)

    def _figures_table(self) -> PrettyTable:
        table = _table(["Counter", "Version", "MACs", "Of ours", "Convention"], "MACs", "Of ours")
        ours, bound = self.account.macs, ">= " if self.account.is_lower_bound else ""
        convention = "MACs of convolutions and matrix products"
        table.add_row(["separable", _version("separable"), f"{bound}{ours:,}", "", convention])
        for opinion in self.opinions:
            figure, share = opinion.error, ""
            if opinion.macs is not None:
                figure = f"{opinion.macs:,}"
                share = f"{opinion.macs / ours:.2%}" if ours else ""
            table.add_row([opinion.counter, opinion.version, figure, share, opinion.convention])
        return table

    def _differences_table(self) -> PrettyTable:
        names = ["Counter", "Where", "Calls", "Theirs", "Ours", "Difference", "Why"]
        table = _table(names, "Calls", "Theirs", "Ours", "Difference")
        for opinion in self.opinions:
            for each in opinion.differences:
                difference = f"{each.theirs - each.ours:+,}"
                figures = [each.calls or "", f"{each.theirs:,}", f"{each.ours:,}", difference]
                table.add_row([opinion.counter, each.where, *figures, each.why])
        return table

    def __str__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        return self.to_string("html")


def _table(names: list[str], *right: str) -> PrettyTable:
    table = PrettyTable(names)
    for name in names:
        table.align[name] = "r" if name in right else "l"
    return table


def crosscheck(
    model: nn.Module,
    input_size: Sizes | None = None,
    *,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Crosscheck:
    """Ask other counters about a model, and find out where they differ from the account.

    thop, fvcore, ptflops, torchinfo and `torch.utils.flop_counter.FlopCounterMode`, those that
    are installed, count a copy of the model in eval mode. Then each counts every kind of innermost
    module that the model calls alone, with the inputs that it has in the model, and so does
    `count`: this tells which modules make up the difference. What is left is between them, in
    functional calls.

    Args:
        model: any `nn.Module` that `count` takes.
        input_size: shape of the input with its batch, such as `(1, 3, 224, 224)`, or a list of
            shapes for several inputs.
        inputs: instead of `input_size`, a tensor, or a tuple or list of positional arguments.
        kwargs: keyword arguments of the forward.

    Returns:
        The account and what the others say; printing it draws the tables.

    Raises:
        TypeError: as `count`, or no input is a tensor.
        ValueError: as `count`.
    """
    account = count(model, input_size, inputs=inputs, kwargs=kwargs, backward=False)
    model = unwrap(model)
    given = make_inputs(model, input_size, inputs=inputs, kwargs=kwargs)
    if not tensors_in((given.args, given.kwargs)):
        raise TypeError("`inputs` has no tensor, which the other counters need; use `count` alone")
    installed = {name: counter for name, counter in COUNTERS.items() if find_spec(counter.package)}
    given = given.map(torch.detach)
    with untouched(model), torch.no_grad():
        parts = [_Part(account, model, given), *_innermost(model, given)]
        figures: dict[str, list[int | Exception]] = {name: [] for name in installed}
        for part in tqdm(parts, "cross-checking", leave=False, delay=2, disable=None):
            for name, counter in installed.items():
                figures[name].append(_ask(counter, part))
    return Crosscheck(
        account=account,
        opinions=tuple(
            _opinion(name, counter, parts, figures[name]) for name, counter in installed.items()
        ),
        missing=tuple(name for name in COUNTERS if name not in installed),
    )


@dataclass
class _Part:
    """A module with the inputs it has in the model, and its account."""

    account: Account
    module: nn.Module
    given: Inputs
    calls: int = 1


class _OneInput(nn.Module):
    """A module as all counters take it: one tensor in, a tuple of tensors out."""

    def __init__(self, module: nn.Module, given: Inputs) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = tree_flatten((given.args, dict(given.kwargs)))
        self.x = next(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # at each of its places: attention takes another path where query, key and value are one
        leaves = [x if leaf is self.x else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        output = self.module(*args, **kwargs)
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _ask(counter: Counter, part: _Part) -> int | Exception:
    try:
        # a copy for each: they leave hooks, buffers and flags behind
        alone = _OneInput(*copied(part.module, part.given))
        with train_flags(alone, False), _silence():
            return counter.ask(alone, alone.x)
    except Exception as error:
        return error


def _innermost(model: nn.Module, given: Inputs) -> list[_Part]:
    """Find the called modules that call no others, equal ones with equal inputs once."""
    model, given = copied(model, given)
    running: list[nn.Module] = []
    calling: set[nn.Module] = set()
    seen: list[tuple[nn.Module, Inputs]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calling.update(running[-1:])
        running.append(module)
        seen.append((module, Inputs(args, kwargs)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        stack.enter_context(train_flags(model, False))
        for module in model.modules():
            stack.enter_context(
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            )
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        model(*given.args, **given.kwargs)

    parts: dict[Any, _Part] = {}
    for module, its in seen:
        tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves((its.args, its.kwargs)))
        if module in calling or not tensors:
            continue
        shapes = tree_map(lambda x: x.shape if isinstance(x, Tensor) else x, (its.args, its.kwargs))
        key = (type(module), repr(module), repr(shapes))
        if key in parts:
            parts[key].calls += 1
        else:
            account = count(module, inputs=its.args, kwargs=its.kwargs, backward=False)
            parts[key] = _Part(account, module, its)
    return list(parts.values())


def _opinion(
    name: str, counter: Counter, parts: list[_Part], figures: list[int | Exception]
) -> Opinion:
    (whole, *inner), (total, *each) = parts, figures
    release = _version(counter.package)
    if isinstance(total, Exception):
        error = f"{type(total).__name__}: {total}".splitlines()[0]
        return Opinion(name, release, counter.convention, None, error=error)
    found: dict[tuple[str, str], list[int]] = {}
    for part, theirs in zip(inner, each, strict=True):
        if isinstance(theirs, int) and theirs != part.account.macs:
            kind = (type(part.module).__name__, _why(theirs, part))
            sums = found.setdefault(kind, [0, 0, 0])
            for i, figure in enumerate((1, theirs, part.account.macs)):
                sums[i] += part.calls * figure
    differences = [
        Difference(where, calls, theirs, ours, why or f"{theirs / ours:.1%} of its multiply-adds")
        for (where, why), (calls, theirs, ours) in found.items()
    ]
    # what is left of both totals without the modules
    known = [(p, t) for p, t in zip(inner, each, strict=True) if isinstance(t, int)]
    theirs = total - sum(part.calls * figure for part, figure in known)
    ours = whole.account.macs - sum(part.calls * part.account.macs for part, _ in known)
    if theirs != ours:
        why = "functional calls, `@`, attention or `.forward` not seen"
        if theirs > ours:
            why = "operations on tensors that are no multiply-adds added in"
        differences.append(Difference("between modules", 0, theirs, ours, why))
    differences.sort(key=lambda each: -abs(each.theirs - each.ours))
    return Opinion(name, release, counter.convention, total, tuple(differences))


def _why(theirs: int, part: _Part) -> str:
    """Name the reason that fits the figures, "" where there is none."""
    ours, account = part.account.macs, part.account
    shapes = account.output_shapes
    positions = torch.Size(shapes[0]).numel() if shapes else 0
    if theirs == 0:
        return "not known, counted as 0"
    if ours == 0:
        columns = [name for name in ("norm", "elementwise", "pool") if getattr(account, name)]
        beside = f"; ours are in `{'`, `'.join(columns)}`" if columns else ""
        each = f"{theirs // positions} per output" if theirs % positions == 0 else "operations"
        return f"{each} counted as multiply-adds{beside}"
    if theirs == ours + account.bias_adds:
        return "bias added in"
    module = part.module
    if getattr(module, "transposed", False):
        weight = module.weight
        assert isinstance(weight, Tensor)
        # [in_channels, out_channels / groups, *kernel_size]: a regular convolution to the output
        taps = weight[0, 0].numel() * weight.shape[0] // int(module.groups)  # type: ignore[arg-type]
        if theirs in (positions * taps, positions * taps + account.bias_adds):
            return "transposed, but counted as a regular convolution to its output"
    if ours < theirs <= account.flops - ours:
        return "biases and elementwise operations added in"
    return ""


def _version(package: str) -> str:
    if package == "separable":
        from separable import __version__

        return __version__
    return version(package)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep back what the counters print and warn of."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
