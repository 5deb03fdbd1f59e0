"""Batches are functions of seed, epoch and step, on however many processes."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

from separable.training.augmenting import augmentation, flipped, shifted
from separable.training.loading import (
    Drawn,
    Order,
    Resumable,
    Shard,
    drawing,
    is_plain,
    permutation,
)


def flat(batches):
    return [index for batch in batches for _, index in batch]


def test_each_epoch_has_an_order_of_its_own():
    order = Order(torch.arange(20), 4, seed=3)
    first = list(order)
    order.epoch = 1
    second = list(order)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(20))
    assert flat(first) != flat(second)
    order.epoch = 0
    assert list(order) == first
    assert {epoch for batch in second for epoch, _ in batch} == {1}


def test_what_fills_no_step_is_left_out():
    assert len(Order(torch.arange(11), 4, 0)) == 2
    assert len(flat(Order(torch.arange(11), 4, 0))) == 8


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_processes_and_passes_share_the_same_steps(world, accumulate):
    """The k-th step sees the same inputs, whoever takes them."""
    whole = [set(flat([batch])) for batch in Order(torch.arange(24), 8, seed=1)]
    parts = [
        list(Order(torch.arange(24), 8, 1, accumulate=accumulate, rank=r, world=world))
        for r in range(world)
    ]
    for step, expected in enumerate(whole):
        passes = slice(step * accumulate, (step + 1) * accumulate)
        shared = [flat([batch]) for part in parts for batch in part[passes]]
        assert {len(each) for each in shared} == {8 // world // accumulate}
        assert {index for each in shared for index in each} == expected


def test_a_step_that_cannot_be_shared():
    with pytest.raises(ValueError, match=r"`batch_size` \(=6\) must be divisible by .* \(=4\)"):
        Order(torch.arange(24), 6, 0, world=4)
    with pytest.raises(ValueError, match=r"at most the number of training inputs \(=3\)"):
        Order(torch.arange(3), 4, 0)


@pytest.mark.parametrize(("count", "world", "batch"), [(9, 2, 4), (10, 3, 2), (7, 7, 4), (5, 1, 2)])
def test_shards_cover_everything_in_as_many_batches(count, world, batch):
    shards = [Shard(torch.arange(count), batch, rank, world) for rank in range(world)]
    assert sorted(index for shard in shards for index in flat(shard)) == list(range(count))
    assert len({len(shard) for shard in shards}) == 1
    assert all(shard_batch for shard in shards for shard_batch in shard)


def test_more_processes_than_validation_inputs():
    with pytest.raises(ValueError, match="2 inputs; 3 processes need as many"):
        Shard(torch.arange(2), 4, 0, 3)


def test_draws_are_a_function_of_epoch_and_index_and_leave_the_generator():
    def noise(input):
        return input + torch.rand(())

    drawn = Drawn(torch.zeros(5, 1), False, noise, seed=1)
    state = torch.get_rng_state()
    values = {(epoch, i): drawn[epoch, i].item() for epoch in range(2) for i in range(5)}
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(values.values())) == 10
    assert drawn[1, 3].item() == values[1, 3]
    assert Drawn(torch.zeros(5, 1), False, noise, seed=2)[1, 3].item() != values[1, 3]


def test_workers_draw_the_same():
    def loader(workers):
        drawn = Drawn(TensorDataset(torch.zeros(16, 1, 9)), False, shifted_noise, 0)
        return torch.cat(
            list(
                DataLoader(drawn, batch_sampler=Order(torch.arange(16), 4, 0), num_workers=workers)
            )
        )

    assert torch.equal(loader(0), loader(2))


def shifted_noise(input):
    return shifted(input + torch.rand(input.shape))


class Noisy(TensorDataset):
    """Draws from torch's generator, as a transform of the user's would."""

    def __getitem__(self, index):
        return self.tensors[0][index] + torch.rand(())


@pytest.mark.parametrize("workers", [0, 1])
def test_any_loader_resumes_where_it_was(workers):
    def fresh():
        data = Noisy(torch.arange(12.0))
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 12, 12)
        loader = DataLoader(data, batch_size=3, sampler=sampler, num_workers=workers)
        assert not is_plain(loader)
        return Resumable(loader, 5)

    whole = fresh()
    whole.set_epoch(2)
    batches = list(whole)
    broken = fresh()
    broken.set_epoch(2)
    some = iter(broken)
    seen = [next(some), next(some)]
    torch.manual_seed(99)  # another process, with another state
    resumed = fresh()
    resumed.load_state_dict(broken.state_dict())
    resumed.set_epoch(2)
    seen += list(resumed)
    assert len(batches) == len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(batches, seen, strict=True))
    resumed.set_epoch(3)
    assert not torch.equal(next(iter(resumed)), batches[0])


def test_shift_moves_and_repeats_the_border():
    line = torch.arange(16.0)[None]
    moved = set()
    for seed in range(40):
        with drawing(seed):
            result = shifted(line)
        by = next(by for by in range(-2, 3) if torch.equal(result, (line - by).clamp(0, 15)))
        moved.add(by)
    assert moved == {-2, -1, 0, 1, 2}


def test_flips():
    image = torch.arange(4.0).view(1, 2, 2)
    with drawing(0):
        results = [flipped(image) for _ in range(20)]
    assert any(torch.equal(r, image) for r in results)
    assert any(torch.equal(r, image.flip(-1)) for r in results)
    assert augmentation("none") is None
    with pytest.raises(ValueError, match="'flip-crop'"):
        augmentation("flip-crop")


def test_permutations_depend_on_every_part_of_the_key():
    orders = {tuple(permutation(9, *key).tolist()) for key in [(0, 1), (1, 0), (0, 0), (0, 1, 0)]}
    assert len(orders) == 4
