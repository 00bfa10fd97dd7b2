"""Start the Deployment's own command as its pod would, without a cluster, and play the kubelet: probes, pause, SIGTERM.

    .venv/bin/python ci/deploy/pod.py WORK        # as root, on Linux; WORK keeps a small model

The command is the first process of namespaces of its own, with the user, the rights, the read-only root and the
writable folders of deploy/kubernetes/base/server.yaml, and a small model that takes its time. Differences from a pod:
the tritonserver is the machine's, so that known holes are accepted; keys and repository lie elsewhere. Exit status 0:
every probe said what was so, the answer under way at SIGTERM came whole, and the command ended in its time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KEY = "pod-test-key-0123456789"
# $1 is the folder that only root may pass, $2 one below it that the user needs, $3 the user; the command follows.
NAMESPACES = """
set -euo pipefail
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=1777,size=1g tmpfs /tmp
if [[ -n $1 ]]; then
  mkdir /tmp/kept
  mount --bind "$2" /tmp/kept
  mount -t tmpfs -o mode=755 tmpfs "$1"
  mkdir -p "$2"
  mount --bind /tmp/kept "$2"
  umount /tmp/kept
  rmdir /tmp/kept
fi
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
ip link set lo up
for place in $(awk '{print $5}' /proc/self/mountinfo); do
  case $place in
    /proc* | /sys* | /dev* | /tmp) ;;
    *) ! mountpoint -q "$place" || mount -o remount,bind,ro "$place" ;;
  esac
done
cd /tmp
exec setpriv --reuid "$3" --regid "$3" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
  env --ignore-environment PATH=/usr/local/bin:/usr/bin:/bin HOME=/tmp "${@:4}"
"""


# Goes into the served model: a step takes 50 ms more, so that the answer is under way when SIGTERM comes.
SLOW = """
import time
from trt_build.ort import session

step = session.Session.step


def slow(self, *given):
    time.sleep(0.05)
    return step(self, *given)


session.Session.step = slow
"""


class Pod:
    """The running command. `pid` is its process as this machine sees it."""

    def __init__(self, command: list[str], user: int) -> None:
        needed = Path(sys.base_prefix)
        closed = next((folder for folder in reversed(needed.parents) if not folder.stat().st_mode & 0o001), None)
        words = ["unshare", "--mount", "--pid", "--net", "--fork", "bash", "-c", NAMESPACES, "pod"]
        words += [str(closed or ""), str(needed), str(user), *command]
        self.process = subprocess.Popen(words)
        self.pid = self._child()

    def _child(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.05)
        return int(found[0])

    def curl(self, *words: str, timeout_s: int = 3) -> str:
        """What an address says from within the pod."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "curl", "-s", "-m", str(timeout_s), *words]
        return subprocess.run(inside, capture_output=True, text=True, check=False).stdout

    def status(self, port: int, path: str) -> int:
        return int(self.curl("-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}{path}") or 0)

    def is_read_only(self, folder: str) -> bool:
        """Whether not even root may write there."""
        probe = f"{folder.rstrip('/')}/.moeship-probe"
        inside = ["nsenter", "--target", str(self.pid), "--mount", "sh", "-c", f"touch {probe} && rm {probe}"]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        return done.returncode != 0 and "Read-only" in done.stderr

    def rights(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        named = dict(line.split(":", 1) for line in lines if ":" in line)
        return {name: named[name].split()[0] for name in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs")}


def make_model(work: Path) -> Path:
    """A repository of the trained example, each of whose steps takes 50 ms more."""
    checkpoint, folder = work / "checkpoint", work / "model"
    if not checkpoint.exists():
        merge = ROOT / "examples" / "tiny-phixtral" / "merge.yml"
        subprocess.run([sys.executable, "-m", "cli.main", "merge", merge, checkpoint], cwd=ROOT, check=True)
    build = [
        ROOT / "deploy/docker/build-model.sh",
        checkpoint,
        "phixtral",
        folder,
        "--precision",
        "int4",
        "--method",
        "search",
    ]
    shutil.rmtree(folder / "repository", ignore_errors=True)
    environment = {**os.environ, "MOESHIP_PYTHON": sys.executable, "VERIFY_TOKENS": "0"}
    subprocess.run(build, env=environment, cwd=ROOT, check=True)
    program = folder / "repository/phixtral/1/model.py"
    program.write_text(program.read_text().replace("\nLAST = ", f"{SLOW}\nLAST = "))
    return folder / "repository"


def command_of(container: dict[str, Any], repository: Path, keys: Path) -> list[str]:
    """The container's command, with this machine's moeship, model and keys."""
    first, _, *flags = container["args"]
    flags = [f"--api-keys={keys}" if flag.startswith("--api-keys=") else flag for flag in flags]
    moeship = Path(sys.prefix, "bin", "moeship")
    return [str(moeship), first, str(repository), *flags, "--accept-known-vulnerabilities"]


def wait_for(pod: Pod, probe: dict[str, Any], ports: dict[str, int]) -> float:
    """Probe as the kubelet does until it succeeds; returns the seconds. Raises SystemExit where it gives up."""
    began, asked = time.monotonic(), probe["httpGet"]
    for _ in range(probe["failureThreshold"]):
        if pod.status(ports[asked["port"]], asked["path"]) == 200:
            return time.monotonic() - began
        if pod.process.poll() is not None:
            break
        time.sleep(probe["periodSeconds"])
    raise SystemExit("the startup probe never succeeded")


def main() -> int:
    work = Path(sys.argv[1]).resolve()
    work.mkdir(parents=True, exist_ok=True)
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes/base/server.yaml").read_text())
    spec = deployment["spec"]["template"]["spec"]
    [container] = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    keys = work / "keys.txt"
    keys.write_text(f"{KEY}\n")
    pod = Pod(command_of(container, make_model(work), keys), spec["securityContext"]["runAsUser"])
    try:
        facts = play(pod, container, ports, spec["terminationGracePeriodSeconds"])
    finally:
        pod.process.kill()
    print(json.dumps(facts, indent=2))
    wrong = [name for name, value in facts["so"].items() if not value]
    print("wrong: " + ", ".join(wrong) if wrong else "the pod did as its manifest says")
    return 1 if wrong else 0


def play(pod: Pod, container: dict[str, Any], ports: dict[str, int], grace_s: float) -> dict[str, Any]:
    started_s = wait_for(pod, container["startupProbe"], ports)
    rights = pod.rights()
    read_only = {place: pod.is_read_only(place) for place in ("/", "/usr", sys.prefix, str(ROOT), "/tmp", "/dev/shm")}
    body = {"model": "phixtral", "prompt": "def main(", "max_tokens": 200, "stream": True, "seed": 3,
            "temperature": 1.2, "ignore_eos": True}  # fmt: skip
    completions = f"http://127.0.0.1:{ports['openai']}/v1/completions"
    without_key = pod.status(ports["openai"], "/v1/models")
    answer: list[str] = []
    asked = [completions, "-N", "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"]
    stream = threading.Thread(
        target=lambda: answer.append(pod.curl(*asked, "-d", json.dumps(body), timeout_s=120)), daemon=True
    )
    stream.start()
    running = "moeship_requests_running{"
    while not any(
        line.startswith(running) and line.endswith(" 1")
        for line in pod.curl(f"http://127.0.0.1:{ports['metrics']}/metrics").splitlines()
    ):
        time.sleep(0.2)
    began = time.monotonic()
    time.sleep(container["lifecycle"]["preStop"]["sleep"]["seconds"])
    ready = pod.status(ports["openai"], "/health")  # proxies that do not know yet are still served
    os.kill(pod.pid, signal.SIGTERM)
    draining: list[tuple[int, int]] = []
    while pod.process.poll() is None and time.monotonic() - began < grace_s:
        draining.append((pod.status(ports["http"], "/v2/health/live"), pod.status(ports["openai"], "/health")))
        time.sleep(0.5)
    ended_s = time.monotonic() - began
    stream.join(5)
    text = answer[0] if answer else ""
    return {
        "started_s": round(started_s, 1), "ended_s": round(ended_s, 1), "grace_s": grace_s, "rights": rights,
        "in the drain, live and healthy": " ".join(f"{live}/{healthy}" for live, healthy in draining),
        "so": {
            "the user is the manifest's": rights["Uid"] == "10001",
            "it has no capability and gains none": int(rights["CapEff"], 16) == 0 == int(rights["CapBnd"], 16)
            and rights["NoNewPrivs"] == "1",
            "only /tmp and /dev/shm can be written to": [place for place, is_so in read_only.items() if not is_so]
            == ["/tmp", "/dev/shm"],
            "nobody is served without a key": without_key == 401,
            "it is ready until SIGTERM": ready == 200,
            "it is live while it drains": draining[0][0] == 200,
            "its gateway is not ready while it drains": draining[-1][1] != 200,
            "the answer under way came whole": text.rstrip().endswith("data: [DONE]") and '"error"' not in text,
            "it ended in its time, with status 0": pod.process.returncode == 0 and ended_s < grace_s,
        },
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
