"""`report`: counts, converts, compiles and measures a network, and gathers what was found."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import Report as Conversion
from ..conversion.calibration import Inputs
from ..conversion.converting import frontier as converted_within
from ..conversion.plans import Budget, NothingToConvert
from ..conversion.sensitivity import Returned, divergence, is_logits
from ..conversion.sites import frozen_copy
from ..cost import Account, LayerTime, Measurement, count, measure_interleaved
from ..cost.comparison import check_same_outputs
from ..cost.inputs import Sizes, make_inputs
from ..cost.measuring import check_timing
from ..failures import in_a_line
from ..outputs import MEASURES, Outputs, check_outputs
from ..progress import progress as progress_bar
from ..runtime import CompiledModel, compile
from ..runtime import machine as machines
from ..runtime.checking import TOLERANCE, outputs_deviation
from ..runtime.explaining import Explanation
from ..runtime.roofline import Peak
from .findings import Findings, Kind, Machine, Network, Point
from .wording import size

Batches = Iterable[tuple[Tensor, Tensor]]


def report(
    model: nn.Module,
    input_size: Sizes | None = None,
    *,
    inputs: Any = None,
    budget: str | None = None,
    calibration: Any = None,
    outputs: Outputs = "auto",
    converted: nn.Module | None = None,
    frontier: Sequence[str] = (),
    beside: Mapping[str, nn.Module] | None = None,
    data: Batches | None = None,
    threads: int | None = None,
    repeats: int = 20,
    min_seconds: float = 0.5,
    seed: int = 0,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Findings:
    """Find out what separable would give a network.

    All networks are measured in turn, in PyTorch and in the separable runtime, whose outputs are
    checked first; a network that the runtime can't take is reported without it.

    Args:
        model: the network, left as it is; it runs in eval mode.
        input_size: shape of the input with its batch, such as `(1, 3, 224, 224)`, or a list of
            shapes for several inputs.
        inputs: instead of `input_size`, a tensor, or a tuple or list of positional arguments.
        budget: what its conversion may cost, as for `separable.convert`; None reports the network
            alone.
        calibration: inputs of the conversion, as for `separable.convert`.
        outputs: what the network returns, as for `separable.convert`; "auto" goes by what the
            conversion of `converted` took them for, where that is known.
        converted: instead of `budget`, the converted network.
        frontier: further budgets, such as `["macs=0.5", "macs=0.1"]`, for the plots of error
            against cost. They share the survey of the layers, and are fitted once, without the
            last pass over all layers, unless they are budgets of the error.
        beside: further networks for these plots, by name.
        data: batches of inputs and labels, for accuracies.
        threads: that a pass may use; None leaves torch's number. Layers are measured on one.
        repeats: number of times to take of each network.
        min_seconds: least time to spend on the repeats of each, in seconds.
        seed: of the conversions.
        title: name of the network; that of its class if None.
        command: what reproduces the report; this call if None.
        progress: whether to show progress bars.

    Returns:
        The findings; `write` makes the page of them.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: arguments exclude each other, a budget is malformed or can't be met, the model
            rejects its inputs, or another network has outputs of other shapes.
    """
    if budget is not None and converted is not None:
        raise ValueError("`budget` and `converted` exclude each other; give one of them")
    if (frontier or beside) and budget is None and converted is None:
        raise ValueError("`frontier` and `beside` belong to a conversion: give `budget` too")
    budgets = [each for each in (budget, *frontier) if each is not None]
    for each in budgets:
        Budget.parse(each)  # before the first of them is converted
    if title is not None and not isinstance(title, str):
        raise TypeError(f"`title` (={title!r}) must be a string")
    if data is not None and not isinstance(data, Iterable):
        raise TypeError(f"`data` (={data!r}) must be batches (inputs, labels) of tensors")
    check_outputs(outputs)
    check_timing(repeats=repeats, min_seconds=min_seconds, threads=threads)
    original = frozen_copy(model)
    given = make_inputs(original, input_size, inputs=inputs).args
    given = tuple(each.clone() if isinstance(each, Tensor) else each for each in given)
    if data is not None:
        data = _checked(data, original)
    title = type(model).__name__ if title is None else title
    steps = 5 + bool(budgets)
    with (
        torch.random.fork_rng(devices=[]),
        progress_bar("counting", steps, "step", shown=progress) as bar,
    ):
        contenders = [_Contender("regular", original, given, "regular")]
        if converted is not None:
            own = getattr(converted, "report", None)
            name = own.plan.budget if isinstance(own, Conversion) else "converted"
            contenders.append(_Contender(name, frozen_copy(converted), given, "converted"))
            check_same_outputs({"model": contenders[0].account, "converted": contenders[1].account})
        regular = contenders[0]
        kind: Outputs = outputs
        if outputs == "auto" and contenders[-1].conversion is not None:
            kind = contenders[-1].conversion.outputs
        measured = calibration is not None and (bool(budgets) or converted is not None)
        # what has no outputs to compare is reported too, but not how far they move
        comparable = measured or regular.returned.is_comparable
        measure = regular.returned.compared_as(kind) if comparable else kind
        obstacle = ""
        try:
            if budgets:
                _next(bar, f"converting at {', '.join(budgets)}")
                found = converted_within(
                    original,
                    calibration,
                    budget,
                    frontier,
                    seed=seed,
                    example=given[0][:1] if isinstance(given[0], Tensor) else None,
                    outputs=kind,
                )
                contenders += [_Contender(name, slim, given) for name, slim in found.items()]
        except NothingToConvert as error:
            obstacle = error.why
        is_converted = len(contenders) > 1
        contenders += [
            _Contender(name, frozen_copy(network), given)
            for name, network in (beside or {}).items()
        ]
        for other in contenders[len(contenders) - len(beside or ()) :]:
            name = f"beside[{other.name!r}]"
            check_same_outputs({"model": contenders[0].account, name: other.account})
        _measure(contenders, given, threads, repeats, min_seconds, bar)
        machine = _measure_layers(contenders[: 1 + is_converted], given, repeats, bar)
        _next(bar, "measuring errors")
        _judge(contenders, calibration, data, measure)
    chosen = contenders[1] if is_converted else None
    first = contenders[0].torch
    return Findings(
        title=title,
        regular=regular.found(),
        converted=chosen.found() if chosen else None,
        plan=chosen.conversion.plan if chosen and chosen.conversion else None,
        obstacle=obstacle,
        error=chosen.error if chosen else None,
        error_convention=MEASURES.get(measure, ""),
        tested=regular.tested,
        frontier=tuple(each.point(each is chosen) for each in contenders) if chosen else (),
        machine=machine,
        environment=_environment(first, regular.account),
        seed=seed,
        command=command or _call(title, given, budget, frontier, outputs, first.threads, seed),
    )


class _Contender:
    """A network of the report, and what is known of it so far."""

    torch: Measurement
    runtime: Measurement | None = None
    compiled: CompiledModel | None = None
    problem: str = ""
    deviation: float | None = None
    layers: tuple[LayerTime, ...] = ()
    explanation: Explanation | None = None
    error: float | None = None
    correct: int = 0
    tested: int = 0

    def __init__(
        self, name: str, network: nn.Module, given: tuple[Any, ...], kind: Kind = "beside"
    ) -> None:
        self.name, self.network, self.kind = name, network, kind
        self.account = count(network, inputs=given)
        conversion = getattr(network, "report", None)
        self.conversion = conversion if isinstance(conversion, Conversion) else None
        if self.conversion is not None and kind != "regular":
            together = self.conversion.refined or self.conversion.trained
            self.kind = "converted" if together else "fitted once"
        with torch.no_grad():
            self.output = network(*given)
        self.returned = Returned.of(self.output)

    def compile(self, given: tuple[Any, ...], threads: int) -> None:
        """Compile the network and check what it returns; say why where that fails."""
        try:
            compiled = compile(self.network, given, threads=threads)
            self.deviation = outputs_deviation(compiled(*given), self.output)
        except Exception as error:  # whatever torch.export or a kernel raises
            self.problem = in_a_line(error).rstrip(".")
            return
        if self.deviation <= TOLERANCE:
            self.compiled = compiled
        else:
            self.problem = f"its outputs would differ by {self.deviation:.1e} of the largest one"

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.tested if self.tested else None

    def found(self) -> Network:
        return Network(
            account=self.account,
            torch=self.torch,
            layers=self.layers,
            runtime=self.runtime,
            explanation=self.explanation,
            deviation=self.deviation,
            problem=self.problem,
            accuracy=self.accuracy,
        )

    def point(self, chosen: bool) -> Point:
        return Point(
            name=self.name,
            macs=self.account.macs,
            params=self.account.params,
            torch_seconds=self.torch.median,
            runtime_seconds=self.runtime.median if self.runtime else None,
            error=self.error,
            accuracy=self.accuracy,
            chosen=chosen,
            kind=self.kind,
        )


def _next(bar: Any, what: str) -> None:
    """Show which step begins."""
    bar.set_description(what, refresh=False)
    bar.update()


def _measure(
    contenders: list[_Contender],
    given: tuple[Any, ...],
    threads: int | None,
    repeats: int,
    min_seconds: float,
    bar: Any,
) -> None:
    """Time all networks, in PyTorch and in the runtime, in turn."""
    threads = torch.get_num_threads() if threads is None else threads
    _next(bar, "compiling")
    for each in contenders:
        each.compile(given, threads)
    _next(bar, "measuring")
    compiled = [each for each in contenders if each.compiled is not None]
    calls: list[Any] = [each.network for each in contenders]
    calls += [each.compiled for each in compiled]
    measured = measure_interleaved(
        calls, given, repeats=repeats, min_seconds=min_seconds, threads=threads
    )
    for each, measurement in zip(contenders, measured, strict=False):
        each.torch = measurement
    for each, measurement in zip(compiled, measured[len(contenders) :], strict=True):
        each.runtime = measurement


def _measure_layers(
    contenders: list[_Contender], given: tuple[Any, ...], repeats: int, bar: Any
) -> Machine | None:
    """Time each module in PyTorch and each kernel of the runtime, and this machine's limits."""
    _next(bar, "measuring layers")
    peak = Peak(machines.host())
    for _ in range(repeats):
        peak.measure()
    measured = measure_interleaved(
        [each.network for each in contenders],
        given,
        repeats=repeats,
        min_seconds=0.0,
        threads=1,
        per_layer=True,
    )
    for each, measurement in zip(contenders, measured, strict=True):
        each.layers = measurement.layers
    _next(bar, "measuring kernels")
    flops = []
    for each in contenders:
        if each.compiled is not None:
            each.explanation = each.compiled.explain(repeats)
            flops.append(each.explanation.peak_flops)
        peak.measure()
    return Machine(max([peak.flops, *flops]), peak.bandwidth)


@torch.no_grad()
def _judge(
    contenders: list[_Contender], calibration: Any, data: Batches | None, measure: Outputs
) -> None:
    """Measure how far the outputs moved, and accuracies.

    What a conversion has measured itself is taken over, where it measured in the same way.
    """
    first = contenders[0]
    compared_as = first.returned.compared_as
    first.error = 0.0 if len(contenders) > 1 else None
    seen = None if calibration is None else Inputs(calibration, first.network)
    for each in contenders[1:]:
        own = each.conversion
        if own is not None and own.error is not None and compared_as(own.outputs) == measure:
            each.error = own.error
        elif seen is not None:
            each.error = divergence(each.network, first.network, seen, measure)
    for batch in data or ():
        for each in contenders:
            correct, tested = _correct(each.network, batch)
            each.correct += correct
            each.tested += tested


def _correct(network: nn.Module, batch: Any) -> tuple[int, int]:
    """How many inputs a network put into their class, and of how many."""
    pair = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    images, labels = pair
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        kinds = " and ".join(type(each).__name__ for each in pair)
        raise TypeError(f"`data` must be batches (inputs, labels) of tensors, not of {kinds}")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`data` has labels {list(labels.shape)} of {labels.dtype} for inputs "
            f"{list(images.shape)}; they must be classes, [{len(images)}] whole numbers"
        )
    output = network(images.clone())  # some write into what they are given
    if not is_logits(output):
        raise ValueError("`data` is for networks that return one score per class, [N, classes]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < output.shape[1]:
        raise ValueError(
            f"`data` has classes from {int(labels.min())} to {int(labels.max())} and `model` "
            f"{output.shape[1]} outputs; classes are counted from 0, one output each"
        )
    return int((output.argmax(1) == labels).sum()), len(labels)


@torch.no_grad()
def _checked(data: Batches, network: nn.Module) -> Batches:
    """The same, whose first batch is one of classes of the network."""
    batches = iter(data)
    first = list(itertools.islice(batches, 1))
    for batch in first:
        _correct(network, batch)
    return itertools.chain(first, batches)


def _environment(measured: Measurement, account: Account) -> dict[str, str]:
    """Where and when: what a figure is worth little without."""
    machine = machines.host()
    return {
        "Processor": measured.device,
        "Instruction set": f"{machine.isa} (LLVM: {machine.cpu})",
        "Cores": str(machines.cores()),
        "Threads per pass": str(measured.threads),
        "Data type": measured.dtype,
        "Inputs": ", ".join(map(size, account.input_shapes)),
        "System": platform.platform(),
        **{f"Version of {name}": version for name, version in measured.versions.items()},
        "Version of llvmlite": importlib.metadata.version("llvmlite"),
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _call(
    title: str,
    given: tuple[Any, ...],
    budget: str | None,
    frontier: Sequence[str],
    outputs: Outputs,
    threads: int,
    seed: int,
) -> str:
    """The call of `report` in Python, for a page that no command made."""
    shapes = [tuple(each.shape) for each in given if isinstance(each, Tensor)]
    parts = [title, str(shapes[0] if len(shapes) == 1 else shapes)]
    if budget is not None:
        parts += [f"budget={budget!r}", "calibration=..."]
    if frontier:
        parts.append(f"frontier={list(frontier)!r}")
    if outputs != "auto":
        parts.append(f"outputs={outputs!r}")
    return f"separable.report({', '.join([*parts, f'threads={threads}', f'seed={seed}'])})"
