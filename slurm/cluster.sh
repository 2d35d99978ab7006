# shellcheck shell=bash
# Your cluster, in three lines. Edit them, and type `source slurm/cluster.sh` in the shell from which you submit; jobs read them too.
DEEPSCALE_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DEEPSCALE_HOME DEEPSCALE_SLURM=$DEEPSCALE_HOME/slurm

# 1. Where jobs run. Where your cluster asks for one, add: SBATCH_ACCOUNT=your_project
export SBATCH_PARTITION=normal
# 2. What makes `python` and `deepscale` the right ones; `module load ...` goes here too.
# shellcheck source=/dev/null
source "$DEEPSCALE_HOME/.venv/bin/activate"
# 3. A folder that all nodes see: data, compiled ops, the jobs' records and checkpoints.
export DEEPSCALE_SHARED=$DEEPSCALE_HOME/shared
