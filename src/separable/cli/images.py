"""Images of a folder as a network's inputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CROP = 0.875  # share of the shorter side that the centre crop keeps, as in torchvision's presets


def read_images(
    folder: Path,
    channels: int,
    size: tuple[int, ...],
    mean: Sequence[float],
    std: Sequence[float],
    most: int,
    seed: int,
) -> Tensor:
    """Read, resize, crop and standardise images.

    Images that can't be read are skipped, counted and named on stderr.

    Args:
        folder: searched with its subfolders.
        channels: 1 for grey, 3 for colour.
        size: height and width of the centre crop.
        mean: of the pixels in 0 to 1, one or one per channel.
        std: their standard deviation, one or one per channel.
        most: images to take at most, drawn at random.
        seed: of the draw.

    Returns:
        `[N, channels, height, width]`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no image can be read, or the sizes do not fit images.
        ImportError: torchvision is not installed.
    """
    if len(size) != 2 or channels not in (1, 3):
        raise ValueError(
            f"--input-size must be Nx1xHxW or Nx3xHxW for images, got {channels} channels of "
            f"{'x'.join(map(str, size))}"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"--calibration: there is no folder {str(folder)!r}")
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        raise ImportError(
            "torchvision is not installed: pip install 'separable[zoo]'", name=error.name
        ) from error
    from PIL import Image
    from tqdm import tqdm

    transform = v2.Compose(
        [
            v2.Resize(round(max(size) / CROP), antialias=True),  # of the shorter side
            v2.CenterCrop(list(size)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")),
        ]
    )
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    random.Random(seed).shuffle(paths)
    images: list[Tensor] = []
    broken: list[Path] = []
    for path in tqdm(paths[: 2 * most], "reading images", leave=False, delay=2, disable=None):
        if len(images) == most:
            break
        try:
            with Image.open(path) as image:
                images.append(transform(image.convert("L" if channels == 1 else "RGB")))
        except (OSError, ValueError, Image.DecompressionBombError):
            broken.append(path)
    if broken:
        names = ", ".join(str(path) for path in broken[:3]) + ", ..." * (len(broken) > 3)
        click.echo(f"Skipped {len(broken)} images that can't be read: {names}", err=True)
    if not images:
        raise ValueError(
            f"--calibration: no image in {str(folder)!r} can be read; put images there that end "
            f"in {', '.join(sorted(SUFFIXES))}"
        )
    return torch.stack(images)


def _per_channel(values: Sequence[float], channels: int, name: str) -> list[float]:
    if len(values) == channels:
        return list(values)
    if channels == 1 or len(values) == 1:
        return [sum(values) / len(values)] * channels
    raise ValueError(f"--{name} (={','.join(map(str, values))}) must be one or {channels} numbers")
