"""The command line: what it prints, and errors of one line."""

import csv
import io
import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import separable
from separable.cli import main
from separable.cli.errors import describe

SMALL = "separable:mobilenet_v1,width=0.25,num_classes=10"
SIZE = "--input-size=1x3x32x32"
LAYER = ["--in-channels=3", "--out-channels=64", "--kernel-size=5", "--stride=2"]


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def prints(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments):
    """Check that the command fails as it should, and return its message."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, input):\n"
        "        print('a word from the network')\n"
        "        return super().forward(input)\n"
        "def chatty():\n"
        "    print('a word from the file')\n"
        "    return Net(4, 2)\n"
        "def broken():\n"
        "    raise RuntimeError('first line\\nsecond line')\n"
        "def cumsum():\n"
        "    return Cumsum()\n"
        "class Raises(torch.nn.Module):\n"
        "    def forward(self, input):\n"
        "        raise KeyError('no such thing')\n"
        "class Median(torch.nn.Module):\n"
        "    def forward(self, input):\n"
        "        return torch.linalg.det(input)\n"
        "def words():\n"
        "    return torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))\n"
        "def interrupted():\n"
        "    raise KeyboardInterrupt\n"
    )
    return path


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from separable.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("count", "compare", "measure", "crosscheck", "demo"):
        assert f"\n  {command} " in done.stdout
    assert done.stderr == ""


def test_no_command_shows_the_help():
    assert "Commands:" in prints()
    assert prints("--version") == f"separable, version {separable.__version__}\n"


@pytest.mark.parametrize("command", ["count", "compare", "measure", "crosscheck", "demo"])
def test_help_of_a_command(command):
    text = prints(command, "--help")
    assert "--json" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_count():
    text = prints("count", "separable:mobilenet_v1", "--depth=0")
    assert "568,740,352" in text
    assert "4,231,976" in text
    assert "classifier" not in text
    assert "classifier" in prints("count", "separable:mobilenet_v1", "--depth=1")


def test_count_json_is_the_account():
    model = separable.models.mobilenet_v1(width=0.25, num_classes=10).eval()
    expected = separable.count(model, (1, 3, 32, 32)).to_dict()
    for option in ("--json", "--format=json"):
        assert json.loads(prints("count", SMALL, SIZE, option)) == json.loads(json.dumps(expected))


def test_formats():
    rows = list(csv.reader(io.StringIO(prints("count", SMALL, SIZE, "--format=csv"))))
    assert rows[1][1] == "MobileNetV1"
    assert "<table>" in prints("count", SMALL, SIZE, "--format=html")
    assert "\n| :" in prints("count", SMALL, SIZE, "--format=markdown")


def test_stdout_holds_the_json_alone(file):
    result = run("count", f"{file}:chatty", "--input-size=3x4", "--json")
    assert json.loads(result.stdout)["macs"] == 3 * 4 * 2
    assert "a word from the file" in result.stderr
    assert "a word from the network" in result.stderr


@pytest.mark.parametrize("command", ["count", "measure", "crosscheck", "compare"])
def test_indices_as_input(command, file):
    models = [f"{file}:words"] * (1 + (command == "compare"))
    options = ["--no-latency"] if command == "compare" else []
    text = prints(command, *models, "--input-size=2x3", "--dtype=int64", "--json", *options)
    json.loads(text)


def test_strict_names_the_operator(file):
    arguments = ["count", f"{file}:Median", "--input-size=2x3x3"]
    assert "Lower bound" in prints(*arguments)
    assert "det" in fails(*arguments, "--strict")


def test_compare_a_layer():
    figures = json.loads(prints("compare", *LAYER, "--input-size=1x3x228x228", "--json"))
    metrics = figures["metrics"]
    assert (metrics["params"]["regular"], metrics["params"]["separable"]) == (4864, 334)
    assert (metrics["macs"]["regular"], metrics["macs"]["separable"]) == (60_211_200, 3_349_248)
    assert figures["promise_kept"] > 0
    table = prints("compare", *LAYER, "--input-size=1x3x228x228", "--no-latency")
    assert "-93.13%" in table
    assert "17.98x" in table


@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        (["--kernel-size=3", "--padding=same", "--input-size=2x4x9"], [2, 6, 9]),
        (["--kernel-size=3x1", "--padding=1x0", "--input-size=1x4x9x8"], [1, 6, 9, 8]),
        (["--kernel-size=2", "--dilation=2", "--input-size=1x4x5x6x7"], [1, 6, 3, 4, 5]),
    ],
)
def test_compare_layers_of_other_shapes(options, outputs):
    layer = ["--in-channels=4", "--out-channels=6", *options]
    figures = json.loads(prints("compare", *layer, "--no-latency", "--json"))
    assert figures["regular"]["output_shapes"] == [outputs]


def test_compare_two_networks():
    regular = f"{SMALL},conv=regular"
    text = prints("compare", regular, SMALL, SIZE, "--no-latency", "--json")
    metrics = json.loads(text)["metrics"]
    assert metrics["params"]["regular"] > 7 * metrics["params"]["separable"]


def test_measure():
    figures = json.loads(prints("measure", SMALL, SIZE, "--threads=1", "--per-layer", "--json"))
    assert figures["median"] > 0
    assert figures["threads"] == 1
    assert any(layer["name"] == "blocks.0.depthwise" for layer in figures["layers"])


def test_crosscheck():
    assert "FlopCounterMode" in prints("crosscheck", SMALL, SIZE)
    json.loads(prints("crosscheck", SMALL, SIZE, "--json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cuont"], "No such command 'cuont'"),
        (["--foo"], "No such option '--foo'"),
        (["count"], "Missing argument 'MODEL'"),
        (["count", "resnet18"], "must be SOURCE:NAME"),
        (["count", "separable:mobilenetv1"], "did you mean mobilenet_v1?"),
        (["count", "separable:mobilenet_v1,conv=dense"], "`conv` (='dense') must be one of"),
        (["count", "separable:mobilenet_v1,widht=1"], "unexpected keyword argument 'widht'"),
        (["count", "no/such/file.py:build"], "there is no file 'no/such/file.py'"),
        (["count", SMALL, "--input-size=1x3xx32"], "'1x3xx32' must be whole numbers"),
        (["count", SMALL, "--input-size=1x0x32x32"], "of at least 1"),
        (["count", SMALL, "--input-size=3x32x32"], "must include the batch"),
        (["count", SMALL, "--input-size=1x4x32x32"], "to have 3 channels, but got 4 channels"),
        (["count", SMALL, "--format=xml"], "'xml' is not one of"),
        (["count", SMALL, "--depth=-1"], "--depth"),
        (["compare"], "--in-channels is missing"),
        (["compare", SMALL], "compare needs two networks, got 1"),
        (["compare", SMALL, SMALL, *LAYER], "--in-channels describes a layer"),
        (["compare", *LAYER, "--input-size=1x3"], "must have 3 to 5 numbers"),
        (["compare", *LAYER, "--padding=-1"], "of at least 0"),
        (["compare", *LAYER, "--padding=same"], "--padding (='same') needs --stride 1"),
        (["compare", *LAYER, "--dilation=1x2x3"], "--dilation (=(1, 2, 3)) must have 2 entries"),
        (["compare", SMALL, "separable:mobilenet_v1", SIZE], "same output shapes"),
        (["measure", SMALL, "--device=cadu"], "'cadu' must be a device such as cpu or cuda:0"),
        (
            ["compare", *LAYER, "--input-size=1x4x8x8"],
            "--in-channels (3) must be the channels of --input-size (1x4x8x8), 4",
        ),
        (["demo", "--epochs=0"], "--epochs"),
        (["demo", "--out=pyproject.toml"], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, words, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert words in fails(*arguments)


def test_errors_in_the_users_code_say_where(file):
    assert fails("count", f"{file}:broken") == f"Error: RuntimeError: first line ({file}:10)"
    line = fails("count", f"{file}:Raises")
    assert "no such thing" in line
    assert f"{file}:15" in line


@pytest.mark.parametrize("text", ["import nothing_of_this_name", "def broken(:"])
def test_a_file_that_cannot_be_imported(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert str(path.name) in fails("count", f"{path}:build")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    line = fails("count", "timm:resnet18")
    assert line == "Error: timm is not installed: pip install 'separable[zoo]'"


def test_an_error_without_a_message_is_named():
    assert describe(ValueError()) == "ValueError"


def test_ctrl_c_exits_with_130(file):
    assert run("count", f"{file}:interrupted").exit_code == 130


def test_ctrl_c_during_the_demo(tmp_path):
    """A real signal in the middle of the training: no traceback, nothing half-written."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    # a shell that starts the tests in the background has them ignore the signal
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from separable.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "demo", "--out", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        # the folder is made when the training begins
        while not (tmp_path / "out").exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert stdout == b""
    assert list((tmp_path / "out").iterdir()) == []
