"""The `lightning-accel` command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lightning_accel import artifact
from lightning_accel.cli import main


def test_inspect_shows_programs_sizes_coverage_and_figures(decoder, capsys):
    assert main(["inspect", str(decoder)]) == 0
    out = capsys.readouterr().out
    manifest = artifact.read_manifest(decoder)
    for expected in (
        "program decoder (portable, decoder.portable.pt2): input_ids int64 ['batch', 'length']",
        "cache: 4 tensors, up to 64 positions",
        f"{manifest['sizes']['default_load_bytes'] / 1e6:.2f} MB for the default load",
        f"int8 quantization: {manifest['coverage'][0]['share_of_parameters']:.1%} of parameters",
        "skipped by int8 quantization: model.norm (LlamaRMSNorm, 32 parameters): no int8 form of this module",
        "speed: not measured",
        f"_mean_logit (artifact): {manifest['metrics'][2]['value']:.4f} (held-out, 1 batches; lower is better)",
    ):
        assert expected in out


def test_inspect_says_first_that_an_artifact_is_slower(decoder, altered, capsys):
    speedup = {"over_float_same_engine": {"prefill": 0.5, "decode": 2.0}, "over_eager": {"prefill": 1.5, "decode": 3.0}}
    main(["inspect", str(altered(decoder, lambda m: m.update(speedup=speedup)))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SLOWER than the float model on this machine: prefill 2.00 x its time"
    assert "decode: 2.00 x the float model through portable, 3.00 x the float model run eagerly" in lines


def test_inspect_json_is_the_manifest(decoder, capsys):
    assert main(["inspect", str(decoder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((decoder / "manifest.json").read_text())


def test_verify_checks_files_and_golden_inputs(decoder, network, capsys):
    assert main(["verify", str(decoder)]) == 0
    assert main(["verify", str(network)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "files: 5, hashes as written" and lines[2] == "files: 4, hashes as written"
    for line in (lines[1], lines[3]):
        start, _, error = line.rpartition(" ")
        assert start == "portable: golden inputs again, relative error" and float(error) < 1e-5


@pytest.mark.parametrize(
    "name", ["decoder.portable.pt2", "weights.safetensors", "golden.safetensors", "tokenizer.json"]
)
def test_verify_of_a_damaged_artifact_exits_with_1_and_names_the_file(decoder, altered, capsys, name):
    directory = altered(decoder)
    with open(directory / name, "ab") as file:
        file.write(b"more")
    assert main(["verify", str(directory)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightning-accel verify: ") and f"{name} is damaged" in captured.err


def test_verify_of_a_program_that_computes_something_else_exits_with_1(decoder, altered, capsys):
    directory = altered(decoder)
    golden = {name: tensor.clone() for name, tensor in artifact.load_weights(directory / "golden.safetensors").items()}
    golden["output.0"] += 0.5 * torch.randn(golden["output.0"].shape)
    artifact.save_weights(golden, directory / "golden.safetensors")
    manifest = artifact.read_manifest(directory)
    manifest["golden"]["sha256"] = artifact.sha256(directory / "golden.safetensors")
    artifact.write_manifest(directory, manifest)
    assert main(["verify", str(directory)]) == 1
    assert "the portable program drifted" in capsys.readouterr().err


def test_verify_says_which_program_it_could_not_run(decoder, altered, capsys):
    elsewhere = {"engine": "aoti", "isa": ["quantum_dot"], "arch": "s390x"}
    directory = altered(decoder, lambda m: m["programs"].insert(0, {**m["programs"][0], **elsewhere}))
    assert main(["verify", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("aoti: not run: it was compiled for s390x")
    assert lines[2].startswith("portable: golden inputs again")


@pytest.mark.parametrize("missing", ["file", "nodes"])
def test_verify_checks_the_files_of_a_program_that_it_cannot_run(decoder, altered, capsys, missing):
    file = {"file": "decoder.aoti.so", "sha256": "0" * 64}
    elsewhere = {"engine": "aoti", "isa": [], "arch": "s390x", **(file if missing == "file" else {"nodes": file})}
    directory = altered(decoder, lambda m: m["programs"].insert(0, {**m["programs"][0], **elsewhere}))
    assert main(["verify", str(directory)]) == 1
    assert "decoder.aoti.so is missing" in capsys.readouterr().err
    (directory / "decoder.aoti.so").write_text("damaged")
    assert main(["verify", str(directory)]) == 1
    assert "decoder.aoti.so is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_no_artifact_exits_with_1(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 1
    assert "is not an artifact: it has no manifest.json" in capsys.readouterr().err


RECIPE = """
import sys
from beside import LETTERS
print(__name__, sys.argv[1:], LETTERS)
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A working directory with `recipes/tiny.py`, and a module beside it that it imports."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.py").write_text(RECIPE)
    (tmp_path / "recipes" / "beside.py").write_text("LETTERS = 'abc'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "recipes"
    sys.modules.pop("beside", None)


@pytest.mark.parametrize("recipe", ["tiny", "recipes/tiny.py"])
def test_run_runs_a_recipe_by_name_or_path_with_its_arguments(recipes, capsys, recipe):
    assert main(["run", recipe, "--quick", "--out", "x", "7"]) == 0
    assert capsys.readouterr().out == "__main__ ['--quick', '--out', 'x', '7'] abc\n"


def test_an_unknown_recipe_exits_with_1_and_lists_the_known_ones(recipes, capsys):
    assert main(["run", "gtp"]) == 1
    err = capsys.readouterr().err
    assert "there is no recipe 'gtp'; give a path, or a name below ./recipes (beside, tiny)" in err


def test_an_error_in_a_recipe_shows_where_it_came_from(recipes):
    (recipes / "wrong.py").write_text("def step():\n    raise ValueError('mine')\nstep()")
    with pytest.raises(ValueError, match="mine") as caught:
        main(["run", "wrong"])
    assert caught.traceback[-1].name == "step"


@pytest.mark.parametrize("arguments", [[], ["unheard"], ["inspect"], ["verify", "a", "b"]])
def test_a_wrong_command_line_exits_with_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: lightning-accel" in capsys.readouterr().err


def test_the_module_runs_as_the_command_does(network):
    command = [sys.executable, "-m", "lightning_accel.cli", "inspect", str(network)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert "program forward (portable, forward.portable.pt2)" in done.stdout
