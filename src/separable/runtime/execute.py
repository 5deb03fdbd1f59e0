"""Running a schedule: one foreign call per stretch of native steps."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from . import jit
from .emit import driver
from .emit.kernel import Kernel
from .graph import Node
from .machine import Machine, host
from .memory import Buffer, Place, aligned, plan_arena
from .steps import Schedule, Step
from .threads import address_of, driver_code, workers

_FLOAT = 4  # bytes


@dataclass
class _Segment:
    """A stretch of native steps, or one torch step."""

    first: int
    last: int
    torch: Step | None = None


@dataclass(eq=False)
class _Frame:
    """What one call needs for itself, reused by later calls."""

    arena: torch.Tensor
    bases: np.ndarray
    jobs: list[np.ndarray]
    counters: np.ndarray
    steps: np.ndarray
    weights: Any = None
    values: dict[Node, Any] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether the last worker has left."""
        active = driver.JOB.index("active")
        return all(job[active] == 0 for job in self.jobs)


# Frames of programs that are gone, which a worker has yet to leave.
_LATE: list[_Frame] = []


def _bury(frames: list[_Frame]) -> None:
    _LATE.extend(frame for frame in frames if not frame.idle)


class Program:
    """A schedule bound to machine code and memory.

    Attributes:
        arena_bytes: activation memory of one call, what each thread needs for itself included.
        constant_bytes: packed weights.
    """

    def __init__(
        self,
        schedule: Schedule,
        machine: Machine,
        threads: int,
        objects: Mapping[Kernel, bytes] | None = None,
    ) -> None:
        self.schedule, self.machine, self.threads = schedule, machine, threads
        steps = schedule.steps
        self._arena = plan_arena([[buffer for buffer, _ in s.arguments] for s in steps])
        offset = 0
        for buffer, _ in schedule.constants:
            buffer.offset = offset
            offset += aligned(buffer.size)
        self._constants = offset
        scratch = [b.size for s in steps for b, _ in s.arguments if b.kind == "scratch"]
        self._scratch = aligned(max(scratch, default=0))
        self._arena_floats = self._arena + threads * self._scratch
        self.arena_bytes, self.constant_bytes = self._arena_floats * _FLOAT, offset * _FLOAT
        objects = objects or {}
        self._codes: dict[Kernel, jit.Code] = {}
        for step in steps:
            kernel = step.kernel
            if kernel and kernel in objects:
                self._codes[kernel] = jit.load_object(objects[kernel], machine)
            elif kernel and kernel not in self._codes:
                self._codes[kernel] = jit.compile_ir(kernel.ir, machine)
        self._table = self._step_table()
        self._segments = self._cut()
        self._launch = jit.foreign(driver_code(host()), "launch", *[ctypes.c_int64] * 3)
        self._frames: list[_Frame] = []
        weakref.finalize(self, _bury, self._frames)
        self._lock = threading.Lock()
        self._weights: torch.Tensor | None = None
        self._process = os.getpid()

    # -- memory of the steps ----------------------------------------------------------------------

    def _base(self, buffer: Buffer) -> int:
        """The number of the base address a buffer's offset counts from."""
        return {
            "arena": 0,
            "constant": 1,
            "input": 2 + buffer.number,
            "output": 2 + len(self.schedule.inputs) + buffer.number,
            "scratch": -self._fixed_bases,
        }[buffer.kind]

    @property
    def _fixed_bases(self) -> int:
        return 2 + len(self.schedule.inputs) + len(self.schedule.outputs)

    def _step_table(self) -> np.ndarray:
        table = np.zeros((len(self.schedule.steps), driver.STEP_WORDS), dtype=np.int64)
        for row, step in zip(table, self.schedule.steps, strict=True):
            if step.kernel is None:
                continue
            row[0] = self._codes[step.kernel].address("kernel")
            row[1] = step.kernel.tasks
            row[2] = len(step.arguments)
            for i, (buffer, offset) in enumerate(step.arguments):
                row[3 + 2 * i] = self._base(buffer)
                row[4 + 2 * i] = (buffer.offset + offset) * _FLOAT
        return table

    def _cut(self) -> list[_Segment]:
        segments: list[_Segment] = []
        for number, step in enumerate(self.schedule.steps):
            if step.kernel is None:
                segments.append(_Segment(number, number + 1, step))
            elif segments and segments[-1].torch is None:
                segments[-1].last = number + 1
            else:
                segments.append(_Segment(number, number + 1))
        return segments

    # -- weights ----------------------------------------------------------------------------------

    @property
    def objects(self) -> dict[Kernel, bytes]:
        """The object file of each kernel."""
        return {kernel: code.binary for kernel, code in self._codes.items()}

    @property
    def weights(self) -> torch.Tensor:
        """The packed weights, flat."""
        assert self._weights is not None
        return self._weights

    def adopt(self, weights: torch.Tensor) -> None:
        """Take weights that a program like this one packed."""
        if weights.numel() != max(self._constants, 1):
            raise ValueError(f"`weights` has {weights.numel()} floats, not {self._constants}")
        self._weights = _aligned_floats(self._constants).copy_(weights)

    def pack(self) -> None:
        """Compute the packed weights anew; calls that are running keep the old ones."""
        weights = _aligned_floats(self._constants)
        with torch.no_grad():
            for buffer, recipe in self.schedule.constants:
                value = recipe().detach().to(torch.float32).reshape(-1)
                weights[buffer.offset : buffer.offset + buffer.size].copy_(value)
        self._weights = weights

    # -- calls ------------------------------------------------------------------------------------

    def __call__(
        self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None] | None = None
    ) -> list[Any]:
        """Run once.

        Args:
            inputs: contiguous float32 tensors of the scheduled shapes, or whatever torch takes
                where the schedule has no buffer.
            outputs: contiguous tensors to write the results to; new ones if `None`.

        Returns:
            The results.
        """
        frame = self._take()
        try:
            outputs = self._outputs() if outputs is None else outputs
            self._bind(frame, inputs, outputs)
            for number, segment in enumerate(self._segments):
                if segment.torch is None:
                    self._run(frame, number)
                else:
                    self._run_torch(frame, segment.torch, inputs, outputs)
            return [
                frame.values[result] if isinstance(result, Node) else output
                for result, output in zip(self.schedule.outputs, outputs, strict=True)
            ]
        finally:
            frame.values.clear()
            with self._lock:
                self._frames.append(frame)

    @property
    def argument_shapes(self) -> list[tuple[int, ...] | None]:
        """The shape of each argument, `None` if it is no float32 tensor."""
        return [node.shape for node in self.schedule.arguments]

    @property
    def result_shapes(self) -> list[tuple[int, ...] | None]:
        """The shape of each result, `None` if it is no float32 tensor."""
        return self.schedule.shapes

    def _outputs(self) -> list[torch.Tensor | None]:
        return [None if shape is None else torch.empty(shape) for shape in self.result_shapes]

    def _bind(
        self, frame: _Frame, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None]
    ) -> None:
        assert self._weights is not None
        frame.weights = self._weights
        frame.bases[1] = frame.weights.data_ptr()
        at = 2
        for buffer, value in zip(self.schedule.inputs, inputs, strict=True):
            frame.bases[at] = 0 if buffer is None else value.data_ptr()
            at += 1
        for output in outputs:
            frame.bases[at] = 0 if output is None else output.data_ptr()
            at += 1

    def _run(self, frame: _Frame, number: int) -> None:
        job = frame.jobs[number]
        job[driver.JOB.index("active")] = 1
        helpers = self.threads - 1
        crew = 0
        if helpers:
            segment = self._segments[number]
            lines = (self.threads + 1) * driver.LINE_WORDS
            frame.counters[segment.first * lines : segment.last * lines] = 0
            crew = workers().addresses(helpers)
        self._launch(job.ctypes.data, crew, helpers)

    def _run_torch(
        self,
        frame: _Frame,
        step: Step,
        inputs: Sequence[Any],
        outputs: Sequence[torch.Tensor | None],
    ) -> None:
        assert step.node is not None
        tensors = [frame.arena, frame.weights, *inputs, *outputs]

        def look(place: Place) -> torch.Tensor:
            base: torch.Tensor = tensors[self._base(place.buffer)]
            offset = place.buffer.offset + place.offset + base.storage_offset()
            return base.as_strided(place.shape, place.strides, offset)

        def value(node: Node) -> Any:
            if node in step.operands:
                return look(step.operands[node])
            if node.kind == "constant":
                return node.attributes["recipe"]()
            if node.kind == "input":
                return inputs[self._input_numbers[node]]
            return frame.values[node]

        attributes = step.node.attributes
        arguments, named = pytree.tree_map_only(
            Node, value, (attributes["arguments"], attributes["named"])
        )
        with torch.no_grad():
            result = attributes["target"](*arguments, **named)
            if step.output is not None:
                look(step.output).copy_(result)
            else:  # nothing may point into the arena, which is used again
                frame.values[step.node] = pytree.tree_map_only(
                    torch.Tensor, torch.Tensor.clone, result
                )

    @property
    def _input_numbers(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.schedule.arguments)}

    def _take(self) -> _Frame:
        """A frame that no one uses, made if need be."""
        with self._lock:
            if self._process != os.getpid():
                self._frames.clear()
                self._process = os.getpid()
            for i, frame in enumerate(self._frames):
                if frame.idle:
                    return self._frames.pop(i)
        return self._new_frame()

    def _new_frame(self) -> _Frame:
        _LATE[:] = [frame for frame in _LATE if not frame.idle]
        bases = np.zeros(self._fixed_bases + self.threads, dtype=np.int64)
        arena = _aligned_floats(self._arena_floats)
        bases[0] = arena.data_ptr()
        for slot in range(self.threads):
            scratch = self._arena + slot * self._scratch
            bases[self._fixed_bases + slot] = bases[0] + scratch * _FLOAT
        lines = len(self.schedule.steps) * (self.threads + 1)
        counters = np.zeros(lines * driver.LINE_WORDS, dtype=np.int64)
        jobs = []
        for segment in self._segments:
            fields = {
                "steps": self._table.ctypes.data,
                "first": segment.first,
                "last": segment.last,
                "bases": bases.ctypes.data,
                "counters": counters.ctypes.data,
                "slots": self.threads,
                "active": 0,
                "yield": address_of("sched_yield"),
            }
            jobs.append(np.array([fields[name] for name in driver.JOB], dtype=np.int64))
        return _Frame(arena, bases, jobs, counters, self._table)

    def step_runner(self, frame_inputs: Sequence[Any]) -> Callable[[int, int], None]:
        """A function that runs native steps `first <= i < last` on one thread, to time them."""
        frame = self._new_frame()
        outputs = self._outputs()
        self._bind(frame, frame_inputs, outputs)
        job = frame.jobs[0].copy()
        keep = (frame, outputs, frame_inputs)

        def run(first: int, last: int) -> None:
            assert keep
            fields = {"first": first, "last": last, "slots": 1, "active": 1}
            for name, value in fields.items():
                job[driver.JOB.index(name)] = value
            self._launch(job.ctypes.data, 0, 0)

        return run


def _aligned_floats(count: int) -> torch.Tensor:
    """Uninitialised floats from a cache line on."""
    raw = torch.empty(count + 16)
    start = -(raw.data_ptr() // _FLOAT) % 16
    return raw[start : start + max(count, 1)]
