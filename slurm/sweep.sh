#!/usr/bin/env bash
# W&B agents that work through a sweep, one per task of a job array:
#
#   .venv/bin/wandb sweep sweep.yaml                            # prints the sweep's id
#   sbatch --array=1-8 --gpus-per-node=1 slurm/sweep.sh ENTITY/mnist_fast/ID
#
# An agent asks the server what to try next, so the nodes need the network and a key (WANDB_API_KEY, or wandb login).
#
# From the environment: PYTHON (default .venv/bin/python), RUNS_PER_AGENT (default 1).
#SBATCH --job-name=mnist_sweep
#SBATCH --array=1-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --no-requeue
#SBATCH --output=%x-%A-%a.log
set -euo pipefail

fail() {
  printf 'slurm/sweep.sh: error: %s\n' "$1" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "runs under SLURM only: sbatch slurm/sweep.sh SWEEP"
[[ $# -eq 1 ]] || fail "name one sweep, ENTITY/PROJECT/ID, as wandb sweep prints it"
cd "$SLURM_SUBMIT_DIR"
[[ -f train.py ]] || fail "$PWD is not the top of the repository: submit from there"
if [[ -f slurm/site.sh ]]; then
  set +u # module and conda touch variables that are not set
  # shellcheck source=/dev/null
  source slurm/site.sh
  set -u
fi
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[[ -x $PYTHON ]] || fail "$PYTHON is not there: run make setup, or set PYTHON"
PATH=$(dirname "$PYTHON"):$PATH # the sweep's command says python
export PATH

exec srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "$PYTHON" -m wandb agent --forward-signals --count "${RUNS_PER_AGENT:-1}" "$1"
