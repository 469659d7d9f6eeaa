"""What the benchmarks read: words and their errors by hand, a file made here, and the real files where they are."""

from __future__ import annotations

import doctest
import importlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 1, or 12; then 100.", "press one or twelve then one hundred"),
        ("dial 8500 or 1,234", "dial eight thousand five hundred or one thousand two hundred thirty four"),
        ("28.8 kilobit, 007 and 5551234", "twenty eight point eight kilobit zero zero seven and five five five one two "
                                          "three four"),
        ("the 1st, 22nd, 40th and 112th", "the first twenty second fortieth and one hundred twelfth"),
        ("Pay $2.50 or $1 for 50%", "pay two dollars and fifty cents or one dollar for fifty percent"),
        ("You're muted; I can't, won't and don't.", "you are muted i can not will not and do not"),
        ("It\u2019s [a beep] Inter-Asterisk (quietly) OK...", "it is inter asterisk okay"),
        ("[ascending tones]", ""),
        ("3D audio", "three d audio"),
    ],
)  # fmt: skip
def test_texts_that_sound_alike_have_the_same_words(text: str, expected: str) -> None:
    from word_errors import words

    assert " ".join(words(text)) == expected
    assert words(expected) == expected.split(), "normalizing twice changes nothing"


@pytest.mark.parametrize(
    ("said", "heard", "errors", "length"),
    [
        ("press one now", "Press 1, now!", 0, 3),
        ("press one now", "press now", 1, 3),
        ("press one now", "please press one now", 1, 3),
        ("press one now", "press two now", 1, 3),
        ("press one now", "", 3, 3),
        ("a b c d", "b c d a", 2, 4),
        ("yes", "no no no", 3, 1),
    ],
)
def test_word_errors_are_the_fewest_that_turn_one_text_into_the_other(
    said: str, heard: str, errors: int, length: int
) -> None:
    from word_errors import word_errors

    assert word_errors(said, heard) == (errors, length)


@pytest.mark.parametrize("name", ["word_errors"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted >= 4 and result.failed == 0


def test_tensors_of_a_ctranslate2_file_are_read_with_their_aliases(tmp_path: Path) -> None:
    from real_speech import read_ct2

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    number = np.array(4, dtype=np.int16)
    file = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    for name, array, kind in (("a/weight", half, 4), ("a/heads", number, 2)):
        file += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        file += struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    (tmp_path / "model.bin").write_bytes(file + struct.pack("<I", 1) + text("b/weight") + text("a/weight"))
    read = read_ct2(tmp_path / "model.bin")
    assert read.keys() == {"a/weight", "a/heads", "b/weight"} and int(read["a/heads"]) == 4
    assert read["b/weight"].dtype == np.float16 and (read["b/weight"] == half).all()


@pytest.mark.parametrize("reader", ["real_speech.clips", "real_speech.whisper", "real_models.efficientnet"])
def test_a_missing_download_raises_with_the_command(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = reader.partition(".")
    read: Any = getattr(importlib.import_module(module), name)
    monkeypatch.setenv("LIGHTNING_ACCEL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"run: python benchmarks/real_data\.py "):
        getattr(read, "__wrapped__", read)()


def test_a_package_that_is_not_the_one_that_was_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import real_data

    monkeypatch.setenv("LIGHTNING_ACCEL_DATA", str(tmp_path))
    monkeypatch.setitem(real_data.PACKAGES, "other", real_data.Package(("cp", __file__, "."), "0" * 64, "x"))
    with pytest.raises(ValueError, match=rf"{Path(__file__).name} has sha256 [0-9a-f]+, expected 0+"):
        real_data.fetch("other")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


# --- the real files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fetched() -> Any:
    """Fetches packages, where there is a network; nothing is replaced by anything else."""
    import real_data

    def fetch(*names: str) -> None:
        for name in names:
            try:
                real_data.fetch(name)
            except (RuntimeError, OSError) as error:  # without a network, outside of continuous integration
                if os.environ.get("CI"):
                    raise
                pytest.skip(f"no real data: {error}")

    return fetch


@pytest.mark.slow
def test_whisper_hears_what_is_said_and_a_wrong_layout_would_not(fetched: Any) -> None:
    fetched("speech", "speech-text", "whisper")
    from real_speech import PROMPT, clips, features, whisper, whisper_processor
    from word_errors import word_errors

    spoken = clips()
    assert len(spoken) > 540 and 22 < sum(len(clip.samples) for clip in spoken) / 16000 / 60 < 25  # minutes
    model, processor = whisper(), whisper_processor()
    assert sum(p.numel() for p in model.parameters()) == 37_760_256
    longer = [clip for clip in spoken if len(clip.text.split()) >= 6][:40:5]
    config = model.generation_config
    config.max_length = 60
    ids = model.generate(features([clip.samples for clip in longer]))
    assert (ids[:, : len(PROMPT)] != PROMPT[0]).all(), "the prompt is no part of the answer"
    heard = processor.batch_decode(ids, skip_special_tokens=True)
    found = [word_errors(clip.text, text) for clip, text in zip(longer, heard, strict=True)]
    errors, words = map(sum, zip(*found, strict=True))
    assert errors / words < 0.12


@pytest.mark.slow
def test_efficientnet_sees_a_palace(fetched: Any) -> None:
    fetched("efficientnet", "efficientnet-module")
    from real_models import efficientnet
    from sklearn.datasets import load_sample_image

    image = torch.tensor(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533].float()
    image = torch.nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    model = efficientnet()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model((image - 127) / 128).argmax().item() == 698  # palace, of ImageNet's classes
        assert efficientnet(classes=10, size=64)(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
