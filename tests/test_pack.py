"""Float convolutions in a compiled program: packed once, right at every size."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
import torch
from test_norms import Same
from torch import nn

from lightning_accel import export_model, load
from lightning_accel.engines import pack

pytestmark = pytest.mark.aoti


def test_convolutions_are_packed_for_the_example_and_right_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = [], []
    real = pack.pack_convolutions

    def spy(graph: torch.fx.Graph) -> None:
        def weights() -> list[bool]:
            convs = [n for n in graph.nodes if n.target is torch.ops.mkldnn._convolution_pointwise.default]
            return [attrgetter(n.args[1].target)(graph.owning_module).is_mkldnn for n in convs]  # type: ignore[union-attr]

        plain.extend(weights())
        real(graph)
        packed.extend(weights())

    monkeypatch.setattr(pack, "pack_convolutions", spy)
    torch.manual_seed(0)
    shared = nn.Conv2d(24, 24, 3, padding=1)
    layers = [nn.Conv2d(3, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(), shared, nn.GELU(), shared]
    layers += [nn.Conv2d(24, 24, 5, groups=24, padding=2), nn.ReLU6(), Same(24, 7, 1), nn.AdaptiveAvgPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(28, 5)).eval()
    export_model(model, tmp_path / "artifact", example_inputs=(torch.randn(3, 3, 32, 40),), measure=False)
    assert not any(plain) and all(packed) and len(packed) == 3, "the depthwise one and that of 1 x 1 have operators"
    program = load(tmp_path / "artifact", engine="aoti")
    for batch in (1, 2, 3, 17):
        x = torch.randn(batch, 3, 32, 40)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
