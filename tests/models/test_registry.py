"""Networks by name."""

import sys

import pytest
import torch
from torch import nn

from separable.models import MobileNetV1, create_model


@pytest.fixture
def file(tmp_path):
    (tmp_path / "parts.py").write_text("WIDTH = 5\n")
    path = tmp_path / "nets.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Config:\n"
        "    outputs: int = 2\n"
        "def build(outputs=Config().outputs):\n"
        "    from parts import WIDTH\n"
        "    return nn.Linear(WIDTH, outputs)\n"
        "ready = nn.Linear(1, 1)\n"
        "number = 3\n"
        "def text():\n"
        "    return 'no network'\n"
        "def broken():\n"
        "    raise KeyError('oops')\n"
    )
    return path


def test_own_network_with_options():
    model = create_model("separable:mobilenet_v1,conv=regular,width=0.25,num_classes=7")
    assert isinstance(model, MobileNetV1)
    assert isinstance(model.blocks[0].conv, nn.Conv2d)
    assert (model.classifier.in_features, model.classifier.out_features) == (256, 7)


def test_torchvision():
    torchvision = pytest.importorskip("torchvision")
    model = create_model("torchvision:shufflenet_v2_x0_5,num_classes=3")
    assert isinstance(model, torchvision.models.ShuffleNetV2)
    assert model.fc.out_features == 3


def test_torchvision_never_downloads_a_backbone(monkeypatch):
    pytest.importorskip("torchvision")

    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with torch.device("meta"):
        create_model("torchvision:lraspp_mobilenet_v3_large")


def test_timm():
    pytest.importorskip("timm")
    assert create_model("timm:mobilenetv1_100,in_chans=1").conv_stem.in_channels == 1


def test_file(file):
    path_before = list(sys.path)
    assert create_model(f"{file}:build").out_features == 2
    assert create_model(f"{file}:build,outputs=9").out_features == 9
    assert create_model(f"{file}:ready").in_features == 1
    assert sys.path == path_before


def test_files_of_the_same_name_have_modules_of_their_own(tmp_path):
    for folder, width in (("a", 4), ("b", 6)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text(f"WIDTH = {width}\n")
        source = "from torch import nn\nfrom beside import WIDTH\nnet = nn.Linear(1, WIDTH)\n"
        (tmp_path / folder / "nets.py").write_text(source)
    widths = [create_model(f"{tmp_path / name}/nets.py:net").out_features for name in "aba"]
    assert widths == [4, 6, 4]


def test_what_a_file_raises_passes_through(file):
    with pytest.raises(KeyError, match="oops"):
        create_model(f"{file}:broken")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet18", ValueError, "`name` (='resnet18') must be SOURCE:NAME, with a source of "),
        ("timm:", ValueError, "`name` (='timm:') must be SOURCE:NAME"),
        ("timn:resnet18", ValueError, "the source 'timn' in `name`"),
        ("timn:resnet18", ValueError, "or path/to/file.py; did you mean timm?"),
        ("torchvision:resnet81", ValueError, "torchvision has no network 'resnet81'; did you mean"),
        ("torchvision:resnet81", ValueError, "resnet18"),
        ("timm:mobilenetv1_10", ValueError, "did you mean mobilenetv1_100"),
        ("separable:mobilenetv1", ValueError, "only mobilenet_v1; did you mean mobilenet_v1?"),
        ("separable:mobilenet_v1,width", ValueError, "the option 'width' must be KEY=VALUE"),
        ("separable:mobilenet_v1,conv=dense", ValueError, "`conv` (='dense') must be one of"),
        ("separable:mobilenet_v1,widht=1", TypeError, "widht"),
        ("torchvision:resnet18,weights=DEFAULT", ValueError, "weights='DEFAULT' loads weights"),
        ("timm:resnet18,pretrained=True", ValueError, "pretrained=True loads weights"),
        ("timm:resnet18,checkpoint_path=x.pt", ValueError, "may be a pickle"),
        ("no/such.py:build", FileNotFoundError, "there is no file 'no/such.py'"),
    ],
)
def test_bad_names(name, error, message):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    if name.startswith("torchvision:"):
        pytest.importorskip("torchvision")
    with pytest.raises(error) as raised:
        create_model(name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("rest", "error", "message"),
    [
        (":biuld", ValueError, "nets.py defines no 'biuld'; did you mean build?"),
        (":number", TypeError, "must be a torch.nn.Module or a function that returns one, not int"),
        (":text", TypeError, "not str"),
        (":ready,width=3", ValueError, "'ready' in "),
    ],
)
def test_bad_attributes(file, rest, error, message):
    with pytest.raises(error) as raised:
        create_model(f"{file}{rest}")
    assert message in str(raised.value)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_a_missing_package_names_the_extra(monkeypatch, source):
    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(ImportError) as raised:
        create_model(f"{source}:resnet18")
    assert str(raised.value) == f"{source} is not installed: pip install 'separable[zoo]'"
