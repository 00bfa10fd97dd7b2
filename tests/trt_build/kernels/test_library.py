"""Whether the compiled library fits: a missing one, one of another moeship, and an ONNX Runtime that is too old."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernel_nodes import block_linear, random_matrices

from trt_build.errors import EngineError
from trt_build.ort import kernels
from trt_build.ort.kernels import __main__  # noqa: F401 - an attribute of the package
from trt_build.ort.kernels.library_file import with_digest

SOURCES = Path(kernels.__file__).parent
ROOT = SOURCES.parents[2]
DIGEST = len(with_digest(b""))  # bytes that the install appends
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not on PATH")


@pytest.fixture
def library_of(tmp_path, monkeypatch):
    """A library with this C source in the place of ours."""

    def build(text):
        path = tmp_path / "moeship_kernels.so"
        path.with_suffix(".c").write_text(text)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", path, path.with_suffix(".c")], check=True)
        monkeypatch.setattr(kernels, "_LIBRARY", path)

    return build


def refused(text):
    with pytest.raises(EngineError, match=text) as error:
        kernels.library()
    assert not kernels.is_usable()
    message = str(error.value)
    assert message.startswith("loading the CPU kernels: ")
    assert "install moeship again" in message
    assert "\n" not in message


def test_a_missing_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "moeship_kernels.so")
    refused(r"moeship_kernels\.so does not exist; (install a C\+\+17 compiler|install moeship again)")


def test_half_a_library_is_refused(monkeypatch, tmp_path):
    (tmp_path / "half.so").write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "half.so")
    refused(r"half\.so is not a library that this machine can load")


# Loading any of these files ends a process by a signal.
DAMAGES = {
    "half": lambda whole: whole[: len(whole) // 2],
    "zeros from the middle on": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "zeros in the middle": lambda whole: whole[:20000] + bytes(len(whole) - 40000) + whole[-20000:],
    "half, without the digest": lambda whole: whole[: (len(whole) - DIGEST) // 2],
    "zeros from the middle on, without the digest": lambda whole: whole[:300000] + bytes(len(whole) - DIGEST - 300000),
}


@pytest.mark.needs_kernels
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_told_and_never_loaded(tmp_path, damage):
    path = tmp_path / "moeship_kernels.so"
    path.write_bytes(DAMAGES[damage](kernels.library().read_bytes()))
    code = f"""
from pathlib import Path
from trt_build.ort import kernels
kernels._LIBRARY = Path({str(path)!r})
print(kernels.found_fault())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.search(r"moeship_kernels\.so is damaged \((found|its end) [^()]*\)", found.stdout)
    assert "install moeship again" in found.stdout


@pytest.mark.needs_kernels
def test_the_install_appends_a_digest_and_a_library_that_was_stripped_is_taken(tmp_path, monkeypatch):
    content = kernels.library().read_bytes()
    assert content == with_digest(content[:-DIGEST])
    (tmp_path / "stripped.so").write_bytes(content[:-DIGEST])
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "stripped.so")
    assert kernels.found_fault() is None


@needs_cc
@pytest.mark.parametrize("number", [kernels.INTERFACE + 1, kernels.INTERFACE - 1, -1, (1 << 32) + kernels.INTERFACE])
def test_another_versions_library_is_refused(library_of, number):
    library_of(f"long MoeshipKernelsInterface(void) {{ return {number}; }}")
    refused(rf"has interface {number}, expected {kernels.INTERFACE}: it was compiled for another version of moeship")


@needs_cc
def test_a_library_that_does_not_say_its_interface_is_refused(library_of):
    library_of("void *RegisterCustomOps(void *options, void *base) { return 0; }")
    refused(rf"does not say which interface it has, expected {kernels.INTERFACE}")


def test_the_sources_have_the_interface_and_the_layout_that_python_expects():
    from export.quantize.layout import LAYOUT

    numbers = dict(re.findall(r"int64_t (\w+) = (\d+);", (SOURCES / "layout.h").read_text()))
    assert int(numbers["kInterface"]) == kernels.INTERFACE
    assert int(numbers["kLayout"]) == LAYOUT


@pytest.mark.parametrize("fault", [None, kernels.Fault("there are none", kernels.remedy())])
def test_the_command_says_in_one_line_what_is_missing_or_that_nothing_is(monkeypatch, capsys, fault):
    monkeypatch.setattr(kernels.__main__, "found_fault", lambda: fault)
    monkeypatch.setattr(kernels.__main__, "library", lambda: "moeship_kernels.so")
    kernels.__main__.main()
    out, err = capsys.readouterr()
    assert out == ("" if fault else "moeship's CPU kernels: moeship_kernels.so\n")
    assert err.count("\n") == bool(fault)
    for text in ("there are none; ", "are built for ONNX Runtime's, which decode at", "install moeship again"):
        assert (text in err) == bool(fault)


@pytest.mark.needs_kernels
def test_the_command_says_that_the_level_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv(kernels.LEVEL_VARIABLE, "nonsense")
    kernels.__main__.main()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(
        "choosing the kernels' instruction set: MOESHIP_KERNELS_LEVEL is nonsense, this CPU has plain"
    )


@pytest.mark.needs_kernels
def test_an_onnx_runtime_that_is_too_old_is_told_and_sessions_of_another_go_on():
    node = block_linear(random_matrices(np.random.default_rng(0), 1, 16, 32, 4, 32))
    session, feeds = node.session(), {"x": np.ones((1, 32), np.float32)}
    before, said = session.run(None, feeds)[0], []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        said.append(message.decode())
        return 1

    # An ONNX Runtime as the library sees it: it has version 1 of the API alone, whose first function is CreateStatus.
    api = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda n: ctypes.addressof(api) if n == 1 else None)
    text = ctypes.create_string_buffer(b"1.16.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(function, ctypes.c_void_p) for function in (get_api, get_version)))
    register = ctypes.CDLL(str(kernels.library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert said == ["registering moeship's kernels: they need ONNX Runtime 1.17 or later, found 1.16.3"]
    np.testing.assert_array_equal(session.run(None, feeds)[0], before)
