"""Compiles grammars in a process of its own, which nothing is lost with: a script, run by guided/trials.py.

    python -I -S trial.py FOLDER CPU_SECONDS BYTES LIMITS

FOLDER has the package llguidance, and LIMITS is the JSON of its LLParserLimits. Each line on standard input is the JSON
of a grammar. An empty line is written once the library has begun, and one for each grammar whose compiling has ended,
well or with an error. The kernel ends the process where a grammar takes more than CPU_SECONDS of processor time. The
library ends it where it would take more than BYTES of memory beside its stack. Only the standard library and llguidance
are imported, so that the process starts within a few hundredths of a second.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading

STACK_BYTES = 256 << 20  # a guide of the most bytes has room for 20,000 levels; memory is taken as it is used


class _Letters:
    """A vocabulary of the 256 bytes: a grammar is compiled the same way for every vocabulary."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = ()
    tokens = (*(bytes([value]) for value in range(256)), b"")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _run(cpu_s: float, limits: dict[str, int]) -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Letters()))
    _answer()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            matcher = LLMatcher(
                tokenizer, json.loads(line), log_level=0, limits=LLParserLimits(verbose_errors=False, **limits)
            )
            matcher.compute_bitmask()
            del matcher
        except BaseException:  # the server compiles it again, and tells what is wrong
            pass
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer()


def _answer() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()


def main(folder: str, cpu_s: str, most_bytes: str, limits: str) -> None:
    """Compile what standard input has, until it ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever the library does
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = int(most_bytes) + STACK_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    sys.path.append(folder)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_run, args=(float(cpu_s), json.loads(limits)), daemon=True)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
