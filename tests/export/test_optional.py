"""Imports: a missing package, a broken one, and Ctrl-C in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from export.errors import MissingPackageError
from export.optional import optional_package


def test_a_missing_package_is_named_with_its_extra():
    with (
        pytest.raises(MissingPackageError, match=r"^flying needs the package wings; install it with: .*moeship\[sky\]"),
        optional_package("wings", "flying", "sky"),
    ):
        import no_such_wings  # noqa: F401


def test_a_package_that_is_there_and_broken_is_not_called_missing():
    message = r"which is installed but cannot be imported \(libwings.so: too old\)"
    with pytest.raises(MissingPackageError, match=message), optional_package("wings", "flying", "sky"):
        raise ImportError("libwings.so: too old")


def test_ctrl_c_in_an_import_waits_for_its_end_and_is_no_missing_package():
    """A module that turns whatever interrupts it into an ImportError, as numpy's import_array does."""
    done = []

    def import_array():
        try:
            signal.raise_signal(signal.SIGINT)
            done.append("imported")
        except KeyboardInterrupt as error:
            raise ImportError("numpy.core.multiarray failed to import") from error

    with pytest.raises(KeyboardInterrupt), optional_package("wings", "flying", "sky"):
        import_array()
    assert done == ["imported"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_others_handle_or_another_thread_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with optional_package("wings", "flying", "sky"):
            signal.raise_signal(signal.SIGINT)
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    imported = []

    def work():
        with optional_package("json", "reading", "sky"):
            imported.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert imported == [True]


def test_ctrl_c_while_the_command_imports_exits_130_without_asking_for_a_package():
    code = (
        "import builtins, signal, sys\n"
        "true_import, pressed = builtins.__import__, []\n"
        "def pressing(name, *rest):\n"
        "    if name.startswith('grpc') and not pressed:\n"
        "        pressed.append(signal.raise_signal(signal.SIGINT))\n"
        "    return true_import(name, *rest)\n"
        "builtins.__import__ = pressing\n"
        "from cli.main import main\n"
        "status = main(['generate', '--url', '127.0.0.1:1', 'x'])\n"
        "assert pressed, 'grpc was not imported'\n"
        "sys.exit(status)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")
