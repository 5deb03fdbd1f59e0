"""What data and networks may be: loaders, modules, labels; and what is refused, and how."""

import copy
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

from lightning.pytorch import LightningDataModule

import separable
from separable.training import Distillation, Recipe, finetune, train
from separable.training.digits import load_digits
from separable.training.learning import divergence
from separable.training.sources import open_source

from .networks import blobs, net, same, seeded

QUICK = {"batch_size": 8, "epochs": 1, "progress": False, "validation": 0.0}
INPUTS, LABELS = blobs()
DATA = TensorDataset(INPUTS, LABELS)


def trained(model=None, data=None, **options):
    model = seeded(net) if model is None else model
    return train(model, blobs() if data is None else data, **{**QUICK, **options})


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class TooLong(Unsized):
    def __len__(self):
        return 1000


class SetUp(LightningDataModule):
    """Makes its data when it is told to, as most modules do."""

    def setup(self, stage):
        self.part = DATA

    def train_dataloader(self):
        return DataLoader(self.part, batch_size=8)

    def val_dataloader(self):
        return DataLoader(self.part, batch_size=8)


class Arrays(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return DATA[index][0].numpy(), int(DATA[index][1])


def weighted():
    return DataLoader(DATA, batch_size=8, sampler=WeightedRandomSampler(torch.ones(48), 48))


def test_the_users_own_batches_are_trained_on():
    seen = []

    class Recording(nn.Module):
        def forward(self, input):
            if torch.is_grad_enabled():
                seen.append(input)
            return input

    batches = BatchSampler(SequentialSampler(range(48)), 16, False)
    run = trained(
        nn.Sequential(Recording(), net()), DataLoader(DATA, batch_sampler=batches), validation=0
    ).run
    assert run.steps == 3
    assert torch.equal(torch.cat(seen), DATA.tensors[0])


def test_a_data_module_makes_its_data_when_set_up():
    result = trained(data=SetUp())
    assert result.run.steps == 6
    assert "val_accuracy" in result.run.metrics


def test_arrays_are_as_good_as_tensors():
    inputs, labels = blobs()
    assert same(trained(data=(inputs.numpy(), labels.numpy())), trained())
    assert same(trained(data=Arrays(), augment="shift"), trained(augment="shift"))


def test_labels_of_any_whole_numbers():
    inputs, labels = blobs()
    assert same(trained(data=(inputs, labels.int())), trained())
    assert same(trained(data=(inputs, labels.to(torch.uint8))), trained())


class Dense(nn.Module):
    """Scores of each pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, input):
        return self.conv(input)


@pytest.mark.parametrize("soft", [False, True])
def test_labels_of_each_pixel_and_soft_ones(soft):
    """From a loader; pixels of no class are left out."""
    labels = LABELS[:, None, None].expand(-1, 8, 8).clone()
    labels[:, 0] = -100
    model = Dense()
    if soft:
        model, labels = seeded(net), nn.functional.one_hot(LABELS).float()
    loader = DataLoader(
        TensorDataset(INPUTS, labels), batch_size=8, sampler=WeightedRandomSampler([1.0] * 48, 48)
    )
    assert trained(model, loader).run.steps == 6


def test_masks_of_infinities_are_no_divergence():
    model = seeded(net)
    model.register_buffer("mask", torch.full((2, 2), -math.inf))
    assert trained(model).run.steps == 6


def test_layers_that_need_a_whole_batch_in_training():
    class Grouped(nn.Module):
        def forward(self, input):
            if self.training:
                input.view(4, len(input) // 4, -1)
            return input

    model = nn.Sequential(Grouped(), seeded(net))
    loader = DataLoader(DATA, batch_size=8)
    assert trained(model, loader, batch_size=1).run.steps == 6


def test_an_error_that_the_caller_handles_is_not_taken_for_ctrl_c():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="the training diverged"):
            trained(data=(INPUTS * math.nan, LABELS))


def test_validation_data_by_name_is_its_own_part():
    source = open_source("digits", "digits", Recipe(), labels=True, channels=1)
    assert torch.equal(source.validation.tensors[0], load_digits().test_images)


def test_classes_must_be_the_same_in_both_parts(tmp_path):
    for part, classes in (("a", "xyz"), ("b", "yz")):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / part / name / "1.png")
    words = r"`validation_data` \(='.*b'\) has the classes y, z, and `data` x, y, z"
    with pytest.raises(ValueError, match=words):
        trained(data=tmp_path / "a", validation_data=tmp_path / "b")
    (tmp_path / "b" / "z" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"`data`: '.*b' has no images in the folders z; put"):
        trained(data=tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"data": SetUp(), "validation_data": blobs()}, ValueError, "give it a `val_dataloader`"),
        ({"data": SetUp(), "augment": "shift"}, ValueError, r"`augment` \(='shift'\) cannot"),
        ({"data": weighted(), "augment": "shift"}, ValueError, "a sampler of its own"),
        ({"data": weighted(), "validation_data": blobs()}, ValueError, "must be a loader too"),
        (
            {"data": DataLoader(DATA, 8, collate_fn=lambda x: x), "augment": "shift"},
            ValueError,
            "a `collate_fn` of its own",
        ),
        ({"validation_data": weighted()}, TypeError, r"`validation_data` \(a DataLoader\) must"),
        ({"validation_data": "nowhere"}, FileNotFoundError, "`validation_data`: there is no"),
        ({"validation_data": torch.zeros(0, 1, 8, 8)}, ValueError, r"`validation_data` .* empty"),
        ({"data": (INPUTS, LABELS - 1)}, ValueError, "has the label -1; labels must be 0 or more"),
        ({"data": (INPUTS, LABELS + 1)}, ValueError, "has 3 outputs and `data` 4 classes"),
        ({"data": (INPUTS, LABELS.float())}, TypeError, r"and not \[8\] of torch.float32"),
        ({"data": (INPUTS, LABELS[:, None])}, TypeError, r"and not \[8, 1\] of torch.int64"),
        ({"precision": "bf16-true"}, ValueError, r"`ema` \(=0.999\) can't average weights of 8"),
        ({"data": (INPUTS.double(), LABELS)}, ValueError, "`model` rejects inputs of 1x8x8"),
        ({"data": {"inputs": INPUTS}}, TypeError, r"`data` \(a dict\) must be"),
        ({"data": TooLong()}, TypeError, r"`data` \(a TooLong\) must be"),
        ({"data": DataLoader(Unsized(), batch_size=8)}, TypeError, "without a length"),
        ({"model": 5}, TypeError, r"`model` \(a int\) must be a torch.nn.Module or a name"),
        ({"recipe": Distillation()}, TypeError, r"`recipe` \(a Distillation\) must be a Recipe"),
        ({"mean": (0.0, float("nan"))}, ValueError, "`mean` .* must be finite"),
        ({"workers": 100_000}, ValueError, r"`workers` \(=100000\) must be 0 to 256"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        trained(**{"out": tmp_path / "run", **options})
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(TooLong(), batch_size=8), "has a length of 125 batches and yields 6"),
        (
            DataLoader(TensorDataset(INPUTS, LABELS + 1), batch_size=8),
            "has labels from 1 to 3",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_what_a_loader_yields_is_checked(data, words):
    with pytest.raises(ValueError, match=words):
        trained(data=data)


def test_labels_that_distillation_learns_from_are_checked():
    model = seeded(net)
    options = {**QUICK, "labels": True, "features": 0.0}
    with pytest.raises(ValueError, match="`student` has 3 outputs and `data` 4 classes"):
        finetune(model, teacher=model, data=(INPUTS, LABELS + 1), **options)


class Pair(nn.Module):
    def forward(self, input):
        return (input, input) if self.training else input


def test_networks_that_answer_otherwise_in_training(tmp_path):
    with pytest.raises(TypeError, match="`model` must return a tensor, not tuple"):
        trained(nn.Sequential(net(), Pair()), out=tmp_path / "run")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"`model` rejects `batch_size` \(=1\) in training"):
        trained(flat, out=tmp_path / "run", batch_size=1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_at_once_is_no_run(tmp_path):
    late = DataLoader(TensorDataset(INPUTS, LABELS + 1), batch_size=8)
    with pytest.raises(ValueError, match="has labels from"):
        trained(data=late, out=tmp_path)
    assert trained(out=tmp_path, lr=0.01).run.steps == 6


def test_kernels_of_two_and_three_dimensions():
    class Lifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.three = nn.Conv2d(1, 2, 3), nn.Conv3d(2, 3, (1, 3, 3))

        def forward(self, input):
            return self.three(self.two(input)[:, :, None]).mean((2, 3, 4))

    assert trained(Lifted()).run.steps == 6


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_arithmetic_of_another_width(precision):
    model = seeded(net)
    ema = 0.0 if precision == "bf16-true" else 0.9
    assert trained(model, precision=precision, ema=ema).run.steps == 6
    wide = model.bfloat16() if precision == "bf16-true" else model.double()
    assert trained(copy.deepcopy(wide), precision=precision, ema=ema).run.steps == 6
    model.float()
    slim = copy.deepcopy(model)
    options = {**QUICK, "precision": precision, "features": 0.0, "ema": ema}
    result = finetune(slim, teacher=model, data=INPUTS, **options)
    assert result.run.steps == 6
    assert {weight.dtype for weight in (*result.parameters(), *model.parameters())} == {
        torch.float32
    }


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)])

    def forward(self, input):
        for conv in self.convs:
            input = conv(input).relu()
        return input.mean((2, 3))


@pytest.mark.filterwarnings("ignore:layer .* more calibration inputs would help")
def test_converted_layers_in_a_list_are_matched(hasty):
    model = seeded(Listed).eval()
    slim = separable.convert(model, INPUTS, "macs=0.5", progress=False)
    assert finetune(slim, teacher=model, data=INPUTS, **QUICK).run.steps == 6


def test_blocks_that_return_no_tensor_are_named(tmp_path):
    model = nn.Sequential(net(), nn.Unflatten(1, (3, 1)), nn.LSTM(1, 3, batch_first=True), First())
    with pytest.raises(TypeError, match="`blocks`: '2' returns a tuple; name modules that"):
        finetune(model, teacher=model, data=INPUTS, blocks=("2",), out=tmp_path / "run", **QUICK)
    idle = seeded(Listed)
    with pytest.raises(ValueError, match="`blocks`: of convs the student calls none"):
        finetune(idle, teacher=idle, data=INPUTS, blocks=("convs",), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


class First(nn.Module):
    def forward(self, pair):
        return pair[0].mean(1)


def test_the_error_of_one_input_is_relative_to_its_own_values():
    goal = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    made = goal + torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert torch.allclose(divergence(made, goal, 1.0), torch.tensor([5.0 / 20.0]))
    alike = torch.full((4, 2, 2), 3.0)
    assert divergence(alike + 1e-3, alike, 1.0).max() < 10


def test_steps_are_logged_however_few(tmp_path):
    trained(out=tmp_path / "a", accumulate=8, epochs=2)
    trained(data=SetUp(), out=tmp_path / "b")
    for name in "ab":
        assert "train_loss" in (tmp_path / name / "metrics.csv").read_text()
        assert (tmp_path / name / "curves.png").exists()


def test_weights_that_the_last_step_spoilt_are_refused():
    with pytest.raises(ValueError, match="is no number after 1 steps: the training diverged"):
        trained(data=(1e20 * INPUTS[:8], LABELS[:8]), lr=1e38, warmup=0.0)
