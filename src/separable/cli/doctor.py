"""The command that looks at an installation: versions, CPU, threads, cache, what is missing."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import click

from .options import table_or_json

EXTRAS = {
    "zoo": "networks named torchvision:... and timm:...",
    "train": "separable train, separable finetune",
    "datasets": "--data hf:NAME of separable train and finetune",
    "report": "separable report",
    "onnx": "separable export --format onnx",
    "peers": "separable bench --against onnxruntime,openvino",
    "crosscheck": "separable crosscheck",
    "demo": "separable demo",
}
"""what needs each extra"""


@click.command()
@table_or_json
def doctor(style: Any) -> str:
    """Show versions, CPU, threads and kernel cache, and what is missing for which feature.

    \b
    separable doctor
    separable doctor --json
    """
    findings = {
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "accelerators": _accelerators(),
        "kernel_cache": _cache(),
        "missing": _missing(),
    }
    return json.dumps(findings, indent=2) if style == "json" else "\n\n".join(_pages(findings))


def _versions() -> dict[str, str]:
    found = {"separable": metadata.version("separable"), "python": platform.python_version()}
    found["system"] = platform.platform()
    core = sorted(name for name, extra in _requirements() if not extra)
    return found | {name: _installed(name) or "missing" for name in core}


def _cpu() -> dict[str, Any]:
    try:
        from ..runtime.machine import available_isas, host
    except ImportError as error:  # its system is none of the runtime's
        return {"name": platform.machine(), "instruction_sets": [], "remedy": str(error)}
    isas = available_isas()
    if not isas:
        return {"name": platform.machine(), "instruction_sets": [], "remedy": "none is supported"}
    machine = host()
    return {
        "name": machine.cpu,
        "instruction_sets": list(isas),
        "floats_per_vector": machine.width,
        "vector_registers": machine.registers,
        "l1_bytes": machine.l1,
        "l2_bytes": machine.l2,
    }


def _threads() -> dict[str, Any]:
    import torch

    try:
        from ..runtime.machine import cores
    except ImportError:
        count = os.cpu_count()
    else:
        count = cores()
    return {
        "cores": count,
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def _accelerators() -> dict[str, Any]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda": names or "none", "built_for": torch.version.cuda or "CPU only"}


def _cache() -> dict[str, Any]:
    try:
        from ..runtime.jit import cache_path
    except ImportError:
        return {"folder": "none, as there is no runtime"}
    folder = cache_path()
    if folder is None:
        return {"folder": "off, SEPARABLE_CACHE=0"}
    if not folder.is_dir():
        return {"folder": str(folder), "state": "not made yet"}
    sizes = [entry.stat().st_size for entry in os.scandir(folder)]
    return {
        "folder": str(folder),
        "mode": f"{folder.stat().st_mode & 0o777:04o}",
        "kernels": len(sizes),
        "megabytes": round(sum(sizes) / 1e6, 1),
    }


def _missing() -> list[dict[str, str]]:
    return [
        {
            "feature": feature,
            "packages": ", ".join(lacking),
            "remedy": f"pip install 'separable[{extra}]'",
        }
        for extra, feature in EXTRAS.items()
        if (lacking := [n for n, of in _requirements() if of == extra and not _installed(n)])
    ]


def _requirements() -> Iterator[tuple[str, str]]:
    """Names of required packages, each with the extra it belongs to, or an empty text."""
    for line in metadata.requires("separable") or []:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)", line)
        assert name
        yield name[0], extra[1] if extra else ""


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pages(findings: dict[str, Any]) -> Iterator[str]:
    """One table per topic."""
    from prettytable import PrettyTable

    for topic, found in findings.items():
        table = PrettyTable(title=topic.replace("_", " "), align="l")
        if isinstance(found, dict):
            table.field_names, table.header = ["what", "value"], False
            for name, value in found.items():
                text = ", ".join(value) if isinstance(value, list) else value
                table.add_row([name.replace("_", " ") if name.islower() else name, text])
        elif found:
            table.field_names = list(found[0])
            table.add_rows([list(row.values()) for row in found])
        else:
            table.field_names, table.header = ["what"], False
            table.add_row(["nothing: every feature has what it needs"])
        yield str(table)
