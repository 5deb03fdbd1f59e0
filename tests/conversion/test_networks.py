"""What networks do besides: write into inputs, hide gradients, choose their path, keep state."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import separable
from separable.conversion import SeparatedConv, converting, planning, refining, varying
from separable.conversion.plans import NothingToConvert
from separable.conversion.sensitivity import divergence
from separable.conversion.sites import trace

pytestmark = pytest.mark.filterwarnings("ignore:.*positions; more calibration")
INPUTS = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(refining, "STEPS", 5)
    monkeypatch.setattr(varying, "ENOUGH", 64)


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def features(self, x):
        return F.relu(self.two(F.relu(self.one(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def network(forward=None, base=Net):
    return type("Model", (base,), {"forward": forward} if forward else {})().eval()


def slim(model, inputs=INPUTS, budget="macs=0.5", **options):
    return separable.convert(model, inputs, budget, progress=False, **options)


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_layers_that_are_run_by_another_way():
    class Listed(Net):
        def __init__(self):
            super().__init__()
            self.layers = {"one": self.one, "two": self.two}

        def features(self, x):
            return F.relu(self.layers["two"](F.relu(self.layers["one"](x)))).mean((2, 3))

    with pytest.raises(ValueError, match="layer `one` is not run by its name"):
        slim(network(base=Listed))
    plan = separable.plan(network(), INPUTS, "macs=0.5", progress=False)
    with pytest.raises(ValueError, match="is not run by its name"):
        separable.apply(network(base=Listed), plan, INPUTS, progress=False)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_layers_that_are_compiled_alone():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    model[2] = torch.compile(model[2], backend="eager")
    with pytest.raises(ValueError, match="is not run by its name"):
        slim(model)
    kept = slim(model, budget="macs=0.99", skip=["2*"])
    assert kept.report.plan.macs <= 0.99


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_what_compile_leaves_reachable_is_converted():
    model = network()
    model.two.compile(backend="eager")
    found = slim(model)
    assert any(isinstance(module, SeparatedConv) for module in found.modules())
    assert not torch.equal(found(INPUTS), model(INPUTS))


def test_values_are_not_compared_as_logits():
    """An offset that a softmax does not see."""
    model = network()
    with torch.no_grad():
        model.head.bias += 3
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.head.bias += 1
    assert divergence(moved, model, [INPUTS]) < 1e-9
    assert divergence(moved, model, [INPUTS], "values") > 0.05
    by_shape, named = slim(model).report, slim(model, outputs="values").report
    assert "(mean KL divergence of logits, nats)" in str(by_shape)
    assert "(relative squared error)" in str(named)
    found = slim(model, outputs="values")
    assert found.report.error == divergence(found, model, [INPUTS], "values")
    assert found.report.plan.outputs == "values"
    boxed = network(lambda self, x: [self.head(self.features(x))])
    boxed.load_state_dict(model.state_dict())
    assert same(found, slim(boxed))
    budget = slim(model, budget="error=0.001", outputs="values")
    assert divergence(budget, model, [INPUTS], "values") <= 0.001


def test_unknown_kinds_of_outputs():
    with pytest.raises(ValueError, match="`outputs`"):
        slim(network(), outputs="scores")
    maps = network(lambda self, x: self.two(F.relu(self.one(x))))
    with pytest.raises(ValueError, match=r"`outputs` \(='logits'\) needs"):
        slim(maps, outputs="logits")


def test_a_network_that_writes_into_its_inputs():
    def writing(self, x):
        return self.head(self.features(x.mul_(2).sub_(1)))

    kept = INPUTS.clone()
    found = slim(network(writing))
    assert torch.equal(INPUTS, kept)
    plain = slim(network(lambda self, x: self.head(self.features(x * 2 - 1))))
    assert same(found, plain)
    assert found.report.error == plain.report.error


def test_half_precision_has_the_last_pass(classifier, monkeypatch):
    monkeypatch.setattr(refining, "STEPS", 60)
    monkeypatch.setattr(varying, "ENOUGH", 1024)
    inputs = torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    found = slim(classifier.half(), inputs, "macs=0.25")
    assert found.report.refined
    assert {p.dtype for p in found.parameters()} == {torch.float16}


def late(self, x):
    h = F.relu(self.one(x))
    if x.mean() > 0.6:
        h = F.relu(self.two(h))
    return self.head(h.mean((2, 3)))


def test_a_layer_that_does_not_run_on_the_first_batch():
    batches = [INPUTS[:8] / 2, *(0.5 + INPUTS[8:] / 2).split(8)]
    found = slim(network(late), batches, "macs=0.6")
    row = found.report.plan.row("two")
    assert row.form is not None
    assert row.macs_before == 16 * 16 * 9 * 64
    assert found.report.plan.macs <= 0.6
    assert found.report.error < 0.1


def test_late_layers_stand_where_they_run():
    def middle(self, x):
        h = F.relu(self.one(x))
        if x.mean() > 0.6:
            h = F.relu(self.two(h))
        return self.last(h)

    model = network(middle)
    model.last = nn.Conv2d(16, 4, 3)
    sites = trace(model, INPUTS / 2, [0.5 + INPUTS / 2])
    assert [site.name for site in sites] == ["one", "two", "last"]


def weights(model):
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum({id(p): p.numel() for conv in convs for p in conv.parameters()}.values())


def test_parameters_are_counted_as_they_are():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 16, 3)).eval()
    found = slim(model, budget="params=0.15")
    assert found.report.plan.params == weights(found) / weights(model) <= 0.15
    edited = found.report.plan.edited("1", "depthwise-pointwise", 1)
    again = separable.apply(model, edited, INPUTS, progress=False)
    assert edited.params == weights(again) / weights(model)


def test_shared_weights_stay_shared():
    model = network(
        lambda self, x: self.head(F.relu(self.two(self.three(self.one(x)))).mean((2, 3)))
    )
    model.three = nn.Conv2d(16, 16, 3, padding=1)
    model.four = nn.Conv2d(16, 16, 3, padding=1)
    model.three.weight = model.two.weight
    plan = separable.plan(model, INPUTS, "macs=0.99", progress=False)
    assert plan.row("two").reason == "shares a parameter with three"
    assert plan.row("three").reason == "shares a parameter with two"
    assert sum(row.params_before for row in plan.rows) == weights(model)
    found = separable.apply(model, plan, INPUTS, progress=False)
    assert found.two.weight is found.three.weight


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_masked_outputs(kind):
    def masked(self, x):
        out = self.head(self.features(x)).masked_fill(torch.arange(10) == 3, -math.inf)
        return out if kind == "logits" else out[:, :, None]

    plain = network(
        lambda self, x: (lambda out: out if kind == "logits" else out[:, :, None])(
            self.head(self.features(x))[:, torch.arange(10) != 3]
        )
    )
    model = network(masked)
    found = slim(model)
    assert 0 <= found.report.error < 0.1
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.head.bias[5] += 1
    beside = copy.deepcopy(plain)
    beside.load_state_dict(moved.state_dict())
    expected = divergence(beside, plain, [INPUTS])
    assert divergence(moved, model, [INPUTS]) == pytest.approx(expected, rel=1e-6)


def test_what_is_attached_to_a_layer_is_not_lost():
    def changed(kind):
        model = network()
        if kind == "hook":
            model.two.register_forward_hook(lambda module, given, output: output * 3)
        elif kind == "pre-hook":
            model.two.register_forward_pre_hook(lambda module, given: (given[0] - 1,))
        else:
            plain = model.two.forward
            model.two.forward = lambda x: plain(x).tanh()
        return model

    for kind in ("hook", "pre-hook", "forward"):
        plan = separable.plan(changed(kind), INPUTS, "macs=0.99", progress=False)
        reason = "its forward pass was replaced" if kind == "forward" else "it has hooks"
        assert plan.row("two").reason == reason
        with pytest.raises(ValueError, match=f"some layers stay dense .*two: {reason}"):
            separable.plan(changed(kind), INPUTS, "macs=0.3", progress=False)
        other = separable.plan(network(), INPUTS, "macs=0.5", progress=False)
        with pytest.raises(ValueError, match=f"layer `two` cannot change, as {reason}"):
            separable.apply(changed(kind), other, INPUTS, progress=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_old_style_parametrizations_stay(kind):
    model = Net()
    if kind == "prune":
        prune.l1_unstructured(model.two, "weight", 0.5)
    else:
        getattr(nn.utils, kind)(model.two)
    model.eval()
    model(INPUTS)
    found = slim(model, budget="macs=0.99")
    assert found.report.plan.row("two").reason == "it has hooks"
    torch.testing.assert_close(found(INPUTS), model(INPUTS), rtol=0.1, atol=0.1)


def test_a_model_that_cannot_be_copied():
    import threading

    model = network()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="`model` cannot be copied: TypeError"):
        slim(model)


FRONTS = {
    "logarithm": lambda self, x: self.head(self.features((x + 1e-6).log())),
    "range": lambda self, x: self.head(self.features(_in_range(x))),
    "index": lambda self, x: self.head(self.features(_looked_up(x))),
}


def _in_range(x):
    assert x.min() >= 0, "negative"
    return x


def _looked_up(x):
    return torch.eye(3)[(x[:, 0] * 2.99).long().abs() + 3 * (x[:, 0] < 0)].permute(0, 3, 1, 2)


@pytest.mark.parametrize("front", FRONTS)
def test_networks_that_reject_variations(front, monkeypatch):
    model = network(FRONTS[front])
    found = slim(model)
    assert "rejects variations of the inputs" in str(found.report)
    assert len(found.report.notes) == 1
    monkeypatch.setattr(varying, "ENOUGH", 1)  # the last pass meets the first of them
    alone = slim(model)
    assert len(alone.report.notes) == 1
    assert alone.report.error < 0.1
    assert slim(network()).report.notes == ()


@pytest.mark.parametrize("hidden", ["no_grad", "inference_mode", "detach", "number"])
def test_outputs_that_hide_how_they_came_about(hidden):
    forward = {
        "no_grad": torch.no_grad()(Net.forward),
        "inference_mode": torch.inference_mode()(Net.forward),
        "detach": lambda self, x: self.head(self.features(x)).detach(),
        "number": lambda self, x: self.head(self.features(x)).sum(),
    }[hidden]
    with pytest.warns(UserWarning, match="hide how they depend on its layers"):
        found = slim(network(forward))
    assert not found.report.refined
    assert found.report.error < 0.1
    assert found.report.plan.error > 0


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    label: str = "none"


@pytest.mark.parametrize(
    "wrap", [lambda out: Answer(out), lambda out: torch.fft.fft(out)], ids=["dataclass", "complex"]
)
def test_outputs_of_more_kinds(wrap):
    found = slim(network(lambda self, x: wrap(self.head(self.features(x)))))
    assert 0 < found.report.error < 0.1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: out.argmax(1),
        lambda out: out > 0,
        lambda out: None,
        lambda out: float(out.sum()),
    ],
)
def test_outputs_that_cannot_be_compared(wrap):
    with pytest.raises(ValueError, match=r"`model` returns .* must return a floating-point tensor"):
        slim(network(lambda self, x: wrap(self.head(self.features(x)))))


def test_within_inference_mode():
    with torch.inference_mode():
        found = slim(network(), INPUTS.clone())
    assert found.report == slim(network()).report
    assert all(p.requires_grad and not p.is_inference() for p in found.parameters())


def test_complex_networks_stay():
    layers = [nn.Conv2d(3, 8, 3, dtype=torch.complex64), nn.Conv2d(8, 8, 3, dtype=torch.complex64)]
    with pytest.raises(NothingToConvert, match="0: its weight is complex"):
        slim(nn.Sequential(*layers).eval(), INPUTS.to(torch.complex64))


def test_layers_that_are_given_their_input_by_name():
    def named(self, x):
        return self.head(F.relu(self.two(input=F.relu(self.one(input=x)))).mean((2, 3)))

    assert same(slim(network(named)), slim(network()))


def test_classes_whose_constructor_raises():
    class Odd(nn.Conv2d):
        def __init__(self, config, *args, **kwargs):
            assert isinstance(config, dict)
            super().__init__(16, 16, 3, padding=1)

        def forward(self, x):
            return super().forward(x)

    model = network()
    model.two = Odd({}).eval()
    plan = separable.plan(model, INPUTS, "macs=0.99", progress=False)
    assert plan.row("two").reason == "its class computes more than a convolution"


def test_networks_of_one_batch_size():
    def fixed(self, x):
        return self.head(self.features(x).view(32, 16))

    found = slim(network(fixed))
    assert "batches of one size only" in str(found.report)
    assert "no part of a batch (RuntimeError: shape" in str(found.report)
    assert found.report.error < 0.1
    surveyed = planning.survey(network(fixed), INPUTS, ["latency=0.9"], progress=False)
    assert surveyed.timer.example.shape[0] == 32


SMALL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too few"), RuntimeError(SMALL)])
@pytest.mark.parametrize(("at", "item"), [(32, 32), (8, 32), (32, 1)])
def test_too_little_memory_is_no_reason_for_another_way(error, at, item):
    """Of the inputs, of a part of them, or of those that came one by one."""

    def costly(self, x):
        if len(x) == at:
            raise error
        return self.head(self.features(x))

    with pytest.raises(type(error), match=str(error)):
        slim(network(costly), inputs=INPUTS.split(item))


def test_bars_are_for_terminals(capsys):
    model = network()
    plan = separable.plan(model, INPUTS, "macs=0.5")
    separable.apply(model, plan, INPUTS)
    assert capsys.readouterr().err == ""


CALLS = {
    "apply": lambda model, few: separable.apply(
        model, separable.plan(model, few, "macs=0.5", progress=False), few, progress=False
    ),
    "convert": lambda model, few: slim(model, few),
    "weights alone": lambda model, _: slim(model, None, "params=0.5"),
    "frontier": lambda model, few: converting.frontier(
        model, few, "macs=0.5", ["macs=0.6"], progress=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_warnings_point_at_the_line_that_called(call):
    with pytest.warns(UserWarning, match="calibration inputs") as told:
        CALLS[call](network(), INPUTS[:2, :, :3, :3])
    assert {warning.filename for warning in told} == {__file__}


def test_buffers_are_as_they_were():
    def counting(self, x):
        self.runs += 1
        return self.head(self.features(x))

    model = network(counting)
    model.register_buffer("runs", torch.tensor(7))
    assert slim(model).runs == 7


def test_draws_do_not_depend_on_the_default_data_type():
    model, plain = network(), slim(network())
    torch.set_default_dtype(torch.float64)
    try:
        found = slim(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.report.error == plain.report.error


def test_a_report_of_the_models_own():
    class Reporting(Net):
        def report(self):
            return "mine"

    for call in (slim, lambda model: separable.apply(model, None, INPUTS)):
        with pytest.raises(ValueError, match=r"attribute `report` \(a method\)"):
            call(network(base=Reporting))
    assert separable.merge(network(base=Reporting)).report() == "mine"
