"""The folder on disk: damage is detected, nothing half-written is left, and calls are checked before they run."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from torch import nn

from lightning_accel import ArtifactError, QuantConfig, artifact, export_model, load
from lightning_accel.engines import aoti, portable
from lightning_accel.loaded import at_threads
from lightning_accel.report import describe

PROGRAM, WEIGHTS, MANIFEST = "decoder.portable.pt2", "weights.safetensors", "manifest.json"


def cut(file: Path) -> None:
    """Takes the last bytes off."""
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """Changes one byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def set_hash(directory: Path, name: str) -> None:
    """Makes the manifest agree with a changed program, as somebody who wants to deceive would."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["programs"][0]["sha256"] = artifact.sha256(directory / name)
    artifact.write_manifest(directory, manifest)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_a_truncated_or_edited_file_is_refused(decoder, altered, name, damage):
    directory = altered(decoder)
    damage(directory / name)
    with pytest.raises(ArtifactError, match=rf"{name} is damaged: its SHA-256 .* export the model again"):
        load(directory)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_a_missing_file_is_named(decoder, altered, name):
    directory = altered(decoder)
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing; export the model again"):
        load(directory)


def test_a_damaged_asset_is_refused_and_a_missing_name_lists_the_others(decoder, altered):
    directory = altered(decoder)
    model = load(directory)
    assert model.asset("tokenizer.json").read_text() == '{"version": "1.0"}'
    flip(directory / "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"tokenizer.json is damaged"):
        model.asset("tokenizer.json")
    with pytest.raises(ValueError, match=r"no asset 'vocab.txt'; this artifact has \['tokenizer.json'\]"):
        model.asset("vocab.txt")


def test_a_truncated_manifest_is_refused(decoder, altered):
    directory = altered(decoder)
    cut(directory / MANIFEST)
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged .* export the model again"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("programs"), "it has no 'programs'"),
        (lambda m: m.update(programs=[]), "it has no programs"),
        (lambda m: m.update(programs={"forward": {}}), "indices|not subscriptable"),
        (lambda m: m.pop("weights"), "it has no 'weights'"),
        (lambda m: m["programs"][0].pop("sha256"), "it has no 'sha256'"),
        (lambda m: m["programs"][0].update(file=7), "file is 7, expected str"),
        (lambda m: m["programs"][0]["cache"].update(max_length="64"), "max_length is '64', expected int"),
        (lambda m: m["programs"][0]["inputs"][0].pop("dtype"), "it has no 'dtype'"),
    ],
)
def test_an_incomplete_manifest_is_refused_with_what_is_wrong(decoder, altered, change, message):
    with pytest.raises(ArtifactError, match=rf"manifest.json is damaged \(.*({message})"):
        load(altered(decoder, change))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"vocabulary": 97', '"vocabulary": 98'), ('"max_length": 64', '"max_length": 65'), ('"min": 1', '"min": 0')],
)
def test_an_edited_manifest_is_refused(decoder, altered, old, new):
    directory = altered(decoder)
    text = (directory / MANIFEST).read_text()
    assert old in text
    (directory / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged \(its content is not what was .*digest"):
        load(directory)


def test_a_manifest_without_a_digest_is_of_an_older_version_and_read(decoder, altered):
    directory = altered(decoder)
    manifest = artifact.read_manifest(directory)
    assert manifest.pop("digest") == artifact.manifest_digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))
    assert load(directory).manifest == manifest


@pytest.mark.parametrize("text", ["", "[]", "null", "\x00\xff", "{}", '{"format": 1}'])
def test_a_manifest_that_is_something_else_is_refused(decoder, altered, text):
    directory = altered(decoder)
    (directory / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        load(directory)


@pytest.mark.parametrize("name", ["../evil.pt2", "/etc/passwd", "sub/program.pt2", ".."])
def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(decoder, altered, name):
    directory = altered(decoder, lambda m: m["programs"][0].update(file=name))
    with pytest.raises(ArtifactError, match=r"outside the artifact; do not load it"):
        load(directory)


def test_another_format_version_is_refused(decoder, altered):
    with pytest.raises(ArtifactError, match=r"has format 2, this version reads 1; upgrade lightning_accel"):
        load(altered(decoder, lambda m: m.update(format=2)))


@pytest.mark.parametrize("name", ["", "nothing/here"])
def test_a_folder_without_a_manifest_is_no_artifact(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest.json; write load\('DIR'\)"):
        load(tmp_path / name)


def test_weights_that_lack_a_tensor_are_refused(decoder, altered):
    directory = altered(decoder, lambda m: m["programs"][0]["weights"].update({"0": "no.such.weight"}))
    with pytest.raises(ArtifactError, match=r"weights.safetensors lacks 'no.such.weight'"):
        load(directory)


def test_a_program_that_wants_another_number_of_weights_is_refused(decoder, altered):
    directory = altered(decoder, lambda m: m["programs"][0]["weights"].pop("0"))
    with pytest.raises(ArtifactError, match=rf"{PROGRAM} cannot be opened .* export it again"):
        load(directory)


# --- archives that would be unpickled --------------------------------------------------------------------------------


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def rewrite(file: Path, change) -> None:
    """The archive with its records changed by `change({name: bytes})`."""
    with zipfile.ZipFile(file) as source:
        records = {name: source.read(name) for name in source.namelist()}
    root = next(iter(records)).partition("/")[0]
    change(root, records)
    with zipfile.ZipFile(file, "w") as target:
        for name, data in records.items():
            target.writestr(name, data)


def pickled_weight(compact: bool):
    """Adds a weight that says `use_pickle`."""

    def change(root: str, records: dict, trap: bytes) -> None:
        entry = {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}
        separators = (",", ":") if compact else None
        config = json.dumps({"config": {"w": entry}}, separators=separators)
        records[f"{root}/data/weights/model_weights_config.json"] = config.encode()
        records[f"{root}/data/weights/weight_0"] = trap

    return change


def pickled_constant(root: str, records: dict, trap: bytes) -> None:
    """Adds a constant that torch unpickles without being told to."""
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    config = json.dumps({"config": {"c": entry}})
    records[f"{root}/data/constants/model_constants_config.json"] = config.encode()
    records[f"{root}/data/constants/opaque_obj_0"] = trap


def sample_inputs(root: str, records: dict, trap: bytes) -> None:
    records[f"{root}/data/sample_inputs/model.pt"] = trap


def old_format(root: str, records: dict, trap: bytes) -> None:
    """The layout of torch 2.7, with its example inputs pickled."""
    records["serialized_example_inputs.pt"] = trap
    records["version"] = b"8.0"


def legacy_weights(root: str, records: dict, trap: bytes) -> None:
    records[f"{root}/data/weights/model.pt"] = trap


@pytest.mark.parametrize(
    "change",
    [pickled_weight(False), pickled_weight(True), pickled_constant, sample_inputs, old_format, legacy_weights],
    ids=["use_pickle", "use_pickle compact", "opaque constant", "sample inputs", "old format", "legacy weights"],
)
def test_an_archive_with_pickled_data_is_refused_and_never_unpickled(decoder, altered, tmp_path, change):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    directory = altered(decoder)
    rewrite(directory / PROGRAM, lambda root, records: change(root, records, trap))
    set_hash(directory, PROGRAM)
    with pytest.raises(ArtifactError, match=rf"{PROGRAM} is not a program that this package wrote"):
        load(directory)
    assert not (tmp_path / "sprung").exists()


def test_an_archive_that_holds_a_record_twice_is_refused(decoder, altered):
    directory = altered(decoder)
    with warnings.catch_warnings(), zipfile.ZipFile(directory / PROGRAM, "a") as target:
        warnings.simplefilter("ignore")
        target.writestr(target.namelist()[0], b"{}")
    set_hash(directory, PROGRAM)
    with pytest.raises(ArtifactError, match=r"a record twice|config"):
        load(directory)


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_read(decoder, altered, monkeypatch):
    directory = altered(decoder)
    with zipfile.ZipFile(directory / PROGRAM, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        root = target.namelist()[0].partition("/")[0]
        with target.open(f"{root}/data/weights/weight_0", "w") as record:
            for _ in range(300):
                record.write(bytes(2**20))
    set_hash(directory, PROGRAM)
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    with pytest.raises(ArtifactError, match=r"this package wrote \(31\d,\d{3},\d{3} bytes in [\d,]+\)"):
        load(directory)


def test_a_program_that_is_no_archive_is_refused(decoder, altered):
    directory = altered(decoder)
    (directory / PROGRAM).write_bytes(b"not a zip file")
    set_hash(directory, PROGRAM)
    with pytest.raises(ArtifactError, match=r"is not a program that this package wrote"):
        load(directory)


def test_a_constant_that_the_export_lifted_out_of_the_code_is_no_reason_to_refuse(tmp_path):
    class Shift(nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0, 3.0])

    export_model(Shift(), tmp_path / "a", example_inputs=(torch.zeros(2, 3),), engines=("portable",), measure=False)
    assert load(tmp_path / "a")(torch.zeros(1, 3)).tolist() == [[1.0, 2.0, 3.0]]


# --- another machine, another torch ----------------------------------------------------------------------------------


def compiled_first(**entry):
    """Puts a compiled program, which was made elsewhere, before the portable one."""

    def change(manifest: dict) -> None:
        here = {"engine": "aoti", "isa": [], "arch": os.uname().machine, "torch": torch.__version__}
        manifest["programs"].insert(0, {**manifest["programs"][0], **here, "file": "decoder.aoti.so", **entry})

    return change


def alone(change):
    def changed(manifest: dict) -> None:
        change(manifest)
        del manifest["programs"][1:]

    return changed


ELSEWHERE = pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"isa": ["avx2", "quantum_dot"]}, "it was compiled for a CPU with quantum_dot, which this one lacks"),
        ({"arch": "s390x"}, "it was compiled for s390x, this is"),
        ({"torch": "2.99.0"}, "it was compiled for torch 2.99.0, this is"),
        ({"engine": "abacus"}, "this version has no such engine"),
    ],
)


@ELSEWHERE
def test_a_program_from_elsewhere_is_replaced_by_the_portable_one_with_a_warning(decoder, altered, entry, reason):
    directory = altered(decoder, compiled_first(**entry))
    with pytest.warns(UserWarning, match=rf"{reason}.*; serving the portable program instead"):
        model = load(directory)
    assert model.engine == "portable"
    assert torch.equal(model(tiny.ids()), load(decoder)(tiny.ids()))


@ELSEWHERE
def test_a_program_from_elsewhere_is_refused_where_there_is_no_portable_one(decoder, altered, entry, reason):
    directory = altered(decoder, alone(compiled_first(**entry)))
    with pytest.raises(ArtifactError, match=rf"{reason}.*engines=\('aoti', 'portable'\)"):
        load(directory)


def test_a_cpu_without_the_instructions_of_the_other_is_recognised(decoder, altered, monkeypatch):
    directory = altered(decoder, compiled_first(isa=["avx2", "avx512_vnni"]))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    with pytest.warns(UserWarning, match="a CPU with avx512_vnni, which this one lacks"):
        assert load(directory).engine == "portable"


@pytest.mark.parametrize(
    ("has", "start", "missing"),
    [
        (
            ("avx2", "fma3"),
            "SLOW: quantized layers run in plain loops, slower than a float32 export (quantize=None)",
            "avx512_vnni, avx512_bw, avx512_dq, avx512_vl",
        ),
        (
            ("avx2", "fma3", "f16c"),
            "quantized layers run with AVX2, slower than with AVX512-VNNI",
            "avx512_vnni, avx512_bw, avx512_dq, avx512_vl",
        ),
        (
            ("avx2", "fma3", "f16c", "avx_vnni", "avx512_bw", "avx512_dq", "avx512_vl"),
            "quantized layers run with AVX-VNNI, slower than with AVX512-VNNI",
            "avx512_vnni",
        ),
        (("avx512_vnni", "avx512_bw", "avx512_dq", "avx512_vl"), None, None),
    ],
)
def test_one_line_says_which_instructions_the_kernels_lack(decoder, altered, monkeypatch, has, start, missing):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    shown = describe(altered(decoder, compiled_first(isa=aoti.isa())))
    expected = f"{start}, as the CPU that compiled them has no {missing}"
    assert [line for line in shown.splitlines() if "quantized layers run" in line] == ([expected] if missing else [])
    assert "quantized layers run" not in describe(decoder), "the portable program has no kernels"


def test_the_line_of_avx2_names_the_scheme_that_is_slow_there_and_the_nearest_that_is_not():
    ours, slow = "int4-weight fake quantization", "(prefill) are slower than float32 in int4-weight, not in int4-int8"
    assert slow in aoti.slow_kernels({"isa": ["avx2", "fma3", "f16c"]}, [ours])
    assert slow not in aoti.slow_kernels({"isa": ["avx2", "fma3", "f16c"]}, ["int8 fake quantization"])
    assert slow not in aoti.slow_kernels({"isa": []}, [ours]), "plain loops are slow in all of them"


def test_no_kernels_are_said_to_be_slow_where_nothing_is_quantized(network, altered):
    assert "quantized layers run" not in describe(altered(network, compiled_first(isa=[])))


def test_a_portable_program_of_a_later_torch_is_refused(decoder, altered):
    with pytest.raises(ArtifactError, match=r"the portable program cannot run here: it was written by torch 2\.99\.0"):
        load(altered(decoder, lambda m: m["programs"][0].update(torch="2.99.0")))


def test_an_engine_that_was_not_built_is_named(decoder):
    with pytest.raises(ArtifactError, match=r"no 'aoti' program, only \['portable'\]; write load\(dir, engine='port"):
        load(decoder, engine="aoti")


# --- the destination -------------------------------------------------------------------------------------------------


def write(directory: Path, seed: int = 0) -> nn.Module:
    """Exports a perceptron and returns it."""
    model = tiny.mlp(seed)
    export_model(model, directory, example_inputs=(torch.zeros(2, 8),), engines=("portable",), measure=False)
    return model


def test_an_existing_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for directory in (tmp_path / "out", tmp_path / "out" / "model"):
        with pytest.raises(FileExistsError, match=r"out is a file; give Export another directory"):
            write(directory)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_existing_directory_which_is_no_artifact_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not an artifact \(it has no manifest.json\); give Export another"):
        write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_read_only_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match=r"cannot be written here, give Export another directory"):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        export_model(nn.Linear(2, 2), tmp_path / "file", example_inputs="never looked at")


def test_an_empty_directory_and_a_new_one_are_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "deep" / "new"):
        model, x = write(directory), torch.randn(3, 8)
        assert torch.equal(load(directory)(x), model(x))
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "deep"}


def test_a_relative_directory_is_written_where_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = write(Path("artifact")), torch.randn(3, 8)
    assert torch.equal(load("artifact")(x), model(x))


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for directory in (Path("."), tmp_path):
        with pytest.raises(FileExistsError, match="is the current directory, or around it"):
            write(directory)


def test_a_new_artifact_replaces_the_older_one_whole(tmp_path):
    directory = tmp_path / "artifact"
    old = write(directory, seed=0)
    (directory / "forward.aoti.so").write_text("of an older export")
    new = write(directory, seed=1)
    x = torch.randn(3, 8)
    assert torch.equal(load(directory)(x), new(x)) and not torch.equal(new(x), old(x))
    assert not (directory / "forward.aoti.so").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_link_to_an_artifact_stays_a_link(tmp_path):
    write(tmp_path / "v1", seed=0)
    (tmp_path / "latest").symlink_to(tmp_path / "v1")
    new = write(tmp_path / "latest", seed=1)
    x = torch.randn(3, 8)
    assert (tmp_path / "latest").is_symlink()
    assert torch.equal(load(tmp_path / "v1")(x), new(x))
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "latest"}


@pytest.mark.parametrize("function", ["save_weights", "write_manifest", "sha256"])
def test_a_full_disk_leaves_the_last_good_artifact_and_nothing_half_written(tmp_path, monkeypatch, function):
    directory = tmp_path / "artifact"
    model = write(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(artifact, function, full)
        with pytest.raises(OSError, match=r"the disk is full; free space or give Export another directory") as caught:
            write(directory, seed=1)
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    x = torch.randn(3, 8)
    assert torch.equal(load(directory)(x), model(x))


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(portable.torch.export, "save", full)
    with pytest.raises(OSError, match=r"the disk is full"):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_cannot_be_moved_into_place_leaves_the_older_one(tmp_path, monkeypatch):
    directory = tmp_path / "artifact"
    model = write(directory)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Input/output"):
            write(directory, seed=1)
    x = torch.randn(3, 8)
    assert torch.equal(load(directory)(x), model(x))
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_an_asset_that_would_overwrite_a_file_of_the_artifact_is_refused(tmp_path):
    (tmp_path / "source").write_text("mine")
    with pytest.raises(ValueError, match=r"the asset 'weights.safetensors' has the name of a file of the artifact"):
        export_model(
            tiny.mlp(),
            tmp_path / "artifact",
            example_inputs=(torch.zeros(2, 8),),
            engines=("portable",),
            measure=False,
            assets={"weights.safetensors": tmp_path / "source"},
        )
    assert not (tmp_path / "artifact").exists()


@pytest.fixture(scope="module")
def decoding(decoder) -> artifact.LoadedModel:
    """The causal language model, loaded."""
    return load(decoder)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"input 'x' is missing; the model takes x, gain"),
        (("X",), {}, r"input 'gain' is missing; the model takes x, gain"),
        (("X", "X", "X"), {}, r"3 inputs given, the model takes 2: x, gain"),
        (("X", "X"), {"x": "X"}, r"input 'x' is given twice; the model takes x, gain"),
        (("X", "X"), {"mask": "X"}, r"input 'mask' is unknown; the model takes x, gain"),
        ((None, "X"), {}, r"input 'x' is missing"),
        (("X", [1.0]), {}, r"input 'gain' is a list; write torch.tensor\(...\)"),
        (
            ("X", torch.ones(4, 16).double()),
            {},
            r"'gain' has dtype torch.float64, expected torch.float32; write gain.to",
        ),
        (
            ("X", torch.ones(4, 16, device="meta")),
            {},
            r"'gain' is on meta, the program runs on the CPU; write gain.cpu",
        ),
        (("X", torch.ones(16)), {}, r"'gain' has shape \[16\], expected \[batch, 16\]"),
        (("X", torch.ones(4, 15)), {}, r"'gain' has shape \[4, 15\], expected \[batch, 16\]"),
        (("X", torch.ones(3, 16)), {}, r"'gain' has batch 3, another input has 4"),
        ((torch.ones(0, 16), torch.ones(0, 16)), {}, r"'x' has batch 0, allowed is 1 to 1024"),
        ((torch.ones(1025, 16), torch.ones(1025, 16)), {}, r"'x' has batch 1025, allowed is 1 to 1024"),
    ],
)
def test_wrong_inputs_are_refused_with_what_is_right(network, args, kwargs, message):
    x = torch.ones(4, 16)
    args = [x if isinstance(a, str) else a for a in args]
    with pytest.raises(ValueError, match=message):
        load(network)(*args, **{name: x for name in kwargs})


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"input 'input_ids' is missing; the model takes input_ids, attention_mask"),
        (
            (tiny.ids(),),
            {"labels": tiny.ids()},
            r"input 'labels' is unknown; the model takes input_ids, attention_mask",
        ),
        ((tiny.ids(), None, None), {}, r"3 inputs given, the model takes 2: input_ids, attention_mask"),
        ((tiny.ids()[0],), {}, r"input_ids has shape \[10\].* for one prompt write input_ids\[None\]"),
        ((tiny.ids().float(),), {}, r"input_ids is torch.float32 on cpu, expected torch.int64"),
        ((tiny.ids().to("meta"),), {}, r"input_ids is torch.int64 on meta, expected torch.int64 on the CPU"),
        (("a prompt",), {}, r"input_ids is a str that holds no token ids; encode text first"),
        (([[1.5, 2.5]],), {}, r"input_ids holds torch.float32 values; token ids are integers"),
        (([[1], []],), {}, r"a prompt is empty; give at least one token"),
        (([],), {}, r"a prompt is empty"),
        ((tiny.ids(2, tiny.POSITIONS + 1),), {}, r"65 tokens are asked for, the model has 64 positions"),
        ((torch.ones(1025, 2, dtype=torch.int64),), {}, r"a batch of 1025 is over the limit of 1024; split it"),
        ((torch.tensor([[tiny.VOCABULARY]]),), {}, r"token id 97 is outside the vocabulary of 97"),
        ((torch.tensor([[-1]]),), {}, r"token id -1 is outside the vocabulary"),
        ((tiny.ids(), torch.ones(2, 9)), {}, r"attention_mask is torch.float32 on cpu, expected torch.bool or int64"),
        ((tiny.ids(), torch.ones(2, 9).bool()), {}, r"attention_mask has shape \[2, 9\], input_ids \[2, 10\]"),
        ((tiny.ids(), torch.zeros(2, 10).bool()), {}, r"a row of attention_mask is all padding"),
    ],
)
def test_wrong_token_ids_are_refused_with_what_is_right(decoding, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        decoding(*args, **kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an int of at least 1"),
        ({"max_new_tokens": 60}, "69 tokens are asked for, the model has 64 positions; shorten the prompt"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a number of at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be an int of at least 1"),
    ],
)
def test_impossible_generations_are_refused(decoding, options, message):
    with pytest.raises(ValueError, match=message):
        decoding.generate(tiny.ids(), **options)


def test_a_model_without_a_cache_says_that_it_cannot_generate(network):
    with pytest.raises(ValueError, match=r"this model has no KV cache, so it cannot generate; call it instead"):
        load(network).generate(tiny.ids())


def test_outputs_keep_their_names_and_nesting(network):
    torch.manual_seed(0)
    model, (x, gain) = tiny.Residual(), (torch.randn(4, 16), torch.rand(4, 16))
    del model
    output = load(network)(x, gain=gain)
    assert list(output) == ["logits", "parts"]
    assert output.logits is output["logits"]
    assert isinstance(output.parts, tuple) and output.parts[1] is None
    with pytest.raises(AttributeError, match="no output 'loss'; this model has logits, parts"):
        _ = output.loss


class InPlace(nn.Module):
    """Begins with operations that write to their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(x)
        return self.linear(x).add_(shift.add_(1))


def test_the_callers_inputs_are_unchanged(tmp_path):
    torch.manual_seed(0)
    inputs = (torch.randn(3, 8), torch.arange(3)[:, None].contiguous())
    export_model(
        InPlace(), tmp_path / "artifact", example_inputs=inputs, engines=("portable",), measure=False,
        dynamic_shapes=(None, None),
    )  # fmt: skip
    model = load(tmp_path / "artifact")
    x, shift = torch.randn(3, 8), torch.arange(3)[:, None].contiguous()
    kept = x.clone(), shift.clone()
    first = model(x, shift)
    assert torch.equal(x, kept[0]) and torch.equal(shift, kept[1])
    assert torch.equal(model(x, shift), first)


class Constant(nn.Module):
    """Puts out a buffer and a view of it beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(x), self.table, self.table[2:]


def test_the_caller_may_write_to_an_output_that_is_a_buffer_of_the_model(tmp_path):
    x = torch.randn(3, 8)
    export_model(Constant(), tmp_path / "a", example_inputs=(x,), engines=("portable",), measure=False)
    model = load(tmp_path / "a")
    first = model(x)
    kept = [output.clone() for output in first]
    for output in first:
        output.add_(1.0)
    assert all(torch.equal(again, output) for again, output in zip(model(x), kept, strict=True))


def test_the_callers_token_ids_and_mask_are_unchanged(decoding):
    model, ids, mask = decoding, tiny.ids(), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    kept = ids.clone(), mask.clone()
    model(ids, mask)
    model.generate(ids, 5, attention_mask=mask)
    assert torch.equal(ids, kept[0]) and torch.equal(mask, kept[1])


def test_a_view_and_a_tensor_with_gradients_are_taken_as_they_are(network):
    model, x, gain = load(network), torch.randn(16, 4), torch.rand(4, 16)
    expected = model(x.t().contiguous(), gain)
    output = model(x.t(), gain.requires_grad_())
    assert torch.equal(output.logits, expected.logits)
    assert not output.logits.requires_grad


# --- several at once -------------------------------------------------------------------------------------------------


def test_threads_that_call_at_once_get_their_own_answers(decoding):
    model = decoding
    prompts = [tiny.ids(1 + i % 3, 3 + i, seed=i) for i in range(6)]
    alone = [(model(p), model.generate(p, 8)) for p in prompts]
    answers: dict[tuple[int, int], tuple] = {}

    def work(index: int, turn: int) -> None:
        answers[index, turn] = model(prompts[index]), model.generate(prompts[index], 8)

    threads = [threading.Thread(target=work, args=(i, turn)) for turn in range(2) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    for (index, _), (logits, ids) in answers.items():
        assert torch.equal(logits, alone[index][0]) and torch.equal(ids, alone[index][1])


def test_two_generations_in_turns_do_not_disturb_each_other(decoding):
    model, (a, b) = decoding, (tiny.ids(1, 5, seed=1), tiny.ids(2, 7, seed=2))
    expected = model.generate(a, 6), model.generate(b, 6)
    streams = model.generate(a, 6, stream=True), model.generate(b, 6, stream=True)
    tokens = list(zip(*streams, strict=True))
    assert torch.equal(torch.stack([t[0] for t in tokens], 1), expected[0])
    assert torch.equal(torch.stack([t[1] for t in tokens], 1), expected[1])


def test_an_artifact_can_be_loaded_twice(decoder):
    one, other = load(decoder), load(decoder)
    expected = one(tiny.ids())
    del one
    assert torch.equal(other(tiny.ids()), expected)


def test_a_moved_artifact_loads_and_a_loaded_one_survives_the_move(decoder, altered, tmp_path):
    directory = altered(decoder)
    model = load(directory)
    expected = model(tiny.ids())
    directory.rename(tmp_path / "moved")
    assert torch.equal(model(tiny.ids()), expected)
    assert torch.equal(load(tmp_path / "moved")(tiny.ids()), expected)


def test_a_loaded_artifact_survives_its_replacement(tmp_path):
    directory = tmp_path / "artifact"
    old = write(directory, seed=0)
    model, x = load(directory), torch.randn(3, 8)
    write(directory, seed=1)
    assert torch.equal(model(x), old(x))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_safetensors_reads_the_weights_that_we_write(decoder, network):
    for directory in (decoder, network):
        theirs = safetensors.torch.load_file(directory / WEIGHTS)
        ours = artifact.load_weights(directory / WEIGHTS)
        assert set(theirs) == set(ours) and len(ours) > 1
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name])


def test_weights_of_every_dtype_and_shape_go_there_and_back(tmp_path):
    torch.manual_seed(0)
    tensors = {
        str(dtype).removeprefix("torch."): (torch.randn(3, 5) * 50).to(dtype)
        for dtype in artifact._CODES
        if not dtype.is_complex
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "view": torch.randn(4, 6).t()}
    artifact.save_weights(tensors, tmp_path / "w.safetensors")
    for read in (
        artifact.load_weights(tmp_path / "w.safetensors"),
        safetensors.torch.load_file(tmp_path / "w.safetensors"),
    ):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_complex_weights_go_there_and_back(tmp_path):
    tensors = {"frequencies": torch.polar(torch.ones(3, 4), torch.randn(3, 4))}
    artifact.save_weights(tensors, tmp_path / "w.safetensors")
    assert torch.equal(artifact.load_weights(tmp_path / "w.safetensors")["frequencies"], tensors["frequencies"])


def test_we_read_the_weights_that_safetensors_writes(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int8)}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    read = artifact.load_weights(tmp_path / "w.safetensors")
    assert set(read) == {"a", "b"} and all(torch.equal(read[n], tensors[n]) for n in tensors)


def test_weights_of_a_dtype_without_a_code_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"frequencies has dtype torch.complex128, which no artifact holds"):
        artifact.save_weights({"frequencies": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}']
)
def test_weights_whose_header_does_not_describe_the_file_are_refused(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ArtifactError, match=r"w.safetensors is not a whole safetensors file"):
        artifact.load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x10"])
def test_weights_without_a_header_are_refused(tmp_path, data):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"is not a whole safetensors file"):
        artifact.load_weights(tmp_path / "w.safetensors")


def test_the_portable_archive_is_compressed(decoder):
    with zipfile.ZipFile(decoder / PROGRAM) as archive:
        graph = next(item for item in archive.infolist() if item.filename.endswith("models/model.json"))
    assert graph.compress_size < 0.1 * graph.file_size
    assert io.BytesIO((decoder / PROGRAM).read_bytes()).read(2) == b"PK"


FAULTS = """
import resource, sys, torch
from lightning_accel import load

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(1 << 21) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
load(sys.argv[1])
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own rules")
def test_memory_that_a_forward_frees_is_kept_for_the_next():
    """30 buffers of 8 MB are 61,440 pages, or 15 of huge ones; kept, they are none."""
    golden = Path(__file__).parent / "data" / "golden"
    done = subprocess.run([sys.executable, "-c", FAULTS, golden], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10


# --- threads ----------------------------------------------------------------------------------------------------------


def test_models_with_other_numbers_of_threads_that_run_at_once_leave_torchs_as_it_was():
    before = torch.get_num_threads()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with at_threads(before + 1):
            first_in.set()
            assert second_in.wait(60)
        first_out.set()
        return torch.get_num_threads()

    def second():
        assert first_in.wait(60)
        with at_threads(before + 2):
            second_in.set()
            assert first_out.wait(60)
            assert torch.get_num_threads() == before + 2
        return torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        assert [done.result() for done in [pool.submit(first), pool.submit(second)]] == [before, before]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


def test_a_model_runs_with_threads_of_its_own_and_leaves_those_of_torch(network):
    before = torch.get_num_threads()
    model = load(network, threads=before + 1)
    seen = []
    run = model._run
    model._run = lambda inputs: seen.append(torch.get_num_threads()) or run(inputs)
    model(*(torch.zeros(2, *spec["shape"][1:]) for spec in model.entry["inputs"]))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    with pytest.raises(ValueError, match=r"threads=0 must be an int of at least 1; None takes torch's number"):
        load(network, threads=0)


# --- compiled for other CPUs ------------------------------------------------------------------------------------------

OLD = {**dict.fromkeys(("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt", "popcnt"), True), "architecture": "x86_64"}


@pytest.mark.aoti
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiled for x86-64")
def test_a_cpu_that_lacks_what_was_compiled_for_gets_the_program_for_less(tmp_path, monkeypatch):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    network, names = tiny.mlp(features=64, hidden=64, classes=16), ("aoti_avx2", "aoti_avx512", "portable")
    options = {"example_inputs": (x,), "quantize": QuantConfig("int8"), "engines": names, "measure": False}
    export_model(network, tmp_path / "a", **options)
    programs = {entry["engine"]: entry for entry in artifact.read_manifest(tmp_path / "a")["programs"]}
    assert set(programs["aoti_avx2"]["isa"]) < set(programs["aoti_avx512"]["isa"])
    expected = load(tmp_path / "a", engine="portable")(x)
    compiled = [name for name in names if name.startswith("aoti") and aoti.unusable(programs[name]) is None]
    for name in compiled:
        assert torch.equal(load(tmp_path / "a", engine=name)(x), expected)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: OLD)
    reordered = json.loads((tmp_path / "a" / "manifest.json").read_text())
    reordered["programs"].sort(key=lambda entry: entry["engine"] != "aoti_avx512")
    artifact.write_manifest(tmp_path / "a", {k: v for k, v in reordered.items() if k != "digest"})
    with pytest.warns(UserWarning, match=r"compiled for a CPU with avx512_bw.*; serving the aoti_avx2 program instead"):
        assert load(tmp_path / "a").engine == "aoti_avx2"
    with pytest.raises(ArtifactError, match="the aoti_avx512 program cannot run here: it was compiled for a CPU with"):
        load(tmp_path / "a", engine="aoti_avx512")
    if shutil.which("objdump"):
        code = subprocess.run(["objdump", "-d", tmp_path / "a" / programs["aoti_avx2"]["file"]], capture_output=True)
        assert b"ymm" in code.stdout and b"zmm" not in code.stdout


FORKS = """
import os, sys, threading, torch
from lightning_accel import load
torch.set_num_threads(2)
model, prompt = load(sys.argv[1], threads=2), torch.arange(6)[None]
(torch.rand(600, 600) @ torch.rand(600, 600)).exp()  # OpenMP's threads are made
expected = model.generate(prompt, 4)
held = model._lock if sys.argv[2] == "lock" else threading.Lock()
with held:  # as another thread may
    child = os.fork()
    if not child:
        found = [one.generate(prompt, 4) for one in (model, load(sys.argv[1]))]
        os._exit(0 if all(torch.equal(ids, expected) for ids in found) else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(torch.equal(model.generate(prompt, 4), expected), model.threads)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("held", ["none", "lock"])
def test_a_forked_process_generates_the_same_and_waits_for_nobody(decoder, held):
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(decoder), held], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.split() == ["0", "True", "2"], done.stderr
    assert done.stderr.count("this process was forked, and computes on one thread; start it with spawn") == 1
