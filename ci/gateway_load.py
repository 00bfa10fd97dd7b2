"""Many streams at once through a gateway, some of which do not read or leave, and its memory meanwhile:

    python ci/gateway_load.py --url http://127.0.0.1:8080 --model tiny --pid PID_OF_THE_GATEWAY

Slow readers read a little and then nothing for --seconds; leaving clients close their connection after the first bytes;
all others must get a whole answer, or 429 with Retry-After. Exit status 1 where another came, or where the gateway took
more than --most-mb beyond what it had before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit


async def stream(url: str, model: str, number: int, kind: str, seconds: float) -> str:
    """How one client's stream ended."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps(
        {"model": model, "prompt": f"def f{number}(", "max_tokens": 400, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    try:
        begin = await reader.read(200)
        if kind == "leaving":
            return "left"
        if kind == "slow":
            await asyncio.sleep(seconds)
        answer = (begin + await reader.read(-1)).decode()
    finally:
        writer.close()
    status = answer.split(" ", 2)[1] if answer else "nothing"
    if status == "200":
        return "whole" if "data: [DONE]" in answer else "cut"
    return f"{status} with Retry-After" if "retry-after" in answer.lower() else status


def memory_mb(pid: int) -> float:
    """The resident memory of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def measured(arguments: argparse.Namespace) -> int:
    """Run the load; returns the exit status."""
    most = before = memory_mb(arguments.pid)

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, memory_mb(arguments.pid))
            await asyncio.sleep(0.1)

    kinds = ["slow"] * arguments.slow + ["leaving"] * arguments.leaving
    kinds += ["reading"] * (arguments.streams - len(kinds))
    began, watching = time.monotonic(), asyncio.create_task(watch())
    tasks = [
        stream(arguments.url, arguments.model, number, kind, arguments.seconds) for number, kind in enumerate(kinds)
    ]
    ends = await asyncio.gather(*tasks)
    watching.cancel()
    for kind in ("reading", "slow", "leaving"):
        print(f"{kind}: {dict(Counter(end for end, own in zip(ends, kinds, strict=True) if own == kind))}")
    print(f"memory {before:.0f} MB before, {most:.0f} MB at most; {time.monotonic() - began:.1f} s")
    bad = [end for end, kind in zip(ends, kinds, strict=True) if kind == "reading"
           and end not in ("whole", "429 with Retry-After")]  # fmt: skip
    return int(bool(bad) or most - before > arguments.most_mb)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--slow", type=int, default=50)
    parser.add_argument("--leaving", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--most-mb", type=float, default=100.0)
    return asyncio.run(measured(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
