"""The public surface: what `separable` exports, and that importing it costs next to nothing."""

import json
import subprocess
import sys

import pytest

import separable


def in_a_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    assert set(separable.__all__) == {
        "Account",
        "Comparison",
        "Measurement",
        "Plan",
        "__version__",
        "apply",
        "compare",
        "compile",
        "conversion",
        "convert",
        "cost",
        "count",
        "crosscheck",
        "export",
        "exporting",
        "finetune",
        "load",
        "load_compiled",
        "measure",
        "merge",
        "models",
        "nn",
        "plan",
        "report",
        "reporting",
        "runtime",
        "save",
        "total_learnables",
        "train",
        "training",
    }
    assert set(separable.__all__) <= set(dir(separable))


@pytest.mark.parametrize("name", separable.__all__)
def test_every_public_name_loads_and_says_what_it_is(name):
    value = getattr(separable, name)
    assert name == "__version__" or value.__doc__
    assert getattr(separable, name) is value


@pytest.mark.parametrize(
    "room",
    ["nn", "cost", "models", "conversion", "runtime", "training", "exporting", "reporting"],
)
def test_every_name_of_a_room_loads(room):
    module = getattr(separable, room)
    assert module.__all__ == sorted(module.__all__)
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'separable' has no attribute 'squeeze'"):
        separable.squeeze  # noqa: B018


def test_import_loads_neither_torch_nor_anything_else_heavy():
    loaded = in_a_fresh_interpreter(
        "import sys, separable; dir(separable); separable.__version__; "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    assert not {"torch", "numpy", "torchvision", "timm", "matplotlib"} & set(loaded.split())


def test_no_room_starts_cuda():
    code = (
        "import separable, torch\n"
        "for name in separable.__all__:\n"
        "    getattr(separable, name)\n"
        "print(torch.cuda.is_initialized())"
    )
    assert in_a_fresh_interpreter(code) == "False"


def test_windows_has_every_room_but_the_runtime_and_what_needs_it():
    pytest.importorskip("lightning", reason="needs the extra `train`")
    code = (
        "import click, lightning.pytorch, prettytable, sys, torch\n"
        "sys.platform = 'win32'\n"
        "import separable\n"
        "for room in ('nn', 'cost', 'models', 'conversion', 'training'):\n"
        "    getattr(separable, room)\n"
        "for name in ('compile', 'export', 'report'):\n"
        "    try:\n"
        "        getattr(separable, name)\n"
        "    except ImportError as error:\n"
        "        print('needs Linux or macOS' in str(error))\n"
        "from separable.cli import main\n"
        "main(['doctor', '--json'])"
    )
    *errors, found = in_a_fresh_interpreter(code).split("\n", 3)
    assert errors == ["True"] * 3
    assert "needs Linux or macOS" in json.loads(found)["cpu"]["remedy"]
