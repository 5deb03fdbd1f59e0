"""Whole networks: budgets, what is kept, files, merge, exporters, processes."""

import copy
import dataclasses
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import separable
from separable.conversion import (
    SeparatedConv,
    applying,
    converting,
    planning,
    refining,
    searching,
    timing,
)
from separable.conversion.applying import finished, fitted
from separable.conversion.calibration import Inputs
from separable.conversion.plans import NothingToConvert
from separable.conversion.sensitivity import divergence
from separable.conversion.sites import trace

FEW = "positions; more calibration"


class Branched(nn.Module):
    """Strides, a shortcut, a module that runs twice, one that never runs, every special layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.twice = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2)
        self.short = nn.Conv2d(12, 16, 1, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.unused = nn.Conv2d(2, 2, 3)
        self.head = nn.Linear(8, 5)
        self.alias = self.down

    def forward(self, input):
        x = nn.functional.relu(self.norm(self.stem(input)), inplace=True)
        x = nn.functional.relu(self.twice(nn.functional.relu(self.twice(x), inplace=True)))
        x = self.depthwise(nn.functional.relu(self.down(x) + self.short(x)))
        return self.head(self.up(x).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Branched()
    with torch.no_grad():
        model.head.weight.mul_(30)
        for _ in range(20):
            model(torch.randn(16, 3, 12, 12))
    return model.eval()


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def slim(model, inputs):
    return separable.convert(model, inputs, "macs=0.4", progress=False)


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [type(m) for m in model.modules()]


def test_a_converted_network_keeps_its_budget_and_most_of_its_outputs(model, inputs, slim):
    plan = slim.report.plan
    assert plan.macs <= 0.4
    counted = separable.count(slim, inputs=inputs[:1]).macs
    dense = separable.count(model, inputs=inputs[:1]).macs
    kept = sum(row.macs_before - row.macs_after for row in plan.rows)
    assert dense - counted == kept
    assert slim.report.error == pytest.approx(divergence(slim, model, inputs.split(32)))
    with pytest.warns(UserWarning, match="weights alone"):
        plain = separable.apply(model, plan, None, progress=False)
    assert slim.report.error < 0.5 * divergence(plain, model, inputs.split(32))


def test_every_convolution_has_a_row_and_a_reason_where_it_stays(slim):
    reasons = {row.name: row.reason for row in slim.report.plan.rows}
    assert reasons["depthwise"] == "already depthwise"
    assert reasons["up"] == "transposed"
    assert reasons["unused"] == "never runs on the calibration inputs"
    assert "alias" not in reasons
    assert slim.alias is slim.down
    assert isinstance(slim.twice, SeparatedConv)
    for row in slim.report.plan.rows:
        assert bool(row.form) != bool(row.reason)


def test_the_model_is_untouched(model, inputs):
    model = copy.deepcopy(model).train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    before = snapshot(model)
    random = torch.get_rng_state()
    slim = separable.convert(model, inputs, "macs=0.5", progress=False)
    after = snapshot(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(random, torch.get_rng_state())
    assert slim.training
    assert not slim.norm.training
    assert all(m.training for m in slim.twice.modules())
    assert not any(m._forward_hooks for m in slim.modules())


def test_the_same_seed_gives_the_same_network(model, inputs, slim):
    again = separable.convert(model, inputs, "macs=0.4", progress=False)
    assert again.report == slim.report
    for name, value in slim.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_at_full_rank_every_form_gives_the_original_back(model, inputs):
    plan = separable.plan(model, inputs, "macs=0.9", progress=False)
    plan = plan.edited("twice", "pointwise-depthwise-pointwise", 108)
    plan = plan.edited("down", "depthwise-pointwise", 8).edited("stem", "pointwise-depthwise", 3)
    slim = separable.apply(model, plan.edited("short", "low-rank", 12), inputs, progress=False)
    assert slim.report.error < 1e-8
    torch.testing.assert_close(slim(inputs), model(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["batches", "pairs", "single", "stream", "dataset"])
def test_calibration_comes_in_many_shapes(model, inputs, slim, kind):
    labels = torch.zeros(64)
    given = {
        "batches": list(inputs.split(32)),
        "pairs": [(inputs[:32], 1), [inputs[32:], 2]],
        "single": list(inputs),
        "stream": iter(inputs.split(32)),
        "dataset": torch.utils.data.TensorDataset(inputs, labels),
    }[kind]
    found = separable.convert(model, given, "macs=0.4", progress=False)
    assert found.report == slim.report


def test_batches_of_one_are_joined(model, inputs, slim):
    found = separable.convert(model, list(inputs.split(1)), "macs=0.4", progress=False)
    assert found.report == slim.report


def test_batches_of_one_stay_apart_where_sizes_differ_or_the_model_takes_one():
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 3, size, size, generator=generator) for size in (8, 8, 9, 8)]
    assert [tuple(b.shape) for b in Inputs(given, nn.Identity())] == [
        (2, 3, 8, 8), (1, 3, 9, 9), (1, 3, 8, 8),
    ]  # fmt: skip
    only = nn.Identity()
    only.forward = lambda x: x.view(1, 3, 8, 8)
    assert [len(batch) for batch in Inputs(given[:2], only)] == [1, 1]


def test_a_convolution_that_takes_single_inputs_is_given_batches():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    images = torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    single = separable.convert(model, list(images), "macs=0.6", progress=False)
    assert single.report == separable.convert(model, images, "macs=0.6", progress=False).report


@pytest.mark.parametrize("budget", ["macs=1", "error=1e-9"])
def test_a_plan_may_change_nothing(model, inputs, budget):
    found = separable.convert(model, inputs, budget, progress=False)
    torch.testing.assert_close(found(inputs), model(inputs))


def test_a_last_batch_of_another_size(model, inputs):
    given = [inputs[:32], inputs[32:33]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", FEW)
        assert separable.convert(model, given, "macs=0.5", progress=False).report.error < 1


def test_params_and_error_budgets(model, inputs):
    plan = separable.plan(model, inputs, "params=0.5", progress=False)
    assert plan.params <= 0.5
    slim = separable.convert(model, inputs, "error=0.05", progress=False)
    assert slim.report.error <= 0.05
    assert slim.report.plan.macs < 1


def test_budgets_share_a_survey(model, inputs):
    budgets = ["macs=0.3", "params=0.6"]
    surveyed = planning.survey(model, inputs, budgets, progress=False)
    plans = {each: surveyed.choose(each) for each in budgets}
    assert plans == {each: separable.plan(model, inputs, each, progress=False) for each in budgets}
    assert len({plan.macs for plan in plans.values()}) == 2


def test_further_budgets_are_fitted_once(model, inputs, monkeypatch):
    def kept(converted, report, *_):
        return copy.deepcopy(converted), dataclasses.replace(report, error=0.0, refined=True)

    monkeypatch.setattr(converting, "finished", kept)
    found = converting.frontier(model, inputs, "macs=0.4", ["macs=0.6"], progress=False)
    assert {name: network.report.refined for name, network in found.items()} == {
        "macs=0.4": True,
        "macs=0.4, fitted once": False,
        "macs=0.6, fitted once": False,
    }
    plans = {name: network.report.plan for name, network in found.items()}
    assert plans["macs=0.4"] == plans["macs=0.4, fitted once"]
    assert plans["macs=0.6, fitted once"].budget == "macs=0.6"
    assert list(converting.frontier(model, inputs, None, ["macs=0.6"], progress=False)) == [
        "macs=0.6, fitted once"
    ]


@pytest.mark.parametrize(
    ("gain", "floor", "expected"),
    [
        (1, 0.0, 0.4),  # the last pass gains nothing
        (5, 0.0, 0.4 / 5**0.25),  # it meets the limit at fewer multiply-adds
        (50, 0.0, 0.4 / 10**0.25),  # it would at fewer yet, but is not tried there
        (5, 0.3, 0.3),  # there are no smaller plans
        (0.01, 0.7, 0.7),  # nor is it tried where the limit is met without
    ],
)
def test_an_error_budget_finds_the_least_multiply_adds(gain, floor, expected, monkeypatch):
    limit, refinements = 0.05, []

    def within(share, _):
        if share < floor:
            raise ValueError
        return share

    def once(_, share, *__):
        return share, SimpleNamespace(error=limit * (0.4 / share) ** 4)

    def last(share, report, *_):
        refinements.append(report.error)
        return share, SimpleNamespace(error=report.error / gain)

    monkeypatch.setattr(searching, "fitted", once)
    monkeypatch.setattr(searching, "finished", last)
    goal = SimpleNamespace(limit=limit)
    search = SimpleNamespace(
        original=None,
        found=SimpleNamespace(sites=()),
        progress=False,
        goal=goal,
        plan=lambda _: 1.0,
        within=within,
    )
    resolution = 1000 ** (0.5**searching.TRIALS)
    assert expected <= searching.for_error(search, None) <= expected * resolution
    assert all(limit < error <= searching.HOPE * limit for error in refinements)


def test_the_last_pass_never_raises_the_measured_error(model, inputs, monkeypatch):
    plan = separable.plan(model, inputs, "macs=0.4", progress=False)
    given = Inputs(inputs, model)
    once, report = fitted(model, plan, trace(model, given.first), given, progress=False)

    def worse(converted, *_):
        result = copy.deepcopy(converted)
        result.head.bias.data[0] += 1
        return result

    monkeypatch.setattr(applying, "refined", worse)
    kept, after = finished(once, report, model, given, progress=False)
    assert kept is once
    assert after == report


def test_skipping_a_block_skips_its_layers(model, inputs):
    outer = nn.ModuleDict({"block": model})
    outer.forward = lambda x: outer["block"](x)
    with pytest.raises(NothingToConvert):
        separable.plan(outer.eval(), inputs, "macs=0.5", skip=["block"], progress=False)


def test_skip_and_forms(model, inputs):
    plan = separable.plan(
        model, inputs, "macs=0.9", skip=["tw*"], forms=["depthwise-pointwise"], progress=False
    )
    assert plan.row("twice").reason == "skipped by name"
    assert {row.form for row in plan.rows} == {None, "depthwise-pointwise"}


def test_latency_budget_is_met_where_it_can_be(monkeypatch):
    """On a clock that charges each network its multiply-adds: no time is asserted here."""
    monkeypatch.setattr(timing, "RANK_STEPS", 3)

    def charged(models, inputs, **_):
        seconds = [separable.count(model, inputs=inputs).macs * 1e-9 for model in models]
        return tuple(SimpleNamespace(median=each) for each in seconds)

    monkeypatch.setattr(timing, "measure_interleaved", charged)
    monkeypatch.setattr(timing, "measure", lambda m, x, **_: charged([m], x)[0])
    wide = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3)).eval()
    inputs = torch.randn(16, 3, 24, 24)
    plan = separable.plan(
        wide, inputs, "latency=0.9", forms=["pointwise-depthwise-pointwise"], progress=False
    )
    assert plan.seconds_after <= 0.9 * plan.seconds_before
    assert plan.seconds_before == separable.count(wide, inputs=inputs[:1]).macs * 1e-9
    assert "ms" in str(plan)


def test_latency_budgets_share_the_times_of_layers(monkeypatch):
    monkeypatch.setattr(timing, "RANK_STEPS", 2)
    timed = []

    def counted(model, input, **_):
        timed.append(model)
        return SimpleNamespace(median=separable.count(model, inputs=input).macs * 1e-9)

    def both(models, inputs, **_):
        return tuple(counted(each, inputs) for each in models)

    monkeypatch.setattr(timing, "measure", counted)
    monkeypatch.setattr(timing, "measure_interleaved", both)
    wide = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3)).eval()
    budgets = ["latency=0.9", "latency=0.5"]
    surveyed = planning.survey(wide, torch.randn(16, 3, 24, 24), budgets, progress=False)
    surveyed.choose("latency=0.9")
    layers = [model for model in timed if not isinstance(model, nn.Sequential)]
    timed.clear()
    surveyed.choose("latency=0.5")
    assert layers
    assert all(isinstance(model, nn.Sequential) and len(model) == 3 for model in timed)


def test_plan_is_a_value_that_prints_and_saves(model, inputs, slim):
    plan = slim.report.plan
    assert separable.Plan.from_json(plan.to_json()) == plan
    assert hash(separable.Plan.from_json(plan.to_json())) == hash(plan)
    json.loads(plan.edited("stem", "pointwise-depthwise", 1).to_json())
    assert "dense: transposed" in str(plan)
    dense = plan.edited("stem", None)
    assert dense.row("stem").macs_after == plan.row("stem").macs_before
    assert dense.row("stem").error == 0
    assert dense.error is not None
    edited = plan.edited("stem", "pointwise-depthwise", 1)
    assert edited.error is None
    assert "predicted output error unknown" in str(edited)


def test_files_load_without_the_original(model, inputs, slim, tmp_path):
    path = tmp_path / "slim.safetensors"
    separable.save(slim, path)
    assert [file.name for file in tmp_path.iterdir()] == ["slim.safetensors"]
    fresh = Branched().eval()
    loaded = separable.load(path, model=fresh)
    assert loaded.report == slim.report
    assert torch.equal(loaded(inputs), slim(inputs))
    assert isinstance(fresh.twice, nn.Conv2d)


def test_merge_gives_dense_convolutions_of_the_same_function(model, inputs, slim):
    merged = separable.merge(slim)
    assert not any(isinstance(m, SeparatedConv) for m in merged.modules())
    assert merged.down.groups == 2
    assert merged.twice.padding_mode == "reflect"
    torch.testing.assert_close(merged(inputs), slim(inputs), rtol=1e-4, atol=1e-4)
    assert merged.alias is merged.down


def test_numbers_among_the_outputs_and_transposed_layers_in_the_budget():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.wide = nn.Conv2d(16, 24, 3, padding=1, bias=False)
            self.up = nn.ConvTranspose2d(24, 4, 2, stride=2, bias=False)

        def forward(self, x):
            y = self.up(self.wide(self.conv(x)))
            return {"y": y, "mean": y.mean()}

    torch.manual_seed(0)
    model, inputs = Model().eval(), torch.randn(16, 3, 8, 8)
    slim = separable.convert(model, inputs, "macs=0.7", progress=False)
    before, after = (separable.count(m, (1, 3, 8, 8)).macs for m in (model, slim))
    assert slim.report.plan.macs == pytest.approx(after / before)
    assert after <= 0.7 * before


def test_export_keeps_the_outputs(inputs, slim):
    exported = torch.export.export(slim, (inputs[:2],)).module()
    torch.testing.assert_close(exported(inputs[:2]), slim(inputs[:2]), rtol=1e-4, atol=1e-4)


def test_onnx_keeps_the_outputs(inputs, slim, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "slim.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(slim, (inputs[:2],), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: inputs[:2].numpy()})
    torch.testing.assert_close(torch.from_numpy(result), slim(inputs[:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["inductor", "separable"])
def test_compilers_keep_the_outputs(inputs, slim, backend):
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compilers' own
        result = torch.compile(slim, backend=backend)(inputs[:4])
    torch.testing.assert_close(result, slim(inputs[:4]), rtol=1e-4, atol=1e-4)


def test_dtype_flags_and_hooks_are_kept(model, inputs):
    model = copy.deepcopy(model).double().train()
    model.norm.eval()
    model.twice.weight.requires_grad_(False)
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.head.register_forward_pre_hook(lambda *_: seen.append("head"))
    slim = separable.convert(model, inputs.double(), "macs=0.4", progress=False)
    assert {p.dtype for p in slim.parameters()} == {torch.float64}
    assert slim.training
    assert slim.head.training
    assert not slim.norm.training
    assert isinstance(slim.twice, SeparatedConv)
    assert not any(p.requires_grad for p in slim.twice.parameters() if p.dim() > 1)
    assert slim.head.weight.requires_grad
    seen.clear()
    slim.eval()(inputs[:1].double())
    assert seen == ["norm", "head"]


def test_channels_last_is_kept(model, inputs):
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    slim = separable.convert(model, inputs, "macs=0.4", progress=False)
    assert slim.twice.last.weight.is_contiguous(memory_format=torch.channels_last)


class Reading(nn.Module):
    """A network that looks at its convolution, as timm's DaViT and EdgeNeXt do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        x = nn.functional.pad(x, (0, -x.shape[-1] % self.conv.kernel_size[0]))
        return self.conv(x.to(self.conv.weight.dtype)).relu().mean((2, 3))


def test_networks_that_look_at_their_convolution():
    inputs = torch.randn(16, 3, 10, 10)
    slim = separable.convert(Reading().eval(), inputs, "macs=0.6", progress=False)
    assert slim.report.plan.rows[0].form is not None
    assert slim(inputs).shape == (16, 16)


def test_outputs_that_are_no_logits(inputs):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.out = nn.Conv2d(16, 16, 3)

        def forward(self, x):
            x = self.conv(x).relu()
            return {"features": [x, self.out(x)]}

    slim = separable.convert(Two(), inputs, "macs=0.5", progress=False)
    assert 0 < slim.report.error < 0.3


def test_a_bare_convolution_and_batch_norm_that_drifted(inputs):
    slim = separable.convert(nn.Conv2d(3, 16, 3), inputs, "macs=0.6", progress=False)
    assert isinstance(slim, SeparatedConv)


def test_too_few_inputs_say_so_and_stay_finite(model, inputs):
    with pytest.warns(UserWarning, match=FEW):
        slim = separable.convert(model, inputs[:1, :, :4, :4], "macs=0.4", progress=False)
    assert all(value.isfinite().all() for value in slim.state_dict().values())


def test_weights_alone_need_an_example_for_macs(model, inputs):
    with pytest.warns(UserWarning, match="weights alone"):
        slim = separable.convert(model, None, "macs=0.5", example=inputs[:1], progress=False)
    assert slim.report.plan.macs <= 0.5
    assert torch.equal(slim.norm.running_mean, model.norm.running_mean)
    with pytest.warns(UserWarning, match="weights alone"):
        slim = separable.convert(model, None, "params=0.5", progress=False)
    assert slim.report.plan.params <= 0.5


def _rank_of_two(rank, port, path):
    import os

    from torch import distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    refining.STEPS = 20
    model, inputs, _ = torch.load(path / "case.pt", weights_only=False)
    mine = list(inputs.split(16))[rank::2]
    slim = separable.convert(model, mine, "macs=0.45", progress=False)
    torch.save((slim.report.plan.to_json(), slim.state_dict()), path / f"{rank}.pt")

    def search():
        assert rank == 0
        return slim.report.plan

    assert timing._found_by_first(search) == slim.report.plan

    def fails():
        raise ValueError("cannot be met")

    with pytest.raises(ValueError, match="cannot be met"):
        timing._found_by_first(fails)
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(model, inputs, tmp_path):
    import socket

    from torch import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = copy.deepcopy(model).double()
    inputs = inputs.double()
    torch.save((model, inputs, None), tmp_path / "case.pt")
    multiprocessing.spawn(_rank_of_two, (port, tmp_path), nprocs=2)
    alone = separable.convert(model, list(inputs.split(16)), "macs=0.45", progress=False)
    for rank in (0, 1):
        text, state = torch.load(tmp_path / f"{rank}.pt")
        rows = separable.Plan.from_json(text).rows
        chosen = [(row.name, row.form, row.rank) for row in rows]
        assert chosen == [(r.name, r.form, r.rank) for r in alone.report.plan.rows]
        for name, value in alone.state_dict().items():
            # fits amplify the rounding of sums in another order
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(model, inputs):
    slim = separable.convert(model, inputs, "macs=0.5", progress=False)
    moved = copy.deepcopy(model).cuda()
    found = separable.convert(moved, inputs, "macs=0.5", progress=False)
    assert {p.device.type for p in found.parameters()} == {"cuda"}
    assert found.report.plan.macs <= 0.5
    # rounding may tip ranks, so what is compared is how near both come
    here = divergence(slim, model, inputs.split(16))
    there = divergence(found, moved, inputs.cuda().split(16))
    assert there < 1.5 * here + 1e-4
