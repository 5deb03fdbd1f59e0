"""The CPU runtime: networks as machine code for this CPU, generated from Python.

graph      a torch graph as the runtime's own operators, folded and fused
schedule   operator and machine -> layout, tile, memory
emit       one file per kernel family: description in, LLVM IR out
jit        verify, optimise, cache, load
execute    threads and calls
backend    `compile` and the torch.compile backend
"""

import sys

if sys.platform == "win32":
    raise ImportError(
        "separable.runtime, and with it compile, report and export, needs Linux or macOS: its "
        "threads are POSIX's; on Windows run networks in PyTorch"
    )

from .backend import compile
from .compiled import CompiledModel
from .files import load_compiled

__all__ = ["CompiledModel", "compile", "load_compiled"]
