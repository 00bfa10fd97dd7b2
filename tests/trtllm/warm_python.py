"""A Python that starts with modules loaded: one process loads them, and forks for every program that is started.

    with warm_python(folder, ["torch"]) as python:
        subprocess.run([python, "-m", "module", "argument"])

`python` is a small program that takes Python's own arguments, asks the process for a fork and ends as the fork ends.
The fork has the arguments, the working folder, the environment, the streams and the process group of the program that
asked, and gets the signals that are sent to that program; if nobody waits for it any more, it gets SIGTERM. Loading
torch takes more than a second of processor time, and transformers' models two more; many programs take little else.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

# What is asked for: its length in four bytes with the three streams, then JSON. The answers, of four bytes each: the
# number of the fork, and at its end its wait status.
ADDRESS = "socket"
PROGRAM = """#!{python} -IS
import array, json, os, signal, socket, sys
known = sys.argv[1:2] in (["-c"], ["-m"]) or (len(sys.argv) > 1 and not sys.argv[1].startswith("-"))
if not known or os.environ.get("LD_LIBRARY_PATH", "") != {libraries!r}:
    # It has other flags, reads its program from a stream, or looks for libraries where the process does not.
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), os.getpgid(0)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(asked).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(asked)
    process = int.from_bytes(server.recv(4), "big")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process, number))
    status = os.waitstatus_to_exitcode(int.from_bytes(server.recv(4), "big"))
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def warm_python(folder: Path, modules: Sequence[str], libraries: Path | None = None) -> Iterator[Path]:
    """Such a program in a new folder, for as long as the block lasts. `libraries`: where it looks for libraries, as
    LD_LIBRARY_PATH says to the programs that are to be forks; others load their modules themselves."""
    folder.mkdir()
    program = folder / "python3"
    environment = {**os.environ, **({} if libraries is None else {"LD_LIBRARY_PATH": str(libraries)})}
    text = PROGRAM.format(
        python=sys.executable, address=str(folder / ADDRESS), libraries=environment.get("LD_LIBRARY_PATH", "")
    )
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    command = [sys.executable, "-I", __file__, str(program), *modules]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield program


def serve(program: Path, modules: Sequence[str]) -> None:
    """Load modules and fork for those who ask, until the standard input ends."""
    for name in modules:
        importlib.import_module(name)
    sys.executable = str(program)  # where a fork starts Python
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as selector:
        listening.bind(str(program.with_name(ADDRESS)))
        listening.listen()
        selector.register(listening, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        waiting: dict[int, tuple[int, socket.socket]] = {}  # descriptor of a fork -> its process, who waits for it
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listening:
                    client, _ = listening.accept()
                    process = _fork(client)
                    client.sendall(process.to_bytes(4, "big"))
                    ended = os.pidfd_open(process)
                    waiting[ended] = process, client
                    selector.register(ended, selectors.EVENT_READ)
                    selector.register(client, selectors.EVENT_READ, process)
                elif key.fd in waiting:
                    process, client = waiting.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(process, 0)
                    with contextlib.suppress(KeyError):
                        selector.unregister(client)
                    with contextlib.suppress(OSError), client:
                        client.sendall(status.to_bytes(4, "big"))
                elif key.data is not None:  # the program that asked has ended
                    selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGTERM)


def _fork(client: socket.socket) -> int:
    """The process that does what is asked; it does not return in that process."""
    head, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i", ancillary[0][2])
    with client.dup().makefile("rb") as file:
        words, folder, environment, group = json.loads(file.read(int.from_bytes(head, "big")))
    process = os.fork()
    if process == 0:
        status = 1
        try:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.closerange(3, max(streams) + 1)
            with contextlib.suppress(OSError):  # the group has ended meanwhile
                os.setpgid(0, group)
            sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            status = _run(words)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)
    for stream in streams:
        os.close(stream)
    return process


def _run(words: Sequence[str]) -> int:
    """Python's command line: -c, -m or a file, each with its arguments. The exit status."""
    kind, what = (words[0], words[1]) if words[0] in ("-c", "-m") else ("", words[0])
    arguments = list(words[2:] if kind else words[1:])
    first = str(Path(what).resolve().parent) if not kind else "" if kind == "-c" else str(Path.cwd())
    sys.path[:0] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv[:] = [kind or what, *arguments]
    try:
        if kind == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        elif kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])
