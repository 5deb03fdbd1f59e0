"""Exported files: loaded again, run, and what is in them."""

import copy
import math
import os
import signal
import sys

import pytest
import torch
from torch import nn

import separable
from separable import exporting
from separable.nn import SeparableConv2d
from separable.runtime.checking import outputs_deviation

onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
ort = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
pytest.importorskip("onnxscript", reason="needs the extra `onnx`")

FILES = {"onnx": "net.onnx", "torch-export": "net.pt2", "safetensors": "net.safetensors"}
EXAMPLE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        SeparableConv2d(3, 8, 3, padding=1, depth_multiplier=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).eval()


@pytest.fixture(scope="module")
def converted(hasty):
    inputs = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return separable.convert(network(), inputs, "macs=0.5", progress=False)


@pytest.fixture(params=["plain", "converted"])
def model(request, converted):
    return converted if request.param == "converted" else network()


def run(path, batch):
    """What a file computes, by its ending."""
    if path.suffix == ".onnx":
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])
    return torch.export.load(path).module()(batch)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_the_file_computes_the_same_at_any_batch_size(model, tmp_path, format):
    path = tmp_path / FILES[format]
    done = separable.export(model, path, example=EXAMPLE[:1], progress=False)
    assert (done.format, done.batch_sizes, done.checks) == (format, (1, 2), 3)
    assert 0 <= done.deviation < 1e-4
    assert done.size == path.stat().st_size
    assert os.listdir(tmp_path) == [path.name]
    for number in (1, 2, 5):
        batch = torch.randn(number, 3, 12, 12)
        torch.testing.assert_close(run(path, batch), model(batch).detach(), rtol=1e-3, atol=1e-5)


def test_weights_of_a_converted_network_load_into_the_regular_one(converted, tmp_path):
    path = tmp_path / "net.safetensors"
    done = separable.export(converted, path, example=EXAMPLE, progress=False)
    assert done.deviation < 1e-6
    again = separable.load(path, model=network())
    assert torch.equal(again(EXAMPLE), converted(EXAMPLE))
    assert again.report.plan == converted.report.plan


def test_weights_of_a_network_load_by_name(tmp_path):
    from safetensors.torch import load_file

    model = network()
    model[7].extra = model[8]  # tied, under two names
    done = separable.export(model, tmp_path / "net.safetensors", example=EXAMPLE, progress=False)
    assert done.deviation == 0
    read = load_file(tmp_path / "net.safetensors")
    assert set(read) == set(model.state_dict())
    assert torch.equal(read["8.weight"], model[8].weight)


def convolutions(path):
    """Groups, kernel and output channels of each Conv node, in order, and the other nodes."""
    graph = onnx.load(path).graph
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    convs = []
    for node in graph.node:
        if node.op_type == "Conv":
            given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            outputs, _, *kernel = weights[node.input[1]]
            convs.append((given.get("group", 1), tuple(kernel), outputs))
    return convs, {node.op_type for node in graph.node} - {"Conv"}


def test_outputs_are_compared_one_by_one_and_by_their_number():
    one, two = torch.ones(2), torch.arange(2)
    assert outputs_deviation([one, {"at": two}], (one, two)) == 0
    assert outputs_deviation((one, two + 1), (one, two)) == math.inf
    assert outputs_deviation((one,), (one, two)) == math.inf
    assert outputs_deviation((one, one * 1.5), (one, one)) == 0.5
    assert outputs_deviation((), ()) == 0


def expected_convolutions(model):
    return [
        (module.groups, module.kernel_size, module.out_channels)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]


@pytest.mark.parametrize("order", ["depthwise-pointwise", "pointwise-depthwise"])
def test_a_separable_layer_is_two_convolutions(tmp_path, order):
    pair = SeparableConv2d(6, 8, 3, padding=1, order=order).eval()
    path = tmp_path / "pair.onnx"
    separable.export(pair, path, example=torch.randn(1, 6, 9, 9), progress=False)
    depthwise, pointwise = (6, (3, 3), 6), (1, (1, 1), 8)
    if order == "pointwise-depthwise":
        depthwise = (8, (3, 3), 8)
        assert convolutions(path) == ([pointwise, depthwise], set())
    else:
        assert convolutions(path) == ([depthwise, pointwise], set())


def test_a_converted_network_is_plain_convolutions(converted, tmp_path):
    path = tmp_path / "net.onnx"
    separable.export(converted, path, example=EXAMPLE, progress=False)
    found, others = convolutions(path)
    assert found == expected_convolutions(converted)
    assert len(found) > len(expected_convolutions(network()))
    # the batch norm went into the weights, reflection padding has a node of its own
    assert not others & {"BatchNormalization", "Einsum", "MatMul"}


@pytest.mark.parametrize("opset", [18, 20])
def test_opset(tmp_path, opset):
    path = tmp_path / "net.onnx"
    done = separable.export(network(), path, example=EXAMPLE, opset=opset, progress=False)
    versions = {each.domain: each.version for each in onnx.load(path).opset_import}
    assert versions[""] == done.opset == opset
    assert f"opset {opset}" in str(done)


class Fixed(nn.Module):
    """A network with its batch size written into it."""

    def forward(self, x):
        return x.reshape(2, 432).sum(1)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_fixed_batch_size_needs_to_be_asked_for(tmp_path, format):
    path = tmp_path / FILES[format]
    with pytest.raises(ValueError, match=r"fixed.*: `dynamic_batch=False`"):
        separable.export(Fixed(), path, example=EXAMPLE, progress=False)
    assert not os.listdir(tmp_path)
    done = separable.export(Fixed(), path, example=EXAMPLE, dynamic_batch=False, progress=False)
    assert done.batch_sizes == (2,)
    torch.testing.assert_close(run(path, EXAMPLE), Fixed()(EXAMPLE))


def test_real_inputs_are_compared_too(tmp_path):
    done = separable.export(
        network(),
        tmp_path / "net.onnx",
        example=EXAMPLE,
        inputs=torch.randn(10, 3, 12, 12).split(4),
        progress=False,
    )
    assert done.checks == 6
    assert done.batch_sizes == (2, 3, 4)
    fixed = separable.export(
        network(),
        tmp_path / "net.onnx",
        example=EXAMPLE,
        inputs=torch.randn(5, 3, 12, 12).split(5),
        dynamic_batch=False,
        progress=False,
    )
    assert (fixed.checks, fixed.batch_sizes) == (5, (2,))  # 2, 2, and the fifth twice


class Pair(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, scale):
        y = self.conv(x)
        return {"scaled": y * scale[:, :, None, None], "mean": y.mean((1, 2, 3))}


@pytest.mark.parametrize("format", FILES)
def test_several_inputs_and_outputs(tmp_path, format):
    example = (EXAMPLE, torch.randn(2, 4))
    path = tmp_path / FILES[format]
    done = separable.export(Pair().eval(), path, example=example, progress=False)
    assert done.deviation < 1e-5


def test_the_model_is_as_before(tmp_path):
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    separable.export(model, tmp_path / "net.onnx", example=EXAMPLE, progress=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("format", FILES)
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, format):
    path = tmp_path / FILES[format]
    path.write_text("old")
    write, run_again = exporting._WAYS[format]

    def spoilt(model, path, *rest):
        with torch.no_grad():
            other = network()
            other[8].bias += 0.1
        return write(other, path, *rest)

    monkeypatch.setitem(exporting._WAYS, format, (spoilt, run_again))
    with pytest.raises(RuntimeError, match=r"computes something else.*nothing was kept"):
        separable.export(network(), path, example=EXAMPLE, progress=False)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_ctrl_c_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_text("old")

    def interrupted(model, path, *rest):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(exporting._WAYS, "onnx", (interrupted, None))
    with pytest.raises(KeyboardInterrupt):
        separable.export(network(), path, example=EXAMPLE, progress=False)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"path": "net.tflite"}, ValueError, r"`format` \(=None\) must be one of onnx, torch"),
        ({"format": "tflite"}, ValueError, r"`format` \(='tflite'\) must be one of"),
        ({"path": "net.pt2", "opset": 18}, ValueError, r"`opset` \(=18\) is for onnx"),
        ({"opset": 99}, ValueError, "99"),
        ({"format": "safetensors"}, ValueError, "contradicts the ending of `path`.*that of onnx"),
        ({"path": "none/net.onnx"}, FileNotFoundError, "there is no folder"),
        ({"example": [1, 2]}, TypeError, "`example` must be a tensor"),
        ({"example": torch.zeros(2, 5, 12, 12)}, ValueError, "does not take `example`"),
    ],
)
def test_errors_leave_nothing(tmp_path, options, error, words):
    path = tmp_path / options.pop("path", "net.onnx")
    with pytest.raises(error, match=words):
        separable.export(network(), path, **{"example": EXAMPLE, "progress": False, **options})
    assert not os.listdir(tmp_path)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError) as raised:
        separable.export(network(), tmp_path / "net.onnx", example=EXAMPLE, progress=False)
    assert str(raised.value) == "onnxruntime is not installed: pip install 'separable[onnx]'"


class Preparing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, input):
        return self.conv(input.sub_(1.0)).mean((2, 3))


def test_networks_that_write_into_their_input(tmp_path):
    model, example = Preparing().eval(), torch.randn(2, 3, 8, 8)
    before = example.clone()
    separable.export(model, tmp_path / "a.safetensors", example=example)
    assert torch.equal(example, before)


class Masked(nn.Module):
    def forward(self, input):
        return input.masked_fill(input < 0, -math.inf)


def test_infinities_that_the_model_returns_are_no_difference(tmp_path):
    separable.export(Masked(), tmp_path / "a.onnx", example=torch.randn(2, 3, 8, 8))


def test_half_precision_is_compared_as_coarsely_as_it_rounds(converted, tmp_path):
    model = copy.deepcopy(converted).half()
    separable.export(model, tmp_path / "a.onnx", example=torch.randn(2, 3, 12, 12).half())


class Deciding(nn.Module):
    def forward(self, input):
        return input if input.sum() > 0 else -input


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_why_a_network_can_not_be_exported(tmp_path, capfd, format, dynamic):
    with pytest.raises(ValueError, match="data-dependent") as raised:
        separable.export(
            Deciding(), tmp_path / FILES[format], example=EXAMPLE, dynamic_batch=dynamic
        )
    assert "dynamic_batch" not in str(raised.value)
    assert "def forward" not in "".join(capfd.readouterr())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_that_onnxruntime_does_not_run(tmp_path, dtype):
    model, example = nn.Conv2d(3, 4, 3).to(dtype), EXAMPLE.to(dtype)
    with pytest.raises(
        ValueError, match=r"onnxruntime, which checks the file, can't run it.*float"
    ):
        separable.export(model, tmp_path / "a.onnx", example=example, progress=False)
    assert not os.listdir(tmp_path)


def test_real_inputs_come_in_batches(tmp_path):
    with pytest.raises(TypeError, match=r"`inputs` \(a Tensor\) must be batches of inputs"):
        separable.export(
            Masked(), tmp_path / "a.onnx", example=torch.randn(2, 3), inputs=torch.randn(4, 3)
        )


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, first, *rest):
        return self.conv(first) + rest[0]


class Lengths(nn.Module):
    """An image, and a matrix that belongs to no sample."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x, matrix):
        return self.conv(x).mean((2, 3)) @ matrix


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.conv(x.reshape(2, 1, 8, 8))


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
@pytest.mark.parametrize(
    ("make", "example", "dynamic"),
    [
        (lambda: nn.DataParallel(nn.Conv2d(1, 2, 3)), X, True),
        (lambda: torch.compile(nn.Conv2d(1, 2, 3)), X, True),
        (Several, (X, torch.ones(2, 1, 1, 1)), True),
        (Lengths, (X, torch.ones(4, 5)), False),
        (OfTwo, X, False),
    ],
)
def test_however_a_network_takes_its_inputs(make, example, dynamic, ending, tmp_path):
    found = separable.export(
        make(), tmp_path / f"a.{ending}", example=example, dynamic_batch=dynamic, progress=False
    )
    assert found.batch_sizes == ((2, 3) if dynamic else (2,))


def test_onnx_files_are_whole_in_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("separable.exporting._MOST_BYTES", 10)
    with pytest.raises(ValueError, match="one ONNX file holds at most"):
        separable.export(nn.Conv2d(1, 2, 3), tmp_path / "a.onnx", example=X, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes on this system")
def test_a_full_disk_is_an_error(tmp_path):
    import resource

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 600))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            separable.export(model, tmp_path / "a.pt2", example=X, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
