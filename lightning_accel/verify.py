"""Is what was exported what was trained? Contract 4, on held-out inputs.

`trained` is the eager model as training left it (fake-quantized), `plain` the same weights without fake quantization,
`artifact` the loaded program. Rounding flips amplify through layers, so whole models are compared statistically:

    KL(trained || artifact) <= KL_FRACTION * KL(plain || artifact)

for logits, ERROR_FRACTION in place of KL_FRACTION with relative L2 errors for other outputs. In deep models with flat
logits, as with random weights, flips alone make more: a divergence or error beyond that bound may still be
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
from .calls import structure
from .distill import logits_of
from .generate import forward, forward_seq2seq
from .loaded import LoadedModel, LoadedSeq2Seq

KL_FRACTION = 0.1
ERROR_FRACTION = 0.5
ROUNDING = 1e-3  # relative L2 error that float reordering alone may cause
SMALL_KL = 1e-6  # nats; below it a ratio of divergences means nothing
NOISE = 1e-6  # relative; what another order of float operations does to sums of about a thousand products
NOISE_FACTOR = 2.0
STEPS = 3  # of a decoder's golden tokens, the last so many are read again one by one
READS = (
    ". A likely cause is a model that uses the weight of a quantized module without calling it, as "
    "F.linear(x, self.embedding.weight) does, which training does not round; write overrides={'embedding': None}"
)

Call = Callable[[Any], Any]  # inputs -> output


class DriftError(RuntimeError):
    """The exported program does not compute what was trained; nothing was replaced."""


@dataclass
class Verification:
    """Figures of one program against the eager models, all on the same inputs.

    Attributes:
        kl_trained, kl_plain: nats a position; `None` where the model puts out no logits.
        kl_noise, error_noise: KL(trained || trained with noise), and the relative error, where they were needed.
        error_trained, error_plain: relative L2 error of the float outputs.
        margin: logit margin above which predictions must agree, from the errors of the calibration half.
        agreement: share of positions of the test half with the same prediction, and of those over the margin.
        over_margin: share of positions of the test half that are over the margin.
    """

    positions: int
    error_trained: float
    error_plain: float
    kl_trained: float | None = None
    kl_plain: float | None = None
    kl_noise: float | None = None
    error_noise: float | None = None
    margin: float | None = None
    agreement: float | None = None
    agreement_over_margin: float | None = None
    over_margin: float | None = None

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
    """Compares a program with the eager models on `inputs`, one batch in memory at a time.

    Args:
        plain: the unquantized model; `None` when nothing is quantized.
        noisy: the trained model with noise, from a seed (see `with_noise`).

    Raises:
        DriftError: the program computes something else; the message holds the figures.
    """
    tally = _tally(inputs, artifact, trained, plain)
    if not tally.finite:
        raise DriftError(f"the {name} program puts out NaN or infinite values on held-out inputs")
    result = Verification(tally.positions, _error(tally.all_trained), _error(tally.all_plain))
    if plain is None:
        _check_error(result.error_trained, ROUNDING, f"float rounding explains {ROUNDING:g}", name)
        return result
    try:
        noises = (lambda: _noise_error(inputs, trained, noisy)), (lambda: _noise(inputs, trained, noisy))
        _check_quantized(result, tally, name, *noises)
    except DriftError as error:
        raise DriftError(f"{error}{READS}") from None
    return result


def compare(inputs: Sequence[Any], artifact: Call, trained: Call, plain: Call | None) -> Verification:
    """The figures of `verify` without its demands: what rounding activations otherwise than in training changes."""
    tally = _tally(inputs, artifact, trained, plain)
    result = Verification(tally.positions, _error(tally.all_trained), _error(tally.all_plain))
    if tally.rows:
        rows = torch.cat(tally.rows)
        result.kl_trained, result.kl_plain = rows[:, :2].double().mean(0).tolist()
        result.agreement = rows[:, -1].mean().item()
    return result


@torch.no_grad()
def _tally(inputs: Sequence[Any], artifact: Call, trained: Call, plain: Call | None) -> _Tally:
    tally = _Tally()
    for x in inputs:
        answers = [call(x) for call in (artifact, trained, plain or trained)]
        alone = isinstance(answers[0], Tensor)  # a causal LM's program gives its logits only
        ours, fake, full = (_tensors(answer, x, alone) for answer in answers)
        tally.finite &= all(bool(torch.isfinite(t).all()) for t in ours)
        logits = int(_logits(answers[0], x) is not None)
        tally.add(ours, fake, full, logits if plain is not None else 0)
    return tally


def _check_quantized(
    result: Verification, tally: _Tally, name: str, noise_error: Callable[[], float], noise: Callable[[], float]
) -> None:
    allowed = max(ERROR_FRACTION * _error(tally.rest_plain), ROUNDING)
    explained = f"{allowed:.2g} allowed ({ERROR_FRACTION} of its error against the float model)"
    if not _error(tally.rest_trained) <= allowed:
        result.error_noise = noise_error()
        allowed = max(allowed, NOISE_FACTOR * result.error_noise)
        explained += f", noise of {NOISE:g} in the trained model makes {result.error_noise:.2g}"
    _check_error(_error(tally.rest_trained), allowed, explained, name)
    if tally.rows:
        _check_divergence(result, tally, name, noise)
        _check_predictions(result, tally, name)


class _Tally:
    """Sums over batches: [squared difference, squared size] of outputs, and a row of figures a position of logits."""

    def __init__(self) -> None:
        self.positions, self.finite = 0, True
        self.all_trained, self.all_plain, self.rest_trained, self.rest_plain = ([0.0, 0.0] for _ in range(4))
        self.rows: list[Tensor] = []  # [P, 6]: KL, KL, largest error, largest error, margin, same prediction

    def add(self, ours: list[Tensor], trained: list[Tensor], plain: list[Tensor], logits: int) -> None:
        self.positions += ours[0].shape[:-1].numel()
        for index, (a, b, c) in enumerate(zip(ours, trained, plain, strict=True)):
            rest = [(self.rest_trained, b), (self.rest_plain, c)] if index >= logits else []
            for sums, other in ((self.all_trained, b), (self.all_plain, c), *rest):
                sums[0] += float((a - other).square().sum())
                sums[1] += float(other.square().sum())
        if logits:
            flat = (t[0].flatten(0, -2).split(1024) for t in (ours, trained, plain))
            self.rows += [_figures(*chunk) for chunk in zip(*flat, strict=True)]


def _figures(ours_PV: Tensor, trained_PV: Tensor, plain_PV: Tensor) -> Tensor:
    top2_P2 = trained_PV.topk(2).values
    columns = (
        _kl(trained_PV, ours_PV),
        _kl(plain_PV, ours_PV),
        (ours_PV - trained_PV).abs().amax(-1),
        (ours_PV - plain_PV).abs().amax(-1),
        top2_P2[:, 0] - top2_P2[:, 1],
        (ours_PV.argmax(-1) == trained_PV.argmax(-1)).float(),
    )
    return torch.stack(columns, -1)


def _check_error(error: float, allowed: float, explained: str, name: str) -> None:
    if not error <= allowed:  # so that NaN fails
        raise DriftError(f"the {name} program drifted: relative error {error:.2g} of its outputs, {explained}")


def _check_divergence(result: Verification, tally: _Tally, name: str, noise: Callable[[], float]) -> None:
    result.kl_trained, result.kl_plain = torch.cat(tally.rows)[:, :2].double().mean(0).tolist()
    if result.kl_trained <= max(KL_FRACTION * result.kl_plain, SMALL_KL):
        return
    result.kl_noise = noise()
    if not result.kl_trained <= NOISE_FACTOR * result.kl_noise:
        raise DriftError(
            f"the {name} program drifted: KL(trained || artifact) is {result.kl_trained:.2g} nats, more than "
            f"{KL_FRACTION} of KL(float || artifact), {result.kl_plain:.2g}, and than {NOISE_FACTOR} times what noise "
            f"of {NOISE:g} does to the trained model, {result.kl_noise:.2g}"
        )


def _check_predictions(result: Verification, tally: _Tally, name: str) -> None:
    _, _, error_P, error_plain_P, gap_P, same_P = torch.cat(tally.rows).unbind(-1)
    half = len(gap_P) // 2
    if half == 0:
        return
    result.margin = 2 * max(error_P[:half].max().item(), KL_FRACTION**0.5 * error_plain_P[:half].max().item())
    same, over = same_P[half:], gap_P[half:] > result.margin
    result.agreement, result.over_margin = same.mean().item(), over.float().mean().item()
    result.agreement_over_margin = same[over].mean().item() if over.any() else 1.0
    if result.agreement_over_margin < 1.0:
        raise DriftError(
            f"the {name} program predicts otherwise than the trained model at {1 - result.agreement_over_margin:.1%} "
            f"of the positions whose margin exceeds {result.margin:.2g}"
        )


def with_noise(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model whose vectors (biases, gains of normalization) are multiplied by 1 + NOISE * normal."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() < 2):
            parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def _noise(inputs: Sequence[Any], trained: Call, noisy: Callable[[int], Call] | None) -> float:
    """The largest KL(trained || trained with noise), in nats, of three draws."""
    draws = [noisy(seed) for seed in range(3)] if noisy else []
    rows: list[list[Tensor]] = [[] for _ in draws]
    for x in inputs:
        answers = [_logits(call(x), x) for call in (trained, *draws)]
        if answers[0] is not None:
            expected, *others = (t.detach().float().flatten(0, -2) for t in answers if t is not None)
            for row, other in zip(rows, others, strict=True):
                row.append(_kl(expected, other))
    return max((torch.cat(row).mean().item() for row in rows if row), default=0.0)


@torch.no_grad()
def _noise_error(inputs: Sequence[Any], trained: Call, noisy: Callable[[int], Call] | None) -> float:
    """The largest relative error of outputs beside logits that noise makes in the trained model, of three draws."""
    draws = [noisy(seed) for seed in range(3)] if noisy else []
    tallies = [_Tally() for _ in draws]
    for x in inputs:
        expected = trained(x)
        logits = int(_logits(expected, x) is not None)
        tensors = _tensors(expected, x, alone=False)
        for tally, draw in zip(tallies, draws, strict=True):
            other = _tensors(draw(x), x, alone=False)
            tally.add(other[logits:], tensors[logits:], tensors[logits:], 0)
    return max((_error(tally.all_trained) for tally in tallies), default=0.0)


def _logits(output: Any, inputs: Any) -> Tensor | None:
    """Logits of two classes or more; of padding none, for what a model puts out there means nothing."""
    logits = logits_of(output)
    if logits is None or logits.shape[-1] < 2:
        return None
    given = inputs if isinstance(inputs, Mapping) else {}
    mask = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
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


def _error(sums: Sequence[float]) -> float:
    return (sums[0] / max(sums[1], 1e-30)) ** 0.5


def _kl(p_PV: Tensor, q_PV: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of each position [P], in nats."""
    p, q = torch.log_softmax(p_PV, -1), torch.log_softmax(q_PV, -1)
    return (p.exp() * (p - q)).sum(-1)


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
    for entry in manifest["programs"]:  # those too that cannot run here
        for item in artifact.program_files(entry):
            artifact.check_file(directory, **_digest(item))
    lines = [f"files: {len(list(directory.iterdir()))}, hashes as written"]
    for entry in artifact.answering(manifest):
        reason = engines.get(entry["engine"]).unusable(entry)
        if reason is not None:
            lines.append(f"{entry['engine']}: not run: {reason}")
            continue
        error = verify_golden(artifact.load(directory, engine=entry["engine"]), golden)
        lines.append(f"{entry['engine']}: golden inputs again, relative error {error:.2g}")
    return lines


def verify_golden(model: LoadedModel, golden: Mapping[str, Tensor] | None = None) -> float:
    """Relative error against the golden outputs; another machine may round activations otherwise, as far as allowed.

    A decoder reads the golden inputs at once, and once more with the last tokens one by one behind its cache.

    Raises:
        DriftError: larger than that.
    """
    if golden is None:
        golden = artifact.load_weights(artifact.check_file(model.directory, **_digest(model.manifest["golden"])))
    entry = model.entry
    inputs = {n.removeprefix("input."): t.clone() for n, t in golden.items() if n.startswith("input.")}
    own = f"{entry['engine']}.output."
    prefix = own if any(name.startswith(own) for name in golden) else "output."
    outputs = [golden[f"{prefix}{i}"] for i in range(sum(name.startswith(prefix) for name in golden))]
    golden_answer = structure(entry["outputs"], outputs)
    answers = [model(**inputs)] + ([_decoded(model, inputs)] if entry["cache"] is not None else [])
    expected = _tensors(golden_answer, inputs, alone=False)
    allowed = max(ERROR_FRACTION * (entry.get("verification") or {}).get("error_plain", 0.0), ROUNDING)
    errors = []
    for answer in answers:
        tally = _Tally()
        tally.add(_tensors(answer, inputs, alone=False), expected, expected, 0)
        errors.append(_error(tally.all_trained))
        _check_error(errors[-1], allowed, f"{allowed:.2g} allowed", entry["engine"])
    return max(errors)


def _decoded(model: LoadedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits as `model(**inputs)` gives them, the last ones from steps of one token."""
    if isinstance(model, LoadedSeq2Seq):
        source = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
        return forward_seq2seq(model, source, inputs["decoder_input_ids"], singly=STEPS)
    return forward(model, inputs["input_ids"], inputs.get("attention_mask"), singly=STEPS)


def _digest(item: Mapping[str, Any]) -> dict[str, str]:
    return {"name": item["file"], "digest": item["sha256"]}
