"""Every way a command can be called wrongly: one line, exit code 2, and nothing written."""

import shlex
import warnings

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import separable
from separable.cli import main
from separable.cli.errors import Group

for package in (
    "torchvision",
    "timm",
    "plotly",
    "onnxruntime",
    "lightning",
    "sklearn",
    "matplotlib",
):
    pytest.importorskip(package, reason="needs the extra `all`")

SOURCE = """
import torch
from torch import nn

number = 3

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )

def other():
    network = net()
    network[7] = nn.Linear(16, 3)
    return network

def nan():
    network = net()
    network[0].weight.data.fill_(float("nan"))
    return network

def wants(argument):
    return net()

def raises():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    raise SystemExit("no GPU, no network")

class Failing(nn.Module):
    def forward(self, input):
        raise KeyError("no such thing")

class Shape(nn.Module):
    def forward(self, input):
        return torch.zeros(3)
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory, hasty):
    """A folder with good and bad files of every kind."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "nets.py").write_text(SOURCE)
    (folder / "syntax.py").write_text("def net(:\n")
    (folder / "imports.py").write_text("import nothing_of_this_name\n")
    (folder / "leaves.py").write_text("raise SystemExit(1)\n")
    (folder / "text.safetensors").write_text("nonsense")
    (folder / "nothing.safetensors").touch()
    save_file({"other": torch.zeros(1)}, folder / "other.safetensors")
    space = {}
    exec(SOURCE, space)
    torch.manual_seed(0)
    network = space["net"]().eval()
    save_file(network.state_dict(), folder / "good.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    slim = separable.convert(
        network, torch.randn(64, 3, 16, 16), "macs=0.5", progress=False, seed=0
    )
    separable.save(slim, folder / "slim.safetensors")
    for i in range(8):
        name = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (18, 18), (30 * i, 10, 200)).save(name)
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"no image")
    (folder / "nobody").mkdir()
    (folder / "run").mkdir()
    for name, text in {
        "list": "- 1\n", "yaml": "a: [\n", "key": "epoch: 3\n", "value": "epochs: many\n",
    }.items():  # fmt: skip
        (folder / f"{name}.yaml").write_text(text)
    return folder


SIZE = "--input-size=1x3x16x16"
MODELS = {  # for MODEL of every command
    "''": "must be SOURCE:NAME",
    "resnet18": "must be SOURCE:NAME",
    "nets.py": "must be SOURCE:NAME",
    "tensorflow:resnet18": "must be",
    "separable:mobilenet_v9": "mobilenet_v1",
    "separable:mobilenet_v1,width=wide": "width",
    "separable:mobilenet_v1,width": "width",
    "torchvision:resnet1": "resnet1",
    "timm:resnet1": "resnet1",
    "missing.py:net": "there is no file 'missing.py'",
    "photos:net": "photos",
    "good.safetensors:net": "good.safetensors",
    "syntax.py:net": "syntax.py",
    "imports.py:net": "nothing_of_this_name",
    "leaves.py:net": "SystemExit: 1",
    "nets.py:nobody": "nobody",
    "nets.py:number": "number",
    "nets.py:wants": "argument",
    "nets.py:raises": "RuntimeError: first line",
    "nets.py:leaves": "SystemExit: no GPU, no network",
}
NETWORK_COMMANDS = {
    "count": "count {} " + SIZE,
    "compare": "compare {} nets.py:net " + SIZE,
    "measure": "measure {} " + SIZE,
    "crosscheck": "crosscheck {} " + SIZE,
    "convert": "convert {} --budget=macs=0.5 --out=new.safetensors " + SIZE,
    "explain": "explain {} " + SIZE,
    "bench": "bench {} " + SIZE,
    "report": "report {} --repeats=1 " + SIZE,
    "export": "export {} --out=new.onnx " + SIZE,
    "train": "train --model={} --data=digits --epochs=1",
    "finetune": "finetune --teacher={} --student=slim.safetensors --data=photos",
}
SIZES = {
    "1x3xx16": "'1x3xx16' must be whole numbers of at least 1",
    "1x0x16x16": "of at least 1",
    "-1x3x16x16": "of at least 1",
    "big": "'big' must be whole numbers",
    "3x16x16": "",
    "1x5x16x16": "",
    "1x3": "",
}
FORWARDS = {"nets.py:Failing": "no such thing"}
FILES = {  # for --weights
    "missing.safetensors": "there is no file 'missing.safetensors'",
    "photos": "is a directory",
    "text.safetensors": "is no safetensors file",
    "nothing.safetensors": "is no safetensors file",
    "cut.safetensors": "is no safetensors file",
    "other.safetensors": "is of another network",
}
CONVERTED = {  # for --converted and --student
    "missing.safetensors": "is no file",
    "photos": "",
    "text.safetensors": "text.safetensors",
    "nothing.safetensors": "nothing.safetensors",
    "cut.safetensors": "cut.safetensors",
    "good.safetensors": "good.safetensors",
}
FOLDERS = {  # for folders of images
    "missing": "there is no folder 'missing'",
    "nets.py": "is a file",
    "nobody": "no image in 'nobody'",
    "broken": "no image in 'broken'",
}
OUTS = {
    "missing/new{}": "--out: there is no folder",
    "photos": "is a directory",
    "/proc/new{}": "--out: no file can be written in '/proc'",
}


def _cases():
    for name, command in NETWORK_COMMANDS.items():
        for model, words in MODELS.items():
            yield command.format(model), words
        if name in ("train", "finetune"):
            continue
        for size, words in SIZES.items():
            yield f"{command.format('nets.py:net')} --input-size={size}", words
        for model, words in FORWARDS.items():
            yield command.format(model), words
        yield f"{command.format('nets.py:net')} --nonsense", "No such option '--nonsense'"
        yield command.format("nets.py:net").replace("nets.py:net", ""), ""
        if name not in ("report", "export", "explain"):
            yield f"{command.format('nets.py:net')} --format=xml", "'xml' is not one of"
    convert = "convert nets.py:net --budget=macs=0.5 --out=new.safetensors " + SIZE
    report = "report nets.py:net --repeats=1 --threads=1 " + SIZE
    export = "export nets.py:net --out=new.onnx " + SIZE
    finetune = "finetune --teacher=nets.py:net --student=slim.safetensors --data=photos"
    train = "train --model=separable:mobilenet_v1,width=0.25,stem_stride=1 --data=digits --epochs=1"
    for file, words in FILES.items():
        for command in (convert, report, export):
            yield f"{command} --weights={file}", words
        # finetune's may come from a YAML file, so that click does not look at it
        is_folder = words == "is a directory"
        yield f"{finetune} --weights={file}", "there is no file" if is_folder else words
    for file, words in CONVERTED.items():
        yield f"{report} --converted={file}", words
        yield f"{export} --converted={file}", words
        yield f"{finetune} --student={file}", words
    for folder, words in FOLDERS.items():
        yield f"{convert} --calibration={folder}", words
        yield f"{report} --convert=macs=0.5 --calibration={folder}", words
        is_flat = words.startswith("no image")
        yield f"{report} --labelled={folder}", "folder of images for each" if is_flat else words
        yield f"{export} --check={folder}", words
    for command, flag in (
        (convert, "--calibration"), (report + " --convert=macs=0.5", "--calibration"),
        (export, "--check"),
    ):  # fmt: skip
        for option, words in {
            "--mean=0.5,0.5": "--mean (=0.5,0.5) must be one number, or 3",
            "--mean=grey": "must be numbers with commas between them",
            "--mean=nan": "finite",
            "--std=0": "--std",
            "--std=-1": "--std",
            "--std=inf": "finite",
            "--images=0": "'--images'",
            "--images=many": "'--images'",
            "--input-size=1x5x16x16": "must be Nx1xHxW or Nx3xHxW for images",
            "--input-size=1x3x16": "must be Nx1xHxW or Nx3xHxW for images",
        }.items():
            yield f"{command} {flag}=photos {option}", words
    for command, ending in ((convert, ".safetensors"), (report, ".html"), (export, ".onnx")):
        for out, words in OUTS.items():
            yield f"{command} --out={out.format(ending)}", words
    for command in (convert, report + " --calibration=photos"):
        flag = "--budget" if command is convert else "--convert"
        for budget, words in {
            "speed=2": f"{flag} (='speed=2')",
            "macs": f"{flag} (='macs')",
            "macs=": f"{flag} (='macs=')",
            "macs=half": f"{flag} (='macs=half')",
            "macs=0": f"{flag} (='macs=0')",
            "macs=-1": f"{flag} (='macs=-1')",
            "macs=2": f"{flag} (='macs=2')",
            "macs=nan": f"{flag} (='macs=nan')",
            "params=0.0001": "cannot be met; the nearest one that can be is 'params=",
            "latency=0": f"{flag} (='latency=0')",
            "error=-1": f"{flag} (='error=-1')",
            "''": f"{flag} (='')",
        }.items():
            yield f"{command} {flag}={budget}", words
    for command in (
        "measure nets.py:net " + SIZE, "compare nets.py:net nets.py:net " + SIZE,
        "explain nets.py:net " + SIZE, "bench nets.py:net " + SIZE, report,
    ):  # fmt: skip
        for threads in ("0", "-1", "many", "1.5", "''", "1000000"):
            yield f"{command} --threads={threads}", "--threads"
    for rest, words in {
        "--seed=x": "'--seed'",
        f"--seed={10**30}": "'--seed'",
        "--form=dense": "'dense' is not one of",
        "--skip=nowhere": "--skip (='nowhere') must name a layer",
        "--format=csv": "'csv' is not one of 'table', 'json'",
    }.items():
        yield f"{convert} {rest}", words
    yield convert.replace("--budget=macs=0.5", ""), "Missing option '--budget'"
    yield convert.replace("--out=new.safetensors", ""), "Missing option '--out'"
    yield convert.replace("nets.py:net", "nets.py:nan"), "holds NaN or infinity"
    yield convert.replace("nets.py:net", "nets.py:nan") + " --calibration=photos", "holds NaN"
    for rest, words in {
        "--frontier=0.5": "--frontier belongs to a conversion",
        "--convert=macs=0.5 --frontier=half": "must be numbers with commas between them",
        "--convert=macs=0.5 --frontier=2": "--frontier (='macs=2')",
        "--convert=macs=0.5 --frontier=0": "--frontier (='macs=0')",
        "--convert=macs=0.5 --frontier=nan": "nan",
        "--convert=macs=0.5 --converted=slim.safetensors": "exclude each other",
        "--repeats=0": "'--repeats'",
        "--seed=x": "'--seed'",
        f"--seed={10**30}": "'--seed'",
        "--format=pdf": "'pdf' is not one of",
        "--out=new.txt": "--format (='txt') must be one of",
        "--out=new": "must be one of",
        "--labelled=photos/a": "photos/a",
        "--input-size=1x5x16x16 --labelled=photos": "Nx1xHxW or Nx3xHxW for images",
    }.items():
        yield f"{report} {rest}", words
    yield f"{report.replace('nets.py:net', 'nets.py:Shape')} --labelled=photos", "one score per"
    for rest, words in {
        "--out=new.tflite": "must be one of onnx, torch-export, safetensors",
        "--format=tflite": "'tflite' is not one of",
        "--out=new.pt2 --opset=18": "--opset (=18) is for onnx",
        "--opset=0": "'--opset'",
        "--opset=1": "opset",
        "--opset=99": "99",
    }.items():
        yield f"{export} {rest}", words
    yield export.replace("--out=new.onnx", ""), "Missing option '--out'"
    yield export.replace("nets.py:net", "nets.py:nan"), "returns NaN for an input of --input-size"
    for rest, words in {
        "": "--in-channels is missing",
        "nets.py:net": "compare needs two networks, got 1",
        "nets.py:net nets.py:net nets.py:net": "compare needs two networks, got 3",
        "nets.py:net nets.py:net --stride=2": "--stride describes a layer",
        "nets.py:net nets.py:Shape": "same output shapes",
        "--in-channels=0": "'--in-channels'",
        "--in-channels=3 --out-channels=-1": "'--out-channels'",
        "--in-channels=3 --out-channels=8": "--kernel-size is missing",
        "--in-channels=3 --out-channels=8 --kernel-size=0": "of at least 1",
        "--in-channels=3 --out-channels=8 --kernel-size=3x3x3": "must have 2 entries",
        "--in-channels=3 --out-channels=8 --kernel-size=3 --stride=0": "of at least 1",
        "--in-channels=3 --out-channels=8 --kernel-size=3 --padding=-1": "of at least 0",
        "--in-channels=3 --out-channels=8 --kernel-size=3 --padding=full": "must be whole",
        "--in-channels=3 --out-channels=8 --kernel-size=3 --padding=same --stride=2": "stride",
        "--in-channels=3 --out-channels=8 --kernel-size=3 --dilation=0": "of at least 1",
        "--in-channels=3 --out-channels=8 --kernel-size=40": "",
        "--in-channels=5 --out-channels=8 --kernel-size=3": "channels",
        "--in-channels=3 --out-channels=8 --kernel-size=3 --input-size=1x3": "3 to 5 numbers",
    }.items():
        yield f"compare {SIZE} {rest}", words
    yield f"count nets.py:net {SIZE} --depth=-1", "'--depth'"
    yield f"count nets.py:net {SIZE} --depth=all", "'--depth'"
    for device in ("cadu", "cuda:99", "''", "xpu", "meta"):
        yield f"measure nets.py:net {SIZE} --device={device}", ""
    yield f"explain nets.py:net {SIZE} --isa=mmx", "isa"
    yield f"explain nets.py:net {SIZE} --isa=neon", "isa"
    yield f"explain nets.py:net {SIZE} --asm=nowhere", "nowhere"
    yield f"bench nets.py:net {SIZE} --against=tvm", "--against"
    yield f"bench nets.py:net {SIZE} --against=''", "--against"
    yield f"bench nets.py:net {SIZE} --turns=0", "'--turns'"
    yield f"bench nets.py:nan {SIZE}", "gives NaN or infinity on random inputs"
    yield f"bench nets.py:net {SIZE} --threads=1,0", "of at least 1"
    yield f"bench nets.py:net {SIZE} --format=csv", "'csv' is not one of 'table', 'json'"
    for rest, words in {
        "--data=missing": "missing",
        "--data=nobody": "nobody",
        "--data=broken": "broken",
        "--data=nets.py": "nets.py",
        "--data=''": "",
        "--validation-data=missing": "missing",
        "--epochs=0": "--epochs (=0) must be at least 1",
        "--epochs=many": "'--epochs'",
        "--batch-size=0": "--batch-size (=0)",
        "--batch-size=100000": "--batch-size (=100000) must be at most",
        "--accumulate=0": "--accumulate (=0)",
        "--accumulate=3": "must be divisible",
        "--optimizer=lion": "'lion' is not one of",
        "--lr=-1": "--lr (=-1.0)",
        "--lr=nan": "--lr (=nan)",
        "--momentum=2": "--momentum (=2.0)",
        "--weight-decay=-1": "--weight-decay (=-1.0)",
        "--warmup=2": "--warmup (=2.0)",
        "--clip=-1": "--clip (=-1.0)",
        "--label-smoothing=2": "--label-smoothing (=2.0)",
        "--ema=2": "--ema (=2.0)",
        "--augment=flip": "'flip' is not one of",
        "--image-size=0": "--image-size (=0)",
        "--mean=grey": "must be numbers",
        "--data=photos --mean=0.1,0.2 --batch-size=2": "mean",
        "--std=0": "--std (=(0.0,)) must be at least",
        "--validation=1": "--validation (=1.0)",
        "--seed=-1": "--seed (=-1)",
        f"--seed={10**30}": "seed",
        "--precision=12": "'12' is not one of",
        "--sync-batchnorm --accelerator=cpu --batch-size=4": "--sync-batchnorm (=True) needs GPUs",
        "--workers=-1": "--workers (=-1)",
        "--checkpoint-every=0": "--checkpoint-every (=0)",
        "--accelerator=abacus": "abacus",
        "--devices=0": "0",
        "--devices=none": "devices",
        "--num-nodes=0": "--num-nodes (=0)",
        "--strategy=hope": "hope",
        "--config=missing.yaml": "--config: there is no file",
        "--config=photos": "is a directory",
        "--config=list.yaml": "must hold KEY: VALUE lines",
        "--config=yaml.yaml": "is no YAML file",
        "--config=key.yaml": "has no `epoch`; the nearest is `epochs`",
        "--config=good.safetensors": "is no YAML file",
        "--out=nets.py": "is a file",
        "--out=/proc/new": "/proc",
        "--format=csv": "'csv' is not one of 'table', 'json'",
    }.items():
        yield f"{train} {rest}", words
    yield train.replace("--epochs=1", "--config=value.yaml"), "epochs"
    yield "train --data=digits", "--model is missing"
    yield "train --model=nets.py:net", "--data is missing"
    for rest, words in {
        "--data=missing": "missing",
        "--data=nobody": "nobody",
        "--data=broken --batch-size=1": "broken",
        "--temperature=0": "--temperature (=0.0)",
        "--features=-1": "--features (=-1.0)",
        "--blocks=nowhere --batch-size=4": "nowhere",
        "--batch-norm=off": "'off' is not one of",
        "--image-size=0": "--image-size (=0)",
        "--teacher=separable:mobilenet_v1": "",
        "--out=nets.py": "is a file",
        "--config=key.yaml": "has no `epoch`",
    }.items():
        yield f"{finetune} {rest}", words
    yield finetune.replace("--student=slim.safetensors", ""), "--student is missing"
    yield finetune.replace("--teacher=nets.py:net", ""), "--teacher is missing"
    yield finetune.replace("--data=photos", ""), "--data is missing"
    for rest, words in {
        "demo --epochs=0": "'--epochs'",
        "demo --epochs=many": "'--epochs'",
        "demo --seed=-1": "'--seed'",
        f"demo --seed={10**30}": "'--seed'",
        "demo --out=nets.py": "is a file",
        "demo --out=/proc/new": "/proc",
        "demo --format=xml": "'xml' is not one of",
        "demo nets.py:net": "unexpected extra argument",
        "doctor --format=csv": "'csv' is not one of 'table', 'json'",
        "doctor me": "unexpected extra argument",
        "completion": "Missing argument",
        "completion tcsh": "'tcsh' is not one of",
        "cuont": "No such command 'cuont'",
        "--nonsense": "No such option '--nonsense'",
    }.items():
        yield rest, words


CASES = list(dict(_cases()).items())


def files(folder):
    return {p for p in folder.rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.parametrize(("typed", "words"), CASES, ids=[typed for typed, _ in CASES])
@pytest.mark.filterwarnings("ignore:conversion without calibration inputs")
def test_an_error_is_one_line(typed, words, assets, monkeypatch):
    monkeypatch.chdir(assets)
    before = files(assets)
    result = CliRunner().invoke(main, shlex.split(typed))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    shown = [line for line in result.stderr.splitlines() if not line.startswith("Skipped ")]
    assert len(shown) == 1, result.stderr
    assert shown[0].startswith("Error: ")
    assert words in shown[0]
    assert "/src/separable" not in shown[0]
    assert files(assets) == before


@pytest.mark.filterwarnings("default:too few")
def test_a_warning_is_one_line():
    @main.command("warns")
    def warns():
        warnings.warn("too few\n inputs", stacklevel=1)

    try:
        done = CliRunner().invoke(main, ["warns"])
    finally:
        del main.commands["warns"]
    assert (done.exit_code, done.stderr) == (0, "Warning: too few inputs\n")


@pytest.mark.filterwarnings("ignore:conversion without calibration inputs")
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("finetune --teacher=nets.py:net --data=photos --student=no.safetensors", "--student"),
        ("export nets.py:net --out=new.onnx --converted=no.safetensors", "--converted"),
        (f"report nets.py:net {SIZE} --converted=no.safetensors", "--converted"),
    ],
)
def test_a_missing_file_is_named_by_its_option(typed, words, assets, monkeypatch):
    monkeypatch.chdir(assets)
    result = CliRunner().invoke(main, shlex.split(typed))
    assert result.stderr == f"Error: {words} (='no.safetensors') is no file\n"


def test_a_conversion_of_another_network_says_what_differs(assets, monkeypatch):
    monkeypatch.chdir(assets)
    typed = "export nets.py:other --converted=slim.safetensors --out=new.onnx"
    result = CliRunner().invoke(main, shlex.split(typed))
    assert result.stderr.startswith(
        "Error: --converted (='slim.safetensors') holds another network than MODEL: Error(s) in "
        "loading state_dict for Sequential: "
    )
    assert "size mismatch for 7.weight" in result.stderr


def test_a_training_that_is_told_to_end_says_so_to_what_started_it():
    """As `_interruptible` of a training leaves at SIGTERM: batch systems look at the code."""

    @click.command
    def ends():
        raise SystemExit(143)

    with pytest.raises(SystemExit) as left:
        Group(commands={"ends": ends}).main(["ends"])
    assert left.value.code == 143
