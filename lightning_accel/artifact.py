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
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loaded import LoadedModel, LoadedSeq2Seq, at_threads

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FOLDERS = ("transformers",)  # engines whose program is a folder

_DTYPES = {
    "C64": torch.complex64,
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


class ArtifactError(ValueError):
    """An artifact is damaged, incomplete, of another version, or cannot run here; the message says what to do."""


# --- weights -------------------------------------------------------------------------------------------------------


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors in the safetensors format, the data aligned to 64 bytes where sizes allow it."""
    names = sorted(tensors, key=lambda n: (tensors[n].nbytes % 64 != 0, -tensors[n].element_size(), n))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which no artifact holds; convert it, as in x.float()")
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
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file ({error}); export the model again") from error
    return tensors


# --- writing -------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_destination(directory: Path) -> None:
    """Raises unless an artifact can be written at `directory`: absent, empty, or an older artifact."""
    directory = directory.resolve()
    file = next((p for p in (directory, *directory.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise FileExistsError(f"{file} is a file; give Export another directory")
    if Path.cwd().is_relative_to(directory):
        raise FileExistsError(f"{directory} is the current directory, or around it; give Export another directory")
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise FileExistsError(
            f"{directory} exists and is not an artifact (it has no {MANIFEST}); give Export another directory"
        )
    parent = next(p for p in directory.parents if p.exists())  # where the new artifact is staged
    if not os.access(parent, os.W_OK):
        raise PermissionError(
            errno.EACCES, "an artifact cannot be written here, give Export another directory", str(parent)
        )


class staging:
    """A sibling of `directory` to write into; renamed to `directory` when the block ends well, removed otherwise.

    The last good artifact stays until the new one is complete.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.path = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        check_destination(self.directory)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC, "the disk is full; free space or give Export another directory", str(self.directory)
                ) from error
            return
        old = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.old")
        if self.directory.exists():
            self.directory.rename(old)
        try:
            self.path.rename(self.directory)
        except OSError:
            if old.exists():
                old.rename(self.directory)
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest.json` with its digest, last, so that a folder that has one is complete."""
    plain = json.loads(json.dumps({"format": FORMAT, **manifest}, default=str))
    text = json.dumps({**plain, "digest": manifest_digest(plain)}, indent=1)
    with open(directory / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of the manifest without its `digest`, as JSON with sorted keys and no spaces."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ArtifactError: none there, damaged, or written by a later version.
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
        if version == FORMAT:
            if manifest.get("digest", digest := manifest_digest(manifest)) != digest:  # older artifacts have none
                raise ValueError("its content is not what was written: the SHA-256 differs from its digest")
            _check_manifest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{path} is damaged ({reason}); export the model again") from error
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version}, this version reads {FORMAT}; upgrade lightning_accel")
    return manifest


def answering(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The program of each engine that gives the model's outputs: all but encoders, which work for their decoders."""
    return [entry for entry in manifest["programs"] if entry["role"] != "encoder"]


def program_files(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files of a program, each with `file` and `sha256`: its own first."""
    return [entry, *(entry[name] for name in ("nodes", "data") if name in entry), *entry.get("files", ())]


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises unless all that `load` and `verify` need is there; `manifest.schema.json` describes the whole."""
    if not manifest["programs"]:
        raise ValueError("it has no programs")
    for entry in manifest["programs"]:
        _check_types(entry, role=str, engine=str, torch=str, inputs=list, outputs=dict, weights=dict)
        if entry["cache"] is not None:
            _check_types(entry["cache"], shapes=list, dtype=str, max_length=int, max_batch=int, vocabulary=int)
        for spec in entry["inputs"]:
            _check_types(spec, name=str, dtype=str, shape=list)
    weights = [manifest["weights"]] if any(entry["weights"] for entry in manifest["programs"]) else []
    for file in (*manifest["programs"], *manifest["assets"], *weights, manifest["golden"]):
        _check_types(file, file=str, sha256=str)


def _check_types(item: dict[str, Any], **fields: type) -> None:
    for name, kind in fields.items():
        if not isinstance(item[name], kind):
            raise TypeError(f"{name} is {item[name]!r}, expected {kind.__name__}")


def check_file(directory: Path, name: str, digest: str) -> Path:
    """Path of a file of the artifact, after checking that it lies in it and is what was written.

    Raises:
        ArtifactError: outside the folder, missing, truncated or changed.
    """
    folder, _, file = name.rpartition("/")
    if Path(file).name != file or file in ("", "..") or folder not in ("", *FOLDERS):
        raise ArtifactError(f"the manifest names the file {name!r}, outside the artifact; do not load it")
    path = directory / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the model again")
    if sha256(path) != digest:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the manifest's; export the model again")
    return path


def load(directory: str | Path, *, engine: str | None = None, threads: int | None = None) -> LoadedModel:
    """Loads an artifact with torch alone; nothing is compiled and nothing unpickled.

    The compiled program is used where this machine and torch can run it, else the portable one, with a warning.
    A program is code: the hashes detect damage, not malice, so load artifacts from people whose code you would run.

    Args:
        directory: what Export or export_model wrote.
        engine: `None` takes the first of torch's own programs (`"aoti"`, its variants for other CPUs, `"portable"`)
            that runs here. Others, where they were built, are taken by name only (`"onnx"`, `"openvino"`,
            `"transformers"`, `"gguf"`), with their own packages, or by `"fastest"`: the one that was fastest when the
            artifact was exported, of those that compute what was trained, run here and answer the golden inputs as
            they should.
        threads: how many this model runs with, whatever torch has; by default torch's number. An engine that is not
            torch's own keeps the number that there was when it was loaded.

    Returns:
        a callable model; a causal language model has `.generate` too.

    Raises:
        ArtifactError: damaged, of another version, or no program of it runs here.

    >>> load("no/such/folder")
    Traceback (most recent call last):
    lightning_accel.artifact.ArtifactError: no/such/folder is not an artifact: it has no manifest.json; \
write load('DIR') with the directory that Export or export_model wrote
    """
    from . import engines

    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads={threads!r} must be an int of at least 1; None takes torch's number")
    directory = Path(directory)
    manifest = read_manifest(directory)
    if engine == "fastest" and any(p["engine"] in engines.NEEDS for p in manifest["programs"]):
        return _load_fastest(directory, manifest, threads)
    entries = manifest["programs"]
    if engine in (None, "fastest"):  # those of a later version are named below
        entries = [p for p in entries if p["engine"] in engines.TORCH or p["engine"] not in engines.NAMES]
    else:
        entries = [p for p in entries if p["engine"] == engine]
    if not entries:
        built = sorted({p["engine"] for p in manifest["programs"]})
        lacks = "program that needs torch alone" if engine is None else f"{engine!r} program"
        raise ArtifactError(f"the artifact has no {lacks}, only {built}; write load(dir, engine={built[0]!r})")
    reasons: list[str] = []
    for name in dict.fromkeys(entry["engine"] for entry in entries):
        programs = [entry for entry in entries if entry["engine"] == name]
        known = name in engines.NAMES
        why = [engines.get(name).unusable(entry) if known else "this version has no such engine" for entry in programs]
        if not any(why):
            if reasons:
                warnings.warn(f"{'; '.join(reasons)}; serving the {name} program instead", stacklevel=2)
            return _open(directory, manifest, programs, threads)
        reasons.append(f"the {name} program cannot run here: {next(filter(None, why))}")
    raise ArtifactError(
        "; ".join(reasons) + "; export the model on this kind of machine, with engines=('aoti', "
        "'portable') to have a program that runs anywhere"
    )


def _load_fastest(directory: Path, manifest: dict[str, Any], threads: int | None) -> LoadedModel:
    """The first engine of the ranking that runs here and computes what it did when it was exported, and was trained.

    Where `aoti` cannot run, its variants for other CPUs come in its place.
    """
    from . import engines
    from .verify import verify_golden

    own = {entry["engine"] for entry in manifest["programs"] if "activations" in entry}  # rounded by rules of their own
    own |= engines.UNTIMED.keys()
    built = list(dict.fromkeys(entry["engine"] for entry in manifest["programs"] if entry["engine"] not in own))
    ranked = [row["engine"] for row in manifest.get("ranking", ()) if row["slower"] is not None]
    timed = [name for name in ranked if name not in own]
    if not timed and len(built) > 1:
        raise ArtifactError(
            f"the engines of {directory} were not timed; export with measure=True, or write load(dir, "
            f"engine={built[0]!r})"
        )
    variants = [name for name in engines.VARIANTS if name in built]
    names = [n for name in timed or built for n in (name, *(variants if name == "aoti" else ()))]
    for name in dict.fromkeys(names):
        try:
            model = load(directory, engine=name, threads=threads)
            verify_golden(model)
        except Exception as error:  # whatever another project's runtime raises
            warnings.warn(f"the {name} program is passed over: {error}", stacklevel=3)
            continue
        return model
    raise ArtifactError(f"none of {', '.join(names)} runs here; export the model on this kind of machine")


def _open(
    directory: Path, manifest: dict[str, Any], programs: list[dict[str, Any]], threads: int | None
) -> LoadedModel:
    """The model that the programs of one engine are."""
    roles = {entry["role"]: entry for entry in programs}
    if "encoder" not in roles:
        return _open_program(directory, manifest, programs[0], threads)
    encoder = _open_program(directory, manifest, roles["encoder"], threads)
    return _open_program(directory, manifest, roles["decoder"], threads, LoadedSeq2Seq, encoder=encoder)


def _open_program(
    directory: Path,
    manifest: dict[str, Any],
    entry: dict[str, Any],
    threads: int | None,
    kind: type = LoadedModel,
    **parts: LoadedModel,
) -> LoadedModel:
    from . import engines

    path, *_ = (check_file(directory, file["file"], file["sha256"]) for file in program_files(entry))
    tensors: dict[str, Tensor] = {}
    if entry.get("weights"):
        weights = manifest["weights"]
        tensors = load_weights(check_file(directory, weights["file"], weights["sha256"]))
        missing = set(entry["weights"].values()) - set(tensors)
        if missing:
            raise ArtifactError(f"{weights['file']} lacks {sorted(missing)[0]!r}; export the model again")
    try:
        with at_threads(threads):
            run = engines.get(entry["engine"]).open(path, entry, tensors)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} cannot be opened ({type(error).__name__}: {error}); export it again") from error
    _keep_freed_memory()
    return kind(directory, manifest, entry, run, tensors.values(), threads, **parts)


def _keep_freed_memory() -> None:
    """Has glibc keep what a forward frees for the next one, as it does by itself once a block so large was freed.

    Else each forward takes its buffers anew from the system, page by page (docs/log.md). See mallopt(3),
    M_MMAP_THRESHOLD; the block is never touched, and other allocators take no notice.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
