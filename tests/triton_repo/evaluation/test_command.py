"""`moeship eval` over three small tasks whose scores are worked out here with the float32 reference."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from cli.eval import _Progress
from cli.main import main
from triton_repo.evaluation.presets import PRESETS
from trt_build.manifest import TRTLLM_BACKEND, digested_text

TASKS = Path(__file__).parent / "tasks"
SUITE = ("tiny_choice", "tiny_text", "tiny_answer")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tasks, which is the present one. What the package datasets keeps stays in it, and nothing is
    asked of the hub."""
    shutil.copytree(TASKS, tmp_path / "tasks")
    monkeypatch.chdir(tmp_path / "tasks")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "tasks"


def run(capsys, *words):
    """Status, what was printed and what was said of a command."""
    status = main(list(map(str, words)))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def documents(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def tokens(example, text, *, starts):
    return example.tokenizer.backend.encode(text, add_special_tokens=starts).ids


def choice_scores(example):
    """Accuracy by log-probability, and by log-probability for each byte of the choice."""
    right, right_by_byte = [], []
    start = example.tokenizer.backend.token_to_id(example.session.engine.manifest.tokenizer.special_tokens["bos_token"])
    for document in documents("tiny_choice"):
        pairs = []
        for choice in document["choices"]:
            context = tokens(example, document["question"], starts=True) if document["question"] else [start]
            whole = tokens(example, f"{document['question']} {choice}", starts=bool(document["question"]))
            pairs.append((context, whole[len(context) if document["question"] else 0 :]))
        scores = [score for score, _ in example.scores(pairs)]
        by_byte = [score / len(choice.encode()) for score, choice in zip(scores, document["choices"], strict=True)]
        right.append(scores.index(max(scores)) == document["answer"])
        right_by_byte.append(by_byte.index(max(by_byte)) == document["answer"])
    return sum(right) / len(right), sum(right_by_byte) / len(right_by_byte)


def text_scores(example):
    """Perplexity for each word and byte, and bits for each byte, over both documents."""
    start = example.tokenizer.backend.token_to_id(example.session.engine.manifest.tokenizer.special_tokens["bos_token"])
    texts = [document["text"] for document in documents("tiny_text")]
    total = sum(score for score, _ in example.scores([([start], tokens(example, text, starts=True)) for text in texts]))
    words, num_bytes = sum(len(re.split(r"\s+", text)) for text in texts), sum(len(text.encode()) for text in texts)
    return math.exp(-total / words), math.exp(-total / num_bytes), -total / num_bytes / math.log(2)


def answer_score(example):
    """The share of prompts whose first line of the reference's greedy continuation is the answer."""
    found = []
    for document in documents("tiny_answer"):
        token_ids = example.greedy(tokens(example, document["prompt"], starts=True), 24)
        ends = example.session.engine.manifest.eos_token_ids
        until_end = [token for place, token in enumerate(token_ids) if not set(ends) & set(token_ids[: place + 1])]
        found.append(example.tokenizer.decode(until_end).partition("\n")[0] == document["answer"])
    return sum(found) / len(found)


def test_scores_are_those_that_the_reference_gives(example, folder, capsys):
    status, printed, _ = run(
        capsys, "eval", example.engine, "--include-path", folder, "--tasks", "tiny_suite", "--json"
    )
    assert status == 0
    found = json.loads(printed)
    acc, acc_norm = choice_scores(example)
    assert 0 < acc < 1
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(acc)
    assert found["results"]["tiny_choice"]["acc_norm,none"] == pytest.approx(acc_norm)
    word, byte, bits = text_scores(example)
    text = found["results"]["tiny_text"]
    assert text["word_perplexity,none"] == pytest.approx(word, rel=1e-4)
    assert text["byte_perplexity,none"] == pytest.approx(byte, rel=1e-5)
    assert text["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    exact = answer_score(example)
    assert exact in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["results"]["tiny_answer"]["exact_match,none"] == pytest.approx(exact)
    assert found["truncated_contexts"] == 0


def test_the_record_says_what_was_evaluated_and_how(phixtral, folder, capsys):
    words = ("--tasks", "tiny_choice,tiny_answer", "--limit", 2, "--num-fewshot", 1, "--batch", 3)
    status, printed, _ = run(
        capsys, "eval", phixtral.engine, "--include-path", folder, *words, "--output", folder / "results.json"
    )
    assert status == 0
    assert "| tiny_choice | 1.0     | 1        | 2         | acc" in printed
    assert "at most 2 documents of each task: a trial" in printed
    found = json.loads((folder / "results.json").read_text())
    manifest = phixtral.session.engine
    assert found["engine"]["digest"] == hashlib.sha256(manifest.text(None).encode()).hexdigest()
    assert found["engine"]["precision"] == "fp32"
    assert found["settings"] == {
        "tasks": ["tiny_choice", "tiny_answer"], "preset": None, "include_path": str(folder), "limit": 2,
        "num_fewshot": 1, "batch": 3, "chat_template": False, "kv_cache": "float",
    }  # fmt: skip
    assert set(found["libraries"]) == {"moeship", "lm_eval", "datasets"}
    assert found["versions"] == {"tiny_choice": 1.0, "tiny_answer": 1.0}
    assert found["num_documents"]["tiny_choice"] == {"original": 5, "effective": 2}


def test_examples_come_into_the_prompts(phixtral, folder, capsys, monkeypatch):
    from triton_repo.evaluation import model

    lengths = []
    real = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *given: lengths.append([len(one.token_ids) for one in given[2]]) or real(*given)
    )
    for words in ((), ("--num-fewshot", "2")):
        run(capsys, "eval", phixtral.engine, "--include-path", folder, "--tasks", "tiny_answer", *words)
    plain, with_examples = lengths
    assert all(longer > shorter + 10 for shorter, longer in zip(plain, with_examples, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "tiny_choise"), r"'tiny_choise': lm_eval and .* none of that name; did you mean tiny_choice"),
        (("--tasks", "tiny_choice,"), "found no task or an empty name"),
        ((), "found no task or an empty name, expected names of tasks; give --tasks or --preset"),
        (("--tasks", "tiny_choice", "--limit", "0"), "--limit is 0, expected 1 or more"),
        (("--tasks", "tiny_choice", "--num-fewshot", "-1"), "--num-fewshot is -1, expected 0 or more"),
        (("--tasks", "tiny_choice", "--batch", "0"), "--batch is 0, expected 1 or more"),
        (("--tasks", "tiny_choice", "--threads", "0"), "--threads is 0, expected 1 or more"),
        (("--tasks", "tiny_choice", "--output", "no/results.json"), "OutputError: .*the folder .*/no does not exist"),
        (("--tasks", "tiny_choice", "--output", "."), "OutputError: .*exists already"),
        (
            ("--tasks", "tiny_choice", "--output", "tiny_choice.jsonl"),
            "OutputError: .*tiny_choice.jsonl exists already",
        ),
        (("--tasks", "tiny_choice", "--chat-template"), "the engine has none, as its checkpoint had none"),
    ],
)
def test_wrong_words_are_refused(phixtral, folder, capsys, monkeypatch, words, message):
    only_the_folder(monkeypatch)
    status, printed, said = run(capsys, "eval", phixtral.engine, "--include-path", folder, *words)
    assert (status, printed) == (2, "")
    assert re.search(message, said)


def only_the_folder(monkeypatch):
    """Have lm_eval know none of its own tasks: reading them all takes ten seconds."""
    from lm_eval.tasks import TaskManager

    def made(self, *arguments, include_defaults=True, _init=TaskManager.__init__, **options):
        _init(self, *arguments, include_defaults=False, **options)

    monkeypatch.setattr(TaskManager, "__init__", made)


BROKEN = {
    "no-yaml": ("task: [", "broken.yaml cannot be read"),
    "a-list": ("- task: x\n", "broken.yaml cannot be read.*Expected YAML dict"),
    "a-missing-include": ("include: nothing.yaml\ntask: x\n", "broken.yaml cannot be read.*nothing.yaml"),
    "a-wrong-type": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: tiny_choice.jsonl}\noutput_type: guess\n",
        "loading the task broken: .*guess",
    ),
    "files-that-are-not-there": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nothing.jsonl}\ntest_split: train\n",
        "loading the task broken: its data set json of 'nothing.jsonl' cannot be loaded .*--include-path DIR --tasks",
    ),
    "a-data-set-of-the-hub": (
        "task: broken\ndataset_path: nobody/nothing\ndataset_name: part\ntest_split: test\n",
        r"its data set nobody/nothing \(part\) cannot be loaded .*needs the network once, or a copy in the cache",
    ),
    "a-missing-package": (
        "task: broken\nclass: !function nothing_here.Task\n",
        "loading the task broken: it needs the package nothing_here.*moeship.eval",
    ),
    "no-documents": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: tiny_choice.jsonl}\ntest_split: train\n"
        "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
        "process_docs: !function own.none_of\n",
        "loading the task broken: found no documents, expected at least one",
    ),
    "a-column-that-is-not-there": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: tiny_choice.jsonl}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{ nothing.here }}'\ndoc_to_target: '{{answer}}'\n",
        "broken: UndefinedError: .*nothing",
    ),
    "settings-that-are-not-honoured": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: tiny_answer.jsonl}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: [x], num_beams: 4}\n",
        "generation_kwargs of a task: found 'num_beams'",
    ),
    "code-that-the-model-writes": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: tiny_answer.jsonl}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\nunsafe_code: true\n",
        "evaluating broken: ValueError: .*marked as unsafe",
    ),
    "more-tokens-than-fit": (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: tiny_answer.jsonl}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: [x], max_gen_toks: 5000}\n",
        "asks for 5000 new tokens, expected fewer than the 512",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_task_is_one_clear_error(phixtral, folder, capsys, monkeypatch, kind):
    only_the_folder(monkeypatch)
    text, message = BROKEN[kind]
    (folder / "broken.yaml").write_text(text)
    (folder / "own.py").write_text("def none_of(documents):\n    return documents.select([])\n")
    status, printed, said = run(capsys, "eval", phixtral.engine, "--include-path", folder, "--tasks", "broken")
    assert (status, printed) == (2, "")
    last = said.splitlines()[-1]
    assert last.startswith("EvaluationError: ")
    assert re.search(message, last)


def test_a_group_has_a_row_of_its_own(phixtral, folder, capsys):
    (folder / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choice]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\nmetadata: {version: 3.0}\n"
    )
    words = ("--include-path", folder, "--tasks", "tiny_group")
    _, printed, _ = run(capsys, "eval", phixtral.engine, *words, "--json")
    found = json.loads(printed)
    assert found["groups"]["tiny_group"]["acc,none"] == found["results"]["tiny_choice"]["acc,none"]
    _, printed, _ = run(capsys, "eval", phixtral.engine, *words)
    assert re.search(r"^\| tiny_group +\| 3.0 ", printed, re.M)


def test_a_preset_prints_its_table(phixtral, folder, capsys):
    """Over tasks of one's own with the names of lm_eval's, which come first."""
    for name in PRESETS["nous"].tasks:
        (folder / f"{name}.yaml").write_text(f"include: tiny_choice.yaml\ntask: {name}\n")
    words = ("--include-path", folder, "--preset", "nous", "--output", folder / "nous.json")
    status, printed, _ = run(capsys, "eval", phixtral.engine, *words)
    acc, acc_norm = (100 * score for score in choice_scores(phixtral))
    table = {"AGIEval": acc_norm, "GPT4All": acc_norm, "TruthfulQA": acc, "Bigbench": acc}
    expected = {**table, "Average": sum(table.values()) / 4}
    assert status == 0
    assert json.loads((folder / "nous.json").read_text())["table"] == pytest.approx(expected)
    heading, _, row = printed.splitlines()[:3]
    assert [cell.strip() for cell in heading.strip("|").split("|")] == ["Model", *expected]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [f"{value:.2f}" for value in expected.values()]


def test_what_a_task_prints_is_not_among_the_results(phixtral, folder, capsys):
    (folder / "own.py").write_text("def all_of(documents):\n    print('noise')\n    return documents\n")
    (folder / "loud.yaml").write_text("include: tiny_choice.yaml\ntask: loud\nprocess_docs: !function own.all_of\n")
    status, printed, said = run(capsys, "eval", phixtral.engine, "--include-path", folder, "--tasks", "loud", "--json")
    assert (status, list(json.loads(printed)["results"])) == (0, ["loud"])
    assert "noise" in said


def test_a_task_twice_is_refused(phixtral, folder, capsys, monkeypatch):
    only_the_folder(monkeypatch)
    (folder / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice]\n")
    words = ("--include-path", folder, "--tasks", "tiny_group,tiny_choice")
    status, _, said = run(capsys, "eval", phixtral.engine, *words)
    assert status == 2
    assert re.search("Duplicate task 'tiny_choice'.*or leave the task out", said)


def test_neither_torch_nor_transformers_is_imported(phixtral, folder):
    code = """
import json, sys
from cli.main import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted({"torch", "transformers", "lm_eval"} & set(sys.modules))]))
"""
    words = ("eval", phixtral.engine, "--include-path", folder, "--tasks", "tiny_suite")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(TASKS.parents[3]), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [0, ["lm_eval"]]


def test_a_folder_without_tasks_is_refused(phixtral, folder, capsys):
    (folder / "empty").mkdir()
    for name, message in (("empty", "no file whose name ends in .yaml"), ("nothing", "no such folder")):
        status, _, said = run(capsys, "eval", phixtral.engine, "--include-path", folder / name, "--tasks", "x")
        assert (status, message in said) == (2, True)


def test_an_engine_of_tensorrt_llm_is_refused_with_the_way_around(folder, capsys):
    (folder / "engine").mkdir()
    values = {"format_version": 1, "backend": TRTLLM_BACKEND}
    (folder / "engine" / "engine.json").write_text(digested_text(values))
    status, _, said = run(capsys, "eval", folder / "engine", "--include-path", folder, "--tasks", "tiny_choice")
    assert status == 2
    assert "its backend is tensorrt-llm, and moeship eval runs engines of onnxruntime in process" in said
    assert "lm_eval --model local-completions" in said


def test_too_long_contexts_are_counted(phixtral, folder, capsys, caplog):
    line = json.dumps({"question": "x = 1\n" * 400, "choices": ["a", "b"], "answer": 0})
    (folder / "tiny_choice.jsonl").write_text(f"{line}\n")
    status, printed, _ = run(capsys, "eval", phixtral.engine, "--include-path", folder, "--tasks", "tiny_choice")
    assert status == 0
    assert "2 contexts were longer than the 512 tokens that the engine takes, and lost their beginning" in caplog.text
    assert "2 contexts were too long for the engine" in printed


class Terminal:
    def __init__(self, is_terminal):
        self.text, self._is_terminal = "", is_terminal

    def isatty(self):
        return self._is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_one_line_of_a_terminal():
    stream = Terminal(is_terminal=True)
    progress = _Progress(stream)
    for done in range(1, 1001):
        progress("answers", done, 1000)
    progress.close()
    assert stream.text.count("\n") == 1
    assert "1000 of 1000 answers" in stream.text


@pytest.mark.parametrize("stream", [Terminal(is_terminal=False), None])
def test_progress_is_a_plain_line_every_few_seconds_elsewhere(stream, monkeypatch, caplog):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("cli.eval.time", clock)
    monkeypatch.setattr("cli.progress.time", clock)
    caplog.set_level(logging.INFO, "cli.eval")
    progress = _Progress(stream)
    for done in range(1, 101):  # two answers a second
        clock.now += 0.5
        progress("answers", done, 100)
    progress.close()
    said = [record.getMessage() for record in caplog.records]
    # The first answer was counted after 0.5 s, from which on the rate is measured: nine more took 4.5 s.
    assert said[:2] == ["10 of 100 answers, 0:40 left", "20 of 100 answers, 0:38 left"]
    assert (len(said), said[-1]) == (10, "100 of 100 answers")
    assert stream is None or not stream.text


def test_a_short_evaluation_tells_no_progress(caplog):
    caplog.set_level(logging.INFO, "cli.eval")
    progress = _Progress(None)
    for done in range(1, 13):
        progress("answers", done, 12)
    assert not caplog.records
