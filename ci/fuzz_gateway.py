"""Send damaged bodies to a gateway: python ci/fuzz_gateway.py --seed 7 --bodies 5000

The gateway runs in this process, in front of a stand-in for Triton that answers with the prompt; its tokenizer is of
the folder --tokenizer. Bodies and bounds are those of tests/fuzz_gateway.py. Exit status 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import grpc  # noqa: E402 - found through the path above
from fake_triton import FakeServer, echoed_prompt  # noqa: E402
from fuzz_gateway import faults  # noqa: E402
from gateway_in_thread import CHATML, running  # noqa: E402
from tritonclient.grpc import service_pb2_grpc  # noqa: E402

from clients.gateway.settings import Settings  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bodies", type=int, default=5000)
    parser.add_argument("--tokenizer", type=Path, required=True, help="an engine's or a checkpoint's folder")
    arguments = parser.parse_args()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    servicer = FakeServer(answer=echoed_prompt)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    template = arguments.tokenizer.parent / ".fuzz-template.jinja"
    template.write_text(CHATML)
    try:
        settings = Settings(tritons=(url,), tokenizers={"": arguments.tokenizer}, chat_template=template)
        began = time.monotonic()
        with running(settings) as gateway:
            found = faults(gateway.url, "phixtral", seed=arguments.seed, count=arguments.bodies)
    finally:
        template.unlink()
        server.stop(grace=None).wait()
    for fault in found[:20]:
        print(fault)
    seconds = time.monotonic() - began
    print(f"{arguments.bodies} damaged bodies, seed {arguments.seed}: {len(found)} wrong answers, {seconds:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
