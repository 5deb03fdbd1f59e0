"""The doctor, the shells' completion, and the help of every command."""

import importlib.metadata
import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import separable
from separable.cli import main
from separable.cli.completion import SHELLS
from separable.cli.doctor import EXTRAS


def doctor(*arguments):
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_doctor_names_versions_cpu_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEPARABLE_CACHE_DIR", str(tmp_path))
    found = json.loads(doctor("--json"))
    assert found["versions"]["separable"] == separable.__version__
    assert found["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert found["cpu"]["instruction_sets"]
    assert found["threads"]["cores"] == len(os.sched_getaffinity(0))
    assert found["kernel_cache"]["state"] == "not made yet"
    assert not list(tmp_path.iterdir())  # looking makes nothing
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    (folder / "one").write_bytes(b"x" * 200_000)
    cache = json.loads(doctor("--json"))["kernel_cache"]
    assert (cache["kernels"], cache["megabytes"], cache["mode"]) == (1, 0.2, "0700")
    monkeypatch.setenv("SEPARABLE_CACHE", "0")
    assert "SEPARABLE_CACHE=0" in json.loads(doctor("--json"))["kernel_cache"]["folder"]


def test_doctor_says_what_is_missing_for_what(monkeypatch):
    known = importlib.metadata.version

    def version(name):
        if name in ("onnxruntime", "timm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    missing = {row["remedy"]: row["packages"] for row in json.loads(doctor("--json"))["missing"]}
    assert missing["pip install 'separable[zoo]'"] == "timm"
    assert missing["pip install 'separable[peers]'"] == "onnxruntime"
    assert "separable bench" in doctor()


def test_doctor_knows_every_extra():
    provided = set(importlib.metadata.metadata("separable").get_all("Provides-Extra"))
    assert provided == {*EXTRAS, "all", "docs", "dev"}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_a_script(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_SEPARABLE_COMPLETE" in result.stdout


def test_completion_completes():
    words = {
        "_SEPARABLE_COMPLETE": "bash_complete",
        "COMP_WORDS": "separable cr",
        "COMP_CWORD": "1",
    }
    code = "import sys; from separable.cli import main; sys.argv = ['separable']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | words
    )
    assert done.stdout.split() == ["plain,crosscheck"]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_help_shows_an_example_and_explains_every_option(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert f"\n  separable {name} " in result.stdout
    for option in main.commands[name].params:
        if isinstance(option, click.Option):
            assert option.help, option.name
