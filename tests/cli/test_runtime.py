"""The commands `explain` and `bench`."""

import json

import pytest
from click.testing import CliRunner

from separable.cli import main

MODEL = "separable:mobilenet_v1,width=0.25,num_classes=10"
SIZE = "--input-size=1x3x32x32"


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_explain_names_layers_and_kernels():
    result = run("explain", MODEL, SIZE, "--threads=1")
    assert result.exit_code == 0, result.output
    assert "blocks.0.pointwise" in result.stdout
    assert "0 operators in torch" in result.stdout
    assembly = run("explain", MODEL, SIZE, "--threads=1", "--asm=blocks.0.pointwise")
    assert "ret" in assembly.stdout


def test_explain_as_json():
    result = run("explain", MODEL, SIZE, "--threads=1", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["threads"], figures["peak_flops"] > 0) == (1, True)
    assert any("blocks.0.pointwise" in (row["layer"], *row["fused"]) for row in figures["rows"])
    assert all(row["roofline_share"] > 0 for row in figures["rows"] if row["seconds"])


def test_bench_checks_and_times():
    result = run("bench", MODEL, SIZE, "--against=eager", "--turns=2", "--json")
    assert result.exit_code == 0, result.output
    (figures,) = json.loads(result.stdout)
    assert [each["runtime"] for each in figures["timings"]] == ["separable", "eager"]
    assert figures["timings"][0]["error"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", MODEL, SIZE, "--against=nothing"], "--against has"),
        (["bench", MODEL, SIZE, "--threads=0"], "whole numbers of at least 1"),
        (["bench", MODEL, SIZE, "--format=csv"], "'csv' is not one of 'table', 'json'"),
        (["explain", MODEL, SIZE, "--asm=nowhere", "--json"], "leave one of them out"),
        (["explain", MODEL, SIZE, "--isa=mmx"], "isa"),
        (["explain", MODEL, SIZE, "--asm=nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
