"""The launch templates: each is run against stand-ins of its scheduler, or read as its schema."""

import argparse
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml  # Flax needs it, so it is always there

from dsv3_jax.config import Config
from dsv3_jax.overrides import load_config
from dsv3_jax.parallel.pipeline.schedules import make_schedule
from dsv3_jax.train.loop import EXIT_STOPPED
from dsv3_jax.train.schedules import sequences_per_step

LAUNCH = Path(__file__).parents[1] / "tools/launch"

# The fields of a JobSet (v1alpha2), its Jobs and their pods that a template may use; `!` marks
# those that must be there. A list of one schema stands for items that satisfy it.
EXIT_CODES = {"containerName": str, "operator!": ("In", "NotIn"), "values!": [int]}
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value!": str}],
    "ports": [{"containerPort!": int}],
    "resources": {"limits": {"google.com/tpu": int, "nvidia.com/gpu": int}},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
POD = {
    "restartPolicy!": ("Never",),  # a pod failure policy allows no other
    "terminationGracePeriodSeconds": int,
    "hostNetwork": bool,
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator!": str,
        "cloud.google.com/gke-tpu-topology!": str,
    },
    "containers!": [CONTAINER],
    "volumes": [{"name!": str, "persistentVolumeClaim!": {"claimName!": str}}],
}
JOB = {
    "completionMode!": ("Indexed",),
    "parallelism!": int,
    "completions!": int,
    "backoffLimit!": int,
    "podFailurePolicy": {
        "rules!": [{"action!": ("FailJob", "Ignore", "Count"), "onExitCodes!": EXIT_CODES}]
    },
    "template!": {"spec!": POD},
}
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": {
        "name!": str,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec!": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name!": str,
                    "action!": (
                        "FailJobSet",
                        "RestartJobSet",
                        "RestartJobSetAndIgnoreMaxRestarts",
                    ),
                    "onJobFailureReasons": [
                        (
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        )
                    ],
                }
            ],
        },
        "replicatedJobs!": [{"name!": str, "replicas!": int, "template!": {"spec!": JOB}}],
    },
}


def problems(value, schema, where="JobSet") -> list[str]:
    """What does not fit the schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where} is not a table"]
        fields = {name.rstrip("!"): inner for name, inner in schema.items()}
        missing = [name[:-1] for name in schema if name[-1] == "!" and name[:-1] not in value]
        unknown = [name for name in value if name not in fields]
        found = [f"{where} lacks {name}" for name in missing]
        found += [f"{where} has no field {name}" for name in unknown]
        for name in fields:
            if name in value:
                found += problems(value[name], fields[name], f"{where}.{name}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is not a list"]
        return [p for i, item in enumerate(value) for p in problems(item, *schema, f"{where}[{i}]")]
    fits = value in schema if isinstance(schema, tuple) else type(value) is schema
    return [] if fits else [f"{where} is {value!r}"]


def pretrain_config(argv: list[str]) -> Config:
    """The config of a `python -m experiments.pretrain ...`, validated as the experiment does."""
    assert argv[:3] == ["python", "-m", "experiments.pretrain"], argv
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append")
    parser.add_argument("--workdir", required=True)
    arguments = parser.parse_args(argv[3:])
    return load_config(arguments.config, arguments.set)


def check_config(config: Config, devices: int) -> None:
    """The mesh takes every device, and the schedule every batch of the ramp."""
    parallel = config.parallel
    assert config.run.name == "deepseek_v3_671b"
    assert parallel.pipe * parallel.data * parallel.expert == devices
    assert config.data.prepared and config.data.sequences_per_step == 15360
    ramp_tokens = config.data.batch_ramp_fraction * config.total_tokens
    batches = {
        sequences_per_step(config, int(tokens)) for tokens in np.linspace(0, ramp_tokens, 10_000)
    }
    for sequences in batches if parallel.pipe > 1 else ():
        make_schedule(parallel.schedule, parallel.pipe, sequences // config.microbatch_sequences)


def run_template(name: str, tmp_path: Path, stand_ins: dict[str, str], **environment: str):
    """Runs a template with shell scripts in the place of its scheduler's commands."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for command, body in stand_ins.items():
        (folder / command).write_text(f"#!/bin/bash\n{body}\n")
        (folder / command).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / name)],
        env={"PATH": path, "SHARED": str(tmp_path), **environment},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def sbatch_directives() -> dict[str, str]:
    text = (LAUNCH / "slurm.sbatch").read_text()
    pairs = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert len(pairs) == text.count("\n#SBATCH")
    return dict(pairs)


def run_slurm(tmp_path, code: int, **environment: str) -> tuple[list[str], str, int]:
    """Arguments of srun, those of scontrol, and the exit code."""
    stand_ins = {
        "srun": f'printf "%s\\n" "$@" >{tmp_path}/srun; exit {code}',
        "scontrol": f'echo "$@" >{tmp_path}/scontrol',
    }
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    done = run_template("slurm.sbatch", tmp_path, stand_ins, **slurm, **environment)
    assert done.stderr == ""
    requeued = tmp_path / "scontrol"
    told = requeued.read_text().strip() if requeued.exists() else ""
    return (tmp_path / "srun").read_text().splitlines(), told, done.returncode


def test_slurm_asks_for_the_devices_of_its_mesh(tmp_path):
    directives = sbatch_directives()
    arguments, _, _ = run_slurm(tmp_path, 0)
    gpus = int(directives["gpus-per-node"])
    # JAX on Slurm gives each task one device.
    assert int(directives["ntasks-per-node"]) == gpus
    command = arguments[arguments.index("python") :]
    check_config(pretrain_config(command), devices=int(directives["nodes"]) * gpus)


def test_slurm_signals_tasks_in_time_to_save(tmp_path):
    directives = sbatch_directives()
    signal, seconds = directives["signal"].split("@")
    assert signal == "TERM"  # without B: the tasks get it
    assert int(seconds) >= 300
    assert "requeue" in directives and directives["open-mode"] == "append"
    arguments, _, _ = run_slurm(tmp_path, 0)
    (wait,) = [a for a in arguments if a.startswith("--wait=")]
    assert int(wait.partition("=")[2]) >= 300  # the last to write is not killed by the first to end


@pytest.mark.parametrize(
    "code, requeued",
    [(0, False), (2, False), (17, False), (16, True), (EXIT_STOPPED, True), (1, True), (137, True)],
)
def test_slurm_requeues_by_exit_code(tmp_path, code, requeued):
    _, told, returned = run_slurm(tmp_path, code)
    assert told == ("requeue 7" if requeued else "")
    assert returned == code


def test_slurm_gives_up_after_many_failures_but_never_after_a_save(tmp_path):
    (tmp_path / "dsv3-671b.7.failures").write_text("3\n")
    for code, expected in ((1, ""), (EXIT_STOPPED, "requeue 7")):
        _, told, _ = run_slurm(tmp_path, code, MAX_FAILURES="3")
        assert told == expected


def test_slurm_in_a_container(tmp_path):
    arguments, _, _ = run_slurm(tmp_path, 0, CONTAINER="/images/dsv3 jax.sqsh")
    assert "--container-image=/images/dsv3 jax.sqsh" in arguments
    assert f"--container-mounts={tmp_path}" in arguments


def test_slurm_needs_a_shared_folder(tmp_path):
    done = run_template("slurm.sbatch", tmp_path, {}, SHARED="")
    assert done.returncode != 0 and "set SHARED" in done.stderr


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_jobset_has_the_fields_of_a_jobset():
    assert problems(jobset(), JOBSET) == []
    broken = jobset()
    broken["spec"]["failurePolicy"]["maxRestart"] = broken["spec"]["failurePolicy"].pop(
        "maxRestarts"
    )
    del broken["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimit"]
    assert problems(broken, JOBSET) == [
        "JobSet.spec.failurePolicy has no field maxRestart",
        "JobSet.spec.replicatedJobs[0].template.spec lacks backoffLimit",
    ]


def test_jobset_asks_for_the_devices_of_its_mesh():
    (group,) = jobset()["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(int(side) for side in topology.split("x")) == chips
    config = pretrain_config(container["command"] + container["args"])
    check_config(config, devices=group["replicas"] * chips)
    (mount,) = container["volumeMounts"]
    assert mount["name"] == pod["volumes"][0]["name"]
    assert config.data.prepared.startswith(mount["mountPath"] + "/")


def test_jobset_fails_on_a_mistake_and_restarts_whole_on_all_else():
    spec = jobset()["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] > 0
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert pod_rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2, 17]},
    }
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 300


def test_xpk_asks_for_the_devices_of_its_mesh(tmp_path):
    cluster = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "IMAGE": "i"}
    stand_in = {"xpk": f'printf "%s\\n" "$@" >{tmp_path}/xpk'}
    done = run_template("xpk.sh", tmp_path, stand_in, **cluster)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "xpk").read_text().splitlines()
    assert arguments[:2] == ["workload", "create"]
    given = dict(a.partition("=")[::2] for a in arguments[2:])
    cores = int(given["--tpu-type"].removeprefix("v5p-"))
    config = pretrain_config(given["--command"].split())
    check_config(config, devices=int(given["--num-slices"]) * cores // 2)
    assert config.data.prepared == f"{tmp_path}/corpus"
    # Both are needed for exit code 75 to be followed by a restart.
    assert int(given["--max-restarts"]) > 0 and "--restart-on-user-code-failure" in given
    assert int(given["--termination-grace-period-seconds"]) >= 300


def test_xpk_needs_its_cluster(tmp_path):
    done = run_template("xpk.sh", tmp_path, {"xpk": "exit 9"})
    assert done.returncode == 1 and "CLUSTER" in done.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "xpk.sh"])
def test_scripts_parse(name):
    done = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
