"""Tokenizer and chat template as Qwen's mixtures are published with them, small and made by hand; transformers, on the
same files, says what is right."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from export.tokenizer.chat_template import ChatTemplate
from export.tokenizer.settings import read_settings

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The parts of Qwen's template that decide the text: the system's turn before all others, tools as JSON, calls and
# responses of tools inside the turns, thoughts that are dropped before the last question, and an empty thought that
# turns thinking off.
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" %}
        {%- set ns.looking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}
                {{- call.function.arguments }}
            {%- else %}
                {{- call.function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "2+2?"}],
    [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": " naïve e\u0301 <|im_end|> 123\r\n"}],
    [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>\nso\n</think>\n\nd"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant", "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"town": "Zürich"}}}],
        },
        {"role": "tool", "content": '{"sky": "grey"}'},
    ],
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "look", "description": "l'œil", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe"])
def folder(request, tmp_path_factory):
    """A folder with the files of a published checkpoint: tokenizer.json with the class's pipeline written out, and
    tokenizer_config.json with its added tokens and its template."""
    made = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the weather user assistant system tool response naïve \n\n"] * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in (END, START, STOP)])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.save(str(made / "tokenizer.json"))
    added = {
        str(index): {
            "content": token.content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token.special,
        }
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }  # fmt: skip
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added, "bos_token": None,
        "additional_special_tokens": [START, STOP], "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": STOP, "errors": "replace", "model_max_length": 131072, "pad_token": END,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    (made / "config.json").write_text(json.dumps({"model_type": request.param, "eos_token_id": 0}))
    return made


def test_the_published_file_is_kept_as_it_is_and_gives_transformers_ids(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = read_settings(folder, json.loads((folder / "config.json").read_text()))
    assert ours.facts.tokenizer_class == type(theirs).__name__ == "Qwen2Tokenizer"
    assert ours.facts.special_tokens == theirs.special_tokens_map
    for text in (
        "it'S 12345 we'll\r\n\n  x = [7,8]; e\u0301 ",
        f"{START}user\n日本{STOP}\n",
        "\t\n  <think> a</think>",
    ):
        assert ours.tokenizer.backend.encode(text).ids == theirs(text)["input_ids"], text
    (folder / "made").mkdir()
    ours.write(folder / "made")
    assert (folder / "made" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}], ids=["thinking", "not thinking"])
def test_the_template_gives_what_apply_chat_template_gives(folder, conversation, tools, more):
    facts = read_settings(folder, json.loads((folder / "config.json").read_text())).facts
    template = ChatTemplate(facts.chat_templates["default"], facts.special_tokens)
    asked = {"tools": tools, "add_generation_prompt": True}
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(conversation, tokenize=False, **asked, **more)
    assert template.render(conversation, variables=more, **asked) == expected
    assert expected.startswith(START)
