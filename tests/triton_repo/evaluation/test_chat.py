"""Chat templates render as transformers renders them, and can do no more than make text."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import PreTrainedTokenizerFast

from triton_repo.evaluation.chat import ChatTemplate
from triton_repo.evaluation.errors import EvaluationError

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = """{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}"""
JSON = "{% for message in messages %}{{ message | tojson }}{{ {'a': '<é>'} | tojson(indent=1) }}{% endfor %}"
ASK = [{"role": "user", "content": " 2+2? "}]
CONVERSATION = [*ASK, {"role": "assistant", "content": "4"}, {"role": "user", "content": "and <b> é"}]


def template(example, text):
    facts = dataclasses.replace(
        example.session.engine.manifest.tokenizer, chat_templates={} if text is None else {"default": text}
    )
    return ChatTemplate(facts)


@pytest.mark.parametrize("text", [CHATML, INSTRUCT, JSON])
@pytest.mark.parametrize("messages", [ASK, CONVERSATION])
def test_conversations_render_as_transformers_renders_them(mixtral, text, messages):
    settings = json.loads((mixtral.checkpoint / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(mixtral.checkpoint / "tokenizer.json"),
        bos_token=settings["bos_token"],
        eos_token=settings["eos_token"],
        chat_template=text,
    )
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template(mixtral, text).render(messages, add_generation_prompt=True) == expected


# The template's own words behind the message have these texts too: <|im_end|> and a line break.
@pytest.mark.parametrize("last", ["The answer is", "The answer is ", "", " ", "\n", "e", "end", "  end  ", "|"])
@pytest.mark.parametrize("text", [CHATML, CHATML.replace("message['content'] +", "message['content'] | trim +")])
def test_a_begun_answer_is_continued_as_transformers_continues_it(mixtral, last, text):
    messages = [*ASK, {"role": "assistant", "content": last}]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(mixtral.checkpoint / "tokenizer.json"), chat_template=text)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert template(mixtral, text).render(messages, add_generation_prompt=False) == expected


def test_a_template_without_system_messages_is_asked_again_without_them(mixtral, caplog):
    messages = [{"role": "system", "content": "be brief"}, *ASK]
    assert template(mixtral, INSTRUCT).render(messages, add_generation_prompt=True) == "<s>[INST] 2+2? [/INST]"
    assert "takes no system messages (roles must alternate)" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the engine has none"),
        ("{% for %}", "it is no Jinja"),
        ("{{ raise_exception('no\x1b such') }}", r"it fails \(no\\x1b such\)"),
        ("{{ messages.__class__.__mro__ }}", "it fails"),
        ("{{ messages.append(1) }}", "it fails"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "it fails"),
        ("{{ 1 / 0 }}", "it fails"),
    ],
)
def test_a_template_that_fails_is_refused(mixtral, text, message):
    with pytest.raises(EvaluationError, match=message):
        template(mixtral, text).render(ASK, add_generation_prompt=True)


def test_a_last_message_that_the_template_changes_cannot_be_continued(mixtral):
    with pytest.raises(EvaluationError, match="the last message is not in the text"):
        template(mixtral, "{{ messages[-1].content | upper }}").render(
            [{"role": "assistant", "content": "yes"}], add_generation_prompt=False
        )
