"""Small networks and data for the tests of the training."""

import torch
from torch import nn


def net(channels=1, classes=3, norm=True):
    """Two convolutions, one depthwise; norm or none."""
    layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)]
    layers += [nn.BatchNorm2d(6)] * norm
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)]
    return nn.Sequential(*layers)


def net1d(classes=3):
    """The same for signals."""
    return nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def blobs(count=48, classes=3, size=(1, 8, 8), seed=0):
    """Noise whose level is its class: easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    inputs = torch.randn(count, *size, generator=generator)
    inputs += 2 * labels.view(-1, *[1] * len(size))
    return inputs, labels


def seeded(build, *arguments, seed=0, **options):
    """A network with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*arguments, **options)


def same(a, b):
    """Whether two networks have bit-equal states."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
