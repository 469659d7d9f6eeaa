"""Word error rates of Whisper's artifacts, each as it is deployed, against the float one.

    lightning-accel run benchmarks/inference.py whisper --build --engines aoti --out out/inference
    lightning-accel run benchmarks/transcripts.py --out out/inference

The test clips of `distillation.py`, which nothing was calibrated on: each text once, numbers as words. Greedy, through
`transcribe`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from distillation_speech import SPEECH, clips_of
from inference import MODELS
from quality_report import paired
from real_speech import RATE
from tables import coverage, file_name, provenance
from word_errors import word_errors, words

from lightning_accel import load
from lightning_accel.artifact import MANIFEST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/inference"), help="of inference.py")
    parser.add_argument("--engine", default="aoti")
    parser.add_argument("--clips", type=int, default=SPEECH.settings.test)
    options = parser.parse_args()
    clips = clips_of(SPEECH.settings)[2][: options.clips]
    folders = {scheme: options.out / "whisper" / file_name(scheme) for scheme in ("float", *MODELS["whisper"].schemes)}
    missing = [str(folder) for folder in folders.values() if not (folder / MANIFEST).exists()]
    if missing:
        raise SystemExit(f"no artifact at {', '.join(missing)}; run inference.py whisper --build --out {options.out}")
    print(f"| whisper, {options.engine} | WER % | - float, 95 % | clips with other words | covers |")
    print("|---|---|---|---|---|")
    first: tuple[torch.Tensor, list[str]] | None = None
    for scheme, folder in folders.items():
        model = load(folder, engine=options.engine)
        heard = [model.transcribe(clip.samples, sampling_rate=RATE) for clip in clips]
        counts = torch.tensor([word_errors(clip.text, text) for clip, text in zip(clips, heard, strict=True)])
        errors = 100 * counts[:, 0] / counts[:, 1].float().mean()  # of each clip: their mean is the word error rate
        first = first or (errors, heard)
        mean, half = paired((errors - first[0])[None])
        other = sum(words(one) != words(two) for one, two in zip(heard, first[1], strict=True))
        difference, covered = ("", "") if scheme == "float" else (f"{mean:+.2f} +- {half:.2f}", coverage(folder))
        print(f"| {scheme} | {errors.mean():.2f} | {difference} | {other} | {covered} |", flush=True)
    spoken = int(counts[:, 1].sum())
    print(f"\n{len(clips)} clips, {spoken} words. The interval is over clips, of these artifacts only.")
    print(provenance(torch.get_num_threads()))


if __name__ == "__main__":
    main()
