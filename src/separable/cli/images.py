"""Images of a folder as a network's inputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
BATCH = 32
CROP = 0.875  # share of the shorter side that the centre crop keeps, as in torchvision's presets


def read_images(
    option: str,
    folder: Path,
    input_size: tuple[int, ...],
    mean: Sequence[float],
    std: Sequence[float],
    most: int,
    seed: int,
) -> Tensor:
    """Read, resize, crop and standardise images.

    Images that can't be read are skipped, counted and named on stderr.

    Args:
        option: that names the folder, for errors.
        folder: searched with its subfolders.
        input_size: a batch's shape; of its channels 1 is grey and 3 colour, and the last two are
            the height and width of the centre crop.
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
    reader = _Reader(option, folder, input_size, mean, std)
    paths = _images_in(folder)
    random.Random(seed).shuffle(paths)
    images = [image for image, _ in reader.read(paths[: 2 * most], most)]
    return torch.stack(images)


def read_labelled(
    folder: Path, input_size: tuple[int, ...], mean: Sequence[float], std: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Read all images of a folder with one subfolder per class.

    Args:
        folder: its subfolders, sorted by name, are the classes 0, 1, ...
        input_size: as for `read_images`, like the others.
        mean: of the pixels.
        std: of the pixels.

    Returns:
        Batches of images `[N, channels, height, width]` and classes `[N]`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no image can be read, or the sizes do not fit images.
        ImportError: torchvision is not installed.
    """
    reader = _Reader("--labelled", folder, input_size, mean, std)
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    labels = {path: i for i, each in enumerate(classes) for path in _images_in(each)}
    read = reader.read(list(labels), len(labels))
    images = torch.stack([image for image, _ in read])
    truth = torch.tensor([labels[path] for _, path in read])
    return list(zip(images.split(BATCH), truth.split(BATCH), strict=True))


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


class _Reader:
    """Reads the images of a folder that an option names."""

    def __init__(
        self,
        option: str,
        folder: Path,
        input_size: tuple[int, ...],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        channels, *size = input_size[1:] or (0,)
        if len(size) != 2 or channels not in (1, 3):
            raise ValueError(
                f"--input-size must be Nx1xHxW or Nx3xHxW for images, got {channels} channels of "
                f"{'x'.join(map(str, size))}"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"{option}: there is no folder {str(folder)!r}")
        try:
            from torchvision.transforms import v2
        except ModuleNotFoundError as error:
            raise ImportError(
                "torchvision is not installed: pip install 'separable[zoo]'", name=error.name
            ) from error
        self.option, self.folder = option, folder
        self.mode = "L" if channels == 1 else "RGB"
        self.transform = v2.Compose(
            [
                v2.Resize(round(max(size) / CROP), antialias=True),  # of the shorter side
                v2.CenterCrop(size),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(
                    _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
                ),
            ]
        )

    def read(self, paths: list[Path], most: int) -> list[tuple[Tensor, Path]]:
        """Read images until there are `most`."""
        from PIL import Image
        from tqdm import tqdm

        images: list[tuple[Tensor, Path]] = []
        broken: list[Path] = []
        for path in tqdm(paths, "reading images", leave=False, delay=2, disable=None):
            if len(images) == most:
                break
            try:
                with Image.open(path) as image:
                    images.append((self.transform(image.convert(self.mode)), path))
            except (OSError, ValueError, Image.DecompressionBombError):
                broken.append(path)
        if broken:
            names = ", ".join(str(path) for path in broken[:3]) + ", ..." * (len(broken) > 3)
            click.echo(f"Skipped {len(broken)} images that can't be read: {names}", err=True)
        if not images:
            raise ValueError(
                f"{self.option}: no image in {str(self.folder)!r} can be read; put images there "
                f"that end in {', '.join(sorted(SUFFIXES))}"
            )
        return images


def _per_channel(values: Sequence[float], channels: int, name: str) -> list[float]:
    if len(values) == channels:
        return list(values)
    if channels == 1 or len(values) == 1:
        return [sum(values) / len(values)] * channels
    raise ValueError(f"--{name} (={','.join(map(str, values))}) must be one or {channels} numbers")
