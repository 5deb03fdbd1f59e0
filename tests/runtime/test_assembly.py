"""Code for CPUs that are not here: it compiles, and its inner loops keep to the registers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import llvmlite.binding as llvm
import pytest

from separable.runtime import jit
from separable.runtime.emit import driver
from separable.runtime.emit.conv import Conv, ConvTile
from separable.runtime.emit.kernel import Description, Kernel
from separable.runtime.emit.window import Window
from separable.runtime.machine import Machine, with_vectors_of
from separable.runtime.scheduling.tiles import choose_tile


@dataclass(frozen=True)
class Foreign(Machine):
    """A CPU of another kind than this process runs on."""

    target: str = ""

    @property
    def triple(self) -> str:
        return self.target


def foreign(isa: str, fma: bool, target: str, cpu: str) -> Foreign:
    """A CPU by LLVM's name, with the vectors of an instruction set."""
    fields = replace(with_vectors_of(isa), fma=fma, cpu=cpu, features="")
    return Foreign(**fields.__dict__, target=target)


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
CPUS = {
    "avx512": lambda: foreign("avx512", True, X86, "skylake-avx512"),
    "avx512-zen4": lambda: foreign("avx512", True, X86, "znver4"),
    "avx2": lambda: foreign("avx2", True, X86, "haswell"),
    "sse2": lambda: foreign("sse2", False, X86, "x86-64"),
    "neon": lambda: foreign("neon", True, ARM, "cortex-a72"),
}


def pointwise(inputs: int, outputs: int, pixels: int) -> Conv:
    return Conv(
        batch=1,
        size=(1, pixels),
        in_size=(1, pixels),
        channels=(inputs, outputs),
        x_strides=(0, 0, inputs, 1),
        y_strides=(0, 0, outputs),
        epilogue=("max", ("x", 0), 0.0),
    )


def dense(channels: int, size: int) -> Conv:
    walk = (size * size * channels, size * channels, channels)
    return Conv(
        batch=1,
        size=(size, size),
        in_size=(size, size),
        channels=(channels, channels),
        kernel=(3, 3),
        padding=(1, 1),
        x_strides=(*walk, 1),
        y_strides=walk,
    )


STEM = Conv(
    batch=1,
    size=(112, 112),
    in_size=(224, 224),
    channels=(3, 32),
    kernel=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
    x_strides=(150528, 672, 3, 1),
    y_strides=(401408, 3584, 32),
)
PLANES = replace(  # of a contiguous image
    STEM,
    channels=(3, 64),
    kernel=(7, 7),
    padding=(3, 3),
    x_strides=(150528, 224, 1, 50176),
    y_strides=(802816, 7168, 64),
)
CONVOLUTIONS = {
    "stem": STEM,
    "stem-of-planes": PLANES,
    "stem-3x3-of-planes": replace(PLANES, kernel=(3, 3), padding=(1, 1)),
    "pointwise": pointwise(96, 576, 196),
    "pointwise-short": pointwise(24, 144, 3136),
    "pointwise-long": pointwise(1024, 1024, 49),
    "pointwise-narrow": pointwise(64, 24, 784),
    "one-pixel": pointwise(1280, 1000, 1),
    "3x3": dense(64, 56),
    "3x3-long": dense(256, 14),
    "3x3-deep": dense(512, 7),
}


@pytest.fixture(params=CPUS)
def machine(request: pytest.FixtureRequest) -> Foreign:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    made = CPUS[request.param]()
    try:
        llvm.Target.from_triple(made.triple)
    except RuntimeError:
        pytest.skip(f"this LLVM has no {made.triple}")
    return made


def assembly(does: Description, machine: Machine) -> str:
    kernel = Kernel(does, machine, choose_tile(does, machine, 1))
    return jit.emit_assembly(kernel.ir, machine)


def loops(text: str) -> list[list[str]]:
    """The instructions of each loop that is one block."""
    found: list[list[str]] = []
    name, lines = "", []
    for line in text.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            name, lines = label[1], []
            continue
        code = line.split("#")[0].split("//")[0].strip()
        if code and not code.startswith("."):
            lines.append(code)
            if name and re.match(rf"(j\w+|b\.\w+|cbn?z|tbn?z)\s.*{re.escape(name)}$", code):
                found.append(list(lines))
    return found


MULTIPLY_ADD = re.compile(r"vfmadd\w+ps|\bmulps|fmla")
STACK = re.compile(r"%rsp|\[sp")


@pytest.mark.parametrize("does", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_inner_loops_of_convolutions_do_not_spill(does: Conv, machine: Foreign) -> None:
    text = assembly(does, machine)
    counts = [sum(bool(MULTIPLY_ADD.search(line)) for line in loop) for loop in loops(text)]
    hot = [
        loop for loop, count in zip(loops(text), counts, strict=True) if count > max(counts) // 2
    ]
    assert max(counts) >= 8
    register = {16: "zmm", 8: "ymm", 4: "xmm"}[machine.width]
    for loop in hot:
        assert not [
            line for line in loop if STACK.search(line) and re.search(r"[xyz]mm|\bq\d|\bv\d", line)
        ], "\n".join(loop)
        if machine.triple == X86:
            assert any(register in line for line in loop)


@pytest.mark.parametrize("does", [dense(256, 14), dense(512, 7), pointwise(512, 1024, 49)])
def test_vectors_share_the_pixels_they_load(does: Conv) -> None:
    # A load per multiply-add is more than a CPU does in a cycle, wherever the weights come from.
    machine = replace(CPUS["avx2"](), l1=32 << 10, l2=512 << 10)
    tile = choose_tile(does, machine, 1)
    assert isinstance(tile, ConvTile)
    assert tile.vectors > 1


def test_other_kernels_compile(machine: Foreign) -> None:
    walk = (56 * 56 * 70, 56 * 70, 70)
    window = Window("conv", 1, (56, 56), (56, 56), 70, (3, 3), walk, walk, padding=(1, 1))
    assert MULTIPLY_ADD.search(assembly(window, machine))
    code = jit.emit_assembly(driver.emit(machine), machine)
    assert all(f"{name}:" in code for name in ("post", "join", "work", "fetch"))
