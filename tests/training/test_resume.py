"""A run that is killed at any moment goes on to the same weights; nothing is half-written."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from separable.training import finetune, running, train
from separable.training.records import read_metrics

from .networks import blobs, net, same, seeded

CODE = """
import sys, time, torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from separable.training import train
from tests.training.networks import blobs, net, seeded

class Slow(TensorDataset):
    def __getitem__(self, index):
        time.sleep(0.005)
        return super().__getitem__(index)

torch.manual_seed(time.time_ns())
train(seeded(net), Slow(*blobs(96)), out=sys.argv[1], resume="--resume" in sys.argv,
      epochs=3, batch_size=8, checkpoint_every=3, augment="shift", accumulate=2, progress=False)
"""
STEPS = 3 * (86 // 8)


def start(out, *flags):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(out), *flags],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def steps(out):
    try:
        return torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    except FileNotFoundError:
        return -1


def finished(process):
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr.decode()


def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path):
    finished(start(tmp_path / "unbroken"))
    out = tmp_path / "killed"
    # killed in the middle of the first epoch, then after the second began
    for flags, least in (((), 3), (("--resume",), 12)):
        process = start(out, *flags)
        while steps(out) < least and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert least <= steps(out) < STEPS
    finished(start(out, "--resume"))
    assert steps(out) == steps(tmp_path / "unbroken") == STEPS
    whole, resumed = (load_file(tmp_path / n / "last.safetensors") for n in ("unbroken", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    # the metrics are those of the unbroken run
    tables = [read_metrics(tmp_path / name / "metrics.csv") for name in ("unbroken", "killed")]
    validations = [[r for r in table if "val_loss" in r] for table in tables]
    assert validations[0] == validations[1]
    assert len(validations[0]) == 3


OPTIONS = {"epochs": 2, "batch_size": 8, "progress": False, "checkpoint_every": 2}


def begun(out, steps, **options):
    """A run that raises after some steps."""

    class Broken(torch.nn.Module):
        left = steps

        def forward(self, input):
            if torch.is_grad_enabled() and type(self).left == 0:
                raise RuntimeError("killed")
            type(self).left -= torch.is_grad_enabled()
            return input

    network = torch.nn.Sequential(seeded(net), Broken())
    with pytest.raises(RuntimeError, match="killed"):
        train(network, blobs(), out=out, **{**OPTIONS, **options})
    Broken.left = -1
    return network


@pytest.mark.parametrize(
    ("steps", "options"),
    [(1, {}), (3, {}), (5, {}), (6, {}), (9, {}), (3, {"ema": 0.0, "optimizer": "adamw"})],
)
def test_from_every_step(tmp_path, steps, options):
    """Stopped before any step of two epochs of five: the checkpoint is after every second one."""
    whole = train(
        torch.nn.Sequential(seeded(net), torch.nn.Identity()),
        blobs(),
        out=tmp_path / "whole",
        **OPTIONS,
        **options,
    )
    broken = begun(tmp_path / "run", steps, **options)
    result = train(broken, blobs(), out=tmp_path / "run", resume=True, **OPTIONS, **options)
    assert same(result, whole)
    assert result.run.steps == 10
    for name in ("best", "last"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("whole", "run"))
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_distillation_from_the_middle_of_an_epoch(tmp_path, batch_norm):
    class Broken(torch.nn.Module):
        left = 3

        def forward(self, input):
            if torch.is_grad_enabled():
                if Broken.left == 0:
                    raise RuntimeError("killed")
                Broken.left -= 1
            return input

    options = {
        "features": 0.0, "batch_norm": batch_norm, "batch_size": 8, "checkpoint_every": 1,
        "progress": False, "data": blobs()[0],
    }  # fmt: skip
    student, teacher = (
        torch.nn.Sequential(seeded(net, seed=n), torch.nn.Identity()) for n in (1, 0)
    )
    whole = finetune(student, teacher=teacher, out=tmp_path / "whole", **options)
    broken = torch.nn.Sequential(student[0], Broken())
    with pytest.raises(RuntimeError, match="killed"):
        finetune(broken, teacher=teacher, out=tmp_path / "run", **options)
    Broken.left = -1
    result = finetune(broken, teacher=teacher, out=tmp_path / "run", resume=True, **options)
    assert same(result, whole)
    assert result.run.steps == 6


def test_killed_in_the_last_validation(tmp_path):
    class Fragile(torch.nn.Module):
        breaks = True

        def forward(self, input):
            if Fragile.breaks and not self.training and len(input) == 5:
                raise RuntimeError("killed")
            return input

    network = torch.nn.Sequential(seeded(net), Fragile())  # 5 of 48 are held out
    options = {**OPTIONS, "epochs": 1, "checkpoint_every": 1, "out": tmp_path}
    with pytest.raises(RuntimeError, match="killed"):
        train(network, blobs(), **options)
    Fragile.breaks = False
    result = train(network, blobs(), resume=True, **options)
    assert "val_accuracy" in result.run.metrics
    assert (tmp_path / "best.safetensors").exists()


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(seeded(net), blobs(), out=tmp_path, **OPTIONS)
    again = train(seeded(net, seed=1), blobs(), out=tmp_path, resume=True, **OPTIONS)
    assert same(first, again)


def test_another_recipe_is_refused_but_another_machine_is_not(tmp_path):
    begun(tmp_path, 3)
    with pytest.raises(ValueError, match=r"`lr` \(=0.3\) was None when the run in"):
        train(seeded(net), blobs(), out=tmp_path, resume=True, lr=0.3, **OPTIONS)
    with pytest.raises(ValueError, match="`model` "):
        train(torch.nn.Linear(2, 2), blobs(), out=tmp_path, resume=True, **OPTIONS)
    shown = r"`validation_data` \(='tuple'\) was None when the run in"
    with pytest.raises(ValueError, match=shown):
        train(seeded(net), blobs(), validation_data=blobs(), out=tmp_path, resume=True, **OPTIONS)
    wider = torch.nn.Sequential(seeded(net, classes=4), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"`resume`: the weight '0.7.weight' was \[3, 6\] when"):
        train(wider, blobs(), out=tmp_path, resume=True, **OPTIONS)
    network = torch.nn.Sequential(seeded(net), torch.nn.Identity())
    result = train(network, blobs(), out=tmp_path, resume=True, workers=1, **OPTIONS)
    assert result.run.steps == 10


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    begun(tmp_path, 3)
    before = (tmp_path / "last.ckpt").read_bytes()

    def fails(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    network = torch.nn.Sequential(seeded(net), torch.nn.Identity())
    with pytest.raises(OSError, match="no space left"):
        train(network, blobs(), out=tmp_path, resume=True, **OPTIONS)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    def interrupted(content, file):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")  # as torch's writer, when it is closed too early

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(seeded(net), blobs(), out=tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    begun(tmp_path, 3)
    path = tmp_path / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    network = torch.nn.Sequential(seeded(net), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"`out`: '.*last\.ckpt' is damaged"):
        train(network, blobs(), out=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize("cut", ["0,", "0,1,1e-", ""])
def test_records_that_were_cut_do_not_stop_it(tmp_path, cut):
    begun(tmp_path, 3)
    whole = "epoch,step,train_loss\n0,0,1.5\n"
    (tmp_path / "metrics.csv").write_text(whole + cut)
    (tmp_path / ".last.123.ckpt").write_bytes(b"half")
    network = torch.nn.Sequential(seeded(net), torch.nn.Identity())
    assert train(network, blobs(), out=tmp_path, resume=True, **OPTIONS).run.steps == 10
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="does not say how the run began"):
        train(network, blobs(), out=tmp_path, resume=True, **OPTIONS)


def test_sigterm_ends_a_process_as_it_does_elsewhere(tmp_path):
    process = start(tmp_path)
    while steps(tmp_path) < 1 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_under_slurm_nothing_lies_about_for_other_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "NTASKS": "1", "JOB_ID": "123", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0",
        "NODEID": "0", "JOB_NODELIST": "localhost", "NTASKS_PER_NODE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    seen, trainer = [], running.Trainer
    monkeypatch.setattr(
        running, "Trainer", lambda **options: seen.append(trainer(**options)) or seen[-1]
    )
    result = train(seeded(net), blobs(), out=tmp_path / "run", **OPTIONS)
    assert result.run.steps == 10
    assert not seen[0]._accelerator_connector.cluster_environment.auto_requeue
    assert train(seeded(net), blobs(), **OPTIONS).run.steps == 10  # and without a folder


def test_without_a_checkpoint_it_begins_anew(tmp_path):
    first = train(seeded(net), blobs(), out=tmp_path / "a", **OPTIONS)
    again = train(seeded(net), blobs(), out=tmp_path / "b", resume=True, **OPTIONS)
    assert same(first, again)
