"""The four small networks of the conversion benchmark, and their training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import data

CACHE = Path("runs/convert")


def _unit(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def vgg(width: int = 16) -> nn.Module:
    """Seven 3×3 convolutions with batch norm, max pooling between the stages."""
    one, two, four = width, 2 * width, 4 * width
    return nn.Sequential(
        *_unit(1, one),
        nn.MaxPool2d(2),
        *_unit(one, two),
        *_unit(two, two),
        nn.MaxPool2d(2),
        *_unit(two, four),
        *_unit(four, four),
        nn.MaxPool2d(2),
        *_unit(four, four),
        *_unit(four, four),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(four, 10),
    )


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which has a 1×1 convolution where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(*_unit(inputs, outputs, stride), *_unit(outputs, outputs)[:2])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, input: Tensor) -> Tensor:
        """Map `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        return F.relu(self.main(input) + self.shortcut(input))


def resnet(width: int = 16) -> nn.Module:
    """A stem and five residual blocks; strides and 1×1 shortcuts at the stage boundaries."""
    one, two, four = width, 2 * width, 4 * width
    return nn.Sequential(
        *_unit(1, one),
        Residual(one, two, 2),
        Residual(two, two, 1),
        Residual(two, four, 2),
        Residual(four, four, 1),
        Residual(four, four, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(four, 10),
    )


def dilated(width: int = 24) -> nn.Module:
    """Biases and no batch norm; two layers dilated. He's initial weights, or it does not learn."""
    one, two = width, 2 * width
    network = nn.Sequential(
        nn.Conv2d(1, one, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(one, two, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(two, two, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(two, two, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(two, two, 3, stride=2, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(two, two, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(two, 10),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


class Scan(nn.Module):
    """Read an image of height H row by row: channels H, length W."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[N, 1, H, W]` to `[N, H, W]`."""
        return input.squeeze(1)


def conv1d(rows: int, width: int = 64) -> nn.Module:
    """1d convolutions of kernel 5 over the image's columns, its rows as channels."""
    layers: list[nn.Module] = [Scan()]
    for inputs, outputs, stride in [(rows, width, 1), (width, width, 1), (width, 2 * width, 2)]:
        conv = nn.Conv1d(inputs, outputs, 5, stride, padding=2, bias=False)
        layers += [conv, nn.BatchNorm1d(outputs), nn.ReLU()]
    for _ in range(2):
        conv = nn.Conv1d(2 * width, 2 * width, 5, padding=2, bias=False)
        layers += [conv, nn.BatchNorm1d(2 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def build(name: str, dataset: str) -> nn.Module:
    rows = 8 if dataset == "digits" else data.CANVAS
    makers: dict[str, Callable[[], nn.Module]] = {
        "vgg": vgg,
        "resnet": resnet,
        "dilated": dilated,
        "conv1d": functools.partial(conv1d, rows),
    }
    return makers[name]()


NETWORKS = ("vgg", "resnet", "dilated", "conv1d")


def train(model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Adam with a one-cycle rate and random shifts by up to a sixteenth of the image.

    Without batch norm the rate is a quarter: at the full one the network dies.
    """
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    batch = 64
    steps = epochs * (len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 4e-3 if normed else 1e-3, total_steps=steps
    )
    reach = inputs.shape[-1] // 16
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for index in order[: len(inputs) // batch * batch].split(batch):
            shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            x = inputs[index].roll(shift, (-2, -1))
            loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def trained(name: str, dataset: str, seed: int) -> nn.Module:
    """The trained network, from the cache if it was trained before."""
    torch.manual_seed(seed)
    model = build(name, dataset)
    path = CACHE / f"{name}-{dataset}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    inputs, labels, _, _ = data.load(dataset)
    train(model, inputs, labels, epochs=40 if dataset == "digits" else 8, seed=seed)
    CACHE.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Per cent of `inputs` whose largest output is the label's."""
    return 100 * right(model, inputs, labels).float().mean().item()


@torch.no_grad()
def right(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest output is the label's, for each of `inputs`."""
    hits = [
        model(x).argmax(1) == y for x, y in zip(inputs.split(256), labels.split(256), strict=True)
    ]
    return torch.cat(hits)


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    for seed in map(int, sys.argv[1:] or ["0"]):
        for dataset in data.SETS:
            _, _, inputs, labels = data.load(dataset)
            for name in NETWORKS:
                score = accuracy(trained(name, dataset, seed), inputs, labels)
                print(f"{name:8} {dataset:10} seed {seed}: {score:.2f} %", flush=True)
