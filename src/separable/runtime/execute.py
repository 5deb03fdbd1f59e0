"""Running a schedule: one foreign call per stretch of native steps."""

from __future__ import annotations

import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from ..progress import progress
from . import jit
from .emit import driver
from .emit.kernel import Kernel
from .graph import Node, Operand, evaluation
from .machine import Machine, host
from .memory import Buffer, Place, aligned, plan_arena
from .steps import Schedule, Step
from .threads import address_of, driver_code, workers
from .weights import TRACING, Weights

_FLOAT = 4  # bytes
_ACTIVE = driver.JOB.index("active")


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
    bases: array[int]
    jobs: list[array[int]]
    counters: np.ndarray
    steps: np.ndarray
    weights: Any = None
    values: dict[Node, Any] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether the last worker has left."""
        return not any(job[_ACTIVE] for job in self.jobs)


# Frames of programs that are gone, which a worker has yet to leave.
_LATE: list[_Frame] = []


def _bury(frames: deque[_Frame]) -> None:
    _LATE.extend(frame for frame in frames if not frame.idle)


class Program:
    """A schedule bound to machine code and memory; packs its weights anew when they change.

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
        watched: Weights | None = None,
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
        kernels = dict.fromkeys(step.kernel for step in steps if step.kernel)
        with progress("compiling kernels", len(kernels), "kernel") as bar:
            for kernel in kernels:
                if kernel in objects:
                    self._codes[kernel] = jit.load_object(objects[kernel], machine)
                else:
                    self._codes[kernel] = jit.compile_ir(kernel.ir, machine)
                bar.update()
        self._table = self._step_table()
        self._segments = self._cut()
        code = driver_code(host())
        self._post = jit.foreign(code, "post", 3, brief=True)
        self._join = jit.foreign(code, "join", 1)
        self._frames: deque[_Frame] = deque()
        weakref.finalize(self, _bury, self._frames)
        self._weights: torch.Tensor | None = None
        self._watched = watched
        self._lock = threading.Lock()
        self._workers = workers()

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
        exact = torch.autocast("cpu", enabled=False)  # whatever the caller's defaults are
        with TRACING, torch.no_grad(), evaluation(), exact, torch.device("cpu"):
            seen = self._watched.look() if self._watched else None
            weights = _aligned_floats(self._constants)
            for buffer, recipe in self.schedule.constants:
                value = recipe().detach().to(torch.float32).reshape(-1)
                weights[buffer.offset : buffer.offset + buffer.size].copy_(value)
        self._weights = weights
        if self._watched and seen:  # last: a call that finds nothing changed has these weights
            self._watched.seen = seen

    # -- calls ------------------------------------------------------------------------------------

    def __call__(
        self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None] | None = None
    ) -> list[Any]:
        """Run once.

        Args:
            inputs: tensors of the expected forms, or whatever torch takes where the schedule has
                no buffer.
            outputs: tensors to write the results to, of their forms; new ones if `None`.

        Returns:
            The results.
        """
        outputs = self._outputs() if outputs is None else outputs
        results = self._attempt(inputs, outputs, check=True)
        if results is None:
            self.refresh()
            # Weights packed since the call began will do: who changes them meanwhile can't tell.
            results = self._attempt(inputs, outputs, check=False)
        assert results is not None
        return results

    def _attempt(
        self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None], check: bool
    ) -> list[Any] | None:
        """Run once, with the weights as they were packed last.

        Returns:
            The results; `None` if the weights are to be checked and have changed.
        """
        frame = self._take()
        try:
            self._bind(frame, inputs, outputs)
            fresh = None if check else True
            for number, segment in enumerate(self._segments):
                if segment.torch is not None:
                    self._run_torch(frame, segment.torch, inputs, outputs)
                    continue
                job = _address(frame.jobs[number])
                helpers = self.threads - 1
                crew = self._workers.addresses(helpers)  # may fail, and then nothing is to join
                try:
                    self._post(job, crew, helpers)
                    if fresh is None:  # asked while the workers have begun
                        fresh = self._is_fresh(frame)
                finally:  # after an interrupt too: workers may be writing
                    self._join(job)
            if fresh is False:
                return None
            return [
                frame.values[result] if isinstance(result, Node) else output
                for result, output in zip(self.schedule.outputs, outputs, strict=True)
            ]
        finally:
            frame.values.clear()
            self._frames.append(frame)

    def _is_fresh(self, frame: _Frame) -> bool:
        if self._watched is None:
            return True
        return not self._watched.changed() and frame.weights is self._weights

    def refresh(self) -> None:
        """Pack the weights anew if they have changed."""
        with TRACING, self._lock:
            if self._watched is not None and self._watched.changed():
                self.pack()

    def _outputs(self) -> list[torch.Tensor | None]:
        return [None if form is None else form.empty() for form in self.schedule.results]

    def _bind(
        self, frame: _Frame, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None]
    ) -> None:
        assert self._weights is not None
        frame.weights = self._weights
        frame.bases[1] = frame.weights.data_ptr()
        at = 2
        for buffer, value in zip(self.schedule.inputs, inputs, strict=True):
            frame.bases[at] = 0 if buffer is None else _pointer(value)
            at += 1
        for output in outputs:
            frame.bases[at] = 0 if output is None else _pointer(output)
            at += 1

    def _run_torch(
        self,
        frame: _Frame,
        step: Step,
        inputs: Sequence[Any],
        outputs: Sequence[torch.Tensor | None],
    ) -> None:
        assert step.node is not None
        sources, attributes = step.node.inputs, step.node.attributes
        tensors = [frame.arena, frame.weights, *inputs, *outputs]

        def look(place: Place) -> torch.Tensor:
            base: torch.Tensor = tensors[self._base(place.buffer)]
            offset = place.buffer.offset + place.offset + base.storage_offset()
            return base.as_strided(place.shape, place.strides, offset)

        def value(operand: Operand) -> Any:
            node = sources[operand.number]
            if node in step.operands:
                return attributes["handed"](look(step.operands[node]))
            if node.kind == "constant":
                return node.attributes["recipe"]()
            if node.kind == "input":
                return inputs[self._input_numbers[node]]
            return frame.values[node]

        arguments, named = pytree.tree_map_only(
            Operand, value, (attributes["arguments"], attributes["named"])
        )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            result = attributes["target"](*arguments, **named)
            if step.output is not None:
                look(step.output).copy_(result)
            else:  # nothing may point into the arena, which is used again
                frame.values[step.node] = pytree.tree_map_only(
                    torch.Tensor, torch.Tensor.clone, result
                )

    @cached_property
    def _input_numbers(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.schedule.arguments)}

    def _take(self) -> _Frame:
        """A frame that no one uses, made if need be."""
        if self._workers is not workers():
            with self._lock:
                if self._workers is not workers():
                    self._frames.clear()  # after a fork they wait for workers left behind
                    self._workers = workers()
        for _ in range(len(self._frames)):
            try:
                frame = self._frames.popleft()
            except IndexError:  # other threads were faster
                break
            if frame.idle:
                return frame
            self._frames.append(frame)
        return self._new_frame()

    def _new_frame(self) -> _Frame:
        for late in [frame for frame in _LATE if frame.idle]:
            with suppress(ValueError):  # another thread was faster
                _LATE.remove(late)
        bases = array("q", bytes(8 * (self._fixed_bases + self.threads)))
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
                "bases": _address(bases),
                "counters": counters.ctypes.data,
                "slots": self.threads,
                "active": 0,
                "usleep": address_of("usleep"),
            }
            jobs.append(array("q", [fields[name] for name in driver.JOB]))
        return _Frame(arena, bases, jobs, counters, self._table)

    def step_runner(self, frame_inputs: Sequence[Any]) -> Callable[[int, int], None]:
        """A function that runs native steps `first <= i < last` on one thread, to time them."""
        frame = self._new_frame()
        outputs = self._outputs()
        self._bind(frame, frame_inputs, outputs)
        job = frame.jobs[0][:]
        keep = (frame, outputs, frame_inputs)

        def run(first: int, last: int) -> None:
            assert keep
            fields = {"first": first, "last": last, "slots": 1}
            for name, value in fields.items():
                job[driver.JOB.index(name)] = value
            self._post(_address(job), 0, 0)
            self._join(_address(job))

        return run


def _pointer(tensor: torch.Tensor) -> int:
    if isinstance(tensor, FakeTensor):
        raise TypeError(
            "a compiled model works on memory, and a FakeTensor has none; call it outside of "
            "FakeTensorMode, with tensors that hold data"
        )
    return tensor.data_ptr()


def _address(words: array[int]) -> int:
    return words.buffer_info()[0]


def _aligned_floats(count: int) -> torch.Tensor:
    """Uninitialised floats from a cache line on."""
    with torch.inference_mode(False):  # it is written to in other modes too
        raw = torch.empty(count + 16, dtype=torch.float32, device="cpu")
    start = -(_pointer(raw) // _FLOAT) % 16
    return raw[start : start + max(count, 1)]
