"""What every command keeps to: JSON alone on stdout, no colours, examples and completion."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest
import torch
from click.shell_completion import get_completion_class
from click.testing import CliRunner
from PIL import Image

import separable
from separable.cli import main
from separable.cli.completion import SHELLS
from separable.cli.options import torch_threads

SOURCE = """
from torch import nn

class Chatty(nn.Sequential):
    def forward(self, input):
        print('a word from the network')
        return super().forward(input)

def net(num_classes=2, channels=3):
    print('a word from the file')
    return Chatty(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
SIZE = "--input-size=1x3x16x16"
WITH_JSON = {
    "count": f"nets.py:net {SIZE}",
    "compare": f"nets.py:net nets.py:net {SIZE}",
    "measure": f"nets.py:net {SIZE} --threads=1",
    "crosscheck": f"nets.py:net {SIZE}",
    "convert": f"nets.py:net {SIZE} --budget=macs=0.5 --out=new.safetensors",
    "explain": f"nets.py:net {SIZE} --threads=1",
    "bench": f"nets.py:net {SIZE} --turns=2 --against=eager",
    "train": "--model=nets.py:net --data=photos --image-size=16 --epochs=1 "
    "--batch-size=4 --workers=0",
    "finetune": "--student=slim.safetensors --teacher=nets.py:net --weights=net.safetensors "
    "--data=photos --image-size=16 --epochs=1 --batch-size=4 --workers=0",
    "report": f"nets.py:net {SIZE} --repeats=2 --threads=1",
    "export": f"nets.py:net {SIZE} --out=new.onnx",
    "demo": "--epochs=1",
    "doctor": "",
}
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:[349]|10)\d[\d;]*m")  # NO_COLOR leaves bold and dim alone


@pytest.fixture(scope="module")
def place(tmp_path_factory, hasty):
    """A folder with a network that prints, its weights and conversion, and images."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("place")
    (folder / "nets.py").write_text(SOURCE)
    space = {}
    exec(SOURCE, space)
    torch.manual_seed(0)
    network = space["net"]().eval()
    save_file(network.state_dict(), folder / "net.safetensors")
    slim = separable.convert(network, torch.randn(64, 3, 16, 16), "macs=0.5", progress=False)
    separable.save(slim, folder / "slim.safetensors")
    for i in range(16):
        name = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (18, 18), (15 * i, 10, 200)).save(name)
    return folder


@pytest.fixture
def small_demo(monkeypatch):
    """A demo of few images and one conversion."""
    pytest.importorskip("sklearn")
    from separable.demo import story
    from separable.training.digits import load_digits

    digits = load_digits()
    few = type(digits)(*(getattr(digits, name)[:32] for name in vars(digits)))
    monkeypatch.setattr(story, "load_digits", lambda: few)
    monkeypatch.setattr(story, "FURTHER", ())


def has_json(command):
    return any("--json" in option.opts for option in command.params)


def test_every_command_with_json_is_tried():
    assert set(WITH_JSON) == {name for name, each in main.commands.items() if has_json(each)}


@pytest.mark.parametrize("name", WITH_JSON)
@pytest.mark.filterwarnings("ignore:conversion without calibration", "ignore:layer .* more calib")
def test_stdout_holds_one_json_document(name, place, monkeypatch, small_demo, capfd):
    monkeypatch.chdir(place)
    result = CliRunner().invoke(main, [name, *shlex.split(WITH_JSON[name]), "--json"])
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)  # refuses whatever else there is
    assert capfd.readouterr().out == ""  # nor does anything write around sys.stdout


def on_a_terminal(arguments, folder, **environment):
    """Run a command on a terminal of its own and return all that it shows."""
    ours, theirs = pty.openpty()
    code = "from separable.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    shown = b""
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
        env=os.environ | {"TERM": "xterm-256color"} | environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


@pytest.mark.parametrize("name", ["count", "train", "report"])
def test_no_color_is_respected_on_a_terminal(name, place):
    out = ["--out=plain"] if name == "train" else []  # a run has a folder of its own
    shown = on_a_terminal([name, *shlex.split(WITH_JSON[name]), *out], place, NO_COLOR="1")
    assert shown
    assert not COLOUR.search(shown)


def test_a_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    code = "from separable.cli import main; main()"
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1  # as click has it, for `separable --help | head -1`
    assert "Error" not in done.stderr


def examples(command):
    """The examples that a help ends with."""
    last = command.help.strip().split("\n\n")[-1].removeprefix("\b\n").replace("\\\n", " ")
    return re.findall(r"separable ([^|)\n]*[^|)\s\n])", last)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_help_ends_with_examples_that_parse(name):
    command = main.commands[name]
    found = examples(command)
    assert found
    for example in found:
        called, *arguments = shlex.split(re.split(r"\s{3,}in ", example)[0])
        assert called == name
        with click.Context(main, info_name="separable") as parent:
            command.make_context(name, arguments, parent=parent)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell):
    words = {"COMP_WORDS": "separable ", "COMP_CWORD": "" if shell == "fish" else "1"}
    assert set(main.commands) <= completed(shell, words)
    line = "separable count --in"
    words = {"COMP_WORDS": line, "COMP_CWORD": "--in" if shell == "fish" else "2"}
    assert "--input-size" in completed(shell, words)


def completed(shell, words):
    """What a shell is told, in its own words."""
    code = "import sys; from separable.cli import main; sys.argv = ['separable']; main()"
    environment = os.environ | words | {"_SEPARABLE_COMPLETE": f"{shell}_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return set(re.split(r"[\s,]", done.stdout))


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_accepted_by_it(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = CliRunner().invoke(main, ["completion", shell]).stdout
    kind = get_completion_class(shell)
    assert kind(main, {}, "separable", "_SEPARABLE_COMPLETE").source() in script
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_with_the_script(tmp_path):
    program = tmp_path / "separable"
    program.write_text(f"#!{sys.executable}\nfrom separable.cli import main\nmain()\n")
    program.chmod(0o755)
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    typed = "COMP_WORDS=(separable ex); COMP_CWORD=1; _separable_completion separable"
    done = subprocess.run(
        ["bash", "-c", f'{script}\n{typed}\necho "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout.split() == ["explain", "export"], done.stderr


@pytest.mark.parametrize("name", ["convert", "train", "finetune", "demo", "report"])
def test_torch_computes_with_threads(name, monkeypatch):
    seen = []
    command = main.commands[name]
    assert "threads" in {parameter.name for parameter in command.params}

    @click.command()
    @torch_threads
    def computes():
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    assert CliRunner().invoke(computes, ["--threads", str(before + 1)]).exit_code == 0
    assert CliRunner().invoke(computes, []).exit_code == 0
    assert (seen, torch.get_num_threads()) == ([before + 1, before], before)


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_metavars_are_no_names_of_functions(command):
    context = click.Context(command)
    for option in command.params:
        shown = option.make_metavar(context)
        assert not shown.startswith("_"), option.name
        assert shown != "POSITIVE", option.name
