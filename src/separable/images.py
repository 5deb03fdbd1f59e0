"""Images of a folder: finding, reading and preparing them as a network's inputs."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .wording import counted

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CROP = 0.875  # share of the shorter side that the centre crop keeps, as in torchvision's presets
BATCH = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def find_images(folder: Path) -> list[Path]:
    """Return the images of a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def open_image(path: Path | str, channels: int) -> Any:
    """Return a decoded PIL image, grey or in colour; None where it can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _eight_bits(image).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _eight_bits(image: Any) -> Any:
    """An image of 16 bits in the upper 8; Pillow would cut off all values above 255.

    Raises:
        ValueError: its values have no known range.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"an image of mode {image.mode} has no known range")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def transforms() -> Any:
    """Return `torchvision.transforms.v2`.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        raise ImportError(
            "torchvision is not installed: pip install 'separable[zoo]'", name=error.name
        ) from error
    return v2


def centre_crop(size: Sequence[int]) -> list[Any]:
    """Steps that resize an image and cut its middle out, `size` high and wide."""
    v2 = transforms()
    # the shorter side
    return [v2.Resize(round(max(size) / CROP), antialias=True), v2.CenterCrop(list(size))]


def standardise(mean: Sequence[float], std: Sequence[float], channels: int) -> list[Any]:
    """Steps that turn a PIL image into a standardised tensor `[channels, height, width]`.

    Raises:
        ValueError: there are neither one nor `channels` means or deviations.
    """
    import torch

    v2 = transforms()
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(_per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")),
    ]


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
    import torch

    reader = _Reader(option, folder, input_size, mean, std)
    paths = find_images(folder)
    random.Random(seed).shuffle(paths)
    return torch.stack([image for image, _ in reader.read(paths[: 2 * most], most)])


def read_labelled(
    option: str,
    folder: Path,
    input_size: tuple[int, ...],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[tuple[Tensor, Tensor]]:
    """Read all images of a folder with one subfolder per class.

    Args:
        option: that names the folder, for errors.
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
    import torch

    reader = _Reader(option, folder, input_size, mean, std)
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise ValueError(
            f"{option}: {str(folder)!r} must hold a folder of images for each class, and has "
            f"{len(classes)}"
        )
    labels = {path: i for i, each in enumerate(classes) for path in find_images(each)}
    read = reader.read(list(labels), len(labels))
    images = torch.stack([image for image, _ in read])
    truth = torch.tensor([labels[path] for _, path in read])
    return list(zip(images.split(BATCH), truth.split(BATCH), strict=True))


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
            given = "x".join(map(str, input_size))
            raise ValueError(f"`input_size` (={given}) must be Nx1xHxW or Nx3xHxW for images")
        if not folder.is_dir():
            raise FileNotFoundError(f"{option}: there is no folder {str(folder)!r}")
        self.option, self.folder, self.channels = option, folder, channels
        steps = [*centre_crop(size), *standardise(mean, std, channels)]
        self.transform = transforms().Compose(steps)

    def read(self, paths: list[Path], most: int) -> list[tuple[Tensor, Path]]:
        """Read images until there are `most`."""
        from tqdm import tqdm

        images: list[tuple[Tensor, Path]] = []
        broken: list[Path] = []
        for path in tqdm(paths, "reading images", leave=False, delay=2, disable=None):
            if len(images) == most:
                break
            image = open_image(path, self.channels)
            if image is None:
                broken.append(path)
            else:
                images.append((self.transform(image), path))
        if broken:
            print(skipped(broken), file=sys.stderr)
        if not images:
            raise no_images(self.folder, self.option)
        return images


def skipped(broken: Sequence[Path | str]) -> str:
    """Say which images could not be read, in a line."""
    names = ", ".join(map(str, broken[:3])) + ", ..." * (len(broken) > 3)
    return f"Skipped {counted(len(broken), 'image')} that can't be read: {names}"


def no_images(folder: Path, argument: str) -> ValueError:
    """Build the error of a folder without a readable image."""
    return ValueError(
        f"{argument}: no image in {str(folder)!r} can be read; put images there that end "
        f"in {', '.join(sorted(SUFFIXES))}"
    )


def _per_channel(values: Sequence[float], channels: int, name: str) -> list[float]:
    if len(values) == channels:
        return list(values)
    if channels == 1 or len(values) == 1:
        return [sum(values) / len(values)] * channels
    given = ",".join(map(str, values))
    raise ValueError(f"`{name}` (={given}) must be one number, or {channels}, one per channel")
