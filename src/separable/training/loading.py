"""Loading that can be repeated: order and draws follow from seed, epoch and index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

# what the draws are for; the first entry of each key, so that no two purposes share a stream
ORDER, AUGMENTATION, STEP, SPLIT, FETCH, WEIGHTS = range(6)


def seed_of(*key: int) -> int:
    """Return 63 bits that are a function of the whole numbers given."""
    # its length too, for zeros at the end would not count
    return int(
        np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Draw from the CPU's generator as the key says, and leave the generator as it was."""
    state = torch.get_rng_state()
    # `torch.manual_seed` would seed every device too, and is slow
    torch.default_generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def permutation(count: int, *key: int) -> Tensor:
    """Return a random order of `count` things."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*key)))


class Drawn(Dataset[Any]):
    """A dataset indexed by (epoch, index), whose draws are a function of both and the seed.

    Args:
        dataset: items are inputs, or sequences that begin with one.
        labels: whether to return `(input, label)`; if not, nothing but the input is looked at.
            None returns items as they are.
        transform: of an input; it may draw from the CPU's generator.
        seed: of the draws.
    """

    def __init__(
        self,
        dataset: Any,
        labels: bool | None,
        transform: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset, self.labels, self.transform, self.seed = dataset, labels, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with drawing(self.seed, AUGMENTATION, epoch, index):
            item = self.dataset[index]
            if self.labels is None:
                return item
            pair = isinstance(item, Sequence)
            input = item[0] if pair else item
            if self.transform is not None:
                input = self.transform(input)
        if not self.labels:
            return input
        if not pair or len(item) < 2:
            raise TypeError(
                f"`data` holds {type(item).__name__} items; training with labels needs "
                "(input, label) pairs"
            )
        return input, item[1]


class Order:
    """The batches of each epoch as lists of (epoch, index), for one of several processes.

    A step's inputs depend on the seed, the epoch and the step alone, not on how many processes
    and passes share them. What does not fill a step is left out.

    Args:
        indices: what to draw from.
        batch_size: inputs per step.
        seed: of the order; None keeps the order of the indices.
        accumulate: passes that each process takes its share in.
        rank: which process this is.
        world: how many there are.

    Raises:
        ValueError: the step cannot be shared evenly, or there is less than one.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        seed: int | None,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % (world * accumulate):
            raise ValueError(
                f"`batch_size` (={batch_size}) must be divisible by the number of processes "
                f"(={world}) times `accumulate` (={accumulate})"
            )
        if len(indices) < batch_size:
            raise ValueError(
                f"`batch_size` (={batch_size}) must be at most the number of training inputs "
                f"(={len(indices)})"
            )
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.indices
        if self.seed is not None:
            order = order[permutation(len(order), self.seed, ORDER, self.epoch)]
        for batch in range(self.start, len(self)):
            step, part = divmod(batch, self.accumulate)
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            mine = whole[self.rank :: self.world][part :: self.accumulate]
            yield [(self.epoch, index) for index in mine.tolist()]


class Shard:
    """All inputs once, in order, in as many batches of nearly equal size on every process."""

    def __init__(self, indices: Tensor, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if len(indices) < world:
            raise ValueError(
                f"the validation part has {len(indices)} inputs; {world} processes need as many"
            )
        batches = -(-len(indices) // (batch_size * world))
        self.batches = torch.tensor_split(indices[rank::world], batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(0, index) for index in batch.tolist()]


class Repeated:
    """A loader that yields the same batches each time.

    To Lightning it is an iterable, not a DataLoader: its advice on numbers of workers is for
    those, and a run measures what waiting costs.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Resumable(Repeated):
    """A loader whose batches are a function of the seed, the epoch and the position in it.

    Lightning sets the epoch through `sampler`, and saves and restores the rest.

    Args:
        loader: yields the batches. One whose batch sampler is an `Order` starts anywhere at no
            cost; of any other, each batch is drawn under a seed of its own and those that were
            seen before are drawn again and dropped.
        seed: of the draws of such a loader.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        super().__init__(loader)
        self.seed = seed
        self.order = loader.batch_sampler if isinstance(loader, DataLoader) else None
        self.epoch = self.position = 0

    @property
    def sampler(self) -> Resumable:
        """What Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless it is under way."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        # begins at the first batch, when the epoch is known
        start = self.position
        if isinstance(self.order, Order):
            self.order.epoch, self.order.start = self.epoch, start
            for batch in self.loader:
                self.position += 1
                yield batch
            return
        for name in ("sampler", "batch_sampler"):
            if hasattr(getattr(self.loader, name, None), "set_epoch"):
                getattr(self.loader, name).set_epoch(self.epoch)
        with drawing(self.seed, FETCH, self.epoch):
            batches = iter(self.loader)
        for position in range(len(self)):
            with drawing(self.seed, FETCH, self.epoch, position):
                batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"`data` has a length of {len(self)} batches and yields {position}; its "
                    "`__len__` must be what it yields"
                )
            if position >= start:
                self.position += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches are seen."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were seen."""
        self.epoch, self.position = state["epoch"], state["position"]


def is_plain(loader: Any) -> bool:
    """Whether a loader draws batches from an indexed dataset in sequence or at random."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_size is not None  # there is none where the user samples batches
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
        and not getattr(loader.sampler, "replacement", False)
        and getattr(loader.sampler, "_num_samples", None) is None
    )
