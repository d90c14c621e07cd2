"""Chat templates: messages -> the text that the model was trained to continue.

A template comes from the model's maker, so it runs in jinja's sandbox, with what the templates on the hub expect: `messages`,
`add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, `tojson` and the `generation` block.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moec.runtime.artifact import Artifact
from moec.runtime.errors import MoecError
from moec.runtime.strict_json import loads

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = Mapping[str, Any]
"""At least `role` (`user`, `assistant`, `system`, ...) and `content`."""


def render(artifact: Artifact, messages: Sequence[Message]) -> str:
    """The prompt for a conversation, in the model's own template.

    Raises:
        MoecError: the model has no template, or the template refuses the messages.
    """
    if not messages or not all(isinstance(message.get("role"), str) for message in messages):
        raise MoecError("chat: expected messages such as [{'role': 'user', 'content': 'Hello'}]")
    config = loads(artifact.read(CONFIG), CONFIG) if CONFIG in artifact.manifest.files else {}
    source = artifact.read(TEMPLATE).decode() if TEMPLATE in artifact.manifest.files else _default(config.get("chat_template"))
    if source is None:
        raise MoecError(f"{artifact.folder}: this model has no chat template; give it a plain prompt")
    special = {name: _content(config[name]) for name in _SPECIAL if config.get(name) is not None}
    return render_template(source, messages, special)


def render_template(source: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """Render a template with the special tokens it may name.

    >>> render_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", [{"role": "user", "content": "Hi"}], {})
    '<user>Hi'

    Raises:
        MoecError: the template is wrong, or refuses the messages.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks what the assistant said; for rendering it is nothing."""

        tags = {"generation"}  # noqa: RUF012  # the base class declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(source).render(messages=[dict(m) for m in messages], add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise MoecError(f"chat template: {str(error) or type(error).__name__}; check the messages' roles and contents") from error


def _default(template: Any) -> str | None:
    """The template of a tokenizer's configuration, which may hold several by name."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str:
    """A special token's text: it is stored as a string or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
