"""Saved models: what is read back, and that no crafted file reaches native code."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import separable
from separable.runtime import CompiledModel, jit
from separable.runtime.emit.kernel import Kernel
from separable.runtime.emit.resample import Resample, table
from separable.runtime.execute import Program
from separable.runtime.files import _kernel
from separable.runtime.machine import host
from separable.runtime.memory import aligned
from separable.runtime.scheduling import fusing
from separable.runtime.validation import footprints

from .kernels import run

_MAGIC = b"separable-runtime"


class Everything(nn.Module):
    """Every kernel family once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.silu(self.stem(x))
        x = self.pointwise(F.max_pool2d(F.relu(self.depthwise(x)) + x, 2))
        y = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores, flat = self.head(x.mean((2, 3))), x.flatten(2)
        return {
            "scores": scores.softmax(1),
            "image": y.sigmoid(),
            "alike": flat.mT @ flat * scores.amax(1)[:, None, None],
        }


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data, len(_MAGIC))
    start = len(_MAGIC) + 8
    return json.loads(data[start : start + length]), data[start + length : -32]


def joined(content: Any, rest: bytes) -> bytes:
    text = json.dumps(content).encode()
    data = _MAGIC + struct.pack("<Q", len(text)) + text + rest
    return data + hashlib.sha256(data).digest()


def nested(content: dict[str, Any]) -> dict[str, Any]:
    """A header with its kernels as JSON instead of as text."""
    kernels = [json.loads(text) for text in content["kernels"]]
    return content | {"kernels": kernels}


def flat(content: Any) -> Any:
    """The reverse of `nested`."""
    if not isinstance(content, dict) or not isinstance(content.get("kernels"), list):
        return content
    return content | {"kernels": [json.dumps(kernel) for kernel in content["kernels"]]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("saved") / "model"
    separable.compile(Everything().eval(), torch.randn(2, 3, 20, 20), threads=2).save(file)
    return file.read_bytes()


class Layers(nn.Module):
    """Layers on their own: chains that begin and end with a change of layout."""

    def __init__(self) -> None:
        super().__init__()
        self.regular = nn.Conv2d(20, 24, 3, 2, 1)
        self.separable = separable.nn.SeparableConv2d(20, 18, 3, padding=1)
        self.pointwise = nn.Conv2d(20, 17, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.regular(x), self.separable(x), self.pointwise(x)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("layers") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "cycles_alone", lambda *_: 1e12)
        separable.compile(Layers().eval(), torch.randn(2, 20, 9, 11), threads=2).save(file)
    return file.read_bytes()


def load(data: bytes, folder: Path) -> CompiledModel:
    file = folder / "crafted"
    file.write_bytes(data)
    return separable.load_compiled(file)


@pytest.mark.parametrize("same_cpu", [True, False])
def test_round_trip(tmp_path: Path, same_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Everything().eval(), torch.randn(2, 3, 20, 20)
    compiled = separable.compile(model, x, threads=2)
    file = tmp_path / "model.bin"
    compiled.save(file)
    if not same_cpu:
        monkeypatch.setattr(jit, "load_object", lambda *_: pytest.fail("used foreign code"))
        monkeypatch.setattr("separable.runtime.files._signed", lambda *_: False)
    else:
        monkeypatch.setattr(jit, "emit_object", lambda *_: pytest.fail("compiled again"))
    loaded = separable.load_compiled(file)
    ours, theirs = loaded(x), compiled(x)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="argument 0"):
        loaded(x[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
    again = tmp_path / "again"
    loaded.save(again)
    assert torch.equal(separable.load_compiled(again)(x)["scores"], theirs["scores"])


def test_files_are_replaced_as_others_are(tmp_path: Path) -> None:
    compiled = separable.compile(nn.ReLU().eval(), torch.randn(1, 3))
    target, link = tmp_path / ("a" * 250 + ".bin"), tmp_path / "link"
    compiled.save(target)
    target.chmod(0o640)
    link.symlink_to(target)
    compiled.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(tmp_path.iterdir()) == [target, link]


def test_damaged_files(saved: bytes, tmp_path: Path) -> None:
    changed = saved[:5000] + bytes([saved[5000] ^ 1]) + saved[5001:]
    for damage in (saved[:-1], saved[:100], changed, b"", b"PK" + saved):
        with pytest.raises(ValueError, match=r"damaged|not a compiled model"):
            load(damage, tmp_path)


def test_models_with_torch_parts_are_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, dilation=2)).eval()
    compiled = separable.compile(model, torch.randn(1, 3, 5, 5))
    with pytest.raises(ValueError, match="in torch"):
        compiled.save(tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of nested JSON stands."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*at, key))


def changed(content: Any, at: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not at:
        return change(content)
    copy = content.copy()
    copy[at[0]] = changed(copy[at[0]], at[1:], change)
    return copy


class Native(Exception):
    """Raised in place of code generation and execution."""


@pytest.fixture
def _no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any) -> None:
        raise Native

    monkeypatch.setattr(Program, "__init__", reached)


_WORSE: list[Any] = [-1, 1 << 31, 1 << 62, float("nan"), "x", None, [], True]


def variants(content: Any, most: int = 2) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of a header in turn (of long lists, the first ones) is what it must not be."""
    for at in paths(content):
        if not any(isinstance(key, int) and key >= most for key in at):
            for worse in [{"no": "such"}, *_WORSE]:
                if worse != look(content, at) or type(worse) is not type(look(content, at)):
                    yield at, changed(content, at, lambda _, worse=worse: worse)
        if at and isinstance(at[-1], str):
            yield at, changed(content, at[:-1], lambda d, key=at[-1]: without(d, key))


def without(entries: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != key}


@pytest.mark.usefixtures("_no_native_code")
@pytest.mark.parametrize("file", ["saved", "layers"])
def test_hostile_headers(file: str, saved: bytes, layers: bytes, tmp_path: Path) -> None:
    content, rest = split({"saved": saved, "layers": layers}[file])
    passed = set()
    for at, header in variants(nested(content["header"])):
        try:
            load(joined({"format": content["format"], "header": flat(header)}, rest), tmp_path)
        except ValueError as error:
            assert "describes no valid model" in str(error), at  # noqa: PT017
        except Native:
            passed.add(next(key for key in reversed(at) if isinstance(key, str)))
    # Names, what vouches for code (and so does no more), numbers of the arithmetic, and steps of
    # filters whose taps are then outside the image, and the order of values in an argument.
    allowed = "key signatures layer name kind shape absorbed epilogue stride padding dilation bands"
    assert passed <= {*allowed.split(), "extra_strides", "channels_last"}
    for format in (0, 1, "x", None):
        with pytest.raises(ValueError, match="has format"):
            load(joined({"format": format, "header": content["header"]}, rest), tmp_path)
    for foreign in ([], 3, {"format": content["format"]}):
        with pytest.raises(ValueError, match="no valid model"):
            load(joined(foreign, rest), tmp_path)


@pytest.mark.usefixtures("_no_native_code")
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {"x_strides": [1980, 1, 9, 99]}),  # lines in which pixels are not neighbours
        (0, {"x_strides": [1980, 12, 1, 99]}),  # one row too far
        (0, {"x_strides": [1980, 11, 1]}),
        (0, {"y_strides": [0, 220, 20, 2]}),  # nor channels, in the buffer
        (0, {"channels": 21}),
        (0, {"size": [10, 11]}),
        (0, {"batch": 3}),
        (-1, {"y_strides": [1782, 1, 9, 99]}),  # nor here
        (-1, {"y_strides": [1782, 11, 1, 100]}),  # the last channel leaves its buffer
        (-1, {"y_strides": [1782, 11, 1, 1]}),  # results overlap
        (-1, {"x_strides": [0, 198, 18, 11]}),
        (-1, {"kernel": [1, 1]}),
    ],
)
def test_tampered_layouts(
    stage: int, changes: dict[str, Any], layers: bytes, tmp_path: Path
) -> None:
    content, rest = split(layers)
    header = nested(content["header"])
    (chain,) = (stages for stages, _ in header["kernels"] if len(stages) == 4)
    assert chain[stage][0] == "Relayout"
    chain[stage][1].update(changes)
    with pytest.raises(ValueError, match="describes no valid model"):
        load(joined({"format": content["format"], "header": flat(header)}, rest), tmp_path)


def test_one_sample_of_a_batch(saved: bytes, tmp_path: Path) -> None:
    content, rest = split(saved)
    content["header"]["dynamic_batch"] = True
    with pytest.raises(ValueError, match="one sample"):
        load(joined(content, rest), tmp_path)


def test_structures_name_no_classes(saved: bytes, tmp_path: Path) -> None:
    content, rest = split(saved)
    structure = json.loads(content["header"]["structures"][1])
    structure[1] |= {
        "type": "collections.defaultdict",
        "context": json.dumps({"default_factory_module": "os", "default_factory_name": "abort"}),
    }
    content["header"]["structures"][1] = json.dumps(structure)
    with pytest.raises(ValueError, match="only tuples, lists and dictionaries"):
        load(joined(content, rest), tmp_path)


def test_tables_stay_inside_their_image(saved: bytes, tmp_path: Path) -> None:
    content, rest = split(saved)
    header = content["header"]
    (number,) = (i for i, text in enumerate(header["kernels"]) if "Resample" in text)
    (step,) = (s for s in header["steps"] if s["kernel"] == number)
    table, at = step["arguments"][1][0], 0
    for constant in header["constants"]:
        if constant == table:
            break
        at += aligned(header["buffers"][constant][1])
    for neighbour in (-1.0, 5.0, float("nan"), float("inf")):
        worse = rest[: 4 * at] + struct.pack("<f", neighbour) + rest[4 * at + 4 :]
        with pytest.raises(ValueError, match="outside its image"):
            load(joined(content, worse), tmp_path)


def test_code_is_bound_to_its_description(saved: bytes, tmp_path: Path) -> None:
    content, rest = split(saved)
    header = content["header"]
    at = header["weights"]
    codes = []
    for size in header["objects"]:
        codes.append(rest[at : at + size])
        at += size
    for entries in (codes, header["objects"], header["signatures"]):
        entries[0], entries[1] = entries[1], entries[0]

    def adopt(self: Program, *_: Any) -> None:
        raise Native

    with pytest.MonkeyPatch.context() as patch:
        trusted: list[set[Kernel]] = []
        patch.setattr(
            Program, "__init__", lambda self, s, m, t, objects: trusted.append(set(objects))
        )
        patch.setattr(Program, "adopt", adopt)
        with pytest.raises(Native):
            load(joined(content, rest[: header["weights"]] + b"".join(codes)), tmp_path)
    (kernels,) = trusted
    assert len(kernels) == len(codes) - 2


def crafted(texts: list[str], draws: random.Random) -> Kernel | None:
    """A kernel whose description was tampered with, if it is accepted."""
    parts = json.loads(draws.choice(texts))
    places = [at for at in paths(parts) if "epilogue" not in at and type(look(parts, at)) is int]
    for _ in range(draws.randint(1, 2)):
        at = draws.choice(places)
        value = look(parts, at)
        others = [0, 1, 2, 3, 5, 8, 33, value + 1, value - 1, 2 * value, value // 2]
        worse = max(0, draws.choice(others))
        parts = changed(parts, at, lambda _, worse=worse: worse)
    try:
        kernel = _kernel(json.dumps(parts), host())
        footprints(kernel)
    except (ValueError, ArithmeticError):
        return None
    return kernel


def look(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


@pytest.mark.parametrize("file", ["saved", "layers"])
def test_accepted_descriptions_stay_in_their_memory(file: str, saved: bytes, layers: bytes) -> None:
    # `run` gives each operand just what `footprints` says, before a page that cannot be touched.
    content, _ = split({"saved": saved, "layers": layers}[file])
    texts, draws = content["header"]["kernels"], random.Random(0)
    for _ in range(int(os.environ.get("SEPARABLE_CRAFTED", "40"))):
        kernel = None
        while kernel is None or max(footprints(kernel)) > 1_000_000:
            kernel = crafted(texts, draws)
        operands = [torch.zeros(length) for length in footprints(kernel)]
        if isinstance(kernel.does, Resample):
            operands[1] = table(kernel.does)
        run(kernel, operands[:-1], len(operands[-1]))
