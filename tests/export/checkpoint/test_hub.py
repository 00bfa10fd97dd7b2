"""Hub ids end to end, against a hub on this machine: what is fetched, resumed, refused, and never sent or written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapters import write_adapter
from checkpoints import write_phi_checkpoint
from dense_checkpoints import write_dense_checkpoint
from hub_standin import COMMIT, hub_of
from trtllm.warm_python import warm_python

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable  # `warm` has `moeship` start faster
TOKEN = "hf_secretsecretsecretsecretsecret"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 80, "num_heads": 5, "rotary_dim": 16}
    folder = write_phi_checkpoint(tmp_path_factory.mktemp("hub") / "model", seed=1, **sizes)
    (folder / "modeling_phi.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A model of more than one piece of 10 MiB, in which huggingface_hub writes what it is sent."""
    return write_phi_checkpoint(tmp_path_factory.mktemp("hub") / "big", seed=1, vocab_size=40_000, hidden_size=80)


def ranges_of(hub, name="model.safetensors"):
    """The ranges in which a file was asked for, one after the other; None for the whole."""
    return [asked for file, asked in zip(hub.downloads, hub.ranges, strict=True) if file == name]


@pytest.fixture
def hub(model):
    with hub_of({"owner/model": model}) as served:
        yield served


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """`moeship` starts with its imports loaded, but for huggingface_hub, which reads the environment as it loads."""
    loaded = ["httpx2", "cli.inspect", "cli.plan", "trt_build.manifest"]
    with (
        warm_python(tmp_path_factory.mktemp("warm") / "bin", loaded) as program,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setitem(globals(), "PYTHON", program)
        yield


def moeship(hub, tmp_path, *words, **environment):
    variables = {**os.environ, **hub.environment(tmp_path / "home"), **environment}
    return subprocess.run(
        [PYTHON, "-m", "cli.main", *map(str, words)],
        env=variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def refused(hub, tmp_path, *words, **environment):
    done = moeship(hub, tmp_path, "inspect", *(words or ("owner/model",)), **environment)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert TOKEN not in done.stderr
    *before, error = done.stderr.strip().splitlines()
    assert all(line.startswith("downloading ") for line in before), done.stderr
    return error.replace(hub.endpoint, "HUB")


def storage(tmp_path):
    return tmp_path / "home" / "hub" / "models--owner--model"


def snapshot(tmp_path):
    """Name -> bytes of what the cache has of the commit."""
    folder = storage(tmp_path) / "snapshots" / COMMIT
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def expect_whole(tmp_path, model):
    expected = {path.name: path.read_bytes() for path in model.iterdir() if path.suffix != ".py"}
    assert snapshot(tmp_path) == expected
    for blob in (storage(tmp_path) / "blobs").iterdir():  # every file bears its own digest, and none is a rest
        body = blob.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        assert blob.name in (git, hashlib.sha256(body).hexdigest())


def test_an_engine_is_built_of_a_hub_id_and_bears_the_commit(hub, tmp_path, model):
    done = moeship(hub, tmp_path, "build", "owner/model", "--precision", "fp32", "--output", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "engine" / "engine.json").read_text())["source"]
    assert (source["checkpoint"], source["revision"]) == ("owner/model", COMMIT)
    expect_whole(tmp_path, model)
    assert "modeling_phi.py" not in hub.downloads


def test_what_is_in_the_cache_is_fetched_once_and_used_without_a_network(hub, tmp_path):
    assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
    hub.downloads.clear()
    assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
    offline = moeship(hub, tmp_path, "inspect", "owner/model", HF_HUB_OFFLINE="1")
    unreachable = moeship(hub, tmp_path, "inspect", "owner/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert (offline.returncode, unreachable.returncode) == (0, 0)
    assert f"the hub cannot be reached; taking owner/model of the cache, commit {COMMIT}" in unreachable.stderr
    assert hub.downloads == []


def test_the_files_are_those_that_huggingface_hub_finds(hub, tmp_path):
    assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
    hub.downloads.clear()
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('owner/model', ignore_patterns=['*.py']))"
    variables = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(storage(tmp_path) / "snapshots" / COMMIT)
    assert hub.downloads == []


@pytest.mark.parametrize("words", [("owner/model", "--revision", "v1"), ("owner/model@v1",)])
def test_a_revision_is_pinned(hub, tmp_path, words):
    hub.revisions = ("v1", COMMIT)
    assert moeship(hub, tmp_path, "plan", *words, "--precision", "fp32").returncode == 0
    assert (storage(tmp_path) / "refs" / "v1").read_text() == COMMIT
    assert refused(hub, tmp_path).endswith("hub: the repository has no revision main; check its name")


def test_a_connection_that_is_cut_is_resumed_with_what_has_come(tmp_path, big):
    with hub_of({"owner/model": big}) as hub:
        hub.cuts = [11_000_000, 10_500_000]
        assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
        assert ranges_of(hub) == [None, f"bytes={10 << 20}-", f"bytes={20 << 20}-"]
    expect_whole(tmp_path, big)


def test_a_download_that_is_killed_at_random_goes_on_and_ends_with_the_same_bytes(tmp_path, big):
    rng, kept = random.Random(3), []
    with hub_of({"owner/model": big}) as hub:
        variables = {**os.environ, **hub.environment(tmp_path / "home")}
        code = (
            "import huggingface_hub.file_download as f, time, functools\n"
            "get = f.http_get\n"
            "class Slow:\n"
            "    def __init__(self, file): self.file = file\n"
            "    def write(self, data):\n"
            "        for i in range(0, len(data), 65536): self.file.write(data[i:i + 65536]); self.file.flush(); "
            "time.sleep(0.002)\n"
            "    def __getattr__(self, name): return getattr(self.file, name)\n"
            "f.http_get = lambda url, out, **k: get(url, Slow(out), **k)\n"
            "from cli.main import main\n"
            "raise SystemExit(main(['inspect', 'owner/model']))"
        )
        for _ in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", code], env=variables, cwd=ROOT, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            blobs = storage(tmp_path) / "blobs"
            goal = (kept[-1] if kept else 0) + rng.randrange(200_000, 2_000_000)
            while process.poll() is None and sum(p.stat().st_size for p in blobs.glob("*.moeship")) < goal:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept.append(sum(path.stat().st_size for path in blobs.glob("*.moeship")))
        assert kept == sorted(kept)
        assert kept[0] > 0
        assert not snapshot(tmp_path)
        assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
        assert ranges_of(hub)[-1] == f"bytes={kept[-1]}-"
    expect_whole(tmp_path, big)


def test_two_processes_fetch_a_file_once(tmp_path, big):
    with hub_of({"owner/model": big}) as hub:
        variables = {**os.environ, **hub.environment(tmp_path / "home")}
        words = [sys.executable, "-m", "cli.main", "inspect", "owner/model"]
        both = [subprocess.Popen(words, env=variables, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
        assert [process.wait() for process in both] == [0, 0]
        assert ranges_of(hub) == [None]
    expect_whole(tmp_path, big)


def test_bytes_that_are_not_those_of_the_listing_are_refused_and_removed(hub, tmp_path, model):
    hub.wrong = {"model.safetensors"}
    said = refused(hub, tmp_path)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert said.startswith("CheckpointError: downloading model.safetensors of owner/model: its digest is ")
    assert f"the hub lists {digest}; what came was removed: run the command again" in said
    assert not snapshot(tmp_path)
    assert digest not in {path.name.partition(".")[0] for path in (storage(tmp_path) / "blobs").iterdir()}
    hub.wrong = set()
    assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
    expect_whole(tmp_path, model)


def test_a_damaged_file_of_another_program_is_fetched_again(hub, tmp_path, model):
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    blobs = storage(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / digest).write_bytes(b"cut off")
    assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
    expect_whole(tmp_path, model)


def test_the_token_goes_to_the_hub_alone_and_is_never_printed(hub, tmp_path):
    hub.token = TOKEN
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    done = moeship(hub, tmp_path, "-v", "inspect", "owner/model")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.tokens[f"/owner/model/resolve/{COMMIT}/model.safetensors"] == f"Bearer {TOKEN}"
    assert hub.tokens["/cdn/owner/model/model.safetensors"] is None


def test_a_private_repository_without_a_token_or_with_a_wrong_one(hub, tmp_path):
    hub.token = TOKEN
    start = (
        "CheckpointError: opening the checkpoint owner/model: there is no such folder here, and it could not be "
        "downloaded from the hub: HUB shows no model of this name; check the name, and if it is private, "
    )
    assert refused(hub, tmp_path) == start + (
        "give a token of an account that may read it, in HF_TOKEN or by `hf auth login` (no token was found)"
    )
    assert refused(hub, tmp_path, HF_TOKEN="hf_other") == start + (
        "the token that was sent (HF_TOKEN, or that of `hf auth login`) may not read it; give another"
    )


def test_a_gated_repository_says_where_to_accept_its_conditions(hub, tmp_path):
    hub.gated = {"owner/model"}
    assert "the repository is gated; accept its conditions at HUB/owner/model, and give a token of an" in refused(
        hub, tmp_path
    )
    assert not snapshot(tmp_path)


def test_a_name_that_is_not_there(hub, tmp_path):
    assert "HUB shows no model of this name; check the name" in refused(hub, tmp_path, "owner/other")


@pytest.mark.parametrize("start", ["/api/models/", f"/owner/model/resolve/{COMMIT}/config.json"])
def test_an_answer_of_html_is_told_as_that(hub, tmp_path, start):
    hub.html = (start,)
    assert refused(hub, tmp_path).endswith(
        "HUB gave an answer that is not the hub's, such as the page of a proxy; check HF_ENDPOINT and the network"
    )
    assert not snapshot(tmp_path)


def test_a_page_in_the_place_of_the_weights_is_refused(hub, tmp_path):
    hub.html = ("/cdn/",)
    assert "an answer that is not the hub's, such as the page of a proxy" in refused(hub, tmp_path)
    assert not snapshot(tmp_path)
    assert not list((storage(tmp_path) / "blobs").glob("*.moeship"))


def test_a_hub_that_goes_away_is_told_and_what_came_is_kept(tmp_path, big):
    with hub_of({"owner/model": big}) as hub:
        hub.cuts = [11_000_000, *[0] * 6]
        assert "the connection broke off; what has come is kept: run the command again" in refused(hub, tmp_path)
        assert not snapshot(tmp_path)
        hub.cuts.clear()
        assert moeship(hub, tmp_path, "inspect", "owner/model").returncode == 0
        assert ranges_of(hub)[-1] == f"bytes={10 << 20}-"
    expect_whole(tmp_path, big)


def test_an_error_of_the_hub_is_told_with_its_status(hub, tmp_path):
    hub.statuses = {f"/owner/model/resolve/{COMMIT}/model.safetensors": 500}
    assert "HUB answered with status 500; try again later" in refused(hub, tmp_path)


def test_without_a_network_and_a_cache(hub, tmp_path):
    assert "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub; download it with a network" in refused(
        hub, tmp_path, HF_HUB_OFFLINE="1"
    )
    assert "http://127.0.0.1:9 cannot be reached; check the network, or download it and pass its folder" in refused(
        hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9"
    )


def test_a_repository_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    with hub_of({"owner/model": tmp_path / "empty"}) as hub:
        assert "its repository holds no config.json, no safetensors files and no tokenizer" in refused(hub, tmp_path)


@pytest.mark.parametrize("location", ["owner/model@../../x", "owner/model@", "owner/model@a@b"])
def test_revisions_that_are_none_are_refused(hub, tmp_path, location):
    assert "no such folder, and not a hub id like owner/name or owner/name@revision" in refused(hub, tmp_path, location)


def test_a_folder_has_no_revision(hub, tmp_path, model):
    assert "it is a folder of this machine, which has no revision v1; leave the revision out" in refused(
        hub, tmp_path, model, "--revision", "v1"
    )


def test_a_merge_takes_hub_ids_and_adapters_with_revisions(tmp_path):
    served = {}
    for index in range(2):
        served[f"owner/e{index}"] = write_dense_checkpoint(tmp_path / "served" / f"e{index}", seed=index)
    served["owner/adapter"] = write_adapter(tmp_path / "served" / "adapter", served["owner/e1"], seed=3)
    yaml = tmp_path / "merge.yml"
    with hub_of(served) as hub:
        texts = []
        for base, expert in (("owner/e0", f"owner/e1@{COMMIT}+owner/adapter@main"), ("./served/e0", "")):
            other = expert or "./served/e1+./served/adapter"
            yaml.write_text(
                f"base_model: {base}\ngate_mode: hidden\nexperts:\n"
                f"  - {{source_model: {base}, positive_prompts: [fox]}}\n"
                f"  - {{source_model: '{other}', positive_prompts: [def]}}\n"
            )
            output = tmp_path / f"out{len(texts)}"
            done = moeship(hub, tmp_path, "merge", yaml, output)
            assert done.returncode == 0, done.stderr
            texts.append((output / "model.safetensors").read_bytes())
    assert texts[0] == texts[1]
