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
# The top of the repository: where the job was submitted, or around this script, of which Slurm runs a copy.
own=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's|^ *Command=\(/.*\)/slurm/sweep\.sh.*|\1|p') || true
for top in "$PWD" "${SLURM_SUBMIT_DIR:-}" "$own" "$(dirname "${BASH_SOURCE[0]}")/.." ''; do
  [[ ! -f $top/train.py || ! -f $top/slurm/node.sh ]] || break
done
[[ -n $top ]] || fail "the repository is neither in $PWD nor around this script: submit from its top, or with --chdir=TOP"
cd "$top"
# shellcheck source=slurm/job.sh
source slurm/job.sh
PATH=$(dirname "$PYTHON"):$PATH # the sweep's command says python
export PATH

exec "${on_every_node[@]}" --nodes=1 --ntasks=1 \
  "$PYTHON" -m wandb agent --forward-signals --count "${RUNS_PER_AGENT:-1}" "$1"
