"""Compiled models as files: packed weights, kernel descriptions, and code for the CPU they ran on.

    magic | header length | header (JSON) | weights | objects | SHA-256 of all before

Nothing in a file is executed because it is there. Kernels are described, not stored, and are
generated again on loading; the object code that spares this is only used if it carries a signature
that this user made on this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import struct
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import jit
from . import machine as machines
from .compiled import CompiledModel
from .emit.chain import Chain, ChainTile
from .emit.conv import Conv, ConvTile
from .emit.elementwise import Map
from .emit.kernel import Kernel
from .emit.reduction import Mean, Rows
from .emit.resample import Resample
from .emit.window import Window
from .execute import Program
from .graph import Node
from .memory import Buffer
from .steps import Schedule, Step

_MAGIC = b"separable-runtime"
_FORMAT = 2
_DIGEST = hashlib.sha256
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Conv, ConvTile, Window, Chain, ChainTile, Map, Mean, Rows, Resample)
}
_MACHINE = ("isa", "width", "registers", "fma", "l1", "l2")


def save(model: CompiledModel, path: str | os.PathLike[str]) -> None:
    """Write a compiled model to a file.

    Args:
        model: whose kernels are all its own.
        path: of the file, replaced in one step if it exists.

    Raises:
        ValueError: if a part of the model runs in torch.
    """
    program = model.program
    schedule = program.schedule
    torch_steps = [s.node.name for s in schedule.steps if s.kernel is None and s.node]
    if torch_steps or any(isinstance(output, Node) for output in schedule.outputs):
        raise ValueError(
            f"`model` runs {', '.join(torch_steps)} in torch and cannot be saved; "
            "save the original model instead"
        )
    kernels = list(program.objects)
    buffers = list(dict.fromkeys(buffer for s in schedule.steps for buffer, _ in s.arguments))
    numbers = {buffer: i for i, buffer in enumerate(buffers)}
    objects = list(program.objects.values())
    weights = program.weights.numpy().tobytes()
    header = {
        "format": _FORMAT,
        "key": program.machine.key,
        "machine": {name: getattr(program.machine, name) for name in _MACHINE},
        "threads": program.threads,
        "dynamic_batch": model.dynamic_batch,
        "expected": model.expected,
        "structures": [pytree.treespec_dumps(spec) for spec in model.structures],
        "shapes": schedule.shapes,
        "buffers": [[b.kind, b.size, b.number] for b in buffers],
        "constants": [[numbers[b], b.size] for b, _ in schedule.constants if b in numbers],
        "weights": len(weights),
        "kernels": [
            {
                "does": _described(kernel.does),
                "tile": _described(kernel.tile),
                "object": len(binary),
                "signature": _sign(binary),
            }
            for kernel, binary in program.objects.items()
        ],
        "steps": [
            {
                "kernel": kernels.index(s.kernel),
                "arguments": [[numbers[buffer], offset] for buffer, offset in s.arguments],
                "layer": s.node and [s.node.name, s.node.kind, s.node.shape, s.node.absorbed],
            }
            for s in schedule.steps
            if s.kernel
        ],
    }
    text = json.dumps(header).encode()
    data = b"".join([_MAGIC, struct.pack("<Q", len(text)), text, weights, *objects])
    target = Path(path)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_bytes(data + _DIGEST(data).digest())
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def load_compiled(path: str | os.PathLike[str]) -> CompiledModel:
    """Read a compiled model from a file; kernels are generated again where the CPU differs.

    Args:
        path: of a file that `CompiledModel.save` wrote.

    Raises:
        ValueError: if the file is damaged, foreign, or of another format.
    """
    data = Path(path).read_bytes()
    start = len(_MAGIC) + 8
    end = len(data) - _DIGEST().digest_size
    if end < start or not data.startswith(_MAGIC):
        raise ValueError(f"`path` (={os.fspath(path)!r}) is not a compiled model")
    if _DIGEST(memoryview(data)[:end]).digest() != data[end:]:
        raise ValueError(f"`path` (={os.fspath(path)!r}) is damaged; save the model again")
    (length,) = struct.unpack_from("<Q", data, len(_MAGIC))
    header = json.loads(data[start : start + length])
    if header["format"] != _FORMAT:
        raise ValueError(
            f"`path` (={os.fspath(path)!r}) has format {header['format']}, this version reads "
            f"{_FORMAT}; compile the model again"
        )
    machine = _machine(header)
    at = start + length
    weights = torch.frombuffer(bytearray(data[at : at + header["weights"]]), dtype=torch.float32)
    at += header["weights"]
    kernels: list[Kernel] = []
    trusted: dict[Kernel, bytes] = {}
    for entry in header["kernels"]:
        does, tile = _restored(entry["does"]), _restored(entry["tile"])
        kernels.append(Kernel(does, machine, tile))
        binary = data[at : at + entry["object"]]
        at += entry["object"]
        if header["key"] == machine.key and _signed(binary, entry["signature"]):
            trusted[kernels[-1]] = binary
    program = Program(_schedule(header, kernels), machine, header["threads"], trusted)
    program.adopt(weights)
    expected = [_tuples(shape) for shape in header["expected"]]
    structures = tuple(pytree.treespec_loads(text) for text in header["structures"])
    return CompiledModel(
        program, expected, (structures[0], structures[1]), None, header["dynamic_batch"]
    )


def _machine(header: dict[str, Any]) -> machines.Machine:
    """This CPU, with the vectors the weights were packed for."""
    saved = header["machine"]
    isa = saved["isa"]
    here = machines.host(isa if isa in machines.available_isas() else None)
    return dataclasses.replace(here, **(saved | {"fma": here.fma}))


def _schedule(header: dict[str, Any], kernels: list[Kernel]) -> Schedule:
    buffers = [Buffer(kind, size, number) for kind, size, number in header["buffers"]]
    steps = []
    for entry in header["steps"]:
        node = None
        if entry["layer"]:
            name, kind, shape, absorbed = entry["layer"]
            node = Node(kind, _tuples(shape), name=name, absorbed=absorbed)
        arguments = [(buffers[number], offset) for number, offset in entry["arguments"]]
        if any(not 0 <= offset < buffer.size for buffer, offset in arguments):
            raise ValueError("the file describes an operand outside its buffer")
        steps.append(Step(node, arguments, kernels[entry["kernel"]]))

    def find(kind: str, number: int, shape: Any) -> Buffer | None:
        if shape is None:
            return None
        found = (b for b in buffers if (b.kind, b.number) == (kind, number))
        return next(found, Buffer(kind, torch.Size(shape).numel(), number))

    inputs = [find("input", i, shape) for i, shape in enumerate(header["expected"])]
    outputs = [find("output", i, shape) for i, shape in enumerate(header["shapes"])]
    return Schedule(
        steps,
        [(buffers[number], _no_recipe) for number, _ in header["constants"]],
        [],
        inputs,
        [buffer for buffer in outputs if buffer],
        [_tuples(shape) for shape in header["shapes"]],
    )


def _described(value: Any) -> Any:
    """A description as JSON, its kind beside its fields."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind of": type(value).__name__, **fields}
    return [_described(v) for v in value] if isinstance(value, tuple) else value


def _restored(value: Any) -> Any:
    """The inverse of `_described`."""
    if isinstance(value, dict):
        kind = _KINDS[value["kind of"]]
        return kind(**{k: _restored(v) for k, v in value.items() if k != "kind of"})
    return tuple(_restored(v) for v in value) if isinstance(value, list) else value


def _no_recipe() -> torch.Tensor:
    raise RuntimeError("a loaded model has its weights packed already")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


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
                stream.write(secrets.token_bytes(32))
        return file.read_bytes()
    except OSError:
        return None


def _sign(binary: bytes) -> str:
    secret = _secret(create=True)
    return hmac.new(secret, binary, "sha256").hexdigest() if secret else ""


def _signed(binary: bytes, signature: str) -> bool:
    secret = _secret(create=False)
    if not secret or len(secret) != 32:
        return False
    return hmac.compare_digest(hmac.new(secret, binary, "sha256").hexdigest(), signature)
