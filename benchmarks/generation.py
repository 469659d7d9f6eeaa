"""Are generated tokens those of transformers? Greedy, 20 prompts, 200 tokens each, of real and of small random models.

    python benchmarks/real_data.py                                                  # downloads, once
    python benchmarks/generation.py smollm2 whisper --out out/generation
    python benchmarks/generation.py gpt2 qwen gemma mistral t5 bart marian --out out/generation

No token ends an answer, and none is suppressed. In float32, through the portable and the compiled program: how many
prompts have all tokens equal, and where the first others are, by how much transformers' two best logits differ there,
beside the largest error of the program's logits on transformers' own tokens, read at once. Two tokens whose logits are
nearer than twice that error may be exchanged, no others.

Quantized, through the compiled program: the same count; then teacher-forced on transformers' tokens, the KL divergence
and the share of positions with the same best token, against the quantized model in eager (which has to agree) and
against float32 (what quantization changed). Where codes flip, the quantized model is far from itself too: beside it
stands the KL of the eager model with the noise that verification has (`lightning_accel.verify`).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import provenance
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel import QuantConfig, export_model, load, quantize_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.verify import NOISE, with_noise

VOCABULARY, POSITIONS = 997, 512
SCHEMES = ("int8", "int4-weight", "int4-int8")
Given = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A network, its prompts or sources one by one, and the tokens that an answer begins with, of encoder-decoders."""

    build: Callable[[], Any]
    prompts: Callable[[int], list[Given]]
    begin: tuple[int, ...] = ()


# --- small random models ----------------------------------------------------------------------------------------------


def _random(kind: str, config: str, **sizes: Any) -> Callable[[], Any]:
    """A network of transformers with weights large enough that tokens depend on the whole context."""

    def make() -> Any:
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=VOCABULARY, **sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
        return model

    return make


def _ids(count: int) -> list[Given]:
    """Random ids, 4 to 32 of them."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 33, (count,), generator=draw).tolist()
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, n), generator=draw)} for n in lengths]


_GPT2 = dict(n_embd=128, n_layer=4, n_head=4, n_positions=POSITIONS)
_LLAMA = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
_BART = dict(
    d_model=128, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=256, decoder_ffn_dim=256,
    encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=POSITIONS,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
_T5 = dict(d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, pad_token_id=0, decoder_start_token_id=1)


# --- trained models ---------------------------------------------------------------------------------------------------


def _smollm2() -> nn.Module:
    from real_models import smollm2

    return smollm2()


def _texts(count: int) -> list[Given]:
    """Beginnings of blocks of the Brown corpus, 4 to 42 tokens."""
    import quality_tasks as q

    task = q.TASKS["smollm2"]
    rows = [row for b in q.load_brown(task.settings).test for row in b["input_ids"]]
    return [{"input_ids": rows[i * 3][None, : 4 + 2 * i]} for i in range(count)]


def _whisper() -> nn.Module:
    from real_speech import whisper

    return whisper()


def _speech(count: int) -> list[Given]:
    """The longest recordings."""
    from real_speech import clips, features

    chosen = sorted(clips(), key=lambda clip: -len(clip.samples))[:count]
    return [{"input_features": features([clip.samples])} for clip in chosen]


MODELS = {
    "smollm2": Model(_smollm2, _texts),
    "whisper": Model(_whisper, _speech, (50257, 50362)),  # real_speech.PROMPT
    "gpt2": Model(_random("GPT2LMHeadModel", "GPT2Config", **_GPT2), _ids),
    "qwen": Model(_random("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=32), _ids),
    "gemma": Model(_random("GemmaForCausalLM", "GemmaConfig", **_LLAMA, head_dim=32), _ids),
    "mistral": Model(_random("MistralForCausalLM", "MistralConfig", **_LLAMA, sliding_window=64), _ids),
    "t5": Model(_random("T5ForConditionalGeneration", "T5Config", **_T5), _ids, (1,)),
    "bart": Model(_random("BartForConditionalGeneration", "BartConfig", **_BART), _ids, (1,)),
    "marian": Model(_random("MarianMTModel", "MarianConfig", **_BART, decoder_vocab_size=VOCABULARY), _ids, (1,)),
}  # fmt: skip


# --- tokens and logits ------------------------------------------------------------------------------------------------


@torch.no_grad()
def theirs(model: Any, given: Given, begin: tuple[int, ...], new: int) -> Tensor:
    """The new tokens of transformers' greedy search, [new]; the model's own ends and suppressed tokens are cleared."""
    config = model.generation_config
    config.eos_token_id = config.forced_eos_token_id = config.suppress_tokens = config.begin_suppress_tokens = None
    options = {"decoder_input_ids": torch.tensor([begin])} if begin else {}
    if "input_ids" in given:
        options["attention_mask"] = torch.ones_like(given["input_ids"])
    ids = model.generate(
        **given, **options, max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1, pad_token_id=0
    )
    return ids[0, -new:]


def ours(program: Any, given: Given, begin: tuple[int, ...], new: int) -> Tensor:
    """The program's, [new]."""
    options: dict[str, Any] = {"decoder_input_ids": list(begin)} if begin else {}
    return program.generate(**given, **options, max_new_tokens=new, stop=())[0]


@torch.no_grad()
def logits(call: Any, given: Given, begin: tuple[int, ...], tokens: Tensor) -> Tensor:
    """Those that chose each of the tokens, teacher-forced, [new, vocabulary]."""
    if begin:
        found = call(**given, decoder_input_ids=torch.cat([torch.tensor(begin), tokens[:-1]])[None])
    else:
        found = call(input_ids=torch.cat([given["input_ids"][0], tokens[:-1]])[None])
    return (found if isinstance(found, Tensor) else found["logits"])[0, -len(tokens) :].float()


def first_difference(a: Tensor, b: Tensor) -> int | None:
    """Where two rows of tokens begin to differ."""
    return int((a != b).nonzero()[0]) if (a != b).any() else None


def float_row(model: Any, program: Any, prompts: list[Given], expected: list[Tensor], begin: tuple[int, ...]) -> str:
    """Equal prompts, first differences with the gap there, and twice the largest error of logits."""
    equal, gaps, error = 0, [], 0.0
    for given, tokens in zip(prompts, expected, strict=True):
        reference = logits(model, given, begin, tokens)
        error = max(error, (logits(program, given, begin, tokens) - reference).abs().max().item())
        at = first_difference(ours(program, given, begin, len(tokens)), tokens)
        if at is None:
            equal += 1
        else:
            best = reference[at].topk(2).values
            gaps.append((at, (best[0] - best[1]).item()))
    found = "; ".join(f"token {at}, gap {gap:.1e}" for at, gap in gaps) or "none"
    verdict = "" if all(gap < 2 * error for _, gap in gaps) else " **beyond the error**"
    return f"{equal} of {len(prompts)} | {found}{verdict} | {2 * error:.1e}"


def quantized_row(
    model: Any, eager: Any, program: Any, prompts: list[Given], expected: list[Tensor], begin: tuple[int, ...]
) -> str:
    """Equal prompts; KL and agreement with the quantized model in eager; KL of that with noise; both with float32."""
    equal, sums, positions, noisy = 0, torch.zeros(5, dtype=torch.float64), 0, with_noise(eager, 0)
    for given, tokens in zip(prompts, expected, strict=True):
        equal += first_difference(ours(program, given, begin, len(tokens)), tokens) is None
        found, own, disturbed, exact = (logits(call, given, begin, tokens) for call in (program, eager, noisy, model))
        sums += torch.stack([*_compared(found, own), _compared(disturbed, own)[0], *_compared(found, exact)])
        positions += len(tokens)
    kl, same, kl_noise, kl_float, same_float = (sums / positions).tolist()
    agreed = f"{kl:.1e} | {100 * same:.2f} % | {kl_noise:.1e}"
    return f"{equal} of {len(prompts)} | {agreed} | {kl_float:.1e} | {100 * same_float:.2f} %"


def _compared(found: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || found) in nats, and how often the best token is the same, summed over positions."""
    logs = [F.log_softmax(x.double(), -1) for x in (found, reference)]
    kl = F.kl_div(*logs, log_target=True, reduction="sum")
    return kl, (found.argmax(-1) == reference.argmax(-1)).sum().double()


def table(name: str, out: Path, count: int, new: int, schemes: list[str]) -> str:
    """Both tables of a model; its artifacts are written unless they are there."""
    of = MODELS[name]
    model, prompts = of.build().eval(), of.prompts(count)
    expected = [theirs(model, given, of.begin, new) for given in prompts]
    different = len({token for tokens in expected for token in tokens.tolist()})
    example = dict(prompts[0])
    rows = [f"{name}: {len(prompts)} prompts, {new} tokens each, {different} different ones\n",
            "| float32 | equal | first differences | twice the error |", "|---|---|---|---|"]  # fmt: skip
    for engine in ("portable", "aoti"):
        program = load(built(model, out / name / "float", example, None), engine=engine)
        rows.append(f"| {engine} | {float_row(model, program, prompts, expected, of.begin)} |")
    heads = f"equal | KL to quantized eager | same best | KL of noise {NOISE:g} | KL to float32 | same best"
    rows += ["", f"| aoti | {heads} |", "|---|---|---|---|---|---|---|"] if schemes else []
    for scheme in schemes:
        folder = built(model, out / name / scheme, example, QuantConfig(scheme))
        eager = quantize_model(model, QuantConfig(scheme)).eval()
        found = quantized_row(model, eager, load(folder, engine="aoti"), prompts, expected, of.begin)
        rows.append(f"| {scheme} | {found} |")
    return "\n".join(rows) + "\n"


def built(model: Any, folder: Path, example: Given, quantize: QuantConfig | None) -> Path:
    """The artifact's folder."""
    if not (folder / MANIFEST).exists():
        engines = ("portable", "aoti") if quantize is None else ("aoti",)
        export_model(model, folder, example_inputs=example, quantize=quantize, engines=engines, measure=False)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("out/generation"))
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="transformers|torch|copyreg")
    for name in options.models or MODELS:
        print(table(name, options.out, options.prompts, options.tokens, options.schemes), flush=True)
    print(provenance(torch.get_num_threads()))


if __name__ == "__main__":
    main()
