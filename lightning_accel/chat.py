"""Conversations: messages in, the next answer out, by the template that travels with the tokenizer.

Imports jinja2 when a template is first rendered.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generate import Cache
from .text import CONFIG, continue_ids

if TYPE_CHECKING:
    from .loaded import LoadedModel

TEMPLATE = "chat_template.jinja"
Messages = Sequence[Mapping[str, Any]]


def chat(
    model: LoadedModel,
    messages: Messages,
    max_new_tokens: int = 64,
    *,
    stream: bool = False,
    cache: Cache | None = None,
    stop: str | Sequence[str] = (),
    template: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> str | Iterator[str]:
    """The next answer in a conversation.

    Args:
        messages: `[{"role": "user", "content": text}, ...]`, from the first on, with the answers that were given.
        max_new_tokens: of the answer.
        stream: return an iterator over pieces of the answer instead, as they come.
        cache: of `model.new_cache`, one conversation's: what it holds of the conversation already is not read again.
        stop: texts before which the answer ends; it ends at the model's end-of-text token too.
        template: further variables of the template, such as `{"enable_thinking": False}`.
        sampling: `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`, as in `generate`.

    Raises:
        ValueError: the artifact has no template, or it refuses the messages.
        ImportError: jinja2 is not installed.
    """
    from .loaded import LoadedSeq2Seq

    if isinstance(model, LoadedSeq2Seq):
        raise ValueError("an encoder-decoder model holds no conversation; write model.generate_text(text)")
    ids = model.tokenizer.encode(render(model, messages, **(template or {})), add_special_tokens=False).ids
    if cache is not None:  # what is refused later would have cost what the cache holds
        cache.check_owner(model, 1)
        if isinstance(max_new_tokens, int) and len(ids) + max_new_tokens - 1 > cache.capacity:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, {max_new_tokens} may come, and the cache holds "
                f"{cache.capacity}; begin with a larger one: model.new_cache(capacity=...)"
            )
    rest = ids if cache is None else _rewind(cache, ids)
    pieces = continue_ids(model, [rest], max_new_tokens, stop, cache, **sampling)
    answer = (piece for (piece,) in pieces)
    return answer if stream else "".join(answer)


def _rewind(cache: Cache, ids: list[int]) -> list[int]:
    """Has a cache forget what is not the beginning of `ids`; returns what it still has to read, one token at least."""
    held, common = cache.ids_BS[0].tolist(), 0
    while common < min(len(held), len(ids) - 1) and held[common] == ids[common]:
        common += 1
    cache.keep(common)
    return ids[common:]


def render(model: LoadedModel, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
    """The text of a conversation, up to where the answer begins, as transformers' `apply_chat_template` writes it.

    The template runs in jinja2's sandbox, over plain values.

    Raises:
        ValueError: the artifact has no template, or it refuses the messages.
        ImportError: jinja2 is not installed.
    """
    if isinstance(messages, str) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"messages={messages!r} is no conversation; write [{{'role': 'user', 'content': 'text'}}]")
    names = {asset["name"] for asset in model.manifest["assets"]}
    source, config = template_and_config({name: model.asset(name) for name in (TEMPLATE, CONFIG) if name in names})
    if source is None:
        raise ValueError(
            "this artifact has no template of conversations; export it with processor= a tokenizer that has a "
            "chat_template, or write the prompt yourself: model.generate_text(prompt)"
        )
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise ImportError("conversations need the package jinja2: pip install jinja2") from error
    special = {n: t["content"] if isinstance(t, dict) else t for n, t in config.items() if n.endswith("_token")}
    given = json.loads(json.dumps({"messages": list(messages), **variables}))
    try:
        return _compiled(source).render(**special, **given, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ValueError(f"the template of conversations refuses the messages: {error}") from error


def template_and_config(files: Mapping[str, Path]) -> tuple[str | None, dict[str, Any]]:
    """The template of conversations, and the tokenizer's configuration, from the files that travel with a model."""
    config = json.loads(Path(files[CONFIG]).read_text()) if CONFIG in files else {}
    source = Path(files[TEMPLATE]).read_text() if TEMPLATE in files else config.get("chat_template")
    return source if isinstance(source, str) else None, config


def _compiled(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # tags that mark an answer for training
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return environment.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source))
