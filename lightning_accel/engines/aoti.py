"""The compiled program: AOTInductor, with the project's kernels linked in.

The package that AOTInductor writes is reduced to its shared library, which torch opens in about a millisecond
without a compiler, an archive to unpack or further imports. Its constants are left out and given at load: tensors
mapped from the folder's weights, not copied. Of a float network with weights that can be packed or folded, such as
convolutions, Inductor's freezing does so, and they are stored in the library.

The file is named by its content: dlopen gives a path that it has open already the library which was there before, and
an export that is repeated in one process would be verified, and served, through the older program.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..capture import Capture

_KERNELS = Path(__file__).parent / "kernels"
_LIBRARY = "liblightning_accel_kernels.a"
_OPERATORS = (  # which the kernels implement
    "int8_linear_tiled",
    "int4_linear",
    "int4_int8_linear",
    "int8_linears",
    "int4_linears",
    "int4_int8_linears",
    "int8_static_linear_tiled",
    "int8_static_conv2d_tiled",
    "int8_static_conv2d_coded",
    "int8_feed_forward",
    "int8_gated_feed_forward",
    "int8_static_feed_forward",
    "attention",
    "int8_attention",
    "linear_tiled",
    "depthwise",
)
_ISA = (
    "avx2",
    "fma3",
    "f16c",
    "bmi",
    "bmi2",
    "lzcnt",
    "popcnt",
    "avx512_f",
    "avx512_bw",
    "avx512_cd",
    "avx512_dq",
    "avx512_vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vbmi",
    "avx512_vbmi2",
    "avx512_ifma",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)


_FAST = ("avx512_vnni", "avx512_bw", "avx512_dq", "avx512_vl")  # what kernels/products.h asks for
_AVX2 = ("avx2", "fma3", "f16c")  # and what it takes in their place


@dataclass(frozen=True)
class Processor:
    """What a program is compiled for, on x86-64: an architecture of the compiler, and the instruction sets of it.

    Args:
        march: of `-march=`.
        bits: of the vectors of what Inductor writes.
        isa: of `_ISA`.
    """

    march: str
    bits: int
    isa: tuple[str, ...]


class CompilerMissing(RuntimeError):
    """There is no C++ compiler; only the portable program can be built."""


# --- build side ------------------------------------------------------------------------------------------------------


def lower(model: torch.nn.Module, processor: Processor | None = None) -> torch.nn.Module:
    """Quantized layers in the kernel's form, in place: weights in tiles, one operator a layer.

    An embedding is in tiles only where it is tied to a layer: gathering whole rows is faster. Convolutions in groups of
    several channels have no kernel, and stay in aten operators; so do attention's integer products without VNNI.

    Args:
        processor: as of `build`.
    """
    from ..quantize.layers import Int8Embedding, Int8Linear, Int8StaticConv, Int8StaticLinear
    from ..quantize.ops import int8_embedding_reference, int8_embedding_tiled, int8_linear_tiled, tile
    from ..quantize.products import Int8Products, int8_attention_reference
    from ..quantize.static import int8_static_conv2d_tiled, int8_static_linear_tiled

    functions = {
        Int8Linear: int8_linear_tiled,
        Int8StaticLinear: int8_static_linear_tiled,
        Int8StaticConv: int8_static_conv2d_tiled,
    }
    tiles: dict[int, tuple[Tensor, Tensor]] = {}  # the plain weight is kept too, so that its id stays its own
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module) in functions and not (isinstance(module, Int8StaticConv) and module.in_groups()):
            plain = module.codes
            if id(plain) not in tiles:
                tiles[id(plain)] = plain, tile(plain)
            module.codes, module.function = tiles[id(plain)][1], functions[type(module)]
    for module in modules:
        if isinstance(module, Int8Embedding) and id(module.codes) in tiles:
            plain, module.codes = tiles[id(module.codes)]
            module.function = int8_embedding_tiled(plain.shape[1])
        elif isinstance(module, Int8Embedding):
            module.function = int8_embedding_reference
        elif isinstance(module, Int8Products) and slow_kernels({"isa": _instructions(processor)}):
            module.function = int8_attention_reference
    return model


def _instructions(processor: Processor | None) -> list[str]:
    return isa() if processor is None else list(processor.isa)


def build(capture: Capture, directory: Path, name: str, processor: Processor | None = None) -> dict[str, Any]:
    """Exports and compiles the captured module and writes `NAME.HASH.aoti.so`, named by what is in it.

    Args:
        processor: by default the one of this machine, with all that it can do.

    Raises:
        CompilerMissing: no C++ compiler was found.
    """
    from ..artifact import sha256
    from ..quantize.layers import LINEAR
    from .attention import replace_attention
    from .beside import beside
    from .convolutions import replace_convolutions
    from .fuse import fuse
    from .linear import replace_linear

    compiler, instructions = _compiler(), _instructions(processor)
    program = capture.export(capture.module)
    fuse(program)
    if capture.cache is not None:
        beside(program)
    if not slow_kernels({"isa": instructions}):
        replace_attention(program)
    quantized = any(isinstance(module, LINEAR) for module in capture.module.modules())
    fast = set(_AVX2) <= set(instructions)
    convolutions = replace_convolutions(program) if fast and not quantized else {}
    tiled = replace_linear(program) if fast else {}
    freeze = not quantized and (bool(convolutions) or _could_be_packed(program, tiled))
    kernels = _kernels(compiler, kernel_flags(processor))
    with tempfile.TemporaryDirectory() as temporary:
        package = _compile(program, Path(temporary), kernels, freeze, processor)
        library = _extract(package, directory, name)
    weights = {} if freeze else _constants(library, program, capture, tiled)
    entry = {"file": library.name, "isa": instructions, "arch": platform.machine(), "weights": weights}
    nodes = library.with_suffix(".json")  # operators without a C interface, which torch looks up by name
    return {**entry, "nodes": {"file": nodes.name, "sha256": sha256(nodes)}} if nodes.exists() else entry


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompilerMissing("no C++ compiler was found; install one (Debian: apt-get install g++)") from error
    if shutil.which(compiler) is None:
        raise CompilerMissing(f"the C++ compiler {compiler!r} was not found; install it (Debian: apt-get install g++)")
    return compiler


def kernel_flags(processor: Processor | None = None) -> list[str]:
    """Compiler flags of the kernels, by default for this machine."""
    # no contraction: outputs are equal bit by bit to the reference in aten operators
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"]
    march = "native" if processor is None else processor.march
    flags += [f"-march={march}"] if platform.machine() in ("x86_64", "AMD64") else []
    return [*flags, f"-I{Path(torch.__file__).parent / 'include'}"]


def _kernels(compiler: str, flags: list[str] | None = None) -> Path:
    """A folder with the kernels as a static library; compiled unless it is in torch's cache of compiled code.

    They are the same for all models: what tells one library from another is what it was compiled from, and with.

    Args:
        flags: of the compiler, by default for this machine.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    flags = flags or kernel_flags()
    sources = sorted(path for path in _KERNELS.iterdir() if path.suffix in (".cpp", ".h"))
    version = _run([compiler, "--version"])
    made_of = [torch.__version__, compiler, version, *flags, *isa(), *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:24]
    folder = Path(cache_dir()) / "lightning_accel_kernels" / key
    if not (folder / _LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # another process may be at it
            _build_kernels(compiler, Path(temporary), flags)
            (Path(temporary) / _LIBRARY).replace(folder / _LIBRARY)
    return folder


def _build_kernels(compiler: str, directory: Path, flags: list[str]) -> None:
    """Compiles the kernels into a static library in `directory`."""
    objects = {source: directory / f"{source.stem}.o" for source in sorted(_KERNELS.glob("*.cpp"))}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        compile_ = [compiler, *flags, "-c"]
        list(pool.map(lambda item: _run([*compile_, str(item[0]), "-o", str(item[1])]), objects.items()))
    _run(["ar", "rcs", str(directory / _LIBRARY), *map(str, objects.values())])


def _run(command: list[str]) -> str:
    """What the command printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} could not compile the kernels:\n{done.stderr[-4000:]}")
    return done.stdout


def _compile(
    program: torch.export.ExportedProgram, directory: Path, kernels: Path, freeze: bool, processor: Processor | None
) -> Path:
    from torch._inductor import aoti_compile_and_package

    from .pack import pack_convolutions

    configs: dict[str, Any] = {
        "freezing": freeze,
        "cpp.dynamic_threads": True,  # torch.set_num_threads at run time, not the number at export
        "aot_inductor.package_constants_in_so": freeze,
        "aot_inductor.custom_ops_to_c_shims": _shims(),
        "aot_inductor.custom_op_libs": ["lightning_accel_kernels"],
    }
    if freeze and processor is None:  # the layout is that of this machine
        configs["post_grad_custom_pre_pass"] = pack_convolutions
    if processor is not None:
        configs |= {"cpp.march": processor.march, "cpp.simdlen": processor.bits}
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = os.pathsep.join([str(kernels), *([before] if before else [])])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)  # torch about torch
            package = aoti_compile_and_package(
                program, package_path=str(directory / "program.pt2"), inductor_configs=configs
            )
    finally:
        os.environ.pop("LIBRARY_PATH")
        if before:
            os.environ["LIBRARY_PATH"] = before
    return Path(package)


def _shims() -> dict[Any, list[str]]:
    """The C interface of each operator that the kernels implement, from its schema."""
    from ..quantize import beside, fused, int4, ops, static  # noqa: F401  register the operators
    from . import attention, convolutions, linear  # noqa: F401

    types = {"Tensor": "AtenTensorHandle", "Optional[Tensor]": "AtenTensorHandle*"}
    types |= {"int": "int64_t", "bool": "int32_t", "float": "double"}
    shims = {}
    for name in _OPERATORS:
        operator = getattr(torch.ops.lightning_accel, name).default
        arguments = ", ".join(types[str(argument.type)] for argument in operator._schema.arguments)
        shims[operator] = [f"AOTITorchError aoti_torch_cpu_{name}({arguments}, AtenTensorHandle*)"]
    return shims


def _extract(package: Path, directory: Path, name: str) -> Path:
    """Takes the shared library out of AOTInductor's package, strips it and names it by its content."""
    from ..artifact import sha256

    target = directory / f"{name}.aoti.so"
    with zipfile.ZipFile(package) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        assert len(libraries) == 1, libraries
        target.write_bytes(archive.read(libraries[0]))
        nodes = libraries[0].removesuffix(".so") + ".json"
        if nodes in archive.namelist():
            target.with_suffix(".json").write_bytes(archive.read(nodes))
    target.chmod(0o755)
    if shutil.which("strip"):
        subprocess.run(["strip", "-s", str(target)], check=True)
    named = directory / f"{name}.{sha256(target)[:12]}.aoti.so"
    for suffix in (".so", ".json"):  # torch looks for the nodes beside the library, under its name
        if target.with_suffix(suffix).exists():
            target.with_suffix(suffix).rename(named.with_suffix(suffix))
    return named


def _could_be_packed(program: torch.export.ExportedProgram, tiled: Mapping[str, Tensor]) -> bool:
    """Whether freezing would gain anything: some weight is neither tiles nor a table to gather from."""
    names = program.graph_signature.inputs_to_parameters
    gathers = {torch.ops.aten.embedding.default}
    return any(
        node.name in names and names[node.name] not in tiled and node.meta["val"].dim() > 1
        and not {user.target for user in node.users} <= gathers
        for node in program.graph.find_nodes(op="placeholder")
    )  # fmt: skip


def _constants(
    library: Path, program: torch.export.ExportedProgram, capture: Capture, tiled: Mapping[str, Tensor]
) -> dict[str, str]:
    """Name of each constant in the library -> name of the tensor in the folder's weights."""
    names = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).get_constant_names_to_original_fqns()
    weights, aliases = capture.weights(), capture.aliases()
    constants = {}
    for constant, given in names.items():
        constants[constant] = name = aliases.get(given, given)
        if given in tiled:
            capture.extra[name] = tiled[given]
        elif name not in weights:  # a constant that the export lifted out of the code
            capture.extra[name] = program.constants[name]
    return constants


# --- run side: torch only --------------------------------------------------------------------------------------------


def isa() -> list[str]:
    """The instruction sets of this CPU that a compiler may use."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in _ISA if capabilities.get(name)]


def slow_kernels(entry: Mapping[str, Any], schemes: Sequence[str] = ()) -> str | None:
    """Why the kernels of quantized layers are not at their fastest in a program, or None where they are.

    Args:
        schemes: what the model was quantized with, in words.
    """
    missing = [name for name in _FAST if name not in entry["isa"]]
    if not missing:
        return None
    why = f"as the CPU that compiled them has no {', '.join(missing)}"
    if any(name not in entry["isa"] for name in _AVX2):
        return f"SLOW: quantized layers run in plain loops, slower than a float32 export (quantize=None), {why}"
    path = "AVX-VNNI" if "avx_vnni" in entry["isa"] else "AVX2"
    rows = "; its many rows (prefill) are slower than float32 in int4-weight, not in int4-int8"
    more = rows if any("int4-weight" in scheme for scheme in schemes) else ""
    return f"quantized layers run with {path}, slower than with AVX512-VNNI, {why}{more}"


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the program cannot run here."""
    if entry["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        return f"it was compiled for torch {entry['torch']}, this is {torch.__version__}"
    if entry["arch"] != platform.machine():
        return f"it was compiled for {entry['arch']}, this is {platform.machine()}"
    missing = sorted(set(entry["isa"]) - set(isa()))
    return f"it was compiled for a CPU with {', '.join(missing)}, which this one lacks" if missing else None


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Opens the library and gives it the folder's tensors as constants, without copying them."""
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    constants = {constant: weights[name] for constant, name in entry["weights"].items()}
    if constants:
        _check_constants(path, entry, constants, runner.get_constant_names_to_dtypes())
        runner.update_constant_buffer(constants, False, False, True)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return runner.run(inputs)

    run.constants = constants  # type: ignore[attr-defined]  # keeps the mapped memory alive
    return run


def _check_constants(path: Path, entry: dict[str, Any], constants: dict[str, Tensor], codes: dict[str, int]) -> None:
    """Raises unless the tensors are those that the library takes, by name and dtype: it would read them as its own."""
    if set(constants) != set(codes):
        raise ValueError(f"{path.name} and the manifest name different constants")
    for name, tensor in constants.items():
        dtype = torch.ops.aten.empty.memory_format([0], dtype=codes[name]).dtype  # of the number that C++ has for it
        if tensor.dtype != dtype:
            raise ValueError(f"{entry['weights'][name]} is stored as {tensor.dtype}, {path.name} takes {dtype}")
