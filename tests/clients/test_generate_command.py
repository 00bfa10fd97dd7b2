"""`moeship generate`: what goes to stdout and stderr, which model is taken, and the exit status of each ending."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from certificates import issue
from fake_triton import empty_final, piece

from cli.generate import Timeline, statistics
from cli.main import main
from triton_repo.contracts.piece import Piece

# Long enough for a busy machine; a test that waits so long has failed.
PATIENCE_S = 60


def sent_tensors(server) -> dict[str, bytes]:
    request = server.requests[-1]
    return dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents, strict=True))


def test_the_text_goes_to_stdout_and_nothing_to_stderr(server, capsys):
    assert main(["generate", "--url", server.url, "def main("]) == 0
    assert capsys.readouterr() == ("def main\n", "")


def test_statistics_go_to_stderr(server, capsys):
    assert main(["generate", "--url", server.url, "--stats", "def main("]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def main\n"
    assert captured.err.startswith("3 tokens, first after ")


def test_json_is_one_object_with_text_tokens_counts_and_speed(server, capsys):
    assert main(["generate", "--url", server.url, "--json", "def main("]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("time_to_first_token_ms") > 0
    assert found.pop("tokens_per_s") > 0
    assert found == {
        "model": "phixtral",
        "text": "def main",
        "token_ids": [5, 6, 7],
        "finish_reason": "length",
        "num_input_tokens": 3,
        "num_output_tokens": 3,
    }


def test_every_option_reaches_the_server(server):
    sampling = ["--temperature", "0.5", "--top-k", "2", "--top-p", "0.25", "--seed", "9"]
    words = ["--max-tokens", "7", *sampling, "--stop", "a", "--stop", "bc"]
    assert main(["generate", "--url", server.url, *words, "x"]) == 0
    assert sent_tensors(server) == {
        "text_input": b"\x01\x00\x00\x00x",
        "max_tokens": b"\x07\x00\x00\x00",
        "stream": b"\x01",
        "temperature": b"\x00\x00\x00\x3f",
        "top_k": b"\x02\x00\x00\x00",
        "top_p": b"\x00\x00\x80\x3e",
        "seed": b"\x09" + bytes(7),
        "stop_words": b"\x01\x00\x00\x00a\x02\x00\x00\x00bc",
    }


def test_penalties_words_and_ends_reach_the_server(server):
    options = ["--repetition-penalty", "1.5", "--presence-penalty", "0.5", "--frequency-penalty", "-0.25"]
    words = ["--bad", "a", "--bad", "bc", "--min-tokens", "3", "--end-id", "-1", "--log-probs"]
    assert main(["generate", "--url", server.url, *options, *words, "x"]) == 0
    sent = sent_tensors(server)
    assert {name: sent[name] for name in sent if name not in ("text_input", "max_tokens", "stream")} == {
        "repetition_penalty": b"\x00\x00\xc0\x3f",
        "presence_penalty": b"\x00\x00\x00\x3f",
        "frequency_penalty": b"\x00\x00\x80\xbe",
        "bad_words": b"\x01\x00\x00\x00a\x02\x00\x00\x00bc",
        "min_tokens": b"\x03\x00\x00\x00",
        "end_id": b"\xff\xff\xff\xff",
        "return_log_probs": b"\x01",
    }


def test_a_temperature_alone_draws(server):
    assert main(["generate", "--url", server.url, "--temperature", "0.5", "x"]) == 0
    assert sent_tensors(server)["top_p"] == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("as_json", [False, True])
def test_an_echo_begins_with_the_prompt_which_a_stream_never_repeats(server, capsys, as_json):
    assert main(["generate", "--url", server.url, "--echo", *(["--json"] if as_json else []), "print("]) == 0
    out = capsys.readouterr().out
    assert (json.loads(out)["text"] if as_json else out.removesuffix("\n")) == "print(def main"
    assert "exclude_input_in_output" not in sent_tensors(server)


def with_log_probs(request, context):
    yield piece("def ", (5, 6), num_output=2, log_probs=True)
    yield piece("main", (7,), finish_reason="length", num_output=3, log_probs=True)
    yield empty_final()


def test_log_probabilities_are_a_table_on_stderr(server, capsys):
    server.answer = with_log_probs
    assert main(["generate", "--url", server.url, "--log-probs", "x"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def main\n"
    # exp(-1) is 0.36788, exp(-0.5) 0.60653, exp(0.5) 1.64872.
    assert captured.err.splitlines() == [
        "  log prob   probability  text",
        "    -1.000      36.788 %  'def '  (-0.500 -0.500)",
        "    -0.500      60.653 %  'main'",
        "3 tokens: sum -1.500, mean -0.500, perplexity 1.649",
    ]


def test_log_probabilities_are_in_the_json_object(server, capsys):
    server.answer = with_log_probs
    assert main(["generate", "--url", server.url, "--log-probs", "--json", "x"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["log_probs"], found["cum_log_prob"], captured.err) == ([-0.5, -0.5, -0.5], -0.5, "")


def test_min_p_biases_and_what_is_asked_of_tokens_reach_the_server(server):
    options = ["--min-p", "0.25", "--logit-bias", "50=-2.5", "--logit-bias", "7=4", "--n", "3"]
    assert main(["generate", "--url", server.url, *options, "--top-log-probs", "2", "--prompt-log-probs", "x"]) == 0
    sent = sent_tensors(server)
    assert {name: sent[name] for name in sent if name not in ("text_input", "max_tokens", "stream")} == {
        "min_p": b"\x00\x00\x80\x3e",
        "logit_bias_ids": b"\x32\x00\x00\x00\x07\x00\x00\x00",
        "logit_bias_values": b"\x00\x00\x20\xc0\x00\x00\x80\x40",
        "num_log_probs": b"\x02\x00\x00\x00",
        "return_prompt_log_probs": b"\x01",
        "num_return_sequences": b"\x03\x00\x00\x00",
    }


@pytest.mark.parametrize(
    ("words", "guide_type", "guide"),
    [
        (["--json-object"], b"json", None),
        (["--regex", "[0-9]+é"], b"regex", "[0-9]+é".encode()),
        (["--json-schema", "guide"], b"json_schema", b'{"type": "null"}'),
        (["--grammar", "-"], b"ebnf_grammar", b'root ::= "a"'),
    ],
)
def test_a_guide_reaches_the_server(server, tmp_path, monkeypatch, words, guide_type, guide):
    (tmp_path / "guide").write_text('{"type": "null"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'root ::= "a"')))
    assert main(["generate", "--url", server.url, *words, "x"]) == 0
    sent = sent_tensors(server)
    assert sent["guided_decoding_guide_type"][4:] == guide_type
    assert sent.get("guided_decoding_guide", b"    None")[4:] == (guide or b"None")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json-schema", "absent.json"], "reading --json-schema absent.json: "),
        (["--grammar", "latin1"], "reading --grammar latin1: 'utf-8' codec"),
        (["--regex", ""], "reading the guide: it is empty"),
    ],
)
def test_a_guide_that_cannot_be_read_is_wrong_input(server, tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "latin1").write_bytes(b"\xe9")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--url", server.url, *words, "x"]) == 2
    assert said in capsys.readouterr().err


def test_guides_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--json-object", "--regex", "a", "x"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["5", "a=1", "5=x", "=", "5=1=2"])
def test_a_bias_that_is_no_id_and_number_is_wrong_usage(capsys, text):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--logit-bias", text, "x"])
    assert caught.value.code == 2
    assert f"--logit-bias: found {text!r}, expected a token id and a number, such as 50=-2.5" in capsys.readouterr().err


def test_a_token_that_is_biased_twice_is_refused(server, capsys):
    assert main(["generate", "--url", server.url, "--logit-bias", "5=1", "--logit-bias", "5=2", "x"]) != 0
    assert "--logit-bias: found a token id twice, expected each once" in capsys.readouterr().err


TOP = ((5, -0.5), (9, -1.25))


def with_all_log_probs(request, context):
    prompt = {"prompt_token_ids": (1, 2, 3), "prompt_log_probs": (-1.0, -3.0)}
    yield piece("de", (5,), num_output=1, top_log_probs=(TOP,), **prompt)
    yield piece("f", (9,), finish_reason="length", num_output=2, top_log_probs=(TOP,))
    yield empty_final()


def test_likeliest_tokens_and_the_prompts_probability_are_a_table_on_stderr(server, capsys):
    server.answer = with_all_log_probs
    assert main(["generate", "--url", server.url, "--top-log-probs", "2", "--prompt-log-probs", "x"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def\n"
    # exp(2) is 7.389.
    assert captured.err.splitlines() == [
        "         5: 5:-0.500 9:-1.250",
        "         9: 5:-0.500 9:-1.250",
        "prompt: 2 tokens: sum -4.000, mean -2.000, perplexity 7.389",
    ]


def test_likeliest_tokens_and_the_prompts_probabilities_are_in_the_json_object(server, capsys):
    server.answer = with_all_log_probs
    assert main(["generate", "--url", server.url, "--top-log-probs", "2", "--prompt-log-probs", "--json", "x"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top_log_probs"] == [[[5, -0.5], [9, -1.25]]] * 2
    assert (found["prompt_token_ids"], found["prompt_log_probs"]) == ([1, 2, 3], [-1.0, -3.0])
    assert "log_probs" not in found


ROUTED = (((0, 0.75), (3, 0.25)), ((2, 0.5), (1, 0.5)))  # of one token in two layers


def with_routing(request, context):
    yield piece("de", (5, 6), num_output=2, routing=(ROUTED, ROUTED), num_experts=4)
    yield piece("f", (9,), finish_reason="length", num_output=3, routing=(ROUTED[::-1],), num_experts=4)
    yield empty_final()


def test_the_routing_is_a_table_on_stderr(server, capsys):
    server.answer = with_routing
    assert main(["generate", "--url", server.url, "--routing", "x"]) == 0
    assert sent_tensors(server)["return_routed_experts"] == b"\x01"
    captured = capsys.readouterr()
    assert captured.out == "def\n"
    assert captured.err.splitlines() == [
        "         5: 0:75% 3:25%  2:50% 1:50%",
        "         6: 0:75% 3:25%  2:50% 1:50%",
        "         9: 2:50% 1:50%  0:75% 3:25%",
        "layer    0: 0:2 1:1 2:1 3:2",
        "layer    1: 0:1 1:2 2:2 3:1",
    ]


def test_the_routing_is_in_the_json_object(server, capsys):
    server.answer = with_routing
    assert main(["generate", "--url", server.url, "--routing", "--json", "x"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["routing"][2] == [[[2, 0.5], [1, 0.5]], [[0, 0.75], [3, 0.25]]]
    assert (len(found["routing"]), found["num_experts"]) == (3, 4)


def test_a_server_without_routing_is_told(server, capsys):
    assert main(["generate", "--url", server.url, "--routing", "x"]) == 0
    assert capsys.readouterr().err == "the server gave no routing\n"


def two_answers(request, context):
    yield piece("a", (5,), num_output=1, sequence_index=1)
    yield piece("x", (6,), num_output=1, finish_reason="stop", sequence_index=0)
    yield piece("b", (7,), num_output=2, finish_reason="length", sequence_index=1)
    yield empty_final()


def test_several_answers_are_printed_one_after_the_other(server, capsys):
    server.answer = two_answers
    assert main(["generate", "--url", server.url, "--n", "2", "--echo", "p"]) == 0
    assert capsys.readouterr() == ("[0] px\n[1] pab\n", "")


def test_several_answers_are_a_list_in_the_json_object(server, capsys):
    server.answer = two_answers
    assert main(["generate", "--url", server.url, "--n", "2", "--json", "p"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"model", "answers", "time_to_first_token_ms", "tokens_per_s"}
    assert [(one["text"], one["token_ids"], one["finish_reason"]) for one in found["answers"]] == [
        ("x", [6], "stop"), ("ab", [5, 7], "length"),
    ]  # fmt: skip


def test_a_dash_reads_the_prompt_from_stdin(server, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("zwei\nZeilen für".encode()), "ascii"))
    assert main(["generate", "--url", server.url, "-"]) == 0
    assert sent_tensors(server)["text_input"][4:] == "zwei\nZeilen für".encode()


def test_a_prompt_on_stdin_that_is_not_utf8_is_wrong_input(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert main(["generate", "--url", server.url, "-"]) == 2
    assert "from stdin: 'utf-8' codec can't decode byte 0xe9 in position 3" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "-1"])
def test_a_timeout_that_is_no_duration_is_wrong_input(server, capsys, seconds):
    assert main(["generate", "--url", server.url, "--timeout", seconds, "x"]) == 2
    assert "expected a finite number of seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["", "127.0.0.1", "127.0.0.1:99999", "a b:1"])
def test_an_address_that_is_none_is_wrong_input(capsys, url):
    assert main(["generate", "--url", url, "x"]) == 2
    assert capsys.readouterr().err.startswith(f"AddressInvalid: connecting to {url!r}: expected HOST:PORT")


def test_a_failure_before_the_first_piece_prints_nothing(server, capsys):
    def answer(request, context):
        context.abort(grpc.StatusCode.INTERNAL, "words")

    server.answer = answer
    assert main(["generate", "--url", server.url, "x"]) == 1
    assert capsys.readouterr().out == ""


def test_a_character_that_stdout_cannot_show_becomes_a_question_mark(server, monkeypatch):
    server.answer = lambda request, context: iter([piece("d日f", (1,), finish_reason="stop"), empty_final()])
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["generate", "--url", server.url, "x"]) == 0
    assert shown.getvalue() == b"d?f\n"


def test_several_ready_models_are_listed_and_one_must_be_chosen(server, capsys):
    server.states = (("phixtral", "READY", ""), ("mixtral", "READY", ""), ("broken", "UNAVAILABLE", "why"))
    assert main(["generate", "--url", server.url, "x"]) == 2
    assert "found 2 ready; give --model, one of: mixtral, phixtral" in capsys.readouterr().err
    assert main(["generate", "--url", server.url, "--model", "mixtral", "x"]) == 0


def test_an_ensemble_is_taken_and_its_steps_are_not_asked_about(server):
    steps = ("preprocessing", "tensorrt_llm", "postprocessing")
    server.states = (*((step, "READY", "") for step in steps), ("mixture", "READY", ""))
    assert main(["generate", "--url", server.url, "x"]) == 0
    assert server.requests[-1].model_name == "mixture"


def test_a_server_without_a_ready_model_says_why(server, capsys):
    server.states = (("phixtral", "UNAVAILABLE", "engine.json is missing"),)
    assert main(["generate", "--url", server.url, "x"]) == 2
    assert "none is ready: phixtral version 1 UNAVAILABLE (engine.json is missing)" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_failure_with_a_hint(capsys):
    assert main(["generate", "--url", "127.0.0.1:1", "x"]) == 1
    assert capsys.readouterr().err.startswith("ConnectionFailed: listing the models of 127.0.0.1:1: UNAVAILABLE")


@pytest.mark.parametrize(
    ("status", "exit_status", "name"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2, "RequestRejected"),
        (grpc.StatusCode.NOT_FOUND, 2, "ModelNotFound"),
        (grpc.StatusCode.INTERNAL, 1, "ServerFailed"),
    ],
)
def test_a_failure_keeps_the_text_so_far_and_exits_by_its_kind(server, capsys, status, exit_status, name):
    server.answer = server.failing(status, "words")
    assert main(["generate", "--url", server.url, "x"]) == exit_status
    captured = capsys.readouterr()
    assert captured.out == "def \n"
    assert captured.err.startswith(f"{name}: generating with phixtral at {server.url}: {status.name}: words")


def test_the_timeout_fails_the_command(server, capsys):
    server.answer = server.endless
    assert main(["generate", "--url", server.url, "--timeout", "0.3", "x"]) == 1
    assert capsys.readouterr().err.startswith("DeadlineExceeded: ")


def test_speed_counts_the_tokens_after_the_first_piece_by_the_time_after_it():
    clock = iter([10.0, 12.0, 13.0, 14.0]).__next__
    timeline = Timeline(clock=clock)
    for token_ids in ((1, 2, 3), (4,), (5, 6)):
        timeline.add(Piece(text="x", token_ids=token_ids))
    assert (timeline.num_tokens, timeline.time_to_first_token_ms, timeline.tokens_per_s) == (6, 2000, 1.5)
    assert statistics(timeline) == "6 tokens, first after 2000 ms, then 1.5 tokens/s"


def test_an_answer_that_came_whole_has_no_speed():
    for later in ((), ((),)):
        timeline = Timeline(clock=iter([0.0, 0.25, 1.0]).__next__)
        for token_ids in ((1, 2, 3, 4), *later):
            timeline.add(Piece(text="x", token_ids=token_ids))
        assert timeline.tokens_per_s is None
        assert statistics(timeline) == "4 tokens, first after 250 ms"


def test_a_server_that_names_no_tokens_gets_no_speed():
    timeline = Timeline(clock=iter([0.0, 0.25, 1.0]).__next__)
    timeline.add(Piece(text="a"))
    timeline.add(Piece(text="b"))
    assert statistics(timeline) == "2 pieces, first after 250 ms"


def test_importing_the_command_and_the_clients_loads_neither_grpc_nor_tritonclient():
    code = (
        "import sys, cli.generate, clients.generation, clients.wire, clients.errors;"
        "print([name for name in ('grpc', 'tritonclient', 'google.protobuf', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_an_expired_certificate_of_the_server_is_one_line(tmp_path):
    """gRPC's own line of the handshake is not shown."""
    authority = issue(tmp_path, "authority", is_authority=True)
    expired = issue(tmp_path, "expired", authority, days=(-10, -1))
    server = grpc.server(ThreadPoolExecutor(1))
    pair = expired.key_file.read_bytes(), expired.cert_file.read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    words = ["generate", "--url", f"127.0.0.1:{port}", "--model", "m", "--tls-ca", str(authority.cert_file), "x"]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ended = subprocess.run(
        [sys.executable, "-m", "cli.main", *words], env=environment, capture_output=True, text=True, check=False
    )
    server.stop(None)
    [line] = ended.stderr.splitlines()
    assert line.startswith("TlsFailed: generating with m at 127.0.0.1:")
    assert "certificate has expired" in line
