"""Stream a completion from a served model. Tokens appear on stdout as they are made.

The prompt "-" is read from stdin. Ctrl-C cancels the request on the server and keeps the text printed so far.
Exit status: 0 done, 1 the request failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from cli.timeline import Timeline, log_probability_table, routing_table, statistics
from cli.tls_flags import add_tls_arguments, read_client_tls
from export.command import INTERRUPTED, READER_GONE, leave_stdout

if TYPE_CHECKING:
    from clients.generation import Client
    from clients.messages import Generation, GenerationRequest
    from triton_repo.contracts.model_state import ModelState

POLL_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help='the text to continue; "-" reads it from stdin')
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC address (default: %(default)s)"
    )
    server.add_argument("--model", help="name of the model; not needed if the server has only one ready model")
    server.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after this time (default: wait without limit)"
    )
    add_tls_arguments(parser)
    sampling = parser.add_argument_group("sampling", "options that are not given take the server's defaults")
    sampling.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="most new tokens (default: %(default)s)"
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; 0 means all")
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the likeliest tokens whose probabilities sum to P, 0 < P <= 1",
    )
    sampling.add_argument(
        "--min-p", type=float, metavar="M", help="draw among tokens at least M times as likely as the likeliest"
    )
    sampling.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1 makes tokens of the prompt and answer less likely; 1 changes nothing",
    )
    sampling.add_argument(
        "--presence-penalty",
        type=float,
        metavar="P",
        help="subtracted once from the logit of each token in the answer; 0 changes nothing",
    )
    sampling.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="F",
        help="subtracted as often as the token is in the answer; 0 changes nothing",
    )
    sampling.add_argument(
        "--logit-bias",
        action="append",
        type=read_bias,
        metavar="ID=VALUE",
        help="added to the logit of a token, -1000 to 1000; may be repeated",
    )
    sampling.add_argument(
        "--n", type=int, metavar="N", help="number of answers, printed at the end as [0] ..., [1] ..."
    )
    ending = parser.add_argument_group("words and ends")
    ending.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    ending.add_argument("--bad", action="append", metavar="TEXT", help="never produce this text; may be repeated")
    ending.add_argument("--min-tokens", type=int, metavar="N", help="least number of new tokens before an end token")
    ending.add_argument(
        "--end-id", type=int, metavar="ID", help="end at this token instead of the model's own; -1 means none"
    )
    guide = parser.add_argument_group("guide", "what the answer is kept to").add_mutually_exclusive_group()
    guide.add_argument("--json-object", action="store_true", help="any JSON object")
    guide.add_argument("--json-schema", metavar="FILE", help='JSON that meets the schema in FILE; "-" reads stdin')
    guide.add_argument("--regex", metavar="REGEX", help="a text that the regular expression matches from end to end")
    guide.add_argument("--grammar", metavar="FILE", help='the rule `root` of the EBNF grammar in FILE; "-" reads stdin')
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    output.add_argument("--echo", action="store_true", help="print the prompt before the answer")
    output.add_argument(
        "--log-probs",
        action="store_true",
        help="print the log-probability of each token: as a table on stderr, or in the JSON object",
    )
    output.add_argument(
        "--top-log-probs",
        type=int,
        metavar="N",
        help="also print the log-probabilities of the N likeliest tokens at each place, by their ids",
    )
    output.add_argument(
        "--prompt-log-probs",
        action="store_true",
        help="also print the log-probability of each token of the prompt, by its id",
    )
    output.add_argument(
        "--routing",
        action="store_true",
        help="print the experts of each token, layer by layer, and their weights: as a table on stderr, or in the JSON "
        "object",
    )
    output.add_argument("--stats", action="store_true", help="print a line of counts and speed on stderr at the end")


def read_bias(text: str) -> tuple[int, float]:
    """The token id and the number in the text of --logit-bias. Raises ArgumentTypeError."""
    token, separator, number = text.partition("=")
    try:
        if separator:
            return int(token), float(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a token id and a number, such as 50=-2.5")


def run(arguments: argparse.Namespace) -> int:
    """Stream one answer; returns the exit status. Raises ClientError, and OSError if stdout is closed."""
    from clients.generation import Client

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters of the answer that the terminal's encoding lacks are shown as question marks.
        sys.stdout.reconfigure(errors="replace")
    prompt = read_stdin("the prompt") if arguments.prompt == "-" else arguments.prompt
    with Client(arguments.url, tls=read_client_tls(arguments)) as client:
        interrupted = threading.Event()

        def interrupt() -> None:
            interrupted.set()
            client.close()  # cancels the request on the server

        return beside(lambda: ask(client, arguments, prompt, interrupted), interrupt)


def beside(work: Callable[[], int], interrupt: Callable[[], None]) -> int:
    """Run `work` in a separate thread and return its result; on Ctrl-C call `interrupt` in this thread.

    No KeyboardInterrupt is raised while `work` runs: raised inside gRPC, it can leave a lock of gRPC held, and the
    program would wait for ever. This thread waits in short intervals, since a signal that arrives just before a wait
    begins does not end that wait.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda _number, _frame: pressed.set())
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(work)
            while not future.done():
                wait([future], timeout=POLL_INTERVAL_S)
                if pressed.is_set():
                    pressed.clear()
                    interrupt()
            return future.result()
    finally:
        signal.signal(signal.SIGINT, before)


def ask(client: Client, arguments: argparse.Namespace, prompt: str, interrupted: threading.Event) -> int:
    """Choose the model, stream the answer; returns the exit status. Raises ClientError and OSError."""
    from clients.errors import ClientError

    try:
        model = arguments.model or the_one_ready(client.models(), arguments.url)
        request = read_request(arguments, model, prompt)
        return answer(client, request, arguments, interrupted)
    except ClientError:
        if interrupted.is_set():
            return INTERRUPTED
        raise
    except BrokenPipeError:
        leave_stdout()
        return READER_GONE
    except OSError:
        leave_stdout()
        raise


def read_stdin(what: str) -> str:
    """The text on stdin, byte for byte. Raises RequestRejected if stdin is closed or is not UTF-8. `what` names the
    text in the message."""
    from clients.errors import RequestRejected

    if sys.stdin is None:
        raise RequestRejected(f"reading {what} from stdin: it is closed; pipe a text into it")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestRejected(f"reading {what} from stdin: {error}; expected UTF-8, convert it first") from error


def read_guide(arguments: argparse.Namespace) -> tuple[str | None, str | None]:
    """The type and the text of the guide in the arguments, None for none. Raises RequestRejected for a file that cannot
    be read."""
    if arguments.json_object:
        return "json", None
    if arguments.regex is not None:
        return "regex", arguments.regex
    for flag, guide_type, path in (
        ("--json-schema", "json_schema", arguments.json_schema),
        ("--grammar", "ebnf_grammar", arguments.grammar),
    ):
        if path is not None:
            return guide_type, read_stdin(flag) if path == "-" else read_guide_file(flag, Path(path))
    return None, None


def read_guide_file(flag: str, path: Path) -> str:
    """The text of a guide's file. Raises RequestRejected."""
    from clients.errors import RequestRejected

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestRejected(f"reading {flag} {path}: {error}; give a file of UTF-8 text") from error


def read_request(arguments: argparse.Namespace, model: str, prompt: str) -> GenerationRequest:
    from clients.errors import RequestRejected
    from clients.messages import GenerationRequest

    guide_type, guide = read_guide(arguments)
    if guide == "":
        raise RequestRejected("reading the guide: it is empty; give a schema, a regular expression or a grammar")
    biases = dict(arguments.logit_bias or ())
    if len(biases) < len(arguments.logit_bias or ()):
        raise RequestRejected(
            "reading --logit-bias: found a token id twice, expected each once; give one number for it"
        )
    return GenerationRequest(
        model=model,
        prompt=prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        min_length=arguments.min_tokens,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        logit_bias=biases,
        random_seed=arguments.seed,
        stop_words=tuple(arguments.stop) if arguments.stop else None,
        bad_words=tuple(arguments.bad) if arguments.bad else None,
        end_id=arguments.end_id,
        return_log_probs=True if arguments.log_probs else None,
        num_log_probs=arguments.top_log_probs,
        return_prompt_log_probs=True if arguments.prompt_log_probs else None,
        return_routed_experts=True if arguments.routing else None,
        num_return_sequences=arguments.n,
        guided_decoding_guide_type=guide_type,
        guided_decoding_guide=guide,
        timeout_s=arguments.timeout,
    )


def the_one_ready(models: Sequence[ModelState], url: str) -> str:
    """The name of the server's only ready model, steps of an ensemble not counted. Raises ModelNotFound if there are
    none or several."""
    from clients.errors import ModelNotFound
    from triton_repo.contracts.ensemble import STEP_MODELS

    ready = sorted({model.name for model in models if model.ready and model.name not in STEP_MODELS})
    if len(ready) == 1:
        return ready[0]
    if ready:
        raise ModelNotFound(
            f"choosing a model of {url}: found {len(ready)} ready; give --model, one of: {', '.join(ready)}"
        )
    listed = "; ".join(map(str, models)) or "its repository is empty"
    raise ModelNotFound(f"choosing a model of {url}: none is ready: {listed}")


def answer(
    client: Client, request: GenerationRequest, arguments: argparse.Namespace, interrupted: threading.Event
) -> int:
    """Stream one answer to stdout, or print several when all of them have ended; returns the exit status. Raises
    ClientError; OSError if stdout takes no more."""
    from clients.errors import ClientError
    from clients.messages import collect_all

    timeline, is_several = Timeline(), (request.num_return_sequences or 1) > 1
    try:
        with closing(client.stream(request)) as pieces:
            for piece in pieces:
                # The server never repeats the prompt in a stream, so --echo prints it here.
                before = request.prompt if arguments.echo and not timeline.pieces else ""
                timeline.add(piece)
                if not arguments.json and not is_several:
                    print(before + piece.text, end="", flush=True)
    except ClientError:
        if not interrupted.is_set():
            raise
    finally:
        if timeline.pieces and not arguments.json and not is_several:
            print(flush=True)
    if arguments.json:
        found = summary(request, timeline, echo=arguments.echo, interrupted=interrupted.is_set())
        print(json.dumps(found, ensure_ascii=False), flush=True)
        return end_of(timeline, arguments, interrupted)
    if is_several:
        for generation in collect_all(timeline.pieces):
            text = (request.prompt if arguments.echo else "") + generation.text
            print(f"[{generation.sequence_index}] {text}", flush=True)
    if arguments.log_probs or arguments.top_log_probs or arguments.prompt_log_probs:
        print(log_probability_table(timeline.pieces), file=sys.stderr)
    if arguments.routing:
        print(routing_table(timeline.pieces), file=sys.stderr)
    return end_of(timeline, arguments, interrupted)


def end_of(timeline: Timeline, arguments: argparse.Namespace, interrupted: threading.Event) -> int:
    """Print the statistics that were asked for; returns the exit status."""
    if arguments.stats:
        print(statistics(timeline), file=sys.stderr)
    return INTERRUPTED if interrupted.is_set() else 0


def summary(request: GenerationRequest, timeline: Timeline, *, echo: bool, interrupted: bool) -> dict[str, object]:
    """The JSON object that --json prints. A count or speed that is not known is null. Several answers are a list."""
    from clients.messages import collect, collect_all

    def answer_of(generation: Generation) -> dict[str, object]:
        found: dict[str, object] = {
            "text": (request.prompt if echo else "") + generation.text,
            "token_ids": generation.token_ids,
            "finish_reason": generation.finish_reason or ("cancelled" if interrupted else None),
            "num_input_tokens": generation.num_input_tokens,
            "num_output_tokens": generation.num_output_tokens,
        }
        if request.return_log_probs:
            found |= {"log_probs": generation.log_probs, "cum_log_prob": generation.cum_log_prob}
        if request.num_log_probs:
            found["top_log_probs"] = generation.top_log_probs
        if request.return_prompt_log_probs:
            found |= {
                "prompt_token_ids": generation.prompt_token_ids,
                "prompt_log_probs": generation.prompt_log_probs,
            }
        if request.return_routed_experts:
            found |= {"routing": generation.routing, "num_experts": generation.num_experts}
        return found

    times = {"time_to_first_token_ms": timeline.time_to_first_token_ms, "tokens_per_s": timeline.tokens_per_s}
    if (request.num_return_sequences or 1) > 1:
        answers = [answer_of(generation) for generation in collect_all(timeline.pieces)]
        return {"model": request.model, "answers": answers, **times}
    return {"model": request.model, **answer_of(collect(timeline.pieces)), **times}
