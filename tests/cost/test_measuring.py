"""Measuring leaves everything as it was, and does the arithmetic of times and memory right."""

import json
import math
import platform
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import benchmark

from separable.cost.measuring import measure, measure_interleaved

QUICK = {"repeats": 2, "min_seconds": 0.0, "warmup": 1}
X = torch.arange(12.0).reshape(3, 4)


class Clock:
    """A clock that stands still but for what `Sleep` adds; its slots are no state of a model."""

    __slots__ = ("now", "runs")

    def __init__(self):
        self.now = 0.0
        self.runs = defaultdict(int)

    def __call__(self):
        return self.now


class Sleep(nn.Module):
    """Take so many seconds, those of the next pass from a list, run the children in between."""

    def __init__(self, clock, *seconds, children=()):
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.below = nn.ModuleList(children)

    def forward(self, x):
        self.clock.now += self.seconds[self.clock.runs[id(self)] % len(self.seconds)]
        self.clock.runs[id(self)] += 1
        for child in self.below:
            x = child(x)
        return x


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "timer", clock)
    return clock


LOG = SimpleNamespace(modes=[], threads=0)  # outside of the model, whose state is put back


class Restless(nn.Module):
    """Writes to its buffers, swaps one, adds one, draws numbers and writes to its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("swapped", torch.zeros(2))
        self.register_buffer("empty", None)
        self.fail = False

    def train(self, mode=True):
        raise AssertionError("train() folds weights in some models; it must not be called")

    def forward(self, x):
        LOG.modes.append(
            (self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        )
        LOG.threads = torch.get_num_threads()
        x.add_(torch.rand(()))
        self.written.add_(1)
        self.swapped = self.swapped + 1
        self.register_buffer("added", torch.zeros(1))
        if self.fail:
            raise RuntimeError("no")
        return self.dropout(self.norm(self.linear(x)))


def restless():
    LOG.modes.clear()
    model = Restless()
    model.norm.training = False
    model.linear.register_forward_hook(lambda module, args, output: None)
    return model


def state(model):
    return {
        "flags": [module.training for module in model.modules()],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "tensors": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "hooks": [
            (list(module._forward_hooks), list(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fail", [False, True], ids=["succeeds", "raises"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_model_inputs_and_torch_are_left_as_they_were(fail, per_layer):
    model, x = restless(), X.clone()
    model.fail = fail
    before = state(model)
    if fail:
        with pytest.raises(RuntimeError, match=r"^no$"):
            measure(model, x, **QUICK, per_layer=per_layer)
    else:
        measure(model, x, **QUICK, per_layer=per_layer)
    assert state(model) == before
    assert torch.equal(x, X)
    assert set(LOG.modes) == {(False, False, False)}


def test_hooks_are_removed_where_a_pass_with_them_raises():
    class Late(Restless):
        def forward(self, x):
            self.fail = bool(self.linear._forward_pre_hooks)
            return super().forward(x)

    model = Late()
    before = state(model)
    with pytest.raises(RuntimeError, match=r"^no$"):
        measure(model, X, **QUICK, per_layer=True)
    assert state(model) == before


def test_threads():
    model, present = restless(), torch.get_num_threads()
    assert measure(model, X, **QUICK, threads=present + 1).threads == present + 1
    assert LOG.threads == present + 1
    assert torch.get_num_threads() == present
    assert measure(model, X, **QUICK).threads == present


def test_median_spread_and_calls_per_repeat(clock):
    # one warm-up, one pass for the memory, two to guess the duration, then the repeats
    model = Sleep(clock, 9, 9, 9, 2, 1, 3, 2, 2, 8, 4)
    measurement = measure(model, X, repeats=3, min_seconds=12, warmup=1)
    assert clock.runs[id(model)] == 10
    assert measurement.times == ((1 + 3) / 2, (2 + 2) / 2, (8 + 4) / 2)
    assert measurement.median == 2
    assert measurement.iqr == 2
    assert measurement.layers == ()


def test_min_seconds_of_zero_is_one_call_per_repeat(clock):
    model = Sleep(clock, 1)
    assert measure(model, X, repeats=7, min_seconds=0, warmup=4).times == (1,) * 7
    assert clock.runs[id(model)] == 4 + 1 + 2 + 7


def test_interleaved_to_and_fro(clock):
    order = []

    def named(name, seconds):
        def run(x):
            order.append(name)
            clock.now += seconds
            return x

        return run

    a, b = measure_interleaved(
        [named("a", 6), named("b", 2)], X, repeats=3, min_seconds=0, warmup=1
    )
    # each turn an untimed and a timed call
    assert "".join(order[-12:]) == "aabb" + "bbaa" + "aabb"
    assert (a.times, b.times) == ((6,) * 3, (2,) * 3)
    ratio = a.ratio_to(b)
    assert (ratio.median, ratio.low, ratio.high) == (3, 3, 3)
    assert str(ratio) == "3.00 (3.00 to 3.00)"


def test_ratio_is_taken_pair_by_pair(clock):
    """A machine that gets slower by and by changes the times, not their ratio."""

    def slower(factor):
        seconds = iter(range(1, 100))

        def run(x):
            clock.now += factor * next(seconds)
            return x

        return run

    a, b = measure_interleaved([slower(4), slower(2)], X, repeats=5, min_seconds=0, warmup=1)
    ratio = a.ratio_to(b)
    assert (ratio.median, ratio.low, ratio.high) == (2, 2, 2)
    assert a.iqr > 0
    with pytest.raises(ValueError, match=r"`other` \(=2 repeats\) must have as many"):
        a.ratio_to(measure(nn.ReLU(), X, repeats=2, min_seconds=0.0))


def test_time_per_layer(clock):
    shared = Sleep(clock, 1)
    inner = Sleep(clock, 2, children=[shared, Sleep(clock, 4)])
    never = Sleep(clock, 100)
    model = Sleep(clock, 8, children=[inner, shared])
    model.never = never
    measurement = measure(model, X, **QUICK, per_layer=True)
    figures = {
        each.name: (each.kind, each.calls, each.inclusive, each.own) for each in measurement.layers
    }
    assert figures == {
        "": ("Sleep", 1, 16, 8),
        "below.0": ("Sleep", 1, 7, 2),
        "below.0.below.0": ("Sleep", 2, 2, 2),
        "below.0.below.1": ("Sleep", 1, 4, 4),
    }
    assert list(figures) == ["", "below.0", "below.0.below.0", "below.0.below.1"]
    table = measurement.to_string("csv").splitlines()
    assert table[0] == "Module,Type,Calls,Inclusive (ms),Own (ms),Share"
    assert table[2] == "below.0,Sleep,1,7000.000,2000.000,12.5%"


def test_time_of_a_layer_is_the_median_over_the_repeats(clock):
    model = Sleep(clock, 1, children=[Sleep(clock, 1)])
    child = model.below[0]
    # warm-up, memory, two guesses, three repeats, then with hooks: one untimed and three timed
    child.seconds = (1,) * 7 + (50, 2, 9, 3)
    measurement = measure(model, X, repeats=3, min_seconds=0.0, warmup=1, per_layer=True)
    assert [(each.inclusive, each.own) for each in measurement.layers] == [(4, 1), (3, 3)]


def test_a_hook_of_the_models_own_is_its_modules_time(clock):
    model = Sleep(clock, 1)

    def slow(*_):
        clock.now += 5

    model.register_forward_pre_hook(slow)
    model.register_forward_hook(slow)
    (layer,) = measure(model, X, **QUICK, per_layer=True).layers
    assert layer.own == 11


def test_a_layer_that_raises_and_is_caught_is_timed(clock):
    class Refuse(Sleep):
        def forward(self, x):
            super().forward(x)
            raise NotImplementedError

    class Fallback(Sleep):
        def forward(self, x):
            try:
                return super().forward(x)
            except NotImplementedError:
                return x

    model = Fallback(clock, 2, children=[Refuse(clock, 1)])
    layers = measure(model, X, **QUICK, per_layer=True).layers
    assert [(each.inclusive, each.own) for each in layers] == [(3, 2), (1, 1)]


def branching(x):
    """Hold 3 and then 2 tensors of the size of x at once."""
    a = x + 1
    b = x + 2
    c = a + b
    del a, b
    return c.double()


KIB = torch.zeros(256)  # 1 KiB


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.ReLU(), KIB, 1024),
        (nn.ReLU(inplace=True), KIB, 0),
        (lambda x: x, KIB, 0),
        # the input of each is freed after it has run, but for the first one, which is the caller's
        (nn.Sequential(*[nn.Sigmoid() for _ in range(5)]), KIB, 2048),
        (branching, KIB, 3 * 1024),
        (lambda x: (x + 1).double(), KIB, 3 * 1024),
        (nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 16)), torch.zeros(8, 64), 8 * 528 * 4),
        (nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 512)), torch.zeros(8, 64), 8 * 528 * 4),
    ],
    ids=["relu", "inplace", "identity", "chain", "branches", "cast", "narrowing", "widening"],
)
def test_peak_memory_by_hand(model, x, expected):
    assert measure(model, x, **QUICK).peak_memory_bytes == expected


def test_peak_memory_of_a_chain_of_convolutions():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 32, 3), nn.Conv2d(32, 16, 3))
    live = 4 * (64 * 30 * 30 + 32 * 28 * 28)  # output of the first and of the second
    measured = measure(model, input_size=(1, 16, 32, 32), **QUICK).peak_memory_bytes
    # on top the copies in a blocked layout that oneDNN takes of input, output and weight
    assert live <= measured <= 3 * live


def test_several_inputs_keywords_and_functions():
    def weighted(x, y, *, weight):
        assert x.shape == y.shape == (3, 4)
        assert weight == 2
        return x + weight * y

    for inputs in ((X, X), [X, X]):
        assert measure(weighted, inputs, kwargs={"weight": 2}, **QUICK).dtype == "float32"
    with pytest.raises(TypeError, match="weight"):
        measure(weighted, (X, X), **QUICK)


def test_a_tensor_that_is_given_twice_stays_one():
    """Attention takes another path where query, key and value are one."""

    def attention(query, key):
        assert query is key
        return query

    measure(attention, (X, X), **QUICK)


def test_input_size_makes_noise_in_the_dtype_of_the_model():
    seen = []

    def look(module, args):
        seen.append((args[0].shape, args[0].dtype, bool(args[0].std() > 0.5)))

    model = nn.Linear(4, 2, dtype=torch.bfloat16)
    model.register_forward_pre_hook(look)
    assert measure(model, input_size=(8, 4), **QUICK).dtype == "bfloat16"
    assert set(seen) == {((8, 4), torch.bfloat16, True)}


def test_compiled_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(model, backend="eager")
    before = state(model)
    assert len(measure(compiled, X, **QUICK).times) == 2
    assert state(model) == before
    assert compiled.training
    model.compile(backend="eager")
    assert len(measure(model, X, **QUICK).times) == 2


def test_measurement_says_on_what_and_prints():
    measurement = measure(nn.Linear(4, 2), X, **QUICK)
    assert measurement.versions["torch"] == torch.__version__
    assert set(measurement.versions) == {"python", "torch", "separable"}
    assert measurement.device
    figures = json.loads(measurement.to_string("json"))
    assert figures["peak_memory_bytes"] == 3 * 2 * 4
    assert figures["times"] == list(measurement.times)
    assert figures["median"] == measurement.median
    for format in ("table", "markdown", "html", "csv"):
        assert "24 B" in measurement.to_string(format)
    assert str(measurement) == measurement.to_string("table")
    with pytest.raises(ValueError, match=r"`format` \(='xml'\) must be one of"):
        measurement.to_string("xml")


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ("relu", {"inputs": X}, TypeError, r"`model` \(a str\) must be callable"),
        (nn.ReLU(), {}, TypeError, "`input_size` or `inputs` is missing"),
        (nn.ReLU(), {"inputs": X, "input_size": (3, 4)}, TypeError, "exclude each other"),
        (nn.ReLU(), {"inputs": X, "repeats": 0}, ValueError, r"`repeats` \(=0\) must be at least"),
        (nn.ReLU(), {"inputs": X, "warmup": 0}, ValueError, r"`warmup` \(=0\) must be at least 1"),
        (nn.ReLU(), {"inputs": X, "repeats": 1.5}, TypeError, r"`repeats` \(=1.5\) must be an int"),
        (nn.ReLU(), {"inputs": X, "repeats": "3"}, TypeError, r"`repeats` \(='3'\) must be an int"),
        (nn.ReLU(), {"inputs": X, "warmup": True}, TypeError, r"`warmup` \(=True\) must be an"),
        (nn.ReLU(), {"inputs": X, "threads": True}, TypeError, r"`threads` \(=True\) must be an"),
        (nn.ReLU(), {"inputs": X, "min_seconds": "a"}, TypeError, r"`min_seconds` \(='a'\) must"),
        (nn.ReLU(), {"inputs": X, "threads": 0}, ValueError, r"`threads` \(=0\) must be from 1"),
        (nn.ReLU(), {"inputs": X, "threads": 10**6}, ValueError, r"`threads` \(=1000000\) must"),
        (nn.ReLU(), {"inputs": X, "threads": 1.5}, TypeError, r"`threads` \(=1.5\) must"),
        (nn.ReLU(), {"inputs": X, "min_seconds": -1}, ValueError, r"`min_seconds` \(=-1\) must"),
        (nn.ReLU(), {"inputs": X, "min_seconds": math.nan}, ValueError, "`min_seconds` .=nan"),
        (nn.ReLU(), {"inputs": X.to("meta")}, ValueError, "meta device do not compute"),
        (
            torch.relu,
            {"inputs": X, "per_layer": True},
            ValueError,
            "got a builtin_function",
        ),
        (
            torch.compile(nn.ReLU(), backend="eager"),
            {"inputs": X, "per_layer": True},
            ValueError,
            "got a compiled OptimizedModule",
        ),
    ],
)
def test_errors(model, arguments, error, message):
    with pytest.raises(error, match=message):
        measure(model, **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    model = nn.Sequential(*[nn.Sigmoid() for _ in range(5)])
    x = torch.zeros(1 << 20, device="cuda")
    before = torch.cuda.get_rng_state()
    measurement = measure(model, x, **QUICK, per_layer=True)
    assert measurement.peak_memory_bytes == 2 * 4 * x.numel()
    assert measurement.device == torch.cuda.get_device_name()
    assert measurement.versions["cuda"] == torch.version.cuda
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert len(measurement.layers) == 6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
def test_freed_memory_is_kept():
    """In a process of its own: the page faults of a forward pass stop."""
    script = (
        "import resource, torch\n"
        "from separable.cost import keep_freed_memory\n"
        "if {keep}: assert keep_freed_memory()\n"
        "torch.set_num_threads(1)\n"
        "make = lambda: torch.ones(12_000_000).sum()\n"
        "make(), make()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): make()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = [
        int(subprocess.check_output([sys.executable, "-c", script.format(keep=keep)]))
        for keep in (False, True)
    ]
    # the heap may have to grow once more
    assert faults[1] <= 0.5 * faults[0]
