"""Networks in `separable` and in other runtimes, side by side; writes JSON and prints tables.

python benchmarks/runtime/networks.py --threads 1 --batch 1 --output results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from separable.runtime.benchmark import benchmark


def mobilenet_v1() -> nn.Module:
    def block(i: int, o: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False),
            nn.BatchNorm2d(i),
            nn.ReLU(),
            nn.Conv2d(i, o, 1, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU(),
        )

    sizes = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    sizes += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(block(*size) for size in sizes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1024, 1000),
    )


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mobilenet_v1":
        model = mobilenet_v1()
    elif name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"))
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"]
    defaults += ["timm/mobilenetv4_conv_small", "convnext_tiny", "resnet18"]
    parser.add_argument("networks", nargs="*", default=defaults)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--against", default="eager,channels_last,inductor,onnxruntime,openvino")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
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
