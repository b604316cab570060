"""The files under scripts/launch do what they say: accelerate reads the configs, the jobs are started as written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import nursery
from hf_finetune.parallel import holding

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"


@pytest.mark.parametrize(
    ("config", "held"), [("ddp.yaml", "ddp"), ("fsdp.yaml", "fsdp2"), ("deepspeed.yaml", "fsdp2")]
)
def test_accelerate_asks_for_what_the_config_says(
    config: str, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config_file", str(LAUNCH / config), "--num_processes", "4", "scripts/train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == 4
    args.deepspeed_fields_from_accelerate_config = ""  # set where DeepSpeed is installed
    asked = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    for name, value in asked.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    assert holding(4) == held


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "one\\ntwo\\n"; else echo "$@" >> "$SAID/scontrol"; fi',
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done; exit 1',
    "accelerate": """printf '%s\\n' "$@" > "$SAID/node$SLURM_NODEID"
mkdir -p out; printf '{\\n  "status": "%s"\\n}' "$ENDS" > out/run.json""",
}


@pytest.mark.parametrize(("ends", "code"), [("interrupted", 130), ("failed", 1)])
def test_slurm_starts_a_node_each_and_goes_back_in_the_queue(ends: str, code: int, tmp_path: Path) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path), "ENDS": ends, "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "32",
    }  # fmt: skip
    command = [str(LAUNCH / "slurm.sh"), "out", "--recipe", "full", "data=a b"]
    done = subprocess.run(
        command, env=os.environ | given, cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    for node in "01":
        args = (tmp_path / f"node{node}").read_text().splitlines()
        options = dict(zip(args[1:13:2], args[2:14:2], strict=True))
        assert options == {
            "--config_file": "scripts/launch/ddp.yaml", "--num_machines": "2", "--num_processes": "16",
            "--machine_rank": node, "--main_process_ip": "one", "--main_process_port": "24711",
        }  # fmt: skip
        assert args[13:] == [
            "scripts/train.py",
            "--recipe",
            "full",
            "data=a b",
            "--output",
            "out",
            "--resume",
        ]
        launch_command_parser().parse_args(args[1:])
    requeued = tmp_path / "scontrol"
    assert (requeued.exists() and "requeue 4711" in requeued.read_text()) == (ends == "interrupted")


def test_a_job_is_described_as_the_hub_takes_it(tmp_path: Path) -> None:
    hf = Path(sys.executable).with_name("hf")
    if not hf.exists():
        pytest.skip("needs the command `hf`")
    given = {
        "DRY_RUN": "1",
        "HOURS": "4",
        "PATH": f"{hf.parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path),
    }
    command = [str(LAUNCH / "hf_jobs.sh"), "a10g-large", "user/model", "full", "data=user/photos"]
    done = subprocess.run(command, env=os.environ | given, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("flavor   a10g-large", "timeout  4h", "CONFIG=scripts/launch/ddp.yaml", "HF_TOKEN", ":/code:ro",
                 "hf-finetune full data=user/photos 'hub={repo_id: user/model, when: best}' training.max_hours=3.6"):  # fmt: skip
        assert text in done.stdout, done.stdout


def test_the_tables_of_what_a_step_costs_are_what_the_code_says(tmp_path: Path) -> None:
    codes, printed = nursery.run(ROOT / "scripts" / "scale_table.py", "--check", log=tmp_path / "log")
    assert codes == [0], printed[-500:]
