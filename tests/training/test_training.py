"""Training and distillation: they learn, repeat themselves, leave what they were given."""

import csv
import json
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import weight_norm
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import LightningDataModule

import separable
from separable.training import Distillation, Recipe, finetune, records, train
from separable.training.learning import divergence
from separable.training.matching import block_ends
from separable.training.running import Run

from .networks import blobs, net, net1d, same, seeded

QUICK = {"batch_size": 8, "epochs": 2, "progress": False}


def trained(model=None, data=None, **options):
    model = seeded(net) if model is None else model
    return train(model, blobs() if data is None else data, **{**QUICK, **options})


@pytest.fixture(scope="module")
def original():
    """A trained network, and its converted form."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    )
    model = trained(model, epochs=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer .* more calibration inputs would help")
        slim = separable.convert(model, blobs()[0], "macs=0.3", progress=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so simple a network is converted almost exactly
        for weight in slim.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model, slim


def distance(student, teacher):
    inputs = blobs(seed=5)[0]
    with torch.no_grad():
        return divergence(student(inputs), teacher(inputs), 1.0).mean().item()


def test_training_learns_and_leaves_the_given_network():
    model = seeded(net)
    before, flags = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    result = trained(model, epochs=8, optimizer="adamw", lr=0.02)
    assert same(model, seeded(net))
    assert model.training is flags
    assert not result.training
    inputs, labels = blobs(seed=7)
    assert (result(inputs).argmax(1) == labels).float().mean() > 0.9
    assert result.run.metrics["val_accuracy"] > 0.7
    assert before.keys() == result.state_dict().keys()
    # 48 inputs, 5 held out
    assert result.run.steps == 8 * (43 // 8)
    assert 0 <= result.run.waiting <= 1


def test_the_same_seed_gives_the_same_weights_whatever_the_generator_holds():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trained(augment="shift")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(trained(augment="shift"), first)
    assert not same(trained(augment="shift", seed=1), first)


def test_dropout_is_drawn_from_the_seed():
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)))
    torch.manual_seed(1)
    first = trained(model)
    torch.manual_seed(2)
    assert same(trained(model), first)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 4},
        {"accumulate": 2, "ema": 0},
    ],
)
def test_accumulated_passes_make_the_same_step(options):
    model = seeded(net, norm=False)
    plain = {key: value for key, value in options.items() if key != "accumulate"}
    one, other = trained(model, **plain), trained(model, **options)
    assert one.run.steps == other.run.steps
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_each_option_changes_the_result():
    first = trained(channels_last=False)
    assert same(trained(channels_last=False), first)
    for options in (
        {"label_smoothing": 0.3},
        {"weight_decay": 0.1},
        {"momentum": 0.5},
        {"warmup": 0.5},
        {"clip": 0.01},
        {"ema": 0.5},
        {"lr": 0.01},
        {"validation": 0.3},
        {"optimizer": "adamw"},
        {"augment": "flip-shift"},
    ):
        assert not same(trained(channels_last=False, **options), first), options


def test_label_smoothing_is_in_the_loss():
    """Of a network that always says the same: log K whatever the labels are."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    run = trained(model, lr=0, epochs=1, label_smoothing=0.3, validation=0, batch_size=48).run
    own, other = torch.log_softmax(model[1].bias, 0)[[0, 1]].tolist()
    hit, miss = 0.8 * own + 0.2 * other, 0.8 * other + 0.1 * (own + other)
    assert run.metrics["train_loss"] == pytest.approx(-(hit + 2 * miss) / 3, rel=1e-5)


def test_without_averaging_the_weights_are_the_last_ones():
    """One plain step of SGD from a known gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
    inputs, labels = blobs()
    result = trained(
        model, lr=0.1, warmup=0, ema=0, weight_decay=0, epochs=1, validation=0, batch_size=48
    )
    loss = nn.functional.cross_entropy(model(inputs), labels, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, model[1].weight)
    # Nesterov's first step is 1 + momentum times as long
    expected = model[1].weight - 0.1 * 1.9 * gradient
    assert torch.allclose(result[1].weight, expected, atol=1e-6)


def test_bfloat16_and_compile_and_signals():
    result = trained(precision="bf16-mixed")
    assert next(result.parameters()).dtype == torch.float32
    signals = blobs(size=(2, 30))
    assert trained(seeded(net1d), signals, augment="shift").run.steps == 10


def test_compiled_networks_train_the_same(monkeypatch):
    """Compiled without a code generator, which would take a minute."""
    compiled = []

    def compile(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    result = trained(compile=True)
    assert len(compiled) == 1
    assert same(result, trained())


def test_the_folder_of_a_run(tmp_path):
    out = tmp_path / "new" / "run"
    result = trained(out=out, names={"model": "mine"})
    assert sorted(path.name for path in out.iterdir()) == [
        "best.ckpt",
        "best.safetensors",
        "config.yaml",
        "curves.png",
        "environment.json",
        "last.ckpt",
        "last.safetensors",
        "metrics.csv",
        "tensorboard",
    ]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"] == "mine"
    assert config["data"] == "tuple"
    assert Recipe.of({key: config[key] for key in Recipe().to_dict()}).batch_size == 8
    record = json.loads((out / "environment.json").read_text())
    assert {"torch", "lightning", "separable", "python"} <= set(record["versions"])
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"step", "epoch", "train_loss", "val_loss", "val_accuracy"} <= set(rows[0])
    assert [r["epoch"] for r in rows if r["val_loss"]] == ["0", "1"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    last = load_file(out / "last.safetensors")
    assert all(torch.equal(last[key], value) for key, value in result.state_dict().items())
    assert result.run.folder == out
    assert json.dumps(result.run.to_dict())
    with pytest.raises(ValueError, match=r"`out` \(=.*\) holds a run already"):
        trained(out=out)


@pytest.mark.parametrize(
    ("wanted", "installed", "written"),
    [(None, True, True), (None, False, False), (True, True, True), (False, True, False)],
)
def test_tensorboard_is_on_where_it_is_installed(tmp_path, monkeypatch, wanted, installed, written):
    monkeypatch.setattr(records, "find_spec", lambda _: object() if installed else None)
    assert (records.tensorboard_logger(tmp_path, wanted) is not None) == written


def test_tensorboard_that_is_wanted_and_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        records.tensorboard_logger(tmp_path, True)


def test_distillation_lowers_the_divergence(original):
    model, slim = original
    before = distance(slim, model)
    result = finetune(slim, teacher=model, data=blobs()[0], **{**QUICK, "epochs": 4, "lr": 5e-4})
    assert distance(result, model) < 0.7 * before
    assert result.report == slim.report.after_training()
    assert distance(slim, model) == before


def test_a_distilled_network_is_saved_and_read_again(original, tmp_path):
    model, slim = original
    result = finetune(slim, teacher=model, data=blobs()[0], out=tmp_path / "run", **QUICK)
    again = separable.load(tmp_path / "run" / "last.safetensors", model=model)
    assert same(again, result)
    assert again.report.plan == slim.report.plan
    assert slim.report.error is not None
    for network in (result, again):  # it was measured before
        assert network.report.error is None
        assert "not measured since fine-tuning" in str(network.report)
    separable.save(result, tmp_path / "slim.safetensors")
    assert same(separable.load(tmp_path / "slim.safetensors", model=model), result)


class Sealed:
    """A label that must not be looked at."""

    def __getattribute__(self, name):
        raise AssertionError("a label was read")


class Unlabelled(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return blobs()[0][index], Sealed()


class Module(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Unlabelled(), batch_size=8, shuffle=True)


@pytest.mark.parametrize(
    "data", [Unlabelled(), DataLoader(Unlabelled(), batch_size=8, shuffle=True), Module()]
)
def test_without_labels_none_is_read(original, data):
    model, slim = original
    assert finetune(slim, teacher=model, data=data, **QUICK).run.steps == 12


def test_labels_are_learned_from_where_asked(original):
    model, slim = original
    plain = finetune(slim, teacher=model, data=blobs(), **QUICK)
    taught = finetune(slim, teacher=model, data=blobs(), labels=True, **QUICK)
    assert not same(plain, taught)
    with pytest.raises(TypeError, match="training with labels needs"):
        finetune(slim, teacher=model, data=blobs()[0], labels=True, **QUICK)


def test_values_are_distilled_with_their_offset(original):
    """An offset that a softmax does not see."""
    model = original[0]
    slim = separable.convert(model, blobs()[0], "macs=0.9", outputs="values", progress=False)
    with torch.no_grad():
        slim[-1].bias += 1
    inputs = blobs()[0]
    tune = {"teacher": model, "data": inputs, **QUICK, "lr": 0.05, "epochs": 8, "features": 0}
    by_report, by_shape = finetune(slim, **tune), finetune(slim, outputs="logits", **tune)
    with torch.no_grad():
        before, tuned, lost = (
            (each(inputs) - model(inputs)).square().mean() for each in (slim, by_report, by_shape)
        )
    assert tuned < 0.1 * before < lost
    with pytest.raises(ValueError, match=r"`outputs` .='logits'. needs .* `teacher` returns"):
        finetune(slim[:-2], outputs="logits", **{**tune, "teacher": model[:-2]})


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_networks_that_hold_what_they_computed():
    """`weight_norm` keeps the weight of the last pass, which `copy.deepcopy` refuses."""
    model = seeded(net)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight_norm(module)
    model(blobs()[0])
    assert trained(model).run.steps
    assert finetune(model, teacher=model, data=blobs()[0], features=0, **QUICK).run.steps


def test_feature_matching_brings_the_blocks_closer(original):
    model, slim = original

    def gap(network):
        inputs = blobs(seed=5)[0]
        with torch.no_grad():
            a, b = network[:4](inputs), model[:4](inputs)
        return ((a - b).square().mean() / b.var()).item()

    results = [
        finetune(slim, teacher=model, data=blobs()[0], features=w, **{**QUICK, "epochs": 4})
        for w in (0.0, 30.0)
    ]
    assert gap(results[1]) < gap(results[0])


def test_which_blocks_are_matched(original):
    model, slim = original
    assert block_ends(slim, model, ()) == ["3"]
    assert block_ends(slim, model, ("[35]", "7")) == ["3", "5", "7"]
    with pytest.raises(ValueError, match=r"`blocks` \(='layer.\*'\) names no module"):
        block_ends(slim, model, ("layer.*",))
    with pytest.raises(ValueError, match="`student` has no converted layers"):
        block_ends(model, model, ())
    nested = nn.Sequential(nn.Sequential(*model[:4]), *model[4:])
    converted = nn.Sequential(nn.Sequential(*slim[:4]), *slim[4:])
    assert block_ends(converted, nested, ()) == ["0"]


def test_divergence_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1)
    assert torch.allclose(divergence(student, teacher, 3.0), expected, atol=1e-6)
    images = torch.randn(2, 6, 2, 3, 3, generator=generator)
    error = divergence(*images, 1.0).mean()
    spread = (images[1] - images[1].mean(0)).square().mean()
    assert torch.allclose(error, (images[0] - images[1]).square().mean() / spread)


@pytest.mark.parametrize("kind", ["train", "frozen"])
def test_batch_norm_statistics(original, kind):
    model, slim = original
    result = finetune(slim, teacher=model, data=blobs()[0], batch_norm=kind, **QUICK)
    assert torch.equal(result[1].running_mean, slim[1].running_mean) == (kind == "frozen")


def test_recipes_as_values(original):
    model, slim = original
    recipe = Distillation(batch_size=16, epochs=1)
    result = finetune(slim, teacher=model, data=blobs()[0], recipe=recipe, progress=False, epochs=2)
    assert result.run.steps == 6
    with pytest.raises(TypeError, match=r"`recipe` \(a Distillation\) must be a Recipe|a Recipe"):
        finetune(slim, teacher=model, data=blobs()[0], recipe=Recipe())


def test_loaders_and_datasets_of_the_users(tmp_path):
    inputs, labels = blobs()
    dataset = TensorDataset(inputs, labels)
    of_tensors = trained(data=(inputs, labels), validation=0)
    assert same(trained(data=dataset, validation=0), of_tensors)
    shuffled = DataLoader(dataset, batch_size=8, shuffle=True)
    assert same(trained(data=shuffled, validation=0), of_tensors)
    ordered = trained(data=DataLoader(dataset, batch_size=12), validation=0)
    assert ordered.run.steps == 8

    def stacked(items):
        return torch.stack([item[0] for item in items]), torch.tensor([int(i[1]) for i in items])

    own = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=stacked)
    assert same(trained(data=own, validation=0), of_tensors)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 48, 24)
    drawn = DataLoader(dataset, batch_size=8, sampler=sampler)
    assert trained(data=drawn, validation_data=DataLoader(dataset, 8)).run.steps == 6
    assert trained(validation_data=blobs(seed=3)).run.steps == 12


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"data": (torch.zeros(9, 1, 8, 8), torch.zeros(9).int())}, ValueError, "has one class"),
        ({"data": (torch.zeros(9, 1, 8, 8), torch.zeros(8))}, ValueError, "as many as each other"),
        ({"data": torch.zeros(0, 1, 8, 8)}, ValueError, "is empty"),
        ({"data": 3}, TypeError, r"`data` \(a int\) must be a folder"),
        ({"data": "nowhere"}, FileNotFoundError, "there is no folder 'nowhere', and of the data"),
        ({"data": blobs(classes=5)}, ValueError, "has 3 outputs and `data` 5 classes"),
        ({"data": blobs(size=(2, 8, 8))}, ValueError, "`model` rejects inputs of 2x8x8"),
        ({"batch_size": 100}, ValueError, r"at most the number of training inputs \(=43\)"),
        ({"accumulate": 3}, ValueError, "must be divisible by"),
        ({"epoch": 3}, ValueError, "the nearest is `epochs`"),
        ({"resume": True, "out": None}, ValueError, "`resume` needs the folder of a run"),
        ({"strategy": "fsdp", "ema": 0.9}, ValueError, "use ema=0"),
        ({"model": net().requires_grad_(False)}, ValueError, "no parameters to train"),
        ({"model": nn.Conv2d(1, 3, 3)}, ValueError, "needs logits"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        trained(**{"out": tmp_path / "run", **options})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_stops(tmp_path):
    with pytest.raises(ValueError, match=r"the training diverged; lower `lr` \(=1e\+30\)"):
        trained(lr=1e30, epochs=3, out=tmp_path)
    if (tmp_path / "last.safetensors").exists():
        assert all(w.isfinite().all() for w in load_file(tmp_path / "last.safetensors").values())


def test_inputs_smaller_than_the_stride():
    strided = nn.Sequential(
        *(nn.Conv2d(i, 3, 3, stride=2, padding=1) for i in (1, 3, 3, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with pytest.raises(ValueError, match=r"inputs of 1x8x8 are smaller than the stride of .* 16"):
        trained(strided)
    assert trained(strided, blobs(size=(1, 16, 16))).run.steps == 10


def test_networks_that_differ(original):
    model, slim = original
    with pytest.raises(ValueError, match=r"`student` returns \(1, 5\) and `teacher` \(1, 3\)"):
        finetune(net(classes=5), teacher=model, data=blobs()[0], **QUICK)
    with pytest.raises(TypeError, match=r"`teacher` \(a str\) must be a torch.nn.Module"):
        finetune(slim, teacher="resnet18", data=blobs()[0])


def test_a_run_is_told_in_plain_words():
    metrics = {"train_loss": 2.5, "lr-SGD/pg1": 0.003, "val_accuracy": 0.75}
    run = Run(None, epochs=1, steps=1200, seconds=3.0, waiting=0.25, metrics=metrics)
    assert str(run) == (
        "1 epoch, 1,200 steps in 3.0 s, 25.0% of the training time spent waiting for data\n"
        "train_loss 2.5, val_accuracy 0.75"
    )


class Tables(nn.Module):
    """A network with a table of positions, a mask of infinities, and statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.register_buffer("order", torch.arange(200))
        self.register_buffer("far", torch.tensor([2**40, 2**40 + 1]))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_averaging_leaves_tables_and_masks_as_they_are():
    model = seeded(Tables)
    result = trained(model, epochs=4)
    for name in ("order", "far", "mask"):
        assert torch.equal(getattr(result, name), getattr(model, name)), name
    assert not torch.equal(result.norm.running_mean, model.norm.running_mean)


def test_the_average_of_small_floats_is_refused_whoever_made_them_small():
    inputs, labels = blobs()
    with pytest.raises(ValueError, match="8 significant bits"):
        trained(seeded(net).bfloat16(), (inputs.bfloat16(), labels))


@pytest.mark.parametrize("gather", [list, tuple])
def test_batches_are_not_taken_for_inputs_and_labels(gather):
    with pytest.raises(TypeError, match=r"torch\.cat"):
        trained(data=gather(blobs()[0].split(8)))


def test_labels_that_are_left_out_count_for_nothing():
    inputs, labels = blobs()
    some = labels.clone()
    some[::2] = -100
    options = {"epochs": 1, "lr": 1e-6, "ema": 0}
    found = trained(validation_data=TensorDataset(inputs, some), **options).run.metrics
    known = trained(validation_data=(inputs[1::2], labels[1::2]), **options).run.metrics
    for name in ("val_loss", "val_accuracy"):
        assert found[name] == pytest.approx(known[name], rel=1e-4)


def test_probabilities_are_validated_by_their_largest():
    inputs, labels = blobs()
    sure = nn.functional.one_hot(labels, 3).float()
    options = {"epochs": 1, "lr": 1e-6, "ema": 0}
    found = trained(validation_data=(inputs, sure), **options).run.metrics
    known = trained(validation_data=(inputs, labels), **options).run.metrics
    for name in ("val_loss", "val_accuracy"):
        assert found[name] == pytest.approx(known[name], rel=1e-4)


def test_a_network_that_runs_in_its_own_way_is_refused_before_the_training():
    class Runs(nn.Sequential):
        def run(self, x):
            return self(x)

    with pytest.raises(ValueError, match="has an attribute `run`"):
        trained(Runs(seeded(net)))
    assert trained(trained()).run.steps  # one that was trained may be again
