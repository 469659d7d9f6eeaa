"""The folder on disk: manifest, weights, programs; saving it whole or not at all, checking it, loading it.

Imports torch and the standard library only: an artifact is served without transformers, lightning or this
package's other dependencies. One copy of the weights, in the safetensors format, is mapped into memory and shared by
all programs of the folder and by all processes that load it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Run = Callable[[list[Tensor]], list[Tensor]]


class ArtifactError(ValueError):
    """An artifact is damaged, incomplete, of another version, or cannot run here; the message says what to do."""


class Output(dict):
    """Named outputs, as a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; this model has {', '.join(self)}") from None


# --- weights -------------------------------------------------------------------------------------------------------


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors in the safetensors format, the data aligned to 64 bytes where sizes allow it."""
    names = sorted(tensors, key=lambda n: (tensors[n].nbytes % 64 != 0, -tensors[n].element_size(), n))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped into memory (copy on write), not read.

    Raises:
        ArtifactError: the header does not describe the file.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file ({error}); export the model again") from error
    return tensors


# --- writing -------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_destination(directory: Path) -> None:
    """Raises unless an artifact can be written at `directory`: absent, empty, or an older artifact."""
    if directory.exists():
        if not directory.is_dir():
            raise FileExistsError(f"{directory} is a file; give Export another directory")
        if any(directory.iterdir()) and not (directory / MANIFEST).exists():
            raise FileExistsError(
                f"{directory} exists and is not an artifact (it has no {MANIFEST}); give Export another directory"
            )
    parent = next(p for p in (directory, *directory.parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, "the export directory cannot be written", str(parent))


class staging:
    """A sibling of `directory` to write into; renamed to `directory` when the block ends well, removed otherwise.

    The last good artifact stays until the new one is complete.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory.with_name(f".{directory.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        check_destination(self.directory)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        old = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.old")
        if self.directory.exists():
            self.directory.rename(old)
        self.path.rename(self.directory)
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest.json` last, so that a folder that has one is complete."""
    text = json.dumps({"format": FORMAT, **manifest}, indent=1, default=str)
    with open(directory / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# --- reading -------------------------------------------------------------------------------------------------------


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ArtifactError: none there, not readable, or written by a later version.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise ArtifactError(
            f"{directory} is not an artifact: it has no {MANIFEST}; write load('DIR') with the "
            "directory that Export or export_model wrote"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export the model again") from error
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version}, this version reads {FORMAT}; upgrade lightning_accel")
    return manifest


def check_file(directory: Path, name: str, digest: str) -> Path:
    """Path of a file of the artifact, after checking that it lies in it and is what was written.

    Raises:
        ArtifactError: outside the folder, missing, truncated or changed.
    """
    if Path(name).name != name:
        raise ArtifactError(f"the manifest names the file {name!r}, outside the artifact; do not load it")
    path = directory / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the model again")
    if sha256(path) != digest:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the manifest's; export the model again")
    return path


def load(directory: str | Path, *, engine: str | None = None) -> LoadedModel:
    """Loads an artifact with torch alone; nothing is compiled and nothing unpickled.

    The compiled program is used where this machine and torch can run it, else the portable one, with a warning.

    Args:
        directory: what Export or export_model wrote.
        engine: `"aoti"` or `"portable"`; `None` takes the first that runs here.

    Returns:
        a callable model; a causal language model has `.generate` too.

    Raises:
        ArtifactError: damaged, of another version, or no program of it runs here.
    """
    from . import engines

    directory = Path(directory)
    manifest = read_manifest(directory)
    entries = [p for p in manifest["programs"] if engine in (None, p["engine"])]
    if not entries:
        built = sorted({p["engine"] for p in manifest["programs"]})
        raise ArtifactError(
            f"the artifact has no {engine!r} program, only {built}; write load(dir, engine={built[0]!r})"
        )
    reasons: list[str] = []
    for entry in entries:
        reason = engines.get(entry["engine"]).unusable(entry)
        if reason is None:
            if reasons:
                warnings.warn(f"{'; '.join(reasons)}; serving the {entry['engine']} program instead", stacklevel=2)
            return _open(directory, manifest, entry)
        reasons.append(f"the {entry['engine']} program cannot run here: {reason}")
    raise ArtifactError(
        "; ".join(reasons) + "; export the model on this kind of machine, with engines=('aoti', "
        "'portable') to have a program that runs anywhere"
    )


def _open(directory: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> LoadedModel:
    from . import engines

    path = check_file(directory, entry["file"], entry["sha256"])
    tensors: dict[str, Tensor] = {}
    if entry.get("weights"):
        weights = manifest["weights"]
        tensors = load_weights(check_file(directory, weights["file"], weights["sha256"]))
        missing = set(entry["weights"].values()) - set(tensors)
        if missing:
            raise ArtifactError(f"{weights['file']} lacks {sorted(missing)[0]!r}; export the model again")
    run = engines.get(entry["engine"]).open(path, entry, tensors)
    return LoadedModel(directory, manifest, entry, run)


class LoadedModel:
    """An exported model: call it with the inputs that the manifest lists, by position or by name.

    Inputs are checked in Python before they reach the program, because compiled programs check nothing, and are never
    written to. Calls from several threads take turns.

    Attributes:
        directory, manifest: the artifact.
        engine: the engine that runs it.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], entry: dict[str, Any], run: Run) -> None:
        self.directory, self.manifest, self.entry = directory, manifest, entry
        self.engine: str = entry["engine"]
        self._run = run
        self._lock = threading.Lock()

    def __call__(self, *args: Tensor, **kwargs: Any) -> Any:
        """Outputs in the structure that the model had: a tensor, a tuple, or named outputs (`Output`).

        A causal language model takes `input_ids` [batch, length] and optionally `attention_mask` [batch, length]
        and gives logits [batch, length, vocabulary].

        Raises:
            ValueError: inputs of another number, name, dtype, device or shape than the program takes.
        """
        if self.entry["cache"] is not None:
            from . import generate

            return generate.forward(self, *args, **kwargs)
        return structure(self.entry["outputs"], self.run(bind(self.entry["inputs"], args, kwargs)))

    def generate(self, input_ids: Any, max_new_tokens: int = 32, **options: Any) -> Any:
        """Continues token ids with a KV cache; see `lightning_accel.generate.generate`."""
        if self.entry["cache"] is None:
            raise ValueError("this model has no KV cache, so it cannot generate; call it instead: model(input)")
        from . import generate

        return generate.generate(self, input_ids, max_new_tokens, **options)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Runs the program on checked flat inputs; the lock is held meanwhile."""
        with self._lock:
            return self._run(inputs)

    def asset(self, name: str) -> Path:
        """Path of a file that travels with the model, such as `tokenizer.json`, after checking it."""
        for asset in self.manifest.get("assets", ()):
            if asset["name"] == name:
                return check_file(self.directory, asset["file"], asset["sha256"])
        raise ValueError(f"no asset {name!r}; this artifact has {[a['name'] for a in self.manifest.get('assets', ())]}")

    def __repr__(self) -> str:
        inputs = ", ".join(
            f"{i['name']}{[d if isinstance(d, int) else d['name'] for d in i['shape']]}" for i in self.entry["inputs"]
        )
        return f"LoadedModel({str(self.directory)!r}, engine={self.engine!r}, inputs=({inputs}))"


def bind(specs: list[dict[str, Any]], args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Flat, contiguous, checked inputs in the program's order."""
    names = [spec["name"] for spec in specs]
    if len(args) > len(names):
        raise ValueError(f"{len(args)} inputs given, the model takes {len(names)}: {', '.join(names)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise ValueError(
                f"input {name!r} is {'given twice' if name in given else 'unknown'}; the model takes {', '.join(names)}"
            )
        given[name] = value
    missing = [name for name in names if given.get(name) is None]
    if missing:
        raise ValueError(f"input {missing[0]!r} is missing; the model takes {', '.join(names)}")
    sizes: dict[str, int] = {}
    return [check_input(spec, given[spec["name"]], sizes) for spec in specs]


def check_input(spec: dict[str, Any], value: Any, sizes: dict[str, int]) -> Tensor:
    """The input, contiguous, after checking dtype, device and shape; `sizes` collects the named dimensions."""
    name = spec["name"]
    if not isinstance(value, Tensor):
        raise ValueError(f"input {name!r} is a {type(value).__name__}; write torch.tensor(...)")
    dtype = getattr(torch, spec["dtype"])
    if value.dtype != dtype:
        raise ValueError(f"input {name!r} has dtype {value.dtype}, expected {dtype}; write {name}.to({dtype})")
    if value.device.type != "cpu":
        raise ValueError(f"input {name!r} is on {value.device}, the program runs on the CPU; write {name}.cpu()")
    shape = spec["shape"]
    expected = "[" + ", ".join(str(d) if isinstance(d, int) else d["name"] for d in shape) + "]"
    if value.dim() != len(shape):
        raise ValueError(f"input {name!r} has shape {list(value.shape)}, expected {expected}")
    for size, dim in zip(value.shape, shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise ValueError(f"input {name!r} has shape {list(value.shape)}, expected {expected}")
            continue
        if not dim["min"] <= size <= dim["max"]:
            raise ValueError(f"input {name!r} has {dim['name']} {size}, allowed is {dim['min']} to {dim['max']}")
        if sizes.setdefault(dim["name"], size) != size:
            raise ValueError(f"input {name!r} has {dim['name']} {size}, another input has {sizes[dim['name']]}")
    return value.detach().contiguous()


def structure(spec: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Flat outputs in the structure that the manifest describes."""
    kind = spec["type"]
    if kind == "tensor":
        return tensors[spec["index"]]
    if kind == "dict":
        return Output({name: structure(item, tensors) for name, item in spec["items"].items()})
    if kind == "none":
        return None
    items = [structure(item, tensors) for item in spec["items"]]
    return tuple(items) if kind == "tuple" else items
