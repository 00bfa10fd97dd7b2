"""How many ranks a deployment needs, and the command that starts them: leader mode or orchestrator mode.

    launch = plan_launch(repository, deployment, world_size=None, multi_model=False)
    launch.command(ranks, num_gpus=2)    # mpirun ... -n 1 tritonserver ... : -n 1 tritonserver ...

Leader mode: one tritonserver for each rank. Rank 0 loads every model and answers clients. The other ranks load only the
model that runs on several GPUs, and listen on no port. Orchestrator mode, for several TensorRT-LLM models in one
server: one tritonserver, which has MPI spawn a worker for each rank of each model. Both modes start the programs as
triton_backend/scripts/launch_triton_server.py of NVIDIA/TensorRT-LLM 1.2 does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.errors import listing
from triton_repo.errors import ServerError
from triton_repo.serving.deployment import Deployment, GpuModel
from trt_build.machine.readings import MPIRUN

# By default Open MPI refuses more ranks than cores, but ranks here need GPUs. It also binds one or two ranks to one
# core each, but a server's threads need all cores (mpirun(1), "Mapping, Ranking, and Binding").
_MPIRUN_OPTIONS = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
_ORCHESTRATOR = {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the ranks of a deployment are started."""

    world_size: int  # ranks; each is one tritonserver
    parallel_models: tuple[str, ...]  # the models that ranks other than 0 load
    orchestrator: bool
    mpirun: Path | None  # None if there is one process and no MPI

    def command(self, ranks: Sequence[Sequence[str]], num_gpus: int) -> list[str]:
        """The command that starts all ranks. `ranks` holds the program and arguments of each rank."""
        servers = [[*arguments, *self._mode_arguments(rank, num_gpus)] for rank, arguments in enumerate(ranks)]
        if self.mpirun is None:
            return servers[0]
        command = [str(self.mpirun), *_MPIRUN_OPTIONS]
        for rank, server in enumerate(servers):
            command += [*([":"] if rank else []), "-n", "1", *server]
        return command

    def _mode_arguments(self, rank: int, num_gpus: int) -> list[str]:
        """The arguments that the mode adds. A rank other than 0 that cannot load its model ends, and MPI then ends the
        others, which would otherwise wait for it for ever. An orchestrator reserves no GPU memory, since its workers
        need it.
        """
        if rank:
            closed = [f"--allow-{endpoint}=false" for endpoint in ("grpc", "http", "metrics")]
            loaded = [f"--load-model={name}" for name in self.parallel_models]
            return ["--exit-on-error=true", *closed, "--model-control-mode=explicit", *loaded]
        if self.orchestrator:
            pools = [f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(num_gpus)]
            return ["--pinned-memory-pool-byte-size=0", "--enable-peer-access=false", *pools]
        return []

    def environment(self) -> dict[str, str]:
        """Environment variables that the mode adds."""
        return dict(_ORCHESTRATOR) if self.orchestrator else {}


def plan_launch(repository: Path, deployment: Deployment, *, world_size: int | None, multi_model: bool) -> Launch:
    """Decide how many ranks there are. `world_size` None takes the number in the repository. `multi_model` asks for an
    orchestrator.

    Raises ServerError for a world size that is not that of the repository, for several models in leader mode if one of
    them needs several ranks, and if mpirun is needed and absent.
    """
    models = deployment.ranked
    ranks = 1 if multi_model else world_size or max((model.world_size or 1 for model in models), default=1)
    problems = list(_orchestrator_problems(models, world_size) if multi_model else _leader_problems(models, world_size))
    if not multi_model and len(models) > 1 and ranks > 1:
        names = ", ".join(model.name for model in models)
        problems.append(f"{names} all run on TensorRT-LLM, on up to {ranks} ranks; serve them with --multi-model")
    needs_mpirun = ranks > 1 or multi_model
    problems += [
        f"{model.name} runs on TensorRT-LLM's LLM API, which starts its own processes and cannot do so under mpirun; "
        "serve it from a repository of its own"
        for model in deployment.gpu_models
        if model.spawns and needs_mpirun
    ]
    found = shutil.which(MPIRUN) if needs_mpirun else None
    if found is None and needs_mpirun and not problems:
        problems.append(
            f"{'an orchestrator' if multi_model else f'{ranks} ranks'} cannot be started: no {MPIRUN} on PATH; install "
            "Open MPI, or serve in NVIDIA's container, which has it"
        )
    if problems:
        raise ServerError(f"serving {repository}:{listing(problems)}")
    return Launch(
        world_size=ranks,
        parallel_models=tuple(model.name for model in models) if ranks > 1 else (),
        orchestrator=multi_model,
        mpirun=Path(found) if found else None,
    )


def _orchestrator_problems(models: Sequence[GpuModel], asked: int | None) -> Iterator[str]:
    if asked not in (None, 1):
        yield f"a world size of {asked} was asked for, and an orchestrator is one process; leave the number out"
    if not models:
        yield "an orchestrator was asked for, and no model here runs an engine of TensorRT-LLM; leave it out"


def _leader_problems(models: Sequence[GpuModel], asked: int | None) -> Iterator[str]:
    if asked is None:
        return
    if asked < 1:
        yield f"the world size is {asked}, expected 1 or more"
    if asked > 1 and not models:
        yield f"{asked} ranks were asked for, and no model here runs an engine of TensorRT-LLM; leave the number out"
    for model in models:
        if model.world_size not in (None, asked):
            yield f"{asked} ranks were asked for, and {model.name} is made for {model.world_size}; leave the number out"
