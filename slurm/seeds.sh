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

if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
  printf 'slurm/seeds.sh: error: runs as a job array only: sbatch --array=1-10 slurm/seeds.sh\n' >&2
  exit 2
fi
for word in "$@"; do
  case $word in
  --seed | --seed=* | --run_dir | --run_dir=*)
    printf 'slurm/seeds.sh: error: %s is chosen per task of the array: leave it out\n' "${word%%=*}" >&2
    exit 2
    ;;
  esac
done
exec bash "$SLURM_SUBMIT_DIR/slurm/train.sh" "$@" --seed "$SLURM_ARRAY_TASK_ID" \
  --run_dir "runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/seed-$SLURM_ARRAY_TASK_ID"
