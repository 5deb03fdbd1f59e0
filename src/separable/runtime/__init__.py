"""The CPU runtime: networks as machine code for this CPU, generated from Python.

backend     `compile`: all passes in order; `dynamo`: the same behind torch.compile
importing   a torch graph as nodes, by `lowering`: one small function per operator
graph       nodes, folded and fused
scheduling  nodes and machine -> layout, tile, memory
emit        one file per kernel family: description in, LLVM IR out
jit         verify, optimise, cache, load
execute     threads and calls; `compiled`: what the user calls
files       compiled models on disk
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
