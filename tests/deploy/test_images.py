"""Images are of versions that are named, have no known holes, and hold the packages that moeship needs."""

from __future__ import annotations

import re
import tomllib

import pytest
from deployed import DEPLOY, KINDS, ROOT, USER, base_images, compose, default, documents, parsed, pods
from packaging.requirements import Requirement

from cli import serve
from triton_repo.serving.vulnerabilities import holes_of
from trt_build.trtllm.library import container


def test_images_are_named_by_a_version():
    [version] = {tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]}
    named = [service["image"] for service in compose().values()]
    named += [part["image"] for part in pods()["kserve"]["containers"]]
    [kustomization] = documents("kubernetes/base/kustomization.yaml")
    named += [f"{image['newName']}:{image['newTag']}" for image in kustomization["images"]]
    for image in map(default, named):
        assert re.search(rf"moeship:{re.escape(version)}-cpu$|:v?\d+\.\d+\.\d+$", image), image


def test_images_are_of_tritons_without_known_holes():
    images = base_images()
    assert {f"triton-{kind}" for kind in KINDS} <= images.keys()
    for kind in KINDS:
        year, month = map(int, re.search(r":(\d\d)\.(\d\d)-", images[f"triton-{kind}"]).groups())
        minor = 71 + 12 * (year - 26) + month - 7  # 2.71.0 is 26.07, and there is one a month
        assert holes_of(f"2.{minor}.0") == ()
    assert images["triton-tensorrt-llm"] == container(None)


def test_the_image_runs_as_the_user_of_the_pods_and_starts_nothing_by_itself():
    text = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^USER (.*)$", text, re.M) == [f"{USER}:{USER}"]
    assert re.findall(r"^CMD (.*)$", text, re.M) == ['["--help"]']
    ready = parsed(serve, ["repository"]).ready_timeout
    assert f"--start-period={ready:g}s" in text


@pytest.mark.parametrize("kind", KINDS)
def test_packages_of_an_image_are_pinned_by_digest_and_are_those_that_moeship_needs(kind):
    text = (DEPLOY / "docker" / f"requirements-{kind}.txt").read_text("utf-8")
    entries = re.findall(r"^([a-z0-9-]+)(?:\[[\w,]+\])?==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    assert len(entries) == len(re.findall(r"^[a-z]", text, re.M))
    pinned = {name: version for name, version, _ in entries}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [*([] if kind == "tensorrt-llm" else [kind]), "client", "gateway"]
    assert f"uv pip compile pyproject.toml {' '.join(f'--extra {extra}' for extra in extras)} " in text
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    constraints = (DEPLOY / "docker" / "constraints.txt").read_text("utf-8").splitlines()
    wanted += [line for line in constraints if not line.startswith("#")]
    for requirement in map(Requirement, wanted):
        if requirement.name != "moeship":
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
