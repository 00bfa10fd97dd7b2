"""An engine for our kernels whose files were cut or lost is refused when it is loaded, whatever its manifest says.

Digests are checked when an engine is opened (tests/trt_build/test_open_engine.py). Here they are not, and sizes agree.
"""

import json
import os
import shutil

import pytest
from manifests import edit_manifest

from export.exporter import DATA_FILE
from trt_build.errors import EngineError
from trt_build.ort.engine import open_engine
from trt_build.ort.session import ScoringSession, Session

pytestmark = pytest.mark.needs_kernels
PADDING = 256  # at most, behind the last weight


@pytest.fixture
def engine(tmp_path, tiny_engines):
    return shutil.copytree(tiny_engines("int4", kernels="moeship"), tmp_path / "engine")


def refused(opened, text):
    for session in (Session, ScoringSession):
        with pytest.raises(EngineError, match=f"loading .*{text}") as error:
            session(opened)
        assert f"`moeship doctor {opened.folder}`" in str(error.value)


@pytest.mark.parametrize("share", [0, 1e-6, 0.5, 1])
def test_a_data_file_that_is_shorter_than_the_graphs_say(engine, share):
    data = engine / DATA_FILE
    os.truncate(data, int(share * (data.stat().st_size - PADDING)))
    files = json.loads((engine / "engine.json").read_text())["files"]
    files[DATA_FILE]["bytes"] = data.stat().st_size
    edit_manifest(engine, files=files)
    refused(open_engine(engine, check_digests=False), "refuses it .*out of bounds")


@pytest.mark.parametrize("lost", [DATA_FILE, "both graphs"])
def test_files_that_are_lost_between_opening_and_loading(engine, lost):
    opened = open_engine(engine, check_digests=False)
    for path in engine.glob("*.onnx") if lost == "both graphs" else [engine / lost]:
        path.unlink()
    refused(opened, "(refuses it|cannot be opened)")  # a session watches the weights, and opens them first


def test_a_data_file_that_is_cut_between_opening_and_loading(engine):
    opened = open_engine(engine, check_digests=False)
    os.truncate(engine / DATA_FILE, 0)
    refused(opened, "refuses it .*out of bounds")
