"""The tasks of `pruning.py`: what is pruned of which network, how much, and how a cell of each is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import quality_tasks as q
import torch
from quality import fit, size
from quality_tasks import Settings, inputs_of, scores
from torch import nn

from lightning_accel import Cubic, Distillation, DistillConfig, PruneConfig, Pruning, prune_model_, shrink_model
from lightning_accel.select import count_flops, count_parameters

DENSE = "dense"
FRESH = ", random weights"  # at the end of a variant's name: its shape, without what was learned


@dataclass(frozen=True)
class Task:
    """Variants of a network, pruned by several amounts, against a dense control that is trained as long.

    Args:
        of: the task of `quality_tasks.py` that gives network, data and score.
        variants: name -> what is pruned; the amount is that of the cell. `None` for the control.
        amounts: shares that are pruned; all seeds run at `middle`, seed 0 at the others.
        rates: peak learning rates that each variant may choose from, at `middle`, with seed 0.
        cut_first: cut by `shrink_model`, then trained, rather than masked by the callback in the fit.
        tuned: whether the teacher is fine-tuned first; else it is the network as published.
        length: of a text that FLOPs and latency are of, [1, length].
        latency: whether `--latency` measures its shapes.
    """

    title: str
    of: str
    settings: Settings
    quick: Settings
    variants: Mapping[str, PruneConfig | None]
    amounts: tuple[float, ...] = (0.5,)
    middle: float = 0.5
    rates: tuple[float, ...] = (3e-4,)
    distillation: DistillConfig = field(default_factory=lambda: DistillConfig(temperature=2.0, alpha=0.7))
    schedule: Cubic = field(default_factory=lambda: Cubic(begin=0.0, end=0.5))
    cut_first: bool = False
    tuned: bool = True
    length: int = 128
    latency: bool = False

    @property
    def against(self) -> str | None:
        """The control of saliencies, where there is one."""
        return "random" if "random" in self.variants else None


def by_saliency(structure: str | tuple[str, ...], of: str, *saliencies: str) -> dict[str, PruneConfig | None]:
    """The control, and a variant for each saliency."""
    return {DENSE: None} | {s: PruneConfig(structure, saliency=s, of=of) for s in saliencies}


DEPTH = PruneConfig("layers", of="parameters")
WIDTH = PruneConfig(("neurons", "hidden"), of="parameters", saliency="activation")
TASKS = {
    # Neurons and heads: all of a layer's FLOPs but 1 % are theirs, so that five amounts lie on one line. Layers are
    # not among them: six come in steps of 17 %, and those of a post-norm model are cut before training, another way of
    # training. FLOPs are what the int8 program's time follows.
    "minilm": Task(
        "MiniLM-L6, WordNet glosses, neurons and heads", "minilm",
        replace(q.TASKS["minilm"].settings, train=10000), q.TASKS["minilm"].quick,  # 10k for the teacher, 10k more
        by_saliency(("neurons", "heads"), "flops", "l2", "taylor", "random"),
        amounts=(0.2, 0.35, 0.5, 0.65, 0.8), rates=(2e-4, 6e-4), latency=True,
    ),
    # 60 % of the parameters are left. Width by neurons and hidden, not heads: three groups of them share keys, and
    # one of three is a step of 7 % of the model.
    "smollm2": Task(
        "SmolLM2-135M, Brown corpus", "smollm2",
        replace(q.TASKS["smollm2"].settings, train=512, lr=3e-4), q.TASKS["smollm2"].quick,  # 131,072 tokens
        {DENSE: None, "depth": DEPTH, "width": WIDTH, f"depth{FRESH}": DEPTH, f"width{FRESH}": WIDTH},
        amounts=(0.4,), middle=0.4, cut_first=True, tuned=False, length=64,
        distillation=DistillConfig(temperature=1.0, alpha=0.7),
    ),
    "cnn": Task(
        "CNN with BatchNorm, Fashion-MNIST, channels", "cnn",
        q.TASKS["cnn"].settings, q.TASKS["cnn"].quick,
        by_saliency("channels", "units", "l2", "taylor", "random"), rates=(2e-3,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training and evaluation; `lr` is `None` for the rate that was chosen."""

    task: str
    variant: str
    amount: float
    seed: int
    lr: float | None = None


def example(task: Task, data: q.Data) -> Any:
    """Example inputs: one text of the task's length without padding, or one image."""
    inputs = inputs_of(data.test[0])
    if isinstance(inputs, dict):
        ids = torch.arange(task.length)[None] % 50 + 5
        return {name: ids if name == "input_ids" else torch.ones_like(ids) for name in inputs if name != "labels"}
    return (inputs[:1],)


def config_of(task: Task, cell: Cell) -> PruneConfig | None:
    """What a cell prunes; draws of the random saliency differ from seed to seed."""
    config = task.variants[cell.variant]
    return None if config is None else replace(config, amount=cell.amount, seed=cell.seed)


@lru_cache(1)
def load(name: str, settings: Settings) -> q.Data:
    """Data of a task of `quality_tasks.py`; what was read last is kept."""
    return q.TASKS[name].load(settings)


def teacher_of(task: Task, seed: int, settings: Settings, out: Path) -> nn.Module:
    """The dense network of a seed: fine-tuned, where it is not there yet, or as published."""
    pl.seed_everything(seed, verbose=False)
    model, path = q.TASKS[task.of].build().eval(), out / "teachers" / f"{task.of}-{seed}.pt"
    if not task.tuned:
        return model
    if path.exists():
        found = torch.load(path)
        if found["settings"] != asdict(settings):
            raise SystemExit(f"{path} was trained with other settings; write another --out, or remove it")
        model.load_state_dict(found["weights"])
        return model
    fit(model, settings, load(task.of, settings), seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": asdict(settings), "weights": model.state_dict()}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return model.eval()


def run(cell: Cell, task: Task, settings: Settings, out: Path) -> dict[str, Any]:
    """Trains and scores a cell; the result as it is saved."""
    started = time.perf_counter()
    of, data, config = q.TASKS[task.of], load(task.of, settings), config_of(task, cell)
    teacher = teacher_of(task, cell.seed, settings, out)
    inputs = example(task, data)
    student = of.build().eval()
    student.load_state_dict(teacher.state_dict())
    callbacks: list[pl.Callback] = [Distillation(task.distillation, teacher=teacher, student="model")]
    found: dict[str, Any] = {"dense": sizes(student, inputs)}
    if task.cut_first:
        if config is not None:
            student = cut(student, config, inputs, [inputs_of(b) for b in data.train(-1)[: settings.calibration]])
        if cell.variant.endswith(FRESH):
            forget_(student, cell.seed)
        found["start"] = rounded(scores(of, student, data.test))
    elif config is not None:
        callbacks.append(Pruning(config, task.schedule, module="model", example_inputs=inputs))
    fit(student, replace(settings, lr=cell.lr), data, cell.seed, *callbacks)
    student.eval()
    if not task.cut_first and config is not None:
        masks = callbacks[-1].masks  # type: ignore[attr-defined]
        student = shrink_model(student, masks, example_inputs=inputs)
    found |= {"left": sizes(student, inputs), "shapes": shapes(student)}
    for part, batches in (("validation", data.validation), ("scores", data.test)):
        found[part] = rounded(scores(of, student, batches))
    return found | {"seconds": time.perf_counter() - started}


def cut(model: nn.Module, config: PruneConfig, inputs: Any, calibration: list[Any] | None = None) -> nn.Module:
    """What is left of a model."""
    masks = prune_model_(model, config, example_inputs=inputs, calibration=calibration)
    return shrink_model(model, masks, example_inputs=inputs)


@torch.no_grad()
def forget_(model: nn.Module, seed: int) -> None:
    """Weights as a new Llama has them: matrices normal with a standard deviation of 0.02, gains of one."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)


def sizes(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Parameters, FLOPs of the example inputs, bytes."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return {"parameters": count_parameters(model), "flops": count_flops(model, args, kwargs)[""], "bytes": size(model)}


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of each parameter, so that a cell can be seen to have the widths whose latency was measured."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
