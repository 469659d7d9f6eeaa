"""What may import what: techniques never import Lightning, and what serves an artifact imports torch alone."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from alone import PACKAGE, run_alone

import lightning_accel

GOLDEN = Path(__file__).parent / "data" / "golden"
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
HEAVY = ("transformers", "lightning", "torchao", "torchmetrics", "tokenizers", "safetensors", "rich", "matplotlib")

ADAPTERS = {PACKAGE / "module.py", *(PACKAGE / "callbacks").glob("*.py")}
TECHNIQUES = sorted(set(PACKAGE.rglob("*.py")) - ADAPTERS)
_SERVING = ("__init__", "_warn", "_worker", "artifact", "calls", "cli", "generate", "loaded")
SERVING = sorted([PACKAGE / f"{name}.py" for name in _SERVING] + list((PACKAGE / "engines").glob("*.py")))


def imports(file: Path, inside_functions: bool) -> Iterator[str]:
    """Absolute names of what a module imports when it runs, without what only annotations need."""
    package = [PACKAGE.name, *file.parent.relative_to(PACKAGE).parts]

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                module = [*start, *(node.module.split(".") if node.module else [])]
                yield ".".join(module)
                yield from (".".join([*module, alias.name]) for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
            elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for _, value in ast.iter_fields(node):
                    children = value if isinstance(value, list) else [value]
                    handlers = [
                        s for c in children if isinstance(c, ast.ExceptHandler | ast.match_case) for s in c.body
                    ]
                    yield from walk([c for c in children if isinstance(c, ast.stmt)] + handlers)

    yield from walk(ast.parse(file.read_text()).body)


def roots(file: Path, inside_functions: bool) -> set[str]:
    """Top-level packages that a module imports, this one left out."""
    return {name.partition(".")[0] for name in imports(file, inside_functions)} - {PACKAGE.name}


def own(file: Path, inside_functions: bool) -> set[str]:
    """Modules of this package that a module imports, by their first name."""
    names = (name.split(".") for name in imports(file, inside_functions) if name.startswith(f"{PACKAGE.name}."))
    return {name[1] for name in names}


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", TECHNIQUES, ids=relative)
def test_a_technique_never_imports_lightning(file):
    assert not roots(file, inside_functions=True) & LIGHTNING
    assert not own(file, inside_functions=True) & {"callbacks", "module"}


@pytest.mark.parametrize("file", SERVING, ids=relative)
def test_what_serves_an_artifact_imports_torch_and_the_standard_library_alone(file):
    assert roots(file, inside_functions=False) <= sys.stdlib_module_names | {"torch"}
    assert own(file, inside_functions=False) <= {"artifact", "calls", "loaded", "generate", "engines", "_warn"}


def test_the_lists_name_modules_that_exist():
    assert {PACKAGE / name for name in ("export.py", "prune/masks.py", "engines/aoti.py")} <= set(TECHNIQUES)
    assert all(file.is_file() for file in SERVING)


def test_the_walk_sees_imports_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "sample.py"
    file.write_text(
        "import a\nfrom . import b\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import c\n"
        "try:\n    import d\nexcept ImportError:\n    import e\n"
        "def f():\n    with x:\n        from g.h import i\n"
        "class K:\n    import j\n"
    )
    assert roots(file, inside_functions=False) - {tmp_path.name} == {"a", "c", "d", "e", "j"}
    assert roots(file, inside_functions=True) - {tmp_path.name} == {"a", "c", "d", "e", "j", "g"}
    assert own(file, inside_functions=False) == {"b"}


# --- the public names ------------------------------------------------------------------------------------------------


def test_all_lists_the_names_of_the_lazy_table_and_of_the_type_checker():
    tree = ast.parse((PACKAGE / "__init__.py").read_text()).body
    (checked,) = (node for node in tree if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_types = {alias.name: node.module for node in checked.body for alias in node.names}
    assert lightning_accel.__all__ == sorted(lightning_accel._WHERE)
    assert for_types == lightning_accel._WHERE


def test_every_public_name_can_be_imported():
    for name in lightning_accel.__all__:
        assert getattr(lightning_accel, name).__name__ == name
    assert set(lightning_accel.__all__) <= set(dir(lightning_accel))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Prunning'"):
        lightning_accel.Prunning  # noqa: B018


def test_no_public_name_is_that_of_a_submodule():
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {file.parent.name for file in PACKAGE.glob("*/*.py")}
    for name in modules - {"__init__"}:
        importlib.import_module(f"lightning_accel.{name}")
    assert not modules & set(lightning_accel.__all__)


# --- loading and running in a fresh process --------------------------------------------------------------------------

SERVE = """
import json, sys, warnings
warnings.simplefilter("error")
{before}
from lightning_accel import load
model = load({directory!r}{options})
ids = model.generate([[83, 43, 54]], 4)
logits = model(ids)
assert logits.shape[:2] == (1, 4)
heavy = sorted(set({heavy!r}) & {{name.partition(".")[0] for name in sys.modules}})
print(json.dumps({{"ids": ids.tolist(), "heavy": heavy}}))
"""

REFUSE = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def serve(before: str = "", options: str = "") -> dict:
    """What a fresh process prints that loads and runs the golden artifact."""
    code = SERVE.format(before=before, directory=str(GOLDEN), options=options, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_loading_and_running_imports_torch_and_no_other_dependency():
    assert serve() == {"ids": [[85, 96, 29, 84]], "heavy": []}


def test_an_artifact_is_served_where_only_torch_is_installed():
    assert serve(before=REFUSE.format(heavy=HEAVY), options=", engine='portable'")["ids"] == [[85, 96, 29, 84]]


def test_importing_the_package_imports_nothing():
    code = "import sys, lightning_accel; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


# --- installed without dependencies ----------------------------------------------------------------------------------

ALONE = """
import importlib.util
absent = [name for name in json.loads(sys.argv[2]) if importlib.util.find_spec(name) is None]
model = lightning_accel.load(sys.argv[1])
ids = model.generate([[83, 43, 54]], 4)
logits = model(ids)[0, -1]
print(json.dumps([lightning_accel.__file__, absent, model.engine, ids.tolist(), logits.tolist()]))
"""


@pytest.mark.aoti
def test_the_package_installed_without_dependencies_serves_a_compiled_program(installed, llama_int8, tmp_path):
    serves_alone(installed, llama_int8.directory, "aoti", tmp_path)


def test_the_package_installed_without_dependencies_serves_a_portable_program(installed, decoder, tmp_path):
    serves_alone(installed, decoder, "portable", tmp_path)


def serves_alone(installed: Path, directory: Path, engine: str, folder: Path) -> None:
    """A process with nothing but torch and the installed package gives what this one gives."""
    absent = ["numpy", *HEAVY]
    file, *rest, logits = run_alone(installed, folder, ALONE, directory, json.dumps(absent))
    here = lightning_accel.load(directory)
    ids = here.generate([[83, 43, 54]], 4)
    assert Path(file).is_relative_to(installed)
    assert rest == [absent, engine, ids.tolist()]
    torch.testing.assert_close(torch.tensor(logits), here(ids)[0, -1])
