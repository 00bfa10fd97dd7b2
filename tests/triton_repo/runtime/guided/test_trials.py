"""Guides that the library never has done with: they fail, and others are compiled."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from serve_command import wait_until

from triton_repo.errors import RequestError
from triton_repo.runtime.guided import guides as module
from triton_repo.runtime.guided import trials as trials_module
from triton_repo.runtime.guided.guides import LIMITS, Guides
from triton_repo.runtime.guided.trials import Trials

PATIENCE_S = 60
# Patterns that may match at many places, and must all match: the library takes hours for some dozens of them.
ENDLESS = json.dumps(
    {"allOf": [{"type": "string", "pattern": f"[a-z]*{chr(97 + n % 26)}{n}x"} for n in range(100)]}
)  # fmt: skip
GIGABYTES = '{"type": "integer", "multipleOf": 9999991}'


def grammar_of(schema: str) -> str:
    """The library's grammar of a schema that `check_schema` refuses."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema)


@pytest.fixture
def unchecked(monkeypatch):
    """Schemas whose dangers are not known: nothing refuses them before they are compiled."""
    checked = module.grammar_of
    monkeypatch.setattr(
        module, "grammar_of", lambda kind, guide: grammar_of(guide) if kind == "json_schema" else checked(kind, guide)
    )


@pytest.fixture
def trials():
    made = Trials(LIMITS, cpu_s=0.3, longest_s=PATIENCE_S)
    yield made
    made.close()


def pid_of(trials) -> int:
    [process] = trials._idle
    return process._process.pid


def test_guides_whose_compiling_does_not_end_fail_and_others_are_compiled(byte_fallback, trials, unchecked):
    """As many of them as there are threads that compile, and then as many once more."""
    guides = Guides(byte_fallback, trials=trials)
    for number in range(2):
        endless = [
            guides.ask("json_schema", f"{' ' * (2 * number + n)}{ENDLESS}") for n in range(module.MOST_COMPILERS)
        ]
        for future in endless:
            with pytest.raises(
                RequestError, match="guided_decoding_guide: compiling it takes too long; send a simpler"
            ):
                future.result(PATIENCE_S)
        guides.ask("regex", f"[a-b]{{{number + 1}}}").result(PATIENCE_S)
    assert wait_until(lambda: len(guides) == 2)  # a guide is kept just after those who wait for it are told


def test_a_trial_that_gets_no_processor_ends_too(trials):
    """A stopped process stands for it, whose own timer does not run."""
    trials.check(grammar_of("{}"))
    stopped = pid_of(trials)
    os.kill(stopped, signal.SIGSTOP)
    os.waitid(os.P_PID, stopped, os.WSTOPPED | os.WNOWAIT)  # until then its thread may still answer
    trials._longest_s = 0.1
    with pytest.raises(RequestError, match="compiling it takes too long"):
        trials.check(grammar_of("{}"))
    trials._longest_s = PATIENCE_S
    trials.check(grammar_of("{}"))
    assert pid_of(trials) != stopped


def test_a_guide_that_takes_too_much_memory_ends_no_server():
    """It is only tried here: where no process could be started, compiling it would end this one."""
    trials = Trials(LIMITS, cpu_s=PATIENCE_S, longest_s=PATIENCE_S, most_bytes=160 << 20)
    with pytest.raises(RequestError, match="guided_decoding_guide: compiling it takes too much memory; send a simpler"):
        trials.check(grammar_of(GIGABYTES))
    trials.check(grammar_of("{}"))
    assert pid_of(trials)
    trials.close()


def test_one_process_tries_all_guides_and_a_guide_that_is_kept_is_not_tried(byte_fallback, trials):
    guides = Guides(byte_fallback, trials=trials)
    guides.compile("regex", "[0-9]")
    first = pid_of(trials)
    for guide in ("[0-8]", "[0-9]", "[0-9]"):
        guides.compile("regex", guide)
    assert pid_of(trials) == first
    assert trials._idle[0].num_tried == 2


def test_a_process_that_is_gone_is_replaced(byte_fallback, trials):
    guides = Guides(byte_fallback, trials=trials)
    guides.compile("regex", "[0-9]")
    first = pid_of(trials)
    os.kill(first, signal.SIGKILL)
    trials._idle[0]._process.wait(PATIENCE_S)
    guides.compile("regex", "[0-8]")
    assert pid_of(trials) != first


def test_a_process_is_replaced_after_so_many_guides(byte_fallback, trials, monkeypatch):
    monkeypatch.setattr(trials_module, "_MOST_TRIALS", 1)
    guides = Guides(byte_fallback, trials=trials)
    guides.compile("regex", "[0-9]")
    first = pid_of(trials)
    guides.compile("regex", "[0-8]")
    assert pid_of(trials) != first


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_without_a_process_guides_are_compiled_with_a_warning(byte_fallback, trials, monkeypatch, caplog, python):
    monkeypatch.setattr(sys, "executable", python)
    Guides(byte_fallback, trials=trials).compile("regex", "[0-9]")
    assert "guides are compiled without a trial, since no process could be started for it" in caplog.text


def test_a_process_ends_with_its_input(trials):
    trials.check(grammar_of("{}"))
    [process] = trials._idle
    trials.close()
    assert process._process.returncode == 0
