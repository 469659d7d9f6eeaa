"""Ctrl-C, during training and during the export."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Plain, data, loader, seeded, trainer
from interrupted import callbacks

import lightning_accel


def interrupt(path: Path, where: str) -> str:
    """Runs `interrupted.py`, presses Ctrl-C where it waits, and returns what it wrote."""
    script = Path(__file__).with_name("interrupted.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, script, path, where],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for _ in range(1200):
                if (path / "waiting").exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 1, said
    (path / "waiting").unlink()
    return said


def assert_resumable(path: Path, step: int) -> Any:
    """The checkpoint is whole, and a fit goes on from it to an artifact."""
    assert torch.load(path / "model.ckpt", weights_only=True)["global_step"] == step
    module, extra = seeded(Plain, seed=5), callbacks(path)
    fit = trainer(path, extra, max_epochs=7)
    fit.fit(module, loader(), ckpt_path=str(path / "model.ckpt"))
    assert extra[2].complete and extra[3].complete
    x = data(16)[:][0]
    with torch.no_grad():
        assert torch.allclose(lightning_accel.load(path / "model")(x), module.model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_ctrl_c_in_training_leaves_a_checkpoint_and_no_half_written_artifact(tmp_path):
    said = interrupt(tmp_path, "fit")
    assert "Detected KeyboardInterrupt" in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]
    assert_resumable(tmp_path, 6)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:the checkpoint was written by")
def test_an_interrupt_of_one_rank_leaves_a_checkpoint_and_hangs_nobody(tmp_path):
    interrupt(tmp_path, "ranks")
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]
    assert_resumable(tmp_path, 6)


def test_ctrl_c_in_the_export_leaves_the_checkpoint_and_the_last_good_artifact(tmp_path):
    trainer(tmp_path, callbacks(tmp_path)).fit(seeded(Plain, seed=7), loader())
    x = data(16)[:][0]
    good = lightning_accel.load(tmp_path / "model")(x)
    interrupt(tmp_path, "export")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.ckpt"]
    assert torch.equal(lightning_accel.load(tmp_path / "model")(x), good)
    assert_resumable(tmp_path, 24)
