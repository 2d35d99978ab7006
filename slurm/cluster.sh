# shellcheck shell=bash
# Your cluster, in three lines. Edit them, and type `source slurm/cluster.sh` in the shell from which you submit; jobs read them too.
DEEPSCALE_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) && export DEEPSCALE_SLURM

export SBATCH_PARTITION=normal                         # where jobs run; where yours asks for one, add: SBATCH_ACCOUNT=your_project
# shellcheck source=/dev/null
source "$DEEPSCALE_SLURM/../.venv/bin/activate"        # what makes `python` and `deepscale` the right ones; `module load ...` goes here too
export DEEPSCALE_SHARED="$DEEPSCALE_SLURM/../shared"   # a folder that all nodes see: data, compiled ops, the jobs' records and checkpoints
