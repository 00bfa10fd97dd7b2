"""Build an engine directory from a checkpoint: the one entry that CI and `moeship build` call.

    python trt_build/build_engine.py --checkpoint DIR --backend onnxruntime --precision int4 --output ENGINE
    python trt_build/build_engine.py --checkpoint DIR --backend tensorrt-llm --precision int4 --output ENGINE

The checkpoint's tensors are checked against its config, quantised and written one chunk at a time; the engine appears
under its name only when it is whole. A build that was interrupted, however it was, is resumed by the same command.
For TensorRT-LLM the stages are plan, checkpoint, engine and verify.
Exit status 0 done, 1 an engine differs from its checkpoint, 2 wrong input, 3 TensorRT-LLM or a GPU is
missing and all before that is done.
"""

from __future__ import annotations

import argparse
import logging
import sys

from export.command import run_command
from trt_build.backends import choose_backend
from trt_build.engine_flags import add_engine_arguments, refuse_flags_of_others
from trt_build.errors import VerificationFailed
from trt_build.progress_line import ProgressLine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser, output_help="engine directory to make", output_required=True)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build as the command line asks, and print what was built. Raises VerificationFailed if the engine
    differs from its checkpoint by more than its precision allows."""
    backend = choose_backend(arguments.backend)
    refuse_flags_of_others(arguments)
    built = backend.build(arguments, ProgressLine(sys.stderr) if sys.stderr.isatty() else None)
    sys.stdout.write(built.json_text if arguments.json else f"{built.text}\n")
    if built.failure:
        raise VerificationFailed(built.failure)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = parser.parse_args()
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
