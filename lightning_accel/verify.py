"""Is what was exported what was trained? Contract 4, on held-out inputs.

`trained` is the eager model as training left it (fake-quantized), `plain` the same weights without fake quantization,
`artifact` the loaded program. Rounding flips amplify through layers, so whole models are compared statistically:

    KL(trained || artifact) <= KL_FRACTION * KL(plain || artifact)

for models that put out logits; for other outputs the same with relative L2 errors; and predictions must agree wherever
the margin between the two best logits exceeds twice the largest error seen on another half of the inputs. What is not
quantized must agree to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import artifact, engines
from .distill import logits_of
from .loaded import structure

KL_FRACTION = 0.1
ERROR_FRACTION = 0.5
ROUNDING = 1e-3  # relative L2 error that float reordering alone may cause
SMALL_KL = 1e-6  # nats; below it a ratio of divergences means nothing

Call = Callable[[Any], Any]  # inputs -> output


class DriftError(RuntimeError):
    """The exported program does not compute what was trained; nothing was replaced."""


@dataclass
class Verification:
    """Figures of one program against the eager models, all on the same inputs.

    Attributes:
        kl_trained, kl_plain: nats a position; `None` where the model puts out no logits.
        error_trained, error_plain: relative L2 error of the float outputs.
        margin: logit margin above which predictions must agree (twice the error of the calibration half).
        agreement: share of positions of the test half with the same prediction, and of those over the margin.
    """

    positions: int
    error_trained: float
    error_plain: float
    kl_trained: float | None = None
    kl_plain: float | None = None
    margin: float | None = None
    agreement: float | None = None
    agreement_over_margin: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for the manifest."""
        return {**asdict(self), "kl_fraction_allowed": KL_FRACTION}


def verify(inputs: Sequence[Any], artifact: Call, trained: Call, plain: Call | None, name: str) -> Verification:
    """Compares a program with the eager models on `inputs`.

    Args:
        plain: the unquantized model; `None` when nothing is quantized.

    Raises:
        DriftError: the program computes something else; the message holds the figures.
    """
    with torch.no_grad():
        outputs = [[_floats(call(x), x) for x in inputs] for call in (artifact, trained, plain or trained)]
    ours, fake, full = outputs
    for batch in ours:
        if any(not torch.isfinite(t).all() for t in batch):
            raise DriftError(f"the {name} program puts out NaN or infinite values on held-out inputs")
    result = Verification(sum(b[0].shape[:-1].numel() for b in ours), _error(ours, fake), _error(ours, full))
    if plain is None:
        if result.error_trained > ROUNDING:
            raise DriftError(
                f"the {name} program drifted: relative error {result.error_trained:.2g} of its outputs, "
                f"float rounding explains {ROUNDING:g}"
            )
        return result
    with torch.no_grad():
        has_logits = all(logits_of(call(inputs[0])) is not None for call in (trained, plain))
    if not has_logits:
        allowed = max(ERROR_FRACTION * result.error_plain, ROUNDING)
        if result.error_trained > allowed:
            raise DriftError(
                f"the {name} program drifted: relative error {result.error_trained:.2g} against the trained "
                f"model, {allowed:.2g} allowed ({ERROR_FRACTION} of its error against the float model)"
            )
        return result
    ours_PV, fake_PV, full_PV = (torch.cat([b[0].flatten(0, -2) for b in o]) for o in outputs)
    result.kl_trained, result.kl_plain = _kl(fake_PV, ours_PV), _kl(full_PV, ours_PV)
    if result.kl_trained > max(KL_FRACTION * result.kl_plain, SMALL_KL):
        raise DriftError(
            f"the {name} program drifted: KL(trained || artifact) is {result.kl_trained:.2g} nats, more than "
            f"{KL_FRACTION} of KL(float || artifact), {result.kl_plain:.2g}"
        )
    _compare_predictions(result, ours_PV, fake_PV, name)
    return result


def _compare_predictions(result: Verification, ours_PV: Tensor, trained_PV: Tensor, name: str) -> None:
    half = len(ours_PV) // 2
    if half == 0:
        return
    result.margin = 2 * (ours_PV[:half] - trained_PV[:half]).abs().max().item()
    top2 = trained_PV[half:].topk(min(2, trained_PV.shape[-1])).values
    over = (top2[:, 0] - top2[:, -1]) > result.margin
    same = ours_PV[half:].argmax(-1) == trained_PV[half:].argmax(-1)
    result.agreement = same.float().mean().item()
    result.agreement_over_margin = same[over].float().mean().item() if over.any() else 1.0
    if result.agreement_over_margin < 1.0:
        raise DriftError(
            f"the {name} program predicts otherwise than the trained model at {1 - result.agreement_over_margin:.1%} "
            f"of the positions whose margin exceeds {result.margin:.2g}"
        )


def _floats(output: Any, inputs: Any) -> list[Tensor]:
    """The logits of an output, of padding none (what a model puts out there means nothing), or all float tensors."""
    from .capture import flatten_output

    logits = logits_of(output)
    if logits is not None:
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if mask is not None and mask.shape == logits.shape[:-1]:
            logits = logits[mask.bool()]
        return [logits.detach().float()]
    return [t.detach().float() for t in flatten_output(output)[0] if t.is_floating_point()]


def _error(ours: list[list[Tensor]], others: list[list[Tensor]]) -> float:
    difference = sum(
        float((a - b).square().sum()) for x, y in zip(ours, others, strict=True) for a, b in zip(x, y, strict=True)
    )
    size = sum(float(b.square().sum()) for y in others for b in y)
    return (difference / max(size, 1e-30)) ** 0.5


def _kl(p_PV: Tensor, q_PV: Tensor) -> float:
    p, q = torch.log_softmax(p_PV, -1), torch.log_softmax(q_PV, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- an artifact on disk ----------------------------------------------------------------------------------------------


def verify_artifact(directory: str | Path) -> list[str]:
    """Checks every file and runs the golden inputs through every program again; returns a line for each check.

    Raises:
        artifact.ArtifactError: damaged.
        verify.DriftError: a program computes something else than when it was exported.
    """
    directory = Path(directory)
    manifest = artifact.read_manifest(directory)
    golden = artifact.load_weights(artifact.check_file(directory, **_digest(manifest["golden"])))
    for item in (*manifest.get("assets", ()), *([manifest["weights"]] if "weights" in manifest else [])):
        artifact.check_file(directory, **_digest(item))
    lines = [f"files: {len(list(directory.iterdir()))}, hashes as written"]
    quantized = any("quantization" in c["technique"] for c in manifest.get("coverage", ()))
    for entry in manifest["programs"]:
        reason = engines.get(entry["engine"]).unusable(entry)
        if reason is not None:
            lines.append(f"{entry['engine']}: not run: {reason}")
            continue
        figures = _golden_again(directory, entry, golden, quantized)
        lines.append(f"{entry['engine']}: golden inputs again, relative error {figures.error_trained:.2g}")
    return lines


def _golden_again(
    directory: Path, entry: dict[str, Any], golden: Mapping[str, Tensor], quantized: bool
) -> Verification:
    loaded = artifact.load(directory, engine=entry["engine"])
    inputs = {n.removeprefix("input."): t.clone() for n, t in golden.items() if n.startswith("input.")}
    outputs = [golden[f"output.{i}"] for i in range(sum(name.startswith("output.") for name in golden))]

    def expected(_: Any) -> Any:
        return structure(entry["outputs"], outputs)

    return verify([inputs], lambda x: loaded(**x), expected, expected if quantized else None, entry["engine"])


def _digest(item: Mapping[str, Any]) -> dict[str, str]:
    return {"name": item["file"], "digest": item["sha256"]}
