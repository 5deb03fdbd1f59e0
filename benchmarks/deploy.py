"""Exported networks in the engines they are deployed on, beside the separable runtime.

    python benchmarks/deploy.py --folder exported --out benchmarks/results/deploy.json

Writes each network to ONNX and to a torch.export program with `separable.export`, and runs those
files in onnxruntime, OpenVINO and ExecuTorch (XNNPACK), the network itself in eager PyTorch and in
the separable runtime. Outputs are checked against eager first. All engines and both forms of a
network take turns in one process; a speed-up is the median of pairwise ratios. Weights are random:
only times are of interest here. Files that are in the folder already are used again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable, TableStyle
from torch import Tensor, nn

import separable
from separable.cost import keep_freed_memory, measure_interleaved
from separable.models import create_model
from separable.nn import SeparableConv2d
from separable.runtime.checking import TOLERANCE, deviation

Run = Callable[[Tensor], Any]
SIZE = (1, 3, 224, 224)
PACKAGES = {"eager": "torch"}
REGULAR = {
    "MobileNetV1": "separable:mobilenet_v1,conv=regular",
    "ResNet-18": "torchvision:resnet18",
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name).eval()


def separable_form(model: nn.Module) -> nn.Module:
    """Put a separable convolution in the place of each larger than 1x1, but for the stem."""
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1) and conv.in_channels > 3:
            own: Any = [conv.in_channels, conv.out_channels, conv.kernel_size]
            pair = SeparableConv2d(
                *own, stride=conv.stride, padding=conv.padding, bias=conv.bias is not None
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, pair)
    return model.eval()


def networks() -> Iterator[tuple[str, str, nn.Module]]:
    for title, name in REGULAR.items():
        yield title, "regular", network(name)
        own = name.replace(",conv=regular", "")  # MobileNetV1 is separable by design
        yield title, "separable", network(own) if own != name else separable_form(network(name))


def onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})[0]


def openvino(path: Path, threads: int) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: next(iter(request.infer([x.numpy()]).values()))


def executorch(path: Path, threads: int) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    file = path.with_suffix(".pte")
    if not file.exists():
        program = torch.export.load(path)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        file.write_bytes(lowered.to_executorch().buffer)
    _unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(file).load_method("forward")
    return lambda x: method.execute([x])[0]


def engines(model: nn.Module, stem: Path, x: Tensor, threads: int) -> dict[str, Run]:
    onnx, program = stem.with_suffix(".onnx"), stem.with_suffix(".pt2")
    for path in (onnx, program):
        if not path.exists():
            print(separable.export(model, path, example=x, dynamic_batch=False), flush=True)
    made: dict[str, Callable[[], Run]] = {
        "eager": lambda: model,
        "separable": lambda: separable.compile(model, x, threads=threads),
        "onnxruntime": lambda: onnxruntime(onnx, threads),
        "openvino": lambda: openvino(onnx, threads),
        "executorch": lambda: executorch(program, threads),
    }
    runs = {}
    for name, make in made.items():
        try:
            runs[name] = make()
        except ImportError as error:
            print(f"{name}: left out, {error}")
    return runs


def version(engine: str) -> str:
    package = PACKAGES.get(engine, engine)
    return importlib.metadata.version(package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=1.0, help="per engine and network")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one if left out")
    parser.add_argument("--prepare", action="store_true", help="write the files and stop")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = measure(folder, args.threads, args.repeats, args.seconds, args.prepare)
    if args.prepare:
        return
    print(table(results))
    print(results["conditions"])
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(
    folder: Path, threads: int, repeats: int, seconds: float, prepare: bool
) -> dict[str, Any]:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(threads)
    calls: dict[tuple[str, str, str], Run] = {}
    errors: dict[tuple[str, str, str], float] = {}
    macs: dict[tuple[str, str], int] = {}
    for title, form, model in networks():
        macs[title, form] = separable.count(model, SIZE).macs
        with torch.no_grad():
            expected = model(x)
            for engine, run in engines(model, folder / f"{title} {form}", x, threads).items():
                key = (title, form, engine)
                errors[key] = deviation(torch.as_tensor(run(x)), expected)
                if errors[key] <= TOLERANCE:
                    calls[key] = run
                else:
                    print(f"{key}: left out, its outputs differ by {errors[key]:.1e}")
    if prepare:
        return {}
    measured = dict(
        zip(
            calls,
            measure_interleaved(
                list(calls.values()), x, repeats=repeats, min_seconds=seconds, threads=threads
            ),
            strict=True,
        )
    )
    rows = []
    for (title, form, engine), found in measured.items():
        regular = measured[title, "regular", engine]
        ratio = regular.ratio_to(found)
        rows.append(
            {
                "network": title,
                "form": form,
                "engine": engine,
                "macs": macs[title, form],
                "median_ms": 1e3 * found.median,
                "iqr_ms": 1e3 * found.iqr,
                "speedup_over_regular": [ratio.median, ratio.low, ratio.high],
                "error": errors[title, form, engine],
            }
        )
    first = next(iter(measured.values()))
    named = {PACKAGES.get(engine, engine): version(engine) for _, _, engine in measured}
    versions = ", ".join(f"{name} {number}" for name, number in named.items())
    conditions = (
        f"{first.device}; threads: {threads}; float32; input {'x'.join(map(str, SIZE))}; "
        f"python {first.versions['python']}, {versions}; medians of {repeats} interleaved repeats"
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"conditions": conditions, "date": date, "rows": rows}


def table(results: dict[str, Any]) -> PrettyTable:
    drawn = PrettyTable(["Network", "Form", "MACs (M)", "Engine", "ms", "IQR", "Regular / this"])
    drawn.set_style(TableStyle.MARKDOWN)
    drawn.align = "r"
    drawn.align["Network"] = drawn.align["Form"] = drawn.align["Engine"] = "l"
    for row in results["rows"]:
        ratio = "{:.2f}x ({:.2f} to {:.2f})".format(*row["speedup_over_regular"])
        drawn.add_row(
            [
                row["network"],
                row["form"],
                f"{row['macs'] / 1e6:,.0f}",
                row["engine"],
                f"{row['median_ms']:.2f}",
                f"{row['iqr_ms']:.2f}",
                "" if row["form"] == "regular" else ratio,
            ]
        )
    return drawn


if __name__ == "__main__":
    main()
