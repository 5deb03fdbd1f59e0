"""The CPU that code is generated for: vector width, registers, features, caches."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

# name: (floats per vector, vector registers, has fused multiply-add, required features)
_ISAS = {
    "avx512": (16, 32, True, ("avx512f", "avx512vl", "avx512dq", "avx512bw", "fma")),
    "avx2": (8, 16, True, ("avx2", "fma")),
    "sse2": (4, 16, False, ("sse2",)),
    "neon": (4, 32, True, ("neon",)),
}


@dataclass(frozen=True)
class Machine:
    """What the generators and the schedule need to know of one CPU.

    Attributes:
        isa: `"avx512"`, `"avx2"`, `"sse2"` or `"neon"`.
        width: floats per vector.
        registers: vector registers.
        fma: whether a multiply-add is one instruction.
        cpu: LLVM's name of the CPU.
        features: LLVM's feature string.
        l1: bytes of level-1 data cache per core.
        l2: bytes of level-2 cache per core.
    """

    isa: str
    width: int
    registers: int
    fma: bool
    cpu: str
    features: str
    l1: int
    l2: int

    @property
    def triple(self) -> str:
        """LLVM's target triple of this process."""
        return str(llvm.get_process_triple())

    @property
    def key(self) -> str:
        """Everything that decides which machine code LLVM emits, besides the IR."""
        version = ".".join(map(str, llvm.llvm_version_info))
        return "|".join((version, self.triple, self.cpu, self.features))


@cache
def initialize_llvm() -> None:
    """Load LLVM's code generator for this process, once."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def available_isas() -> tuple[str, ...]:
    """The instruction sets this CPU can run, best first."""
    initialize_llvm()
    features = llvm.get_host_cpu_features()
    return tuple(
        isa for isa, (*_, needs) in _ISAS.items() if all(features.get(name) for name in needs)
    )


@cache
def host(isa: str | None = None) -> Machine:
    """Describe this CPU, restricted to one instruction set.

    Args:
        isa: the instruction set to use; the best available one if `None`.

    Raises:
        ValueError: if the CPU does not have that instruction set.
    """
    available = available_isas()
    if not available:
        raise RuntimeError(
            f"no supported instruction set on {llvm.get_host_cpu_name()}: "
            f"one of {', '.join(_ISAS)} is needed"
        )
    name = available[0] if isa is None else isa
    if name not in available:
        raise ValueError(
            f"`isa` (={name!r}) must be one of {available} on this CPU; leave it out for the best"
        )
    width, registers, fma, _ = _ISAS[name]
    features = llvm.get_host_cpu_features()
    # A restriction is what LLVM is told not to use; the rest stays tuned for this CPU.
    dropped = {
        "avx512": (),
        "avx2": ("avx512", "avx10"),
        "sse2": ("avx", "fma", "f16c", "sse3", "ssse3", "sse4", "xop", "vaes", "vpclmul", "amx"),
        "neon": (),
    }[name]
    for feature in features:
        if dropped and feature.startswith(dropped):
            features[feature] = False
    return Machine(
        isa=name,
        width=width,
        registers=registers,
        fma=fma,
        cpu=llvm.get_host_cpu_name() if name != "sse2" else "x86-64",
        features=features.flatten(),
        l1=_cache_bytes(1, 32 << 10),
        l2=_cache_bytes(2, 512 << 10),
    )


def with_vectors_of(isa: str) -> Machine:
    """This CPU, with the vectors of another one that weights were packed for.

    Raises:
        ValueError: if there is no such instruction set.
    """
    if isa not in _ISAS:
        raise ValueError(f"`isa` (={isa!r}) must be one of {', '.join(_ISAS)}")
    width, registers, *_ = _ISAS[isa]
    here = host(isa if isa in available_isas() else None)
    return replace(here, isa=isa, width=width, registers=registers)


def cores() -> int:
    """The number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cache_bytes(level: int, default: int) -> int:
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, at, size = ((index / name).read_text() for name in ("type", "level", "size"))
            if int(at) == level and kind.strip() != "Instruction":
                return int(size.strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return default
