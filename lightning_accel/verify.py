"""Is what was exported what was trained? Contract 4, on held-out inputs.

`trained` is the eager model as training left it (fake-quantized), `plain` the same weights without fake quantization,
`artifact` the loaded program. Rounding flips amplify through layers, so whole models are compared statistically:

    KL(trained || artifact) <= KL_FRACTION * KL(plain || artifact)

for logits, ERROR_FRACTION in place of KL_FRACTION with relative L2 errors for other outputs. In deep models with flat
logits, as with random weights, flips alone make more: a KL(trained || artifact) beyond that bound may still be
NOISE_FACTOR times what noise of NOISE in its vectors (biases, gains) does to the trained model itself, the largest of
three draws. And predictions must agree wherever the margin between the two best logits exceeds twice the largest error
seen on another half of the inputs (or twice the share sqrt(KL_FRACTION) of quantization's own error there: a single
flip may not occur in that half). What is not quantized must agree to float rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import artifact, engines
from .distill import logits_of
from .loaded import structure

KL_FRACTION = 0.1
ERROR_FRACTION = 0.5
ROUNDING = 1e-3  # relative L2 error that float reordering alone may cause
SMALL_KL = 1e-6  # nats; below it a ratio of divergences means nothing
NOISE = 1e-6  # relative; what another order of float operations does to sums of about a thousand products
NOISE_FACTOR = 2.0

Call = Callable[[Any], Any]  # inputs -> output


class DriftError(RuntimeError):
    """The exported program does not compute what was trained; nothing was replaced."""


@dataclass
class Verification:
    """Figures of one program against the eager models, all on the same inputs.

    Attributes:
        kl_trained, kl_plain: nats a position; `None` where the model puts out no logits.
        kl_noise: KL(trained || trained with noise), where it was needed to judge `kl_trained`.
        error_trained, error_plain: relative L2 error of the float outputs.
        margin: logit margin above which predictions must agree, from the errors of the calibration half.
        agreement: share of positions of the test half with the same prediction, and of those over the margin.
    """

    positions: int
    error_trained: float
    error_plain: float
    kl_trained: float | None = None
    kl_plain: float | None = None
    kl_noise: float | None = None
    margin: float | None = None
    agreement: float | None = None
    agreement_over_margin: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for the manifest."""
        return {**asdict(self), "kl_fraction_allowed": KL_FRACTION}


def verify(
    inputs: Sequence[Any],
    artifact: Call,
    trained: Call,
    plain: Call | None,
    name: str,
    noisy: Callable[[int], Call] | None = None,
) -> Verification:
    """Compares a program with the eager models on `inputs`.

    Args:
        plain: the unquantized model; `None` when nothing is quantized.
        noisy: the trained model with noise, from a seed (see `with_noise`).

    Raises:
        DriftError: the program computes something else; the message holds the figures.
    """
    with torch.no_grad():
        answers = [[call(x) for x in inputs] for call in (artifact, trained, plain or trained)]
    alone = isinstance(answers[0][0], Tensor)  # a causal LM's program gives its logits only
    ours, fake, full = ([_tensors(y, x, alone) for y, x in zip(a, inputs, strict=True)] for a in answers)
    if any(not torch.isfinite(t).all() for batch in ours for t in batch):
        raise DriftError(f"the {name} program puts out NaN or infinite values on held-out inputs")
    result = Verification(sum(b[0].shape[:-1].numel() for b in ours), _error(ours, fake), _error(ours, full))
    if plain is None:
        _check_error(result.error_trained, ROUNDING, f"float rounding explains {ROUNDING:g}", name)
        return result
    logits = int(_logits(answers[0][0], inputs[0]) is not None)
    rest = [[batch[logits:] for batch in outputs] for outputs in (ours, fake, full)]
    allowed = max(ERROR_FRACTION * _error(rest[0], rest[2]), ROUNDING)
    explained = f"{allowed:.2g} allowed ({ERROR_FRACTION} of its error against the float model)"
    _check_error(_error(rest[0], rest[1]), allowed, explained, name)
    if logits:
        ours_PV, trained_PV, plain_PV = (torch.cat([b[0].flatten(0, -2) for b in o]) for o in (ours, fake, full))


        def noise() -> float:
            draws = [noisy(seed) for seed in range(3)] if noisy else []
            with torch.no_grad():
                return max((_kl(trained_PV, _all_logits(draw, inputs)) for draw in draws), default=0.0)

        _compare_logits(result, ours_PV, trained_PV, plain_PV, name, noise)
    return result


def with_noise(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model whose vectors (biases, gains of normalization) are multiplied by 1 + NOISE * normal."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() < 2):
            parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator))
    return model


def _all_logits(call: Call, inputs: Sequence[Any]) -> Tensor:
    logits = (_logits(call(x), x) for x in inputs)
    return torch.cat([batch.detach().float().flatten(0, -2) for batch in logits if batch is not None])


def _check_error(error: float, allowed: float, explained: str, name: str) -> None:
    if not error <= allowed:  # so that NaN fails
        raise DriftError(f"the {name} program drifted: relative error {error:.2g} of its outputs, {explained}")


def _compare_logits(
    result: Verification,
    ours_PV: Tensor,
    trained_PV: Tensor,
    plain_PV: Tensor,
    name: str,
    noise: Callable[[], float],
) -> None:
    result.kl_trained, result.kl_plain = _kl(trained_PV, ours_PV), _kl(plain_PV, ours_PV)
    if not result.kl_trained <= max(KL_FRACTION * result.kl_plain, SMALL_KL):
        result.kl_noise = noise()
        if not result.kl_trained <= NOISE_FACTOR * result.kl_noise:
            raise DriftError(
                f"the {name} program drifted: KL(trained || artifact) is {result.kl_trained:.2g} nats, more than "
                f"{KL_FRACTION} of KL(float || artifact), {result.kl_plain:.2g}, and than {NOISE_FACTOR} times what "
                f"noise of {NOISE:g} does to the trained model, {result.kl_noise:.2g}"
            )
    half = len(ours_PV) // 2
    if half == 0:
        return
    error, error_plain = ((ours_PV[:half] - other[:half]).abs().max().item() for other in (trained_PV, plain_PV))
    result.margin = 2 * max(error, KL_FRACTION**0.5 * error_plain)
    top2 = trained_PV[half:].topk(2).values
    over = (top2[:, 0] - top2[:, 1]) > result.margin
    same = ours_PV[half:].argmax(-1) == trained_PV[half:].argmax(-1)
    result.agreement = same.float().mean().item()
    result.agreement_over_margin = same[over].float().mean().item() if over.any() else 1.0
    if result.agreement_over_margin < 1.0:
        raise DriftError(
            f"the {name} program predicts otherwise than the trained model at {1 - result.agreement_over_margin:.1%} "
            f"of the positions whose margin exceeds {result.margin:.2g}"
        )


def _logits(output: Any, inputs: Any) -> Tensor | None:
    """Logits of two classes or more; of padding none, for what a model puts out there means nothing."""
    logits = logits_of(output)
    if logits is None or logits.shape[-1] < 2:
        return None
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:-1] else logits


def _tensors(output: Any, inputs: Any, alone: bool) -> list[Tensor]:
    """The float tensors of an output (others where it has none), the logits first or alone."""
    from .capture import flatten_output

    logits = _logits(output, inputs)
    first = [] if logits is None else [logits]
    rest = [] if first and alone else [t for t in flatten_output(output)[0] if not first or t is not logits_of(output)]
    rest = [torch.view_as_real(t) if t.is_complex() else t for t in rest]
    floats = [t for t in [*first, *rest] if t.is_floating_point()]
    return [t.detach().float() for t in floats or rest]


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
    for entry in manifest["programs"]:
        reason = engines.get(entry["engine"]).unusable(entry)
        if reason is not None:
            lines.append(f"{entry['engine']}: not run: {reason}")
            continue
        error = _golden_again(directory, entry, golden)
        lines.append(f"{entry['engine']}: golden inputs again, relative error {error:.2g}")
    return lines


def _golden_again(directory: Path, entry: dict[str, Any], golden: Mapping[str, Tensor]) -> float:
    """Relative error against the golden outputs; another machine may round activations otherwise, as far as allowed."""
    inputs = {n.removeprefix("input."): t.clone() for n, t in golden.items() if n.startswith("input.")}
    outputs = [golden[f"output.{i}"] for i in range(sum(name.startswith("output.") for name in golden))]
    answers = artifact.load(directory, engine=entry["engine"])(**inputs), structure(entry["outputs"], outputs)
    ours, expected = ([_tensors(answer, inputs, alone=False)] for answer in answers)
    error, error_plain = _error(ours, expected), (entry.get("verification") or {}).get("error_plain", 0.0)
    allowed = max(ERROR_FRACTION * error_plain, ROUNDING)
    _check_error(error, allowed, f"{allowed:.2g} allowed", entry["engine"])
    return error


def _digest(item: Mapping[str, Any]) -> dict[str, str]:
    return {"name": item["file"], "digest": item["sha256"]}
