"""Word error rates of Whisper's artifacts, each as it is deployed, against the float one.

    lightning-accel run benchmarks/inference.py whisper --build --engines aoti --out out/inference
    lightning-accel run benchmarks/transcripts.py --out out/inference

The test clips of `distillation.py`, which nothing was calibrated on: each text once, numbers as words. Greedy, through
`transcribe`.
"""

from __future__ import annotations

import argparse
import json
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


def transcripts(folder: Path, engine: str, count: int) -> list[str]:
    """What an artifact hears in the first of the test clips; kept beside the artifact, so that a run goes on."""
    path = folder.with_name(f"{folder.name}.{engine}.transcripts.json")
    heard: list[str] = json.loads(path.read_text()) if path.exists() else []
    clips = clips_of(SPEECH.settings)[2][:count]
    if len(heard) >= len(clips):
        return heard[: len(clips)]
    model = load(folder, engine=engine)
    for clip in clips[len(heard) :]:
        heard.append(model.transcribe(clip.samples, sampling_rate=RATE))
        path.write_text(json.dumps(heard))
    return heard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/inference"), help="of inference.py")
    parser.add_argument("--engine", default="aoti")
    parser.add_argument("--clips", type=int, default=SPEECH.settings.test)
    options = parser.parse_args()
    said = [clip.text for clip in clips_of(SPEECH.settings)[2][: options.clips]]
    folders = {scheme: options.out / "whisper" / file_name(scheme) for scheme in ("float", *MODELS["whisper"].schemes)}
    missing = [str(folder) for folder in folders.values() if not (folder / MANIFEST).exists()]
    if missing:
        raise SystemExit(f"no artifact at {', '.join(missing)}; run inference.py whisper --build --out {options.out}")
    print(f"| whisper, {options.engine} | WER % | - float, 95 % | clips with other words | covers |")
    print("|---|---|---|---|---|")
    first: tuple[torch.Tensor, list[str]] | None = None
    for scheme, folder in folders.items():
        heard = transcripts(folder, options.engine, options.clips)
        counts = torch.tensor([word_errors(*pair) for pair in zip(said, heard, strict=True)])
        errors = 100 * counts[:, 0] / counts[:, 1].float().mean()  # of each clip: their mean is the word error rate
        first = first or (errors, heard)
        mean, half = paired((errors - first[0])[None])
        other = sum(words(one) != words(two) for one, two in zip(heard, first[1], strict=True))
        difference, covered = ("", "") if scheme == "float" else (f"{mean:+.2f} +- {half:.2f}", coverage(folder))
        print(f"| {scheme} | {errors.mean():.2f} | {difference} | {other} | {covered} |")
    print(f"\n{len(said)} clips, {int(counts[:, 1].sum())} words. The interval is over clips, of these artifacts only.")
    print(provenance(torch.get_num_threads()))


if __name__ == "__main__":
    main()
