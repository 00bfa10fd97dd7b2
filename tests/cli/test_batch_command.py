"""`moeship batch` against a server of OpenAI's API and against Triton's protocol: what goes in and out, interruptions,
and input that is wrong."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_standin import (
    batch_server,
    completion,
    is_whole,
    openai_line,
    read_answers,
    text_for,
    write_batch,
)
from fake_triton import empty_final, fake_server, piece

from cli.main import main
from clients.batch import job as jobs
from clients.batch.ray_engine import _lines_of
from clients.batch.store import Journal, read_records
from export.files.resume import partial_path

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    with batch_server() as server:
        yield server


def batch(prompts, output, server, *more):
    return main(["batch", str(prompts), str(output), "--url", server.url, *more])


def records(output):
    return sorted(partial_path(output).glob("answers-*"))


def denied_after(server, num_good):
    """Answer so many requests, then refuse the key, which stops a batch."""

    def answer(body):
        return completion(body) if len(server.bodies) <= num_good else (401, {"error": {"message": "no"}}, {})

    server.answer = answer


def interrupted(tmp_path, num_lines=30, num_good=10):
    """A batch that was stopped after some answers: its input and its output to be. Its server was one of its own,
    which may read the requests that were in flight later."""
    prompts, output = write_batch(tmp_path / "in.jsonl", num_lines), tmp_path / "out.jsonl"
    with batch_server() as server:
        denied_after(server, num_good)
        assert batch(prompts, output, server, "--concurrency", "3") == 1
    assert not output.exists()
    return prompts, output


def test_lines_of_openais_format_get_its_answers_in_order(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 50), tmp_path / "out.jsonl"
    assert batch(prompts, output, server, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["lines"], told["answered"], told["failed"], told["kept"]) == (50, 50, 0, 0)
    assert is_whole(output, 50)
    first = read_answers(output)[0]
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert list(first["response"]) == ["status_code", "request_id", "body"]
    assert (first["error"], first["response"]["status_code"]) == (None, 200)
    assert len({line["id"] for line in read_answers(output)}) == 50
    assert not partial_path(output).exists()


def test_plain_prompts_take_the_servers_only_model_and_the_flags(tmp_path, server):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}], "custom_id": "c"}
    prompts.write_bytes(b'\xef\xbb\xbf"one"\r\n\n' + json.dumps({"prompt": "two", "max_tokens": 7}).encode()
                        + b"\n" + json.dumps(chat).encode())  # fmt: skip
    assert batch(prompts, output, server, "--max-tokens", "5", "--body", '{"top_p": 0.5}') == 0
    found = read_answers(output)
    assert [line["text"] for line in found] == [text_for("one"), text_for("two"), text_for("hi")]
    assert [line["line"] for line in found] == [1, 3, 4]
    assert found[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert (found[2]["custom_id"], found[0]["finish_reason"], found[0]["error"]) == ("c", "stop", None)
    sent = {body.get("prompt"): body for body in server.bodies}
    assert sent["one"] == {"model": "tiny", "prompt": "one", "max_tokens": 5, "top_p": 0.5}
    assert sent["two"]["max_tokens"] == 7
    assert server.paths == {"/v1/completions", "/v1/chat/completions"}


def test_several_answers_to_a_plain_prompt_are_refused_also_by_a_flag(tmp_path, server):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('"one"\n{"prompt": "two", "n": 1}\n')
    assert batch(prompts, output, server, "--body", '{"n": 2}') == 1
    assert [line["error"] and line["error"]["code"] for line in read_answers(output)] == ["invalid_line", None]


def test_broken_lines_are_named_and_the_rest_is_done(tmp_path, server, caplog):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        openai_line(0), "{broken", openai_line(2), '{"custom_id": "id-3"}', openai_line(4, stream=True),
        openai_line(5).replace("POST", "GET"), openai_line(6, temperature=float("nan")), "\udcff", "[" * 100_000,
        openai_line(9),
    ]  # fmt: skip
    prompts.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert batch(prompts, output, server) == 1
    found = read_answers(output)
    assert [line["error"] is None for line in found] == [True, False, True, *[False] * 6, True]
    assert {line["error"]["code"] for line in found if line["error"]} == {"invalid_line"}
    assert [line["response"] is None for line in found] == [line["error"] is not None for line in found]
    assert found[3]["custom_id"] == "id-3"
    assert found[3]["error"]["message"].startswith("line 4: found custom_id, expected an object with custom_id, method")
    assert "7 of 10 lines failed" in caplog.text
    assert "line 2: found no JSON" in caplog.text
    assert sorted(server.asked()) == ["prompt 0", "prompt 2", "prompt 9"]


@pytest.mark.parametrize("first", ["no custom_id", "42", "null", "[]", '{"custom_id": "x"}'])
def test_a_first_line_that_is_no_request_does_not_decide_the_form(tmp_path, server, first):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if first == "no custom_id":
        first = json.dumps({"method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "x"}})
    prompts.write_text(f"{first}\n{openai_line(1)}\n{openai_line(2)}\n")
    assert batch(prompts, output, server) == 1
    found = read_answers(output)
    assert [line["error"] and line["error"]["code"] for line in found] == ["invalid_line", None, None]
    assert "expected an object with custom_id, method" in found[0]["error"]["message"]
    assert [line["custom_id"] for line in found[1:]] == ["id-1", "id-2"]


@pytest.mark.parametrize("indent", [None, 2, 0])
def test_a_file_that_is_one_array_is_refused_as_one(tmp_path, server, capsys, indent):
    prompts, output = tmp_path / "in.json", tmp_path / "out.jsonl"
    prompts.write_text("\n" + json.dumps([{"prompt": "a"}, {"prompt": "b"}, "c"], indent=indent) + "\n")
    assert batch(prompts, output, server) == 2
    assert "found one JSON array, expected a JSON value on each line (JSONL); nothing was" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
    assert not server.bodies


def test_standard_input_and_output_are_refused_by_name(tmp_path, server, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("-", "out.jsonl"), ("in.jsonl", "-")):
        with pytest.raises(SystemExit) as caught:
            main(["batch", *words, "--url", server.url])
        assert caught.value.code == 2
        assert "found -, expected a file, since an interrupted batch goes on from files" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_too_many_digits_is_told_in_our_words(tmp_path, server):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(f'"good"\n{{"prompt": "x", "max_tokens": {"9" * 5000}}}\n')
    assert batch(prompts, output, server) == 1
    message = read_answers(output)[1]["error"]["message"]
    assert (
        message == f"line 2: found no JSON (a whole number in it has more than {sys.get_int_max_str_digits()} digits)"
    )


@pytest.mark.parametrize(
    ("encode", "kind"), [(gzip.compress, "gzip"), (lambda data: data.decode().encode("utf-16"), "UTF-16")]
)
def test_a_file_that_is_compressed_or_in_utf_16_is_refused_as_one(tmp_path, server, capsys, encode, kind):
    prompts, output = write_batch(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    prompts.write_bytes(encode(prompts.read_bytes()))
    assert batch(prompts, output, server) == 2
    assert f"found {kind}, expected lines of JSON in UTF-8" in capsys.readouterr().err
    assert not server.bodies
    assert sorted(tmp_path.iterdir()) == [prompts]


def test_a_line_that_is_no_request_asks_for_no_common_model(tmp_path):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join([openai_line(0), "42", openai_line(2, model=None), openai_line(3)]))
    with batch_server(models=("tiny", "large")) as server:
        assert batch(prompts, output, server) == 1
    assert [line["error"] and line["error"]["code"] for line in read_answers(output)] == [
        None, "invalid_line", "invalid_line", None,
    ]  # fmt: skip


def test_numbers_that_json_has_not_are_null_in_the_output(tmp_path, server):
    prompts, output = write_batch(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    made = json.dumps(completion({"prompt": "prompt 0", "model": "tiny"})[1])
    made = made.replace('"logprobs": null', '"logprobs": {"token_logprobs": [-0.5, -Infinity, NaN, 1e999]}')
    server.answer = lambda _body: (200, made.encode(), {})
    assert batch(prompts, output, server) == 0
    found = json.loads(output.read_bytes(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    choice = found["response"]["body"]["choices"][0]
    assert (choice["text"], choice["logprobs"]) == (text_for("prompt 0"), {"token_logprobs": [-0.5, None, None, None]})


def test_a_line_that_comes_when_the_input_was_read_is_not_lost(tmp_path, server, capsys, monkeypatch):
    prompts, output = write_batch(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    check = jobs._Duplicates.check  # called where the pass over the input has ended

    def grow(self, path):
        check(self, path)
        with path.open("a") as file:
            file.write(openai_line(5) + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(jobs._Duplicates, "check", grow)
        assert batch(prompts, output, server) == 2
    assert "changed while it was read" in capsys.readouterr().err
    assert not output.exists()


def test_a_refusal_of_the_server_is_an_answer_with_its_status(tmp_path, server):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    refusal = {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}}
    server.answer = lambda body: (400, refusal, {}) if body["prompt"] == "prompt 1" else completion(body)
    assert batch(prompts, output, server) == 1
    found = read_answers(output)
    assert [line["response"]["status_code"] for line in found] == [200, 400, 200]
    assert found[1]["response"]["body"] == refusal
    assert found[1]["error"] is None, "OpenAI's reference keeps it for requests without an answer by HTTP"
    assert server.asked()["prompt 1"] == 1, "asking again would change nothing"


def test_a_failure_that_passes_is_asked_again(tmp_path, server):
    prompts, output = write_batch(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    first = {
        "prompt 0": (503, b"<html>busy</html>", {}),
        "prompt 1": (429, {}, {"Retry-After": "0"}),
        "prompt 2": (500, {}, {}),
    }

    def answer(body):
        with server.lock:
            return first.pop(body["prompt"], None) or completion(body)

    server.answer = answer
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 4)
    assert server.asked() == {"prompt 0": 2, "prompt 1": 2, "prompt 2": 2, "prompt 3": 1}


def test_duplicate_ids_are_refused_before_anything_is_sent(tmp_path, server, capsys):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(openai_line(number) for number in (0, 1, 2, 1, 0)))
    assert batch(prompts, output, server) == 2
    told = capsys.readouterr().err
    assert "found 2 lines with a custom_id that an earlier line has" in told
    assert "line 4: the custom_id of line 2 (id-1)" in told
    assert "line 5: the custom_id of line 1 (id-0)" in told
    assert server.bodies == []
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize("content", [b"", b"my notes\n", b'{"id":"batch_req_0123456789abcdef01234567_1"}\n'])
def test_an_output_that_is_not_of_the_batch_is_left_as_it_is(tmp_path, server, capsys, content):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    output.write_bytes(content)
    assert batch(prompts, output, server) == 2
    assert f"writing the answers to {output}: it exists already" in capsys.readouterr().err
    assert output.read_bytes() == content
    assert server.bodies == []


def test_an_output_that_appears_meanwhile_is_left_as_it_is(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"

    def answer(body):
        output.write_text("another program's")
        return completion(body)

    server.answer = answer
    assert batch(prompts, output, server) == 2
    assert output.read_text() == "another program's"
    assert "it exists already; move it away, and run the same command again" in capsys.readouterr().err
    output.unlink()
    server.bodies.clear()
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 3)
    assert server.bodies == [], "the answers were kept"


def test_endpoints_that_disagree_on_the_model_are_refused(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    plain = tmp_path / "plain.jsonl"
    plain.write_text('"one"\n')
    with batch_server(models=("other",)) as other:
        assert batch(prompts, output, server, other.url) == 2
        told = capsys.readouterr().err
        assert f"not all endpoints have tiny: {server.url} has tiny; {other.url} has other" in told
        assert batch(plain, output, server, other.url) == 2
        assert "lines name none, and the endpoints do not have one and the same model alone" in capsys.readouterr().err
        other.models = ("tiny", "other")
        assert batch(prompts, output, server, "--url", other.url, "--concurrency", "1") == 0
        assert server.bodies
        assert other.bodies
    assert is_whole(output, 3)


def test_a_batch_that_stopped_goes_on_with_what_is_left(tmp_path, server, capsys):
    prompts, output = interrupted(tmp_path)
    assert "HTTP status 401" in capsys.readouterr().err
    kept = sum(path.read_bytes().count(b"\n") for path in records(output))
    assert 7 <= kept <= 10, "requests that were in flight when the batch stopped may have no answer"
    assert batch(prompts, output, server, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == kept
    assert is_whole(output, 30)
    assert sum(server.asked().values()) == 30 - kept
    assert not partial_path(output).exists()


def test_damaged_records_are_asked_again(tmp_path, server):
    prompts, output = interrupted(tmp_path)
    [path] = records(output)
    lines = path.read_bytes().splitlines(keepends=True)
    # A block that never reached the disk, a changed byte, a line twice, and a line that was cut while it was written.
    damaged = [bytes(len(lines[0]) - 1) + b"\n", lines[1].replace(b"answer", b"Answer"), *lines[2:], lines[3]]
    path.write_bytes(b"".join(damaged) + lines[4][:50])
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 30)
    assert sum(server.asked().values()) == 30 - len(lines) + 2


def test_a_damaged_job_is_named_with_what_to_do(tmp_path, server, capsys):
    prompts, output = interrupted(tmp_path)
    (partial_path(output) / "job.json").write_bytes(b"")
    capsys.readouterr()
    assert batch(prompts, output, server) == 2
    told = capsys.readouterr().err
    assert told.startswith("OutputError: reading the job of an interrupted batch: ")
    assert "is not readable JSON" in told
    assert f"name another output, or discard what was answered (rm -r {partial_path(output)})" in told
    assert server.bodies == []


def test_another_input_or_other_settings_do_not_go_on_with_an_interrupted_batch(tmp_path, server, capsys):
    prompts, output = interrupted(tmp_path)
    before, held = prompts.read_bytes(), [path.read_bytes() for path in records(output)]
    prompts.write_bytes(before.replace(b"prompt 29", b"prompt 99"))
    capsys.readouterr()
    assert batch(prompts, output, server) == 2
    told = capsys.readouterr().err
    assert f"resuming {output}: the run that was interrupted is of another job: its input is another one" in told
    assert "input: sha256 is" in told
    prompts.write_bytes(before)
    assert batch(prompts, output, server, "--temperature", "0.5") == 2
    assert 'settings: body is {"temperature": 0.5}, it was {}' in capsys.readouterr().err
    assert server.bodies == []
    assert [path.read_bytes() for path in records(output)] == held
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 30)


def test_an_input_that_changes_while_it_is_read_makes_no_output(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    before = prompts.read_bytes()

    def answer(body):
        prompts.write_bytes(before.replace(b"prompt 4", b"prompt 5"))
        return completion(body)

    server.answer = answer
    assert batch(prompts, output, server) == 2
    assert "the file changed while it was read; the answers so far are kept" in capsys.readouterr().err
    assert not output.exists()


def test_a_complete_output_is_recognised_and_its_rest_removed(tmp_path, server, caplog):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    assert batch(prompts, output, server) == 0
    made, left = output.read_bytes(), partial_path(output)
    left.mkdir(mode=0o700)  # as after a kill between the output's name and the end
    (left / "merged").write_bytes(made)
    server.bodies.clear()
    caplog.set_level("INFO")
    assert batch(prompts, output, server) == 0
    assert f"{output} is complete already" in caplog.text
    assert (server.bodies, output.read_bytes(), left.exists()) == ([], made, False)


def test_a_server_that_fails_every_request_stops_the_batch(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    server.answer = lambda body: (500, {"error": {"message": "broken"}}, {})
    assert batch(prompts, output, server, "--retries", "0", "--concurrency", "2") == 1
    assert "20 requests in a row failed after 1 attempts each" in capsys.readouterr().err
    server.answer = completion
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 60), "the failures were not kept"


def test_a_triton_answers_completions_over_grpc(tmp_path):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [openai_line(0, model="phixtral", max_tokens=4), openai_line(1, model="phixtral", no_such=1)]
    lines += [openai_line(2, model="phixtral").replace("/v1/completions", "/v1/chat/completions")]
    prompts.write_text("\n".join(lines))

    def answer(request, context):
        yield piece("def main", (5, 6, 7), finish_reason="length", num_output=3)
        yield empty_final()

    with fake_server() as server:
        server.answer = answer
        assert batch(prompts, output, server) == 1
        [sent] = server.requests
    good, unknown, chat = read_answers(output)
    assert good["response"]["body"]["choices"] == [
        {"index": 0, "text": "def main", "logprobs": None, "finish_reason": "length"}
    ]
    assert good["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert unknown["response"]["status_code"] == 400
    assert "unrecognized request argument supplied: 'no_such'" in unknown["response"]["body"]["error"]["message"]
    assert "answers /v1/completions alone" in chat["response"]["body"]["error"]["message"]
    values = dict(zip([tensor.name for tensor in sent.inputs], sent.raw_input_contents, strict=True))
    assert values["text_input"] == b"\x08\x00\x00\x00prompt 0"
    assert values["max_tokens"] == (4).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--concurrency", "0"], "--concurrency is 0, expected 1 or more"),
        (["--patience", "nan"], "--patience is nan, expected a finite number of seconds above 0"),
        (["--body", "[1]"], "reading --body: found a list, expected an object"),
        (["--body", '{"model": ["a"]}'], "reading --body: model is ['a'], expected a name"),
        (["--body", '{"model": ""}'], "reading --body: model is '', expected a name"),
        (["--body", '{"prompt": "x"}'], "reading --body: found prompt, which each line has for itself"),
        (["--body", '{"stream": true}'], "reading --body: stream is true, expected a whole answer"),
        (["--model", ""], "--model is empty, expected a name"),
        (["--body", '{"max_tokens": 1}', "--max-tokens", "2"], "found max_tokens, and the flag of that name"),
        (["--ray-address", "auto"], "found --ray-address without --engine ray"),
        (
            ["--engine", "ray", "--ray-address", "127.0.0.1:1"],
            "connecting to Ray at 127.0.0.1:1: nothing answers there",
        ),
        (["--engine", "ray", "--ray-address", "nowhere"], "expected HOST:PORT, ray://HOST:PORT, or auto"),
    ],
)
def test_flags_that_are_wrong_are_named(tmp_path, server, capsys, flags, told):
    prompts = write_batch(tmp_path / "in.jsonl", 2)
    assert batch(prompts, tmp_path / "out.jsonl", server, *flags) == 2
    assert told in capsys.readouterr().err
    assert server.bodies == []


def test_an_address_of_another_server_is_no_ray_cluster(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setattr("clients.batch.ray_engine.CONNECT_S", 1.0)
    prompts = write_batch(tmp_path / "in.jsonl", 2)
    address = server.url.removeprefix("http://")
    assert batch(prompts, tmp_path / "out.jsonl", server, "--engine", "ray", "--ray-address", address) == 2
    assert f"connecting to Ray at {address}: what answers there is no Ray" in capsys.readouterr().err


def test_an_address_where_nothing_answers_is_said_at_once(tmp_path, capsys):
    prompts = write_batch(tmp_path / "in.jsonl", 2)
    assert main(["batch", str(prompts), str(tmp_path / "o.jsonl"), "--url", "http://127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert "listing the models of http://127.0.0.1:1: Cannot connect to host" in told
    assert "check that the server is running, and its address" in told
    assert "gRPC" not in told
    assert main(["batch", str(prompts), str(tmp_path / "o.jsonl"), "--url", "ftp://here"]) == 2


def test_failed_lines_are_sent_again_when_asked_for(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"
    odd = {f"prompt {number}" for number in (1, 3, 5)}
    server.answer = lambda body: (400, {}, {}) if body["prompt"] in odd else completion(body)
    assert batch(prompts, output, server) == 1
    before = output.read_bytes()
    assert batch(prompts, output, server) == 1, "a complete output stays as it is"
    assert output.read_bytes() == before
    odd = {"prompt 5"}
    server.bodies.clear()
    capsys.readouterr()
    assert batch(prompts, output, server, "--retry-failed", "--json") == 1
    assert json.loads(capsys.readouterr().out)["kept"] == 5
    assert server.asked() == {"prompt 1": 1, "prompt 3": 1, "prompt 5": 1}
    assert [line["response"]["status_code"] for line in read_answers(output)] == [200] * 5 + [400] + [200] * 2
    odd = set()
    assert batch(prompts, output, server, "--retry-failed") == 0
    assert is_whole(output, 8)
    assert not partial_path(output).exists()


def test_a_run_without_the_flag_keeps_what_an_interrupted_retry_has(tmp_path, server):
    prompts, output = write_batch(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    server.answer = lambda body: completion(body) if body["prompt"] == "prompt 0" else (400, {}, {})
    assert batch(prompts, output, server) == 1
    server.answer = lambda body: completion(body) if body["prompt"] < "prompt 3" else (401, {}, {})
    assert batch(prompts, output, server, "--retry-failed", "--concurrency", "1") == 1
    assert batch(prompts, output, server) == 1
    server.answer = completion
    server.bodies.clear()
    assert batch(prompts, output, server, "--retry-failed") == 0
    assert server.asked() == {"prompt 3": 1}
    assert is_whole(output, 4)
    assert not partial_path(output).exists()


def test_failed_lines_of_an_interrupted_batch_are_sent_again_when_asked_for(tmp_path, server):
    prompts, output = write_batch(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"

    def answer(body):
        return (
            (401 if body["prompt"] == "prompt 6" else 400, {}, {}) if body["prompt"] > "prompt 3" else completion(body)
        )

    server.answer = answer
    assert batch(prompts, output, server, "--concurrency", "1") == 1
    server.answer = completion
    server.bodies.clear()
    assert batch(prompts, output, server, "--retry-failed") == 0
    assert is_whole(output, 8)
    assert sorted(server.asked()) == [f"prompt {number}" for number in (4, 5, 6, 7)]


def test_of_several_records_of_a_line_the_first_good_one_counts(tmp_path, server):
    """As two attempts of a task of Ray may leave them."""
    prompts, output = interrupted(tmp_path)
    [path] = records(output)
    index, line = next((record.index, record.line) for record in read_records(path))
    for name, data, is_good in (
        ("0", line.replace(b"answer", b"sooner"), False),
        ("z", line.replace(b"a", b"z"), True),
    ):
        other = Journal(path.parent)
        other.append(index, data, is_good)
        other.close()
        other.path.rename(path.parent / f"answers-{name}.jsonl")
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 30)


def test_a_complete_output_needs_no_server(tmp_path, server, caplog):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    assert batch(prompts, output, server) == 0
    caplog.set_level("INFO")
    assert main(["batch", str(prompts), str(output), "--url", "http://127.0.0.1:1"]) == 0
    assert f"{output} is complete already" in caplog.text


@pytest.mark.parametrize(("part", "damage"), [(b'"error":null', b'"error":7'), (b'"response":', b'"response"')])
def test_a_complete_output_that_was_damaged_is_left_as_it_is(tmp_path, server, capsys, part, damage):
    prompts, output = write_batch(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    assert batch(prompts, output, server) == 0
    lines = output.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], lines[1].replace(part, damage), lines[2]])
    output.write_bytes(damaged)
    assert batch(prompts, output, server) == 2
    assert "it exists already, and line 2 of it is damaged; it was left as it is" in capsys.readouterr().err
    assert output.read_bytes() == damaged


def test_a_server_that_lists_no_models_and_lacks_the_model_fails_the_lines(tmp_path, server):
    """A model that a server had at first is waited for, and this one is not."""
    prompts, output = write_batch(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    server.models = None
    server.answer = lambda _body: (404, {"error": {"message": "no model tiny", "code": "model_not_found"}}, {})
    assert batch(prompts, output, server) == 1
    assert [line["response"]["status_code"] for line in read_answers(output)] == [404, 404]


def test_a_model_that_no_endpoint_has_fails_its_lines_alone(tmp_path, server, caplog):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(f"{openai_line(0)}\n{openai_line(1, model='odd')}\n{openai_line(2)}\n")
    missing = (404, {"error": {"message": "no model odd", "code": "model_not_found"}}, {})
    server.answer = lambda body: missing if body["model"] == "odd" else completion(body)
    assert batch(prompts, output, server) == 1
    assert "no endpoint has the model odd: lines that name it will fail" in caplog.text
    assert [line["response"]["status_code"] for line in read_answers(output)] == [200, 404, 200]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_batch_goes_on(tmp_path, server, number):
    prompts, output = write_batch(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    enough, may_answer = threading.Event(), threading.Event()

    def answer(body):
        if len(first.bodies) > 40:  # the batch is killed while these are waited for
            enough.set()
            may_answer.wait(60)
        return completion(body)

    with batch_server(answer=answer) as first:
        words = [sys.executable, "-m", "cli.main", "batch", str(prompts), str(output), "--url", first.url]
        process = subprocess.Popen(
            [*words, "--concurrency", "4"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert enough.wait(60)
        process.send_signal(number)
        told = process.communicate(timeout=60)[1]
        may_answer.set()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert (b"the answers so far are kept" in told) == (number == signal.SIGTERM)
    assert not output.exists()
    kept = sum(path.read_bytes().count(b"\n") for path in records(output))
    assert kept >= 36
    assert batch(prompts, output, server) == 0
    assert is_whole(output, 60)
    assert sum(server.asked().values()) == 60 - kept


def test_one_output_has_one_batch_at_a_time(tmp_path, server, capsys):
    prompts, output = write_batch(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    found = []

    def answer(body):
        if not found:
            found.append(batch(prompts, output, server))
        return completion(body)

    server.answer = answer
    assert batch(prompts, output, server, "--concurrency", "1") == 0
    assert found == [2]
    assert f"process {os.getpid()} is writing it" in capsys.readouterr().err
    assert is_whole(output, 2)


@pytest.mark.parametrize(
    ("words", "advice"), [([], "when this machine has processors and memory free"), (["auto"], "ray start --head")]
)
def test_a_ray_that_does_not_start_is_one_error(tmp_path, server, capsys, monkeypatch, words, advice):
    """Ray raises a plain Exception where one of its processes does not come up in time, and leaves the others."""
    ended = []

    def init(**_):
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    ray = SimpleNamespace(init=init, shutdown=lambda: ended.append(True), data=None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    prompts, output = write_batch(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    address = ["--ray-address", *words] if words else []
    assert batch(prompts, output, server, "--engine", "ray", *address) == 2
    told = capsys.readouterr().err
    assert "The current node timed out during startup." in told
    assert advice in told
    assert "bug" not in told
    assert ended == [True]
    assert batch(prompts, output, server) == 0  # nothing is in the way of the other engine
    assert is_whole(output, 2)


def test_an_error_of_ray_without_a_text_is_told_by_its_type():
    """Ray's own errors have many lines, and the last one has the cause."""
    assert _lines_of(SystemError(" \n")) == ["SystemError"]
    assert _lines_of(SystemError("traceback\nthe cause\n"))[-1] == "the cause"


def test_ray_tasks_answer_a_batch_each_line_once(tmp_path, server):
    pytest.importorskip("ray")
    prompts, output = write_batch(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    words = ["batch", str(prompts), str(output), "--url", server.url, "--engine", "ray", "--shard-lines", "7"]
    # In a process of its own: Ray leaves threads and handlers in the one that it ran in.
    done = subprocess.run([sys.executable, "-m", "cli.main", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert is_whole(output, 40)
    assert set(server.asked().values()) == {1}
