"""The teacher: a guest in the student's fit, in whatever form it comes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import select
from ..inputs import with_decoder_inputs, without_labels
from ..loaded import LoadedModel, LoadedSeq2Seq
from .layers import Taps
from .losses import TopK, outputs_of


@dataclass
class Answer:
    """What a model puts out in one call, as far as it is compared.

    Attributes:
        logits: [..., classes], or truncated.
        hidden, attention: by the module's name.
        lengths: of a cache, whose tensors hold the positions of all samples one after the other, how many belong to
            each sample [batch]: of the logits under `""`, of hidden states by name; `None` otherwise.
    """

    logits: Tensor | TopK | None
    hidden: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] | None = None


@contextmanager
def guest(teacher: nn.Module) -> Iterator[nn.Module]:
    """The teacher in eval mode and without gradients; its own state is put back afterwards (contract 9).

    Not in inference mode (docs/decisions/0025): its tensors do not count writes in place, by which `Taps` knows them.
    """
    with select.evaluating(teacher), torch.no_grad():
        yield teacher


class LiveTeacher:
    """Asks a teacher what it puts out for the student's inputs.

    Args:
        model: a module that takes the student's inputs, or a loaded artifact.
        hidden, attention: names of modules whose states, or attention maps, are wanted.
    """

    def __init__(
        self, model: nn.Module | LoadedModel, hidden: Iterable[str] = (), attention: Iterable[str] = ()
    ) -> None:
        self.model = model
        hidden, attention = list(dict.fromkeys(hidden)), list(dict.fromkeys(attention))
        if isinstance(model, LoadedModel):
            if hidden or attention:
                raise ValueError(
                    f"the teacher is an artifact, {model.directory}, which has no modules to take {hidden + attention} "
                    "from; give the model that it was exported from, or compare logits alone: hidden=None"
                )
            self._taps = None
        else:
            self._taps = Taps(model, hidden, attention)

    def __call__(self, args: tuple, kwargs: Mapping[str, Any], student: nn.Module | None = None) -> Answer:
        """The teacher's answer to one call of the student; labels are taken out, decoder inputs made from them.

        Args:
            student: whose call it is; it decides how labels become decoder inputs.

        Raises:
            ValueError: it puts out no logits where `logits` of it are compared, its modules no states or maps; ids
                outside its vocabulary.
        """
        if student is not None:
            kwargs = with_decoder_inputs(student, dict(kwargs))
        kwargs = without_labels(kwargs)
        if self._taps is None:
            return Answer(outputs_of(self._ask_artifact(args, kwargs), (args, kwargs)))
        model, taps = self.model, self._taps
        assert isinstance(model, nn.Module)
        if "use_cache" in inspect.signature(model.forward).parameters:
            kwargs = {"use_cache": False, **kwargs}  # nothing is generated
        _check_takes(model, kwargs)
        taps.open = True
        given = tensors_of((args, kwargs))
        try:
            with guest(model), _dtype_of(model) as cast:
                moved = _move((cast(args), cast(kwargs)), _device_of(model))
                output = model(*moved[0], **moved[1])
            if any(tensor._version != version for tensor, version in given):
                raise ValueError(
                    f"the teacher, a {type(model).__name__}, changes its inputs in place, and they are the student's; "
                    "give a module that clones them first"
                )
            taps.check()
            hidden = {name: _only(kept, model, name, "a hidden state") for name, kept in taps.hidden.items()}
            maps = {name: _only(kept, model, name, "an attention map") for name, kept in taps.attention.items()}
        except IndexError as error:
            ids, own = _vocabulary(model), None if student is None else _vocabulary(student)
            if ids is not None and _largest((args, kwargs)) < ids:
                raise
            sizes = ", ".join(f"the {who}'s has {n} ids" for who, n in (("teacher", ids), ("student", own)) if n)
            raise ValueError(
                f"the teacher, a {type(model).__name__}, cannot look up the student's inputs ({error}): with another "
                f"vocabulary ({sizes or 'of unknown size'}) distil sequences: train on "
                "lightning_accel.pseudo_labels(teacher, batches), as text"
            ) from error
        finally:
            taps.open = False
            taps.clear()
        return Answer(outputs_of(output, (args, kwargs)), hidden, maps)

    def _ask_artifact(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        assert isinstance(self.model, LoadedModel)
        known = self.model.input_names
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        given = {name: value for name, value in kwargs.items() if name in known and value is not None}
        args, given = tree_map_only(Tensor, lambda t: (t.float() if t.is_floating_point() else t).cpu(), (args, given))
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            return tree_map_only(Tensor, lambda t: t.to(device), self.model(*args, **given))

    def remove(self) -> None:
        """Takes the hooks off the teacher."""
        if self._taps is not None:
            self._taps.remove()


def tensors_of(values: Any) -> list[tuple[Tensor, int]]:
    """Tensors and how often each was written to, by which a change in place is known."""
    return [(t, t._version) for t in tree_leaves(values) if isinstance(t, Tensor) and not t.is_inference()]


def _only(kept: list[Tensor], model: nn.Module, name: str, what: str) -> Tensor:
    if len(kept) == 1:
        return kept[0]
    if kept:
        raise ValueError(
            f"the teacher's {name!r}, of a {type(model).__name__}, was called {len(kept)} times, as layers that share "
            "weights are; name a module that is called once"
        )
    who = f"the teacher's {name!r}, of a {type(model).__name__}, gave no {what.split(' ', 1)[1]}"
    if what == "an attention map":
        raise ValueError(
            f"{who}; fused attention computes none. Load it with from_pretrained(path, attn_implementation='eager'), "
            "or call teacher.set_attn_implementation('eager')"
        )
    raise ValueError(f"{who}; name a module that is called and puts out a tensor [..., width]{stale(model)}")


def stale(model: nn.Module) -> str:
    """What else may be the cause in a compiled model: torch compiled it for calls without hooks."""
    if not any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        return ""
    return ". It is compiled: if it was called before this fit, call torch.compiler.reset() first"


def _check_takes(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    parameters = inspect.signature(model.forward).parameters
    unknown = sorted(set(kwargs) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"the student is called with {unknown}, which the teacher, a {type(model).__name__}, does not take; leave "
            "them out of the batch, or give a module whose forward() takes the student's inputs"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """Number of ids of the first embedding."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _largest(inputs: Any) -> int:
    ids = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and not t.is_floating_point() and t.numel()]
    return max((int(t.max()) for t in ids), default=-1)


def _labels_of(model: nn.Module) -> dict[int, str]:
    """transformers' names of the classes; users write their numbers as strings, too."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(named, Mapping) or not all(str(i).isdecimal() for i in named):
        return {}
    return {int(i): str(label) for i, label in named.items()}


def check_same_labels(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError where two transformers models number the same labels in another order."""
    own, other = _labels_of(student), _labels_of(teacher)
    if own != other and sorted(own.values()) == sorted(other.values()):
        index = next(i for i in own if own[i] != other.get(i))
        raise ValueError(
            f"class {index} is {own[index]!r} to the student and {other.get(index)!r} to the teacher: the same labels "
            "in another order; give both the same config.id2label, and the labels of the data in that order"
        )


@contextmanager
def _dtype_of(teacher: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """The teacher's dtype for its inputs and for what it makes: Trainer(precision="bf16-true") sets the student's."""
    dtypes = {p.dtype for p in teacher.parameters() if p.is_floating_point()}
    dtype, before = dtypes.pop() if len(dtypes) == 1 else None, torch.get_default_dtype()

    def cast(inputs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)

    if dtype is None:
        yield lambda inputs: inputs
        return
    torch.set_default_dtype(dtype)
    try:
        yield cast
    finally:
        torch.set_default_dtype(before)


def _device_of(teacher: nn.Module) -> torch.device | None:
    """That of its first parameter; of a model that lies on several it is the one of its inputs."""
    return next((p.device for p in teacher.parameters()), None)


def _move(inputs: Any, device: torch.device | None) -> Any:
    return inputs if device is None else tree_map_only(Tensor, lambda t: t.to(device), inputs)


# --- where teachers come from -----------------------------------------------------------------------------------------

FORMS = (
    "a module, the folder or name of a transformers model, the folder of an artifact or of a TeacherCache, a Lightning "
    "checkpoint with teacher_class=, or 'self'"
)


def load_teacher(source: str | Path, teacher_class: Any = None, eager: bool = False) -> Any:
    """A teacher by its name or path: a module, a loaded artifact, or a `TeacherCache`.

    Args:
        source: a Lightning checkpoint (`.ckpt`), the folder of an artifact, of a cache or of a transformers model, or
            the name of one.
        teacher_class: the LightningModule of a checkpoint.
        eager: load a transformers model with attention that gives its maps.

    Raises:
        ValueError: none of these; a checkpoint without its class, or whose class needs arguments that it does not hold.
    """
    path = Path(source)
    if teacher_class is not None or path.suffix == ".ckpt":
        return _from_checkpoint(path, teacher_class)
    if (path / "cache.json").is_file():
        from .cache import TeacherCache

        return TeacherCache(path)
    if (path / "manifest.json").is_file():
        from ..artifact import load

        return load(path)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model; teacher= is {FORMS}")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher={str(source)!r} was not found; teacher= is {FORMS} ({error})") from error
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{source} says that it is a {name or 'model of no class'}, which transformers has not; load it yourself: "
            "teacher=Model.from_pretrained(path)"
        )
    return getattr(transformers, name).from_pretrained(source, **({"attn_implementation": "eager"} if eager else {}))


def _from_checkpoint(path: Path, teacher_class: Any) -> nn.Module:
    if not hasattr(teacher_class, "load_from_checkpoint"):
        raise ValueError(
            f"the checkpoint {path} does not say of which class it is; write "
            f"Distillation(..., teacher={str(path)!r}, teacher_class=MyLightningModule)"
        )
    try:
        return teacher_class.load_from_checkpoint(path, map_location="cpu")
    except TypeError as error:
        raise ValueError(
            f"{teacher_class.__name__} needs arguments that {path} does not hold ({error}); build it yourself: "
            f"teacher = {teacher_class.__name__}(...); "
            f"teacher.load_state_dict(torch.load({str(path)!r}, weights_only=True)['state_dict'])"
        ) from error


# --- sequence-level distillation --------------------------------------------------------------------------------------


def pseudo_labels(teacher: Any, batches: Iterable[Any], **options: Any) -> list[Tensor]:
    """What the teacher generates for each sample, to train on, whatever the student's tokenizer (Kim & Rush 2016).

    A student with the same vocabulary trains on the ids; another one on the text, `tokenizer.decode(ids)` with the
    teacher's tokenizer. See arXiv:1606.07947.

    Args:
        teacher: a transformers model that generates, or a loaded artifact of a language model.
        batches: mappings of keyword inputs for `generate`, such as `input_ids` and `attention_mask`, or
            `input_features`; labels are ignored. Prompts of a causal model are padded on the left.
        options: of `teacher.generate`, such as `max_new_tokens=64`, `num_beams=4`.

    Returns:
        One tensor [length] of token ids a sample, or `num_return_sequences` of them: without the prompt or the
        decoder's start token, up to and with the first end-of-sequence token.

    Raises:
        ValueError: the teacher does not generate; prompts of a causal model that are padded on the right.

    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> teacher = transformers.LlamaForCausalLM(config)
    >>> labels = pseudo_labels(teacher, [{"input_ids": torch.tensor([[1, 5], [1, 6]])}], max_new_tokens=3)
    >>> len(labels)
    2
    """
    if not hasattr(teacher, "generate"):
        raise ValueError(f"the teacher, a {type(teacher).__name__}, has no generate(); give a model that generates")
    found: list[Tensor] = []
    for batch in batches:
        inputs = without_labels(batch)
        artifact = isinstance(teacher, LoadedModel)
        encodes = isinstance(teacher, LoadedSeq2Seq) if artifact else teacher.config.is_encoder_decoder
        mask = inputs.get("attention_mask")
        if not encodes and mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "a prompt is padded on the right, so that the teacher would continue its padding; write "
                "tokenizer.padding_side = 'left'"
            )
        if artifact:
            known = teacher.encoder.input_names if encodes else ("input_ids", "attention_mask")
            ids = teacher.generate(**{name: inputs[name] for name in known if name in inputs}, **options)
            stops = options.get("stop")
            found += [_until(row, teacher.entry["cache"].get("stop", ()) if stops is None else stops) for row in ids]
            continue
        with guest(teacher), _dtype_of(teacher) as cast:
            ids = teacher.generate(**_move(cast(inputs), _device_of(teacher)), **options).cpu()
        if not encodes:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        elif (ids[:, 0] == teacher.config.decoder_start_token_id).all():
            ids = ids[:, 1:]
        end = getattr(options.get("generation_config", teacher.generation_config), "eos_token_id", None)
        end = options.get("eos_token_id", end)
        found += [_until(row, [] if end is None else end) for row in ids]
    return found


def _until(ids: Tensor, ends: Any) -> Tensor:
    """Up to and with the first of `ends`."""
    found = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype).flatten()).nonzero()
    return ids[: int(found[0]) + 1] if len(found) else ids
