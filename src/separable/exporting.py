"""`export`: networks as ONNX, torch.export or safetensors files, each checked before it is kept."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .conversion import Report, load, merge, save
from .conversion.sites import frozen_copy
from .cost.preserving import copied
from .failures import in_a_line
from .progress import progress as progress_bar
from .runtime.checking import TOLERANCE, outputs_deviation
from .runtime.onnx_graph import onnx_program, quiet
from .writing import whole_files

__all__ = ["Exported", "export"]

Format = Literal["onnx", "torch-export", "safetensors"]
ENDINGS: dict[str, Format] = {
    ".onnx": "onnx",
    ".pt2": "torch-export",
    ".safetensors": "safetensors",
}
_MOST_BYTES = 1_500_000_000
"""of weights in an ONNX file; torch would put more into a second one"""
Run = Callable[..., list[Tensor]]
"""Inputs in, all output tensors out, however the model nests them."""


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote, and how it was checked.

    Attributes:
        path: the file.
        format: its format.
        size: its bytes.
        deviation: largest difference of its outputs from the model's over all checks, relative to
            the largest output.
        checks: batches that were compared.
        batch_sizes: their sizes.
        opset: version of the ONNX operators; None for other formats.
    """

    path: str
    format: Format
    size: int
    deviation: float
    checks: int
    batch_sizes: tuple[int, ...]
    opset: int | None

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        opset = "" if self.opset is None else f", opset {self.opset}"
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"{self.path}: {self.format}{opset}, {self.size / 1e6:.2f} MB\n"
            f"largest deviation {self.deviation:.1e} of the largest output, over {self.checks} "
            f"batches of {sizes}"
        )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor | tuple[Tensor, ...],
    format: Format | None = None,
    inputs: Iterable[Tensor] = (),
    dynamic_batch: bool = True,
    opset: int | None = None,
    progress: bool = True,
) -> Exported:
    """Write a network to a file that other runtimes read.

    The file is written under a temporary name, loaded again and run on the example, on noise and
    on `inputs`, and renamed only if all outputs agree with the model's. Separable layers and
    converted ones are plain convolutions in it.

    Args:
        model: any network, converted or not, on the CPU; left as it is. Its eval mode is exported.
        path: the file.
        example: its input `[N, ...]`, or a tuple of its inputs.
        format: "onnx", checked in onnxruntime; "torch-export", a program with its weights for
            `torch.export.load`; "safetensors", weights alone, for `separable.load` where the model
            is a converted one; by the ending of `path` (.onnx, .pt2, .safetensors) if None.
        inputs: real batches to check on too, of a model of one input.
        dynamic_batch: whether the file takes any batch size; checked at another one.
        opset: version of the ONNX operators; torch's default if None.
        progress: whether to show a progress bar.

    Returns:
        What was written, and how far its outputs are from the model's.

    Raises:
        TypeError: `example` is not made of tensors.
        ValueError: the format is unknown, an option is not for it, or the model fails on the
            example, returns NaN, or can't be exported.
        RuntimeError: the outputs differ; nothing is kept.
        ImportError: a package of the extra `onnx` is missing.
        OSError: the file cannot be written.
    """
    target = Path(path)
    chosen = _checked_format(target, format, opset)
    args = (example,) if isinstance(example, Tensor) else tuple(example)
    if not args or not all(isinstance(each, Tensor) and each.dim() for each in args):
        raise TypeError("`example` must be a tensor with a batch axis, or a tuple of such tensors")
    if isinstance(inputs, Tensor):
        raise TypeError("`inputs` (a Tensor) must be batches of inputs, as in inputs.split(32)")
    original = frozen_copy(model)
    _check_runs(original, args)
    write, run_again = _WAYS[chosen]
    with (
        whole_files([target]) as files,
        progress_bar(f"exporting as {chosen}", 2, "step", shown=progress) as bar,
    ):
        found = write(original, files[target], args, dynamic_batch, opset)
        bar.update()
        bar.set_description("checking", refresh=False)
        run = run_again(original, files[target])
        batches = list(_batches(args, inputs, dynamic_batch))
        worst = _compare(original, run, batches, chosen, dynamic_batch)
        size = files[target].stat().st_size
        bar.update()
    sizes = tuple(dict.fromkeys(len(batch[0]) for batch in batches))
    return Exported(str(target), chosen, size, worst, len(batches), sizes, found)


def _checked_format(path: Path, format: str | None, opset: int | None) -> Format:
    ending = ENDINGS.get(path.suffix)
    chosen = ending if format is None else format
    if chosen not in get_args(Format):
        raise ValueError(
            f"`format` (={chosen!r}) must be one of {', '.join(get_args(Format))}, by itself or by "
            f"the ending of `path` (={str(path)!r}): {', '.join(ENDINGS)}"
        )
    if ending not in (None, chosen):
        raise ValueError(
            f"`format` (={chosen!r}) contradicts the ending of `path` (={str(path)!r}), which is "
            f"that of {ending}; change one of them"
        )
    if opset is not None and chosen != "onnx":
        raise ValueError(f"`opset` (={opset}) is for onnx, not for {chosen}; leave it out")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`path`: there is no folder {str(path.absolute().parent)!r}")
    if chosen == "onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{error.name} is not installed: pip install 'separable[onnx]'", name=error.name
            ) from error
    return chosen  # type: ignore[return-value]


def _batches(
    args: tuple[Tensor, ...], inputs: Iterable[Tensor], dynamic: bool
) -> Iterator[tuple[Tensor, ...]]:
    """The example, noise, noise of another batch size, and the real batches that fit."""
    generator = torch.Generator().manual_seed(0)
    size = len(args[0])

    def noise(more: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(len(each) + more, *each.shape[1:], generator=generator).to(each.dtype)
            if each.is_floating_point()
            else _repeated(each, len(each) + more)
            for each in args
        )

    yield args
    yield noise(0)
    if dynamic:
        yield noise(1)
    for batch in inputs:
        parts = [batch] if dynamic else batch.split(size)
        # where the size is fixed, the last ones are repeated to fill a batch
        yield from ((part if dynamic else _repeated(part, size),) for part in parts if len(part))


@torch.no_grad()
def _check_runs(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Refuse, before the work, a model that has nothing to compare a file with."""
    try:
        outputs = _leaves(model(*_copies(args)))
    except Exception as error:
        raise ValueError(f"`model` does not take `example` ({in_a_line(error)})") from error
    if any(each.is_floating_point() and each.isnan().any() for each in outputs):
        raise ValueError(
            "`model` returns NaN for `example`, so no file can be checked against it; look at its "
            "weights"
        )


@torch.no_grad()
def _compare(
    model: nn.Module,
    run: Run,
    batches: list[tuple[Tensor, ...]],
    format: Format,
    dynamic: bool,
) -> float:
    """The largest deviation of the file's outputs from the model's.

    Raises:
        ValueError: the model itself fails on a batch.
        RuntimeError: it is too large.
    """
    worst = 0.0
    for batch in batches:
        try:
            expected = _leaves(model(*_copies(batch)))
        except Exception as error:
            fixed = "; if its batch size is fixed, say so: `dynamic_batch=False`"
            advice = fixed if dynamic else ""
            raise ValueError(
                f"`model` does not take a batch of {len(batch[0])} ({in_a_line(error)}){advice}"
            ) from error
        worst = max(worst, outputs_deviation(run(*_copies(batch)), expected))
        # a narrow type rounds more coarsely than the order of a sum matters
        kinds = [each.dtype for each in expected if each.is_floating_point()]
        allowed = max([TOLERANCE, *(8 * torch.finfo(kind).eps for kind in kinds)])
        if not worst <= allowed:
            raise RuntimeError(
                f"the {format} file computes something else: its outputs differ by {worst:.1e} of "
                f"the largest one at batch size {len(batch[0])}, more than {allowed:g}; nothing "
                "was kept"
            )
    return worst


def _copies(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of one's own, for some networks write into what they are given."""
    return tuple(each.clone() for each in args)


def _repeated(batch: Tensor, number: int) -> Tensor:
    return batch[torch.arange(number) % len(batch)]


def _leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _traceable(
    model: nn.Module, args: tuple[Tensor, ...], dynamic: bool
) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs to export with, and their axes that may change, as `forward` names its inputs.

    A batch of one would be taken for a constant.
    """
    if not dynamic:
        return args, None
    axis = torch.export.Dim("batch")
    larger = tuple(_repeated(each, max(2, len(each))) for each in args)
    axes: tuple[Any, ...] = tuple({0: axis} for _ in args)
    kinds = [each.kind for each in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # `*args` is one input, of several
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        axes = (*axes[:named], axes[named:])
    return larger, axes


def _failed(
    format: Format, model: nn.Module, args: tuple[Tensor, ...], dynamic: bool, error: Exception
) -> ValueError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # torch wraps it in advice about its own options
        cause = cause.__cause__
    hint = ""
    if dynamic:
        with contextlib.suppress(Exception), quiet():
            torch.export.export(model, args)
            hint = "; with a fixed batch size it can: `dynamic_batch=False`"
    return ValueError(f"`model` can't be exported as {format} ({in_a_line(cause)}){hint}")


def _write_onnx(
    model: nn.Module, path: Path, args: tuple[Tensor, ...], dynamic: bool, opset: int | None
) -> int:
    weights = sum(each.nbytes for each in model.state_dict().values() if isinstance(each, Tensor))
    if weights > _MOST_BYTES:
        raise ValueError(
            f"`model` has {weights / 1e9:.1f} GB of weights, and one ONNX file holds at most "
            f"{_MOST_BYTES / 1e9:g}; export as torch-export or safetensors"
        )
    larger, shapes = _traceable(model, args, dynamic)
    try:
        program = onnx_program(model, larger, shapes, opset)
        made = int(program.model.opset_imports[""])
    except Exception as error:  # torch raises its own kinds for what it can't trace
        raise _failed("onnx", model, args, dynamic, error) from error
    if opset is not None and made != opset:
        raise ValueError(
            f"`opset` (={opset}) can't be reached from the graph that torch makes (={made}); "
            "choose another, or leave it out"
        )
    program.save(path)
    return made


def _run_onnx(_: nn.Module, path: Path) -> Run:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, as for operators without a kernel for a dtype
        raise ValueError(
            f"onnxruntime, which checks the file, can't run it ({in_a_line(error)}); export a "
            "float32 copy (`copy.deepcopy(model).float()`), or as torch-export"
        ) from error
    names = [each.name for each in session.get_inputs()]

    def run(*batch: Tensor) -> list[Tensor]:
        feed = {name: each.numpy() for name, each in zip(names, batch, strict=False)}
        return [torch.from_numpy(each) for each in session.run(None, feed)]

    return run


def _write_program(
    model: nn.Module, path: Path, args: tuple[Tensor, ...], dynamic: bool, _: int | None
) -> None:
    larger, shapes = _traceable(model, args, dynamic)
    try:
        with quiet():
            program = torch.export.export(model, larger, dynamic_shapes=shapes)
    except Exception as error:
        raise _failed("torch-export", model, args, dynamic, error) from error
    content = io.BytesIO()  # torch's own writer ends the process where a disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _run_program(_: nn.Module, path: Path) -> Run:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda *batch: _leaves(module(*batch))


def _write_weights(
    model: nn.Module, path: Path, args: tuple[Tensor, ...], dynamic: bool, _: int | None
) -> None:
    from safetensors.torch import save_file

    if isinstance(getattr(model, "report", None), Report):
        save(model, path)
        return
    # a tied weight is stored under each of its names, for tools that look it up by one
    tensors = {
        name: each.detach().clone().contiguous() for name, each in model.state_dict().items()
    }
    save_file(tensors, path, {"format": "pt"})


def _run_weights(model: nn.Module, path: Path) -> Run:
    from safetensors.torch import load_file

    is_converted = isinstance(getattr(model, "report", None), Report)
    empty = merge(model) if is_converted else copied(model)
    for tensor in empty.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # so that every value comes from the file
    if is_converted:
        loaded = load(path, model=empty)
    else:
        empty.load_state_dict(load_file(path))
        loaded = empty
    return lambda *batch: _leaves(loaded(*batch))


_WAYS: dict[Format, tuple[Callable[..., int | None], Callable[[nn.Module, Path], Run]]] = {
    "onnx": (_write_onnx, _run_onnx),
    "torch-export": (_write_program, _run_program),
    "safetensors": (_write_weights, _run_weights),
}
