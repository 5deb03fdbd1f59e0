"""Writing vector code: a thin layer over llvmlite that knows the machine's vector width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir

from ..machine import Machine

Value: TypeAlias = ir.Value
Index: TypeAlias = int | ir.Value

F32 = ir.FloatType()
I64 = ir.IntType(64)
I32 = ir.IntType(32)
PTR = ir.PointerType()


class Builder:
    """Emits one kernel: `void kernel(pointer *arguments, int64 begin, int64 end)`.

    A kernel runs its tasks `begin <= t < end`; the pointers in `arguments` are float arrays that
    do not overlap. Indices are Python integers where they are known, so that what can be computed
    here is never computed by the kernel.

    Attributes:
        machine: the CPU it is emitted for.
        body: the function that is being written.
        pointers: the kernel's arguments.
        begin: first task.
        end: one past the last task.
    """

    def __init__(
        self, machine: Machine, arguments: int, inside: Builder | None = None, name: str = "body"
    ) -> None:
        """Begin a kernel, or a function `name` that the kernel `inside` can `call`."""
        self.machine = machine
        self.width = machine.width
        self.vector = ir.VectorType(F32, machine.width)
        self.module: ir.Module = inside.module if inside else ir.Module()
        self.body = body = ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), [PTR] * arguments + [I64, I64]), name
        )
        body.linkage = "internal"
        # Where a quotient allows it: an estimate and one step of Newton's, for a slow division.
        # (The set's own `add` knows no attributes of this kind.)
        set.add(body.attributes, '"reciprocal-estimates"="vec-divf:1"')
        for pointer in body.args[:arguments]:
            pointer.add_attribute("noalias")
        if inside is None:
            self._wrap(body, arguments)
        self.ir = ir.IRBuilder(body.append_basic_block())
        self.pointers: list[Value] = list(body.args[:arguments])
        self.begin, self.end = body.args[arguments:]

    def _wrap(self, body: ir.Function, arguments: int) -> None:
        kernel = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64]), "kernel")
        build = ir.IRBuilder(kernel.append_basic_block())
        array, begin, end = kernel.args
        loaded = [
            build.load(build.gep(array, [I64(i)], source_etype=PTR), typ=PTR)
            for i in range(arguments)
        ]
        build.call(body, [*loaded, begin, end])
        build.ret_void()

    def finish(self) -> str:
        """End the kernel and return the module's text."""
        self.end_body()
        return str(self.module)

    def end_body(self) -> None:
        """End the function."""
        self.ir.ret_void()

    def call(self, function: ir.Function, pointers: list[Value], begin: Index, end: Index) -> None:
        """Run the tasks `begin <= t < end` of another function of this module."""
        self.ir.call(function, [*pointers, self.index(begin), self.index(end)])

    # -- integers -----------------------------------------------------------------------------

    def index(self, value: Index) -> Value:
        """An integer as an LLVM value."""
        return I64(value) if isinstance(value, int) else value

    def add(self, a: Index, b: Index) -> Index:
        """`a + b`."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self.ir.add(self.index(a), self.index(b), flags=["nsw"])

    def mul(self, a: Index, b: Index) -> Index:
        """`a * b`."""
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if 0 in (a, b):
            return 0
        if 1 in (a, b):
            return b if a == 1 else a
        return self.ir.mul(self.index(a), self.index(b), flags=["nsw"])

    def divmod(self, a: Index, b: int) -> tuple[Index, Index]:
        """`a // b` and `a % b` of a non-negative `a`."""
        if isinstance(a, int):
            return divmod(a, b)
        if b == 1:
            return a, 0
        return self.ir.udiv(a, I64(b)), self.ir.urem(a, I64(b))

    def split(self, a: Index, sizes: Sequence[int]) -> list[Index]:
        """The coordinates of flat index `a` in an array of these sizes, row-major."""
        coordinates: list[Index] = []
        for size in reversed(sizes[1:]):
            a, inner = self.divmod(a, size)
            coordinates.insert(0, inner)
        return [a, *coordinates]

    def dot(self, coordinates: Sequence[Index], strides: Sequence[int]) -> Index:
        """The offset of `coordinates` under `strides`."""
        offset: Index = 0
        for coordinate, stride in zip(coordinates, strides, strict=True):
            offset = self.add(offset, self.mul(coordinate, stride))
        return offset

    def minimum(self, a: Index, b: Index) -> Index:
        """`min(a, b)`, signed."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        a, b = self.index(a), self.index(b)
        return self.ir.select(self.ir.icmp_signed("<", a, b), a, b)

    def maximum(self, a: Index, b: Index) -> Index:
        """`max(a, b)`, signed."""
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        a, b = self.index(a), self.index(b)
        return self.ir.select(self.ir.icmp_signed(">", a, b), a, b)

    # -- control ------------------------------------------------------------------------------

    def loop(
        self,
        start: Index,
        stop: Index,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
        step: int = 1,
    ) -> list[Value]:
        """Emit `for i in range(start, stop, step): carried = body(i, *carried)`.

        Returns:
            The values carried out of the last turn.
        """
        static = isinstance(start, int) and isinstance(stop, int)
        if static:
            turns = len(range(start, stop, step))
            if turns == 0:
                return list(carried)
            if turns == 1:
                return list(body(start, *carried) or ())
        enter = self.ir.block
        turn = self.ir.append_basic_block()
        leave = self.ir.append_basic_block()
        first, last = self.index(start), self.index(stop)
        if static:
            self.ir.branch(turn)
        else:
            self.ir.cbranch(self.ir.icmp_signed("<", first, last), turn, leave)
        self.ir.position_at_end(turn)
        counter = self.ir.phi(I64)
        counter.add_incoming(first, enter)
        phis = [self.ir.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, enter)
        results = list(body(counter, *phis) or ())
        following = self.ir.add(counter, I64(step), flags=["nsw"])
        counter.add_incoming(following, self.ir.block)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, self.ir.block)
        back = self.ir.block
        self.ir.cbranch(self.ir.icmp_signed("<", following, last), turn, leave)
        self.ir.position_at_end(leave)
        merged = []
        for before, after in zip(carried, results, strict=True):
            phi = self.ir.phi(before.type)
            if not static:
                phi.add_incoming(before, enter)
            phi.add_incoming(after, back)
            merged.append(phi)
        return merged

    def when(self, condition: Value | bool, body: Callable[[], None]) -> None:
        """Emit `if condition: body()`."""
        if isinstance(condition, bool):
            if condition:
                body()
            return
        with self.ir.if_then(condition):
            body()

    # -- memory -------------------------------------------------------------------------------

    def at(self, pointer: Value, offset: Index, constant: int = 0) -> Value:
        """The address of float `pointer[offset + constant]`."""
        if not (isinstance(offset, int) and offset == 0):
            pointer = self.ir.gep(pointer, [self.index(offset)], source_etype=F32, inbounds=True)
        if constant:
            pointer = self.ir.gep(pointer, [I64(constant)], source_etype=F32, inbounds=True)
        return pointer

    def load(self, pointer: Value, count: int | None = None) -> Value:
        """Load a vector; only its first `count` lanes, the others zero, if `count` is given."""
        if count is None or count == self.width:
            return self.ir.load(pointer, typ=self.vector, align=4)
        mask = ir.Constant(
            ir.VectorType(ir.IntType(1), self.width), [lane < count for lane in range(self.width)]
        )
        function = self._declare(
            f"llvm.masked.load.v{self.width}f32.p0", self.vector, [PTR, mask.type, self.vector]
        )
        return self.ir.call(function, [pointer, mask, self.zero()])

    def store(self, value: Value, pointer: Value, count: int | None = None) -> None:
        """Store a vector, or its first `count` lanes."""
        if count is None or count == self.width:
            self.ir.store(value, pointer, align=4)
            return
        # Pieces of a power of two each: masked stores are microcoded on some CPUs.
        done = 0
        piece = self.width // 2
        while done < count:
            if count - done >= piece:
                part = self.pick(value, range(done, done + piece))
                self.ir.store(part, self.at(pointer, done), align=4)
                done += piece
            piece //= 2

    def prefetch(self, pointer: Value) -> None:
        """Ask for a cache line, to be in the L2 cache when it is read."""
        function = self._declare("llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        self.ir.call(function, [pointer, I32(0), I32(2), I32(1)])

    def fence(self) -> None:
        """Keep loads and stores on their side of it; no instruction comes of it."""
        self.ir.fence("acq_rel", "singlethread")

    def after(self, value: Value, pointer: Value) -> Value:
        """The same pointer, of which LLVM knows nothing until it has the value."""
        signature = ir.FunctionType(pointer.type, [pointer.type, value.type])
        return self.ir.asm(signature, "", "=r,0,x", [pointer, value], side_effect=False)

    def load_scalar(self, pointer: Value) -> Value:
        """Load one float."""
        return self.ir.load(pointer, typ=F32, align=4)

    def broadcast(self, scalar: Value) -> Value:
        """One float in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        single = self.ir.insert_element(undefined, scalar, I32(0))
        return self.pick(single, [0] * self.width)

    def pick(self, value: Value, lanes: Sequence[int]) -> Value:
        """A vector of these lanes of another."""
        undefined = ir.Constant(value.type, ir.Undefined)
        return self.ir.shuffle_vector(
            value, undefined, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        )

    # -- arithmetic ---------------------------------------------------------------------------

    def constant(self, number: float, type_: ir.Type | None = None) -> Value:
        """A float in every lane."""
        type_ = type_ or self.vector
        if isinstance(type_, ir.VectorType):
            return ir.Constant(type_, [ir.Constant(F32, number)] * type_.count)
        return ir.Constant(type_, number)

    def zero(self) -> Value:
        """A vector of zeros."""
        return self.constant(0.0)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """`a * b + c`, in one rounding where the machine can."""
        if not self.machine.fma:
            return self.ir.fadd(self.ir.fmul(a, b), c)
        return self.intrinsic("fma", a, b, c)

    def quotient(self, a: Value, b: Value) -> Value:
        """`a / b` but for the last bit, of a finite `b` whose reciprocal is a normal number."""
        return self.ir.fdiv(a, b, flags=["arcp"])

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """LLVM's intrinsic of that name for the type of its arguments."""
        type_ = arguments[0].type
        suffix = f"v{type_.count}f32" if isinstance(type_, ir.VectorType) else "f32"
        function = self._declare(
            f"llvm.{name}.{suffix}", type_, [argument.type for argument in arguments]
        )
        return self.ir.call(function, arguments)

    def _declare(self, name: str, result: ir.Type, parameters: list[ir.Type]) -> Any:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, parameters), name)
