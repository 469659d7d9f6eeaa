"""Integer products on CPUs without VNNI, of which oneDNN is told that this is one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_accel import QuantConfig, export_model, quantize_model
from lightning_accel._int_mm import int_mm, mend_


def python(code: str, *arguments: str, isa: str = "AVX2") -> str:
    """What a new process prints that oneDNN takes for one on a CPU of this instruction set."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_products_are_exact_without_vnni_and_torchs_own_are_not() -> None:
    code = """
    import torch
    from lightning_accel._int_mm import SATURATES, int_mm
    draw = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 1, 3), (1, 64, 16), (5, 300, 17), (64, 1000, 70)):
        for largest in (False, True):
            a = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=draw)
            b = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=draw)
            a, b = (a.fill_(127), b.fill_(127)) if largest else (a, b)
            assert torch.equal(int_mm(a, b.t()), (a.double() @ b.t().double()).int())
    print(SATURATES, torch.equal(torch._int_mm(a, b.t()), (a.double() @ b.t().double()).int()))
    """
    assert python(code) == "True False\n"


@pytest.mark.parametrize("inputs", [1, 2, 64, 300])
def test_a_mended_program_computes_the_same(inputs: int) -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return int_mm(a, b.t()).float()

    a, b = (torch.randint(-127, 128, (33, inputs), dtype=torch.int8) for _ in range(2))
    program = torch.export.export(Product(), (a, b)).module()
    mend_(program.graph)
    program.recompile()
    assert torch.equal(program(a, b), (a.double() @ b.double().t()).float())


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_models_and_portable_programs_compute_the_same_without_vnni(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    x, data = 3 * torch.randn(16, 256), [torch.randn(16, 256) for _ in range(8)]
    config = QuantConfig(scheme)
    export_model(model, tmp_path / "artifact", example_inputs=(x,), quantize=config, calibration=data,
                 engines=("portable",), measure=False)  # fmt: skip
    here = {"model": model, "x": x, "data": data, "y": quantize_model(model, config, data)(x)}
    torch.save(here, tmp_path / "here.pt")
    code = """
    import sys
    import torch
    from lightning_accel import QuantConfig, load, quantize_model
    here = torch.load(sys.argv[1] + "/here.pt", weights_only=False)
    x, y, model, data = (here[name] for name in ("x", "y", "model", "data"))
    with torch.no_grad():
        torch.testing.assert_close(quantize_model(model, QuantConfig(sys.argv[2]), data)(x), y)
        torch.testing.assert_close(load(sys.argv[1] + "/artifact")(x), y)
    """
    python(code, str(tmp_path), scheme)
