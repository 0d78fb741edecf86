"""A model's chat template: Jinja source from its directory, rendered the way transformers renders it.

Templates come with models, so they are untrusted code: they run in Jinja's immutable sandbox, and whatever they raise
becomes an error of the row that was rendered.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainers.data.dialog import RowError
from trainers.errors import UserError

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""For a model without a chat template. Needs no control token but EOS, which ends every turn. Doesn't support tools."""

TODAY = datetime(2024, 7, 26)
"""The date for templates that print today's date (Llama 3.2 and others); it is the fallback date of Llama's own
template. A job's tokens must not depend on the day it runs, and a resumed job needs the data it started with."""

_MESSAGE_LENGTH = 300  # characters of a template's error that our message repeats

Turn = Mapping[str, Any]
"""One message as templates take it: see `Dialog.messages`."""


class _Generation(Extension):
    """The tag `{% generation %}`, which marks what the assistant wrote. Here it just renders its body."""

    tags = {"generation"}  # noqa: RUF012  -- Jinja's own way to declare it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's `tojson`, which escapes HTML; models were trained on plain JSON. Raises ValueError for values
    that JSON can't express, such as infinity (1e999)."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        allow_nan=False,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


class ChatTemplate:
    """A model's chat templates, compiled. `sources` are their Jinja texts by name, `default` among them; `tool_use`, if
    there is one, renders the dialogs with tools. `variables` are the special tokens that they may print."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any]) -> None:
        """Raises UserError if one of these two templates isn't valid Jinja."""
        self.sources = dict(sources)
        self._default = _compiled(sources["default"], variables)
        self._with_tools = _compiled(sources["tool_use"], variables) if "tool_use" in sources else self._default

    def render(
        self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The dialog as text. Raises RowError with the template's own message if it refuses the dialog.

        Most templates take the arguments of tool calls as objects, and print them as JSON. Some take them as text, as
        in OpenAI's format: if rendering with objects fails, it is tried with text.
        """
        try:
            return self._render(messages, tools, add_generation_prompt)
        except RowError:
            if any("tool_calls" in message for message in messages):
                with suppress(RowError, ValueError):  # ValueError from `_tojson`
                    return self._render([_with_text(message) for message in messages], tools, add_generation_prompt)
            raise

    def _render(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return (self._with_tools if tools else self._default).render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # noqa: BLE001  -- the template is foreign code: it may raise anything
            reason = f"{error}" or type(error).__name__
            raise RowError(f"the model's chat template refuses the dialog: {reason[:_MESSAGE_LENGTH]}") from None


def _with_text(message: Turn) -> Turn:
    """`message` with the arguments of its tool calls as text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _tojson(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _compiled(source: str, variables: Mapping[str, Any]) -> Template:
    try:
        template = _environment().from_string(source, globals=dict(variables))
    except Exception as error:  # noqa: BLE001  -- also Python's errors in the code that Jinja generates: nested too deep
        reason = f"{error}"[:_MESSAGE_LENGTH]
        raise UserError(
            "model_unsupported", f"the model's chat template is not valid Jinja: {reason}", "model"
        ) from None
    # Every rendering copies the globals to a dict. Jinja keeps them in a ChainMap, for which that takes longer than all
    # the rest.
    template.globals = dict(template.globals)
    return template


def find_templates(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The Jinja sources in `model_dir`, by name: `default` from chat_template.jinja, others from the files in
    additional_chat_templates. Without such files, those of `chat_template` in tokenizer_config.json, which is one
    source or several with names. Empty if the model has none.

    Raises UserError if a file isn't UTF-8, or if there are templates and none is called `default`.
    """
    found = sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
    files = {file.stem: file for file in found if file.is_file()}  # reading a pipe would never end
    if (model_dir / "chat_template.jinja").is_file():
        files["default"] = model_dir / "chat_template.jinja"
    entry = tokenizer_config.get("chat_template")
    if files:
        sources = {name: _read(file) for name, file in files.items()}
    elif isinstance(entry, str):
        sources = {"default": entry}
    else:
        if isinstance(entry, list):
            entry = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        named = entry.items() if isinstance(entry, dict) else ()
        sources = {f"{name}": source for name, source in named if isinstance(source, str)}
    if sources and "default" not in sources:
        names = ", ".join(sorted(sources))
        raise UserError(
            "model_unsupported",
            f"the model has chat templates by name ({names}), and none of them is 'default'"[:_MESSAGE_LENGTH],
            "model",
            suggestion="give the one to use that name, in tokenizer_config.json or as chat_template.jinja",
        )
    return sources


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("model_incomplete", f"the model's {file.name} is not UTF-8 text", "model") from None
