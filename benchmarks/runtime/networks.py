"""Networks in `separable` and in other runtimes, side by side; writes JSON and prints tables.

python benchmarks/runtime/networks.py --threads 1 --batch 1 --output results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from separable.cost import keep_freed_memory
from separable.models import create_model
from separable.runtime.benchmarking import benchmark


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    zoo = ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "resnet18"]
    defaults = ["separable:mobilenet_v1", *(f"torchvision:{name}" for name in zoo)]
    defaults.append("timm:mobilenetv4_conv_small")
    parser.add_argument("networks", nargs="*", default=defaults)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--against", default="eager,channels_last,inductor,onnxruntime,openvino")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    results = []
    for name in arguments.networks:
        for batch in arguments.batch:
            for threads in arguments.threads:
                result = benchmark(
                    network(name),
                    (batch, 3, arguments.size, arguments.size),
                    threads,
                    arguments.against.split(","),
                    arguments.turns,
                    name,
                )
                print(result, flush=True)
                results.append(result.to_dict())
                if arguments.output:
                    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
