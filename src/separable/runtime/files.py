"""Compiled models as files: packed weights, kernel descriptions, and code for the CPU they ran on.

    magic | header length | header (JSON) | weights | objects | SHA-256 of all before

Nothing in a file is executed because it is there. Kernels are described, not stored; descriptions
are checked against their buffers, and code is generated from them again on loading. The object code
that spares this is only used if it carries a signature, of it and of its description, that this
user made on this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..failures import in_a_line
from ..limits import check_threads
from ..writing import whole_file
from . import jit
from . import machine as machines
from .compiled import CompiledModel
from .emit import driver
from .emit.chain import Chain, ChainTile
from .emit.kernel import FAMILIES, Kernel
from .emit.resample import ENTRY, Resample
from .execute import Program
from .graph import Node
from .memory import Buffer, Form, aligned
from .steps import Schedule, Step
from .validation import check_footprint, parsed

_MAGIC = b"separable-runtime"
_FORMAT = 5
_DIGEST = hashlib.sha256
_KINDS = {kind.__name__: kind for kind in FAMILIES if kind is not Chain}
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
_SECRET_BYTES = 32
_Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class _Layer:
    """What `explain()` says of a step."""

    name: str
    kind: str
    shape: _Shape
    absorbed: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    """A kernel and its arguments, each a buffer and an offset."""

    kernel: int
    arguments: tuple[tuple[int, int], ...]
    layer: _Layer | None


@dataclass(frozen=True)
class _Header:
    """What a file says before its weights; kernels as `[kind, description, tile]` in JSON.

    Attributes:
        key: the machine whose code it holds.
        isa: the instruction set that weights are packed for.
        threads: of one call.
        dynamic_batch: as in `compile`.
        expected: forms of the arguments.
        results: forms of the results.
        structures: of the arguments and of the results, in JSON.
        buffers: kind, size and number of each.
        constants: the buffers of weights, in the order they follow one another.
        weights: bytes of weights.
        kernels: each once.
        objects: bytes of each kernel's object code.
        signatures: of each kernel.
        steps: in execution order.
    """

    key: str
    isa: str
    threads: int
    dynamic_batch: bool
    expected: tuple[Form | None, ...]
    results: tuple[Form | None, ...]
    structures: tuple[str, str]
    buffers: tuple[tuple[str, int, int], ...]
    constants: tuple[int, ...]
    weights: int
    kernels: tuple[str, ...]
    objects: tuple[int, ...]
    signatures: tuple[str, ...]
    steps: tuple[_Step, ...]


def save(model: CompiledModel, path: str | os.PathLike[str]) -> None:
    """Write a compiled model to a file.

    Args:
        model: whose kernels are all its own.
        path: of the file, replaced in one step if it exists.

    Raises:
        ValueError: if a part of the model runs in torch, an argument or a result is no float32
            tensor, or they are nested in anything but tuples, lists and dictionaries.
    """
    program = model.program
    program.refresh()
    schedule = program.schedule
    torch_steps = [s.node.name for s in schedule.steps if s.kernel is None and s.node]
    if any(torch_steps):
        raise ValueError(
            f"`model` runs {', '.join(filter(None, torch_steps))} in torch and cannot be saved; "
            "save the original model instead"
        )
    if torch_steps or any(isinstance(output, Node) for output in schedule.outputs):
        raise ValueError(
            "`model` returns something that is no float32 tensor it computed, and cannot be saved; "
            "save the original model instead"
        )
    for number, (form, example) in enumerate(zip(model.expected, model.examples, strict=True)):
        if form is None and example is not None:
            raise ValueError(
                f"`model` takes an argument that is no float32 tensor ({number}, of type "
                f"{type(example).__name__}) and cannot be saved; save the original model instead"
            )
    try:
        structures = tuple(pytree.treespec_dumps(spec) for spec in model.structures)
    except NotImplementedError as error:  # a kind that torch has no name for
        raise ValueError(
            f"`model` cannot be saved: {in_a_line(error)}; only tuples, lists and dictionaries can "
            "nest its arguments and results"
        ) from error
    for text in structures:
        _structure(text)
    kernels = list(program.objects)
    buffers = list(dict.fromkeys(buffer for s in schedule.steps for buffer, _ in s.arguments))
    # Weights that no step reads still take their place among the others.
    buffers += [b for b, _ in schedule.constants if b not in buffers]
    numbers = {buffer: i for i, buffer in enumerate(buffers)}
    texts, binaries = [_text(kernel) for kernel in kernels], list(program.objects.values())
    weights = program.weights.numpy().tobytes()
    header = _Header(
        key=program.machine.key,
        isa=program.machine.isa,
        threads=program.threads,
        dynamic_batch=model.dynamic_batch,
        expected=model.expected,
        results=tuple(schedule.results),
        structures=(structures[0], structures[1]),
        buffers=tuple((b.kind, b.size, b.number) for b in buffers),
        constants=tuple(numbers[b] for b, _ in schedule.constants),
        weights=len(weights),
        kernels=tuple(texts),
        objects=tuple(map(len, binaries)),
        signatures=tuple(
            _sign(program.machine.key, text, binary)
            for text, binary in zip(texts, binaries, strict=True)
        ),
        steps=tuple(
            _Step(
                kernels.index(s.kernel),
                tuple((numbers[buffer], offset) for buffer, offset in s.arguments),
                _layer(s.node),
            )
            for s in schedule.steps
            if s.kernel
        ),
    )
    content = json.dumps({"format": _FORMAT, "header": dataclasses.asdict(header)}).encode()
    data = b"".join([_MAGIC, struct.pack("<Q", len(content)), content, weights, *binaries])
    with whole_file(path) as partial:
        partial.write_bytes(data + _DIGEST(data).digest())


def load_compiled(path: str | os.PathLike[str]) -> CompiledModel:
    """Read a compiled model from a file; kernels are generated again where the CPU differs.

    Args:
        path: of a file that `CompiledModel.save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, foreign, of another format, or describes a model whose
            kernels would leave their buffers.
    """
    data = Path(path).read_bytes()
    name = f"`path` (={os.fspath(path)!r})"
    start = len(_MAGIC) + 8
    end = len(data) - _DIGEST().digest_size
    if end < start or not data.startswith(_MAGIC):
        raise ValueError(f"{name} is not a compiled model")
    if _DIGEST(memoryview(data)[:end]).digest() != data[end:]:
        raise ValueError(f"{name} is damaged; save the model again")
    (length,) = struct.unpack_from("<Q", data, len(_MAGIC))
    try:
        content = json.loads(data[start : start + length])
        version = content["format"]
        if version == _FORMAT:
            header = parsed(_Header, content["header"])
            return _model(header, data[start + length : end])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"{name} describes no valid model: {error}") from error
    raise ValueError(
        f"{name} has format {str(version)[:20]}, this version reads {_FORMAT}; "
        "compile the model again"
    )


def _model(header: _Header, data: bytes) -> CompiledModel:
    machine = machines.with_vectors_of(header.isa)
    kernels = [_kernel(text, machine) for text in header.kernels]
    schedule = _schedule(header, kernels)
    structures = [_structure(text) for text in header.structures]
    for structure, leaves in zip(structures, (header.expected, header.results), strict=True):
        if structure.num_leaves != len(leaves):
            raise ValueError("`structures` and the shapes differ in number")
    check_threads(header.threads)
    if len(data) != header.weights + sum(header.objects):
        raise ValueError("its weights or its code are cut off")
    weights = torch.frombuffer(bytearray(data[: header.weights]), dtype=torch.float32)
    trusted: dict[Kernel, bytes] = {}
    at = header.weights
    entries = zip(kernels, header.kernels, header.objects, header.signatures, strict=True)
    for kernel, text, size, signature in entries:
        binary = data[at : at + size]
        at += size
        if header.key == machine.key and _signed(machine.key, text, binary, signature):
            trusted[kernel] = binary
    _check_tables(schedule, weights)
    program = Program(schedule, machine, header.threads, trusted)
    program.adopt(weights)
    return CompiledModel(program, (structures[0], structures[1]), header.dynamic_batch)


def _layer(node: Node | None) -> _Layer | None:
    if node is None:
        return None
    return _Layer(node.name, node.kind, node.shape, tuple(node.absorbed))


def _node(layer: _Layer | None) -> Node | None:
    if layer is None:
        return None
    return Node(layer.kind, layer.shape, name=layer.name, absorbed=list(layer.absorbed))


def _text(kernel: Kernel) -> str:
    tile = kernel.tile and dataclasses.asdict(kernel.tile)
    stages = kernel.does.stages if isinstance(kernel.does, Chain) else [kernel.does]
    described = [(type(stage).__name__, dataclasses.asdict(stage)) for stage in stages]
    return json.dumps([described, tile])


def _kernel(text: str, machine: machines.Machine) -> Kernel:
    described, tile = json.loads(text)
    stages = [parsed(_KINDS[kind], stage) for kind, stage in described]
    if len(stages) > 1:
        return Kernel(Chain(tuple(stages)), machine, parsed(ChainTile, tile))
    kind = FAMILIES[type(stages[0])].tile
    return Kernel(stages[0], machine, parsed(kind, tile) if kind else None)


def _structure(text: str) -> pytree.TreeSpec:
    """A nesting of tuples, lists and dictionaries; torch's own reader imports what a file names."""

    def check(node: Any) -> None:
        keys = json.loads(node["context"] or "null")
        if node["type"] not in _CONTAINERS or not (
            keys is None or all(isinstance(key, str | int) for key in keys)
        ):
            raise ValueError(
                f"`structures` has a {node['type']!r}; only tuples, lists and dictionaries "
                "can be saved"
            )
        for child in node["children_spec"]:
            check(child)

    check(json.loads(text)[1])
    return pytree.treespec_loads(text)


def _schedule(header: _Header, kernels: Sequence[Kernel]) -> Schedule:
    """The steps, every argument of which lies inside its buffer."""
    buffers = [Buffer(kind, size, number) for kind, size, number in header.buffers]
    forms = {"input": header.expected, "output": header.results}
    constants = [buffers[i] for i in header.constants]
    for buffer in buffers:
        if buffer.kind in forms:
            form = forms[buffer.kind][buffer.number]
            if form is None or math.prod(form.shape) != buffer.size:
                raise ValueError(f"{buffer.kind} {buffer.number} has another size than its buffer")
        elif buffer.kind not in ("arena", "constant", "scratch"):
            raise ValueError(f"buffer of unknown kind {buffer.kind!r}")
        if (buffer.kind == "constant") != (buffer in constants):
            raise ValueError("`constants` are not the buffers of weights")
    if len(set(constants)) != len(constants):
        raise ValueError("`constants` names a buffer twice")
    batched = [*header.expected, *header.results]
    if header.dynamic_batch and not all(form and form.shape[:1] == (1,) for form in batched):
        raise ValueError("with `dynamic_batch`, arguments and results are those of one sample")
    steps = []
    for entry in header.steps:
        arguments = [(buffers[number], offset) for number, offset in entry.arguments]
        if len(arguments) > driver.MOST_ARGUMENTS:
            raise ValueError(f"a kernel has {len(arguments)} arguments")
        check_footprint(kernels[entry.kernel], arguments)
        if arguments[-1][0].kind not in ("arena", "output"):
            raise ValueError("a kernel writes into weights or arguments")
        passing = [i for i, (buffer, _) in enumerate(arguments) if buffer.kind == "scratch"]
        if passing != ([len(arguments) - 2] if _is_chain(kernels[entry.kernel]) else []):
            raise ValueError("buffers between stages belong to chains, and chains have one")
        steps.append(Step(_node(entry.layer), arguments, kernels[entry.kernel]))

    written = {
        step.arguments[-1][0].number for step in steps if step.arguments[-1][0].kind == "output"
    }
    if written != set(range(len(header.results))):
        raise ValueError("a result is computed by no kernel")

    return Schedule(
        steps,
        [(constant, _no_recipe) for constant in constants],
        [],
        [
            None if form is None else form.buffer("input", i)
            for i, form in enumerate(header.expected)
        ],
        [form.buffer("output", i) for i, form in enumerate(header.results) if form],
        list(header.expected),
        list(header.results),
    )


def _is_chain(kernel: Kernel) -> bool:
    return isinstance(kernel.does, Chain)


def _check_tables(schedule: Schedule, weights: torch.Tensor) -> None:
    """The neighbours in tables of resampling are read by kernels as they are."""
    starts: dict[Buffer, int] = {}
    at = 0
    for buffer, _ in schedule.constants:
        starts[buffer] = at
        at += aligned(buffer.size)
    if max(at, 1) != weights.numel():
        raise ValueError(f"it has {weights.numel()} weights, its buffers take {at}")
    for step in schedule.steps:
        does = step.kernel and step.kernel.does
        if not isinstance(does, Resample):
            continue
        buffer, offset = step.arguments[1]
        if buffer not in starts:
            raise ValueError("the table of a resampling is no constant")
        start = starts[buffer] + offset
        table = weights[start : start + sum(does.size) * ENTRY].view(-1, ENTRY)[:, :2]
        for part, inside in zip(table.split(list(does.size)), does.in_size, strict=True):
            if not bool(((part >= 0) & (part < inside)).all()):
                raise ValueError("the table of a resampling leads outside its image")


def _no_recipe() -> torch.Tensor:
    raise RuntimeError("a loaded model has its weights packed already")


def _secret(create: bool) -> bytes | None:
    """This user's key on this machine, kept where only they can read it."""
    folder = jit.cache_folder()
    if folder is None:
        return None
    file = folder / "key"
    try:
        if create and not file.exists():
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(secrets.token_bytes(_SECRET_BYTES))
        return file.read_bytes()
    except OSError:
        return None


def _sign(key: str, text: str, binary: bytes, create: bool = True) -> str:
    """What vouches for this being the code of this kernel on this machine; empty without a key."""
    secret = _secret(create)
    if secret is None or len(secret) != _SECRET_BYTES:
        return ""
    message = json.dumps([jit.FORMAT, key, text]).encode() + b"\0" + binary
    return hmac.new(secret, message, "sha256").hexdigest()


def _signed(key: str, text: str, binary: bytes, signature: str) -> bool:
    expected = _sign(key, text, binary, create=False)
    return bool(expected) and hmac.compare_digest(expected.encode(), signature.encode())
