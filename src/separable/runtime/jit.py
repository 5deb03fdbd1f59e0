"""LLVM IR in, machine code in this process out: verify, optimise, cache, load."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

import llvmlite.binding as llvm

from .machine import Machine, initialize_llvm

# Raised when the layout of cache entries or the calling convention of kernels changes.
FORMAT = 3
_DIGEST = hashlib.sha256
_LOADED: WeakValueDictionary[str, Code] = WeakValueDictionary()
_LOCK = threading.Lock()


class Code:
    """Machine code loaded into this process; it stays loaded as long as this object lives.

    Attributes:
        binary: the relocatable object file.
    """

    def __init__(self, binary: bytes, machine: Machine) -> None:
        self.binary = binary
        backing = llvm.parse_assembly("")
        backing.triple = machine.triple
        self._engine = llvm.create_mcjit_compiler(backing, _target(machine))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(binary))
        self._engine.finalize_object()

    def address(self, symbol: str) -> int:
        """The address of a function in this process."""
        address = int(self._engine.get_function_address(symbol))
        if not address:
            raise KeyError(f"no function {symbol!r} in this object file")
        return address


def compile_ir(ir: str, machine: Machine) -> Code:
    """Turn IR into loaded machine code, through the cache in memory and on disk.

    Args:
        ir: the text of one LLVM module.
        machine: the CPU to generate for.

    Raises:
        RuntimeError: if the IR does not parse or verify.
    """
    key = _DIGEST(f"{FORMAT}|{machine.key}|{ir}".encode()).hexdigest()
    with _LOCK:
        code = _LOADED.get(key)
        if code is None:
            folder = cache_folder()
            binary = _read(folder, key) if folder else None
            if binary is None:
                binary = emit_object(ir, machine)
                if folder:
                    _write(folder, key, binary)
            code = _LOADED[key] = Code(binary, machine)
        return code


def load_object(binary: bytes, machine: Machine) -> Code:
    """Load an object file made for this machine earlier; the caller has checked its origin."""
    key = _DIGEST(machine.key.encode() + b"|" + binary).hexdigest()
    with _LOCK:
        code = _LOADED.get(key)
        if code is None:
            code = _LOADED[key] = Code(binary, machine)
        return code


def emit_object(ir: str, machine: Machine) -> bytes:
    """Verify and optimise IR, and return the object file."""
    target = _target(machine)
    return bytes(target.emit_object(_optimised(ir, target)))


def emit_assembly(ir: str, machine: Machine) -> str:
    """Verify and optimise IR, and return the assembly, to read."""
    target = _target(machine)
    return str(target.emit_assembly(_optimised(ir, target)))


def _optimised(ir: str, target: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(ir)
    module.triple = target.triple
    module.data_layout = str(target.target_data)
    module.verify()
    # The generators leave little to improve: all of -O2 takes ten times as long for the same speed.
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options())
    passes = llvm.create_new_module_pass_manager()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.run(module, builder)
    return module


def _target(machine: Machine) -> llvm.TargetMachine:
    initialize_llvm()
    # code and constants are mapped apart, in a large process by more than the 2 GiB of "small"
    return llvm.Target.from_triple(machine.triple).create_target_machine(
        cpu=machine.cpu,
        features=machine.features,
        opt=3,
        reloc="static",
        codemodel="large",
        jit=True,
    )


def cache_path() -> Path | None:
    """Where compiled objects go: below `SEPARABLE_CACHE_DIR`, or in the user's cache.

    Returns:
        A folder, which need not be there yet, or `None` if `SEPARABLE_CACHE=0`.
    """
    if os.environ.get("SEPARABLE_CACHE") == "0":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEPARABLE_CACHE_DIR") or Path(base) / "separable") / "kernels"


def cache_folder() -> Path | None:
    """The folder of compiled objects, made if need be.

    Returns:
        A folder only this user can enter, or `None` if the cache is off or no such folder can
        be had.
    """
    folder = cache_path()
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    # Whoever can write here can run code as this user: only the owner may.
    if not stat.S_ISDIR(state.st_mode) or (hasattr(os, "getuid") and state.st_uid != os.getuid()):
        return None
    if stat.S_IMODE(state.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def _read(folder: Path, key: str) -> bytes | None:
    try:
        data = (folder / key).read_bytes()
    except OSError:
        return None
    digest, binary = data[: _DIGEST().digest_size], data[_DIGEST().digest_size :]
    return binary if _DIGEST(key.encode() + binary).digest() == digest else None


def _write(folder: Path, key: str, binary: bytes) -> None:
    # A full disk or a read-only folder costs the next process a compilation, nothing else.
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_DIGEST(key.encode() + binary).digest() + binary)
            Path(name).replace(folder / key)
        except BaseException:  # Ctrl-C, too
            Path(name).unlink(missing_ok=True)
            raise


def foreign(code: Code, symbol: str, count: int, brief: bool = False) -> Callable[..., None]:
    """A function of `code` of `count` integers as a callable.

    It releases the interpreter lock while it runs, unless it is `brief`.
    """
    kind = ctypes.PYFUNCTYPE if brief else ctypes.CFUNCTYPE
    return kind(None, *[ctypes.c_int64] * count)(code.address(symbol))
