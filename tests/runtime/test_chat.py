"""Chat templates: what they render, and what a hostile one cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.runtime.chat import render_template
from moec.runtime.errors import MoecError
from tests.runtime.fakes import TINY_MODEL, fake_session, random_table

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Hé "you"'}]

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

CHATML_TEXT = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé "you"<|im_end|>\n<|im_start|>assistant\n'


def test_a_template_renders_as_transformers_renders_it() -> None:
    assert render_template(CHATML, MESSAGES, {}) == CHATML_TEXT


def test_what_templates_on_the_hub_expect_is_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{% generation %}{{ 'x' }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    assert render_template(source, MESSAGES[1:], {"bos_token": "<s>"}) == '<s>{"role": "user", "content": "Hé \\"you\\""}x4'


HOSTILE = {
    "raise_exception": ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
    "syntax": ("{% for %}", "Expected an expression"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    "function globals": ("{{ raise_exception.__globals__ }}", None),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    "mutation": ("{{ messages.append(1) }}", "unsafe"),
    "long range": ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
    "division": ("{{ 1 // 0 }}", "division"),
    "wrong types": ("{{ messages[0].content + 1 }}", "str"),
    "missing filter": ("{{ 1 | nope }}", "nope"),
    "import": ("{% include '/etc/passwd' %}", "no loader"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_fails_or_attacks_is_one_clear_error(kind: str) -> None:
    source, message = HOSTILE[kind]
    if message is None:  # an unsafe attribute renders as nothing until it is used
        assert "os" not in render_template(source, MESSAGES, {})
        return
    with pytest.raises(MoecError, match=f"(?s)chat template: .*{message}"):
        render_template(source, MESSAGES, {})


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": CHATML.encode()},
        {"tokenizer_config.json": json.dumps({"chat_template": CHATML}).encode()},
        {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]}
            ).encode()
        },
    ],
    ids=["file", "configuration", "named"],
)
def test_the_template_is_found_wherever_models_keep_it(tmp_path: Path, files: dict[str, bytes]) -> None:
    session, executor = fake_session(tmp_path / "a.moec", random_table(vocab=4096), files=files)
    assert session.tokenizer.decode(session.chat_ids(MESSAGES), skip_special_tokens=False) == CHATML_TEXT
    list(session.chat(MESSAGES, max_new_tokens=2))
    assert len(executor.batches) == 2


def test_special_tokens_come_from_the_configuration(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((TINY_MODEL / "tokenizer_config.json").read_text())
    config |= {"chat_template": "{{ bos_token }}{{ eos_token }}!", "bos_token": {"content": "<|endoftext|>", "lstrip": False}}
    session, _ = fake_session(tmp_path / "a.moec", random_table(vocab=4096), files={"tokenizer_config.json": json.dumps(config).encode()})
    assert session.chat_ids(MESSAGES) == [0, 0, session.encode("!")[0]]
