#!/usr/bin/env bash
# The same run with several seeds, one per task of a job array; everything else as in slurm/train.sh:
#
#   sbatch --array=1-10 --gpus-per-node=1 slurm/seeds.sh --recipe fast
#
# The runs lie in runs/JOBNAME-ARRAYID/seed-N.
#SBATCH --job-name=mnist_seeds
#SBATCH --array=1-10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  printf 'slurm/seeds.sh: error: %s\n' "$1" >&2
  exit 2
}

[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "runs as a job array only: sbatch --array=1-10 slurm/seeds.sh"
for word in "$@"; do
  case $word in
  --seed | --seed=* | --run_dir | --run_dir=*) fail "${word%%=*} is chosen per task of the array: leave it out" ;;
  esac
done

# The top of the repository: where the job was submitted, or around this script, of which Slurm runs a copy.
own=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's|^ *Command=\(/.*\)/slurm/seeds\.sh.*|\1|p') || true
for top in "$PWD" "${SLURM_SUBMIT_DIR:-}" "$own" "$(dirname "${BASH_SOURCE[0]}")/.." ''; do
  [[ ! -f $top/train.py || ! -f $top/slurm/node.sh ]] || break
done
[[ -n $top ]] || fail "the repository is neither in $PWD nor around this script: submit from its top, or with --chdir=TOP"
cd "$top"
exec bash slurm/train.sh "$@" --seed "$SLURM_ARRAY_TASK_ID" \
  --run_dir "runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/seed-$SLURM_ARRAY_TASK_ID"
