"""A model's chat template: Jinja source from its directory, rendered the way transformers renders it.

Templates come with models, so they are other people's code: they run in Jinja's immutable sandbox, and whatever they
raise is an error of the row they were given.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
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
"""For a model that brings no chat template. Needs no token but EOS, which ends every turn; has no place for tools."""

TODAY = datetime(2024, 7, 26)
"""What templates that print the date (Llama 3.2 and others) are told it is: the fallback date of Llama's own template.
A job's tokens must not depend on the day it runs, nor a resumed job's data differ from what it started with."""

_MESSAGE_LENGTH = 300  # characters of a template's own error that are repeated

Turn = Mapping[str, Any]
"""One message as templates take it: see `Dialog.messages`."""


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote. Here it only lets its body through."""

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
    """Jinja's own filter escapes HTML; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


class ChatTemplate:
    """A compiled chat template. `source` is its Jinja text; `variables` are the special tokens it may print."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Raises UserError when the source is no valid Jinja."""
        self.source = source
        try:
            self._template = _environment().from_string(source, globals=dict(variables))
        except TemplateError as error:
            raise UserError(
                "model_unsupported", f"the model's chat template is not valid Jinja: {error}", "model"
            ) from None
        # Every rendering makes a dict of the globals, and Jinja keeps them in chained ones, which takes it longer than
        # all the rest.
        self._template.globals = dict(self._template.globals)

    def render(
        self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The dialog as text. Raises RowError with the template's own words where it refuses the dialog."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # noqa: BLE001  -- the template is foreign code: it may raise anything
            reason = f"{error}" or type(error).__name__
            raise RowError(f"the model's chat template refuses the dialog: {reason[:_MESSAGE_LENGTH]}") from None


def find_template(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The Jinja source that `model_dir` brings: chat_template.jinja, else chat_template of tokenizer_config.json.

    That key may hold a list of named templates; then it is the one named `default`. None: the model has none.
    """
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None
