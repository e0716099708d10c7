"""Scripts that stand in for SLURM's commands: `sbatch` runs every task of an array at once on this machine.

STATE/ID is the state of a job, STATE/ID.requeue asks for it to be run again, STATE/submitted lists the arrays.
"""

import os
import sys
from pathlib import Path

SBATCH = """\
import os, re, subprocess, sys
from pathlib import Path
state, script = Path(os.environ["PRETEND_SLURM"]), sys.argv[-1]
text = Path(script).read_text()
with (state / "submitted").open("a") as out:
    out.write(script + "\\n")
number = 1000 + len((state / "submitted").read_text().splitlines())
array = re.search(r"^#SBATCH --array=0-(\\d+)", text, re.M)
for index in range(int(array[1]) + 1) if array else [None]:
    job = f"{number}" if index is None else f"{number}_{index}"
    (state / job).write_text("PENDING")
    told = {"SLURM_JOB_ID": f"{number}", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "here"}
    if index is not None:
        told |= {"SLURM_ARRAY_JOB_ID": f"{number}", "SLURM_ARRAY_TASK_ID": f"{index}"}
        told["SLURM_JOB_ID"] = f"{number + 100 + index}"
    wait = os.environ.get("PRETEND_WAIT", "0")
    loop = f"cd {state}; sleep {wait}; while true; do rm -f {job}.requeue; echo RUNNING > {job}; " \\
           f"bash {script}; [ -e {job}.requeue ] || break; done; echo COMPLETED > {job}"
    subprocess.Popen(["bash", "-c", loop], env=os.environ | told, start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(f"Submitted batch job {number}")
"""
SACCT = """\
import os, re, sys
from pathlib import Path
state = Path(os.environ["PRETEND_SLURM"])
print("JobID|State|NodeList")
for job in sorted(state.iterdir()):
    if re.fullmatch(r"\\d+(_\\d+)?", job.name) and job.name.split("_")[0] in sys.argv:
        print(f"{job.name}|{job.read_text().strip()}|here")
"""
SCONTROL = """\
import os, sys
from pathlib import Path
if sys.argv[1] == "requeue":
    (Path(os.environ["PRETEND_SLURM"]) / f"{sys.argv[2]}.requeue").touch()
else:
    print("here")
"""
SRUN = """\
import os, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command = command[2 if command[0] in ("--output", "--error") else 1 :]
os.execvp(command[0], command)
"""


def install(folder: Path) -> dict[str, str]:
    """Writes the commands, and returns the environment in which they are found."""
    state, commands = folder / "state", folder / "bin"
    state.mkdir()
    commands.mkdir()
    for name, code in (("sbatch", SBATCH), ("sacct", SACCT), ("scontrol", SCONTROL), ("srun", SRUN)):
        (commands / name).write_text(f"#!{sys.executable}\n{code}")
        (commands / name).chmod(0o755)
    return {"PATH": f"{commands}:{os.environ['PATH']}", "PRETEND_SLURM": str(state)}
