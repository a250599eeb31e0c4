# shellcheck shell=bash
set -euo pipefail
# Read by train.sh, seeds.sh and sweep.sh at the top of the repository: makes the job's environment the same, however and
# from wherever it was submitted, and reads slurm/site.sh. They define fail().

# What Slurm knows about the job; a variable of the same meaning may come from the job that submitted this one.
JOB=$(SLURM_TIME_FORMAT=standard scontrol show --details job "$SLURM_JOB_ID" 2>/dev/null) || JOB=
[[ ! $JOB =~ Restarts=([0-9]+) ]] || export SLURM_RESTART_COUNT=${BASH_REMATCH[1]}
[[ -z $JOB || $JOB == *ArrayTaskId=* ]] || unset "${!SLURM_ARRAY_@}"
gpus=' GRES=gpu:([^ (]*:)?([0-9]+)' # of a node
if [[ $JOB =~ $gpus ]]; then
  : "${SLURM_GPUS_ON_NODE:=${BASH_REMATCH[2]}}" # not set in salloc's shell
elif [[ -n $JOB && $JOB != *gpu* ]]; then
  unset SLURM_GPUS_ON_NODE CUDA_VISIBLE_DEVICES
fi

# Submitted from a step, salloc or a notebook on a node, a job inherits that one's options for srun (CPU and memory
# binding, memory, tasks) and its launcher's variables. srun would obey the first, accelerate the second.
for name in "${!SLURM_@}" "${!SRUN_@}" "${!PMI_@}" "${!PMIX_@}" "${!OMPI_COMM_@}" "${!MV2_COMM_@}" "${!MPI_LOCAL@}"; do
  case $name in
  SRUN_OPTIONS) ;;
  SLURM_CONF* | SLURM_JWT | SLURM_CLUSTER_NAME | SLURM_SPANK_* | SLURM_TMPDIR) ;;
  SLURM_JOB_* | SLURM_JOBID | SLURM_SUBMIT_* | SLURM_ARRAY_* | SLURM_RESTART_COUNT) ;;
  SLURM_NNODES | SLURM_NODELIST | SLURM_CPUS_ON_NODE | SLURM_GPUS_ON_NODE) ;;
  *) unset "$name" ;;
  esac
done
unset "${!TORCHELASTIC_@}" RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT

if [[ -f slurm/site.sh ]]; then
  set +u # module and conda touch variables that are not set
  # shellcheck source=/dev/null
  source slurm/site.sh
  set -u
fi
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[[ -x $PYTHON ]] || fail "$PYTHON is not there: run make setup, or set PYTHON"

# sbatch --export=NAME=value and SBATCH_EXPORT=NONE leave the job without the submitting shell's PATH.
export PATH
command -v srun >/dev/null || PATH=$PATH:$(bash -lc 'printf %s "$PATH"' 2>/dev/null)
command -v srun >/dev/null || fail "srun is not in PATH: add its folder to PATH in slurm/site.sh"

# One task per node, with all CPUs and GPUs that the job has there: --cpus-per-task would leave it a part, and without --gres
# those that --exclusive brought are kept from it. The step takes this environment whatever sbatch was told to export, and
# shares the job with a step that it was started from.
# shellcheck disable=SC2034 # for the scripts that read this
on_every_node=(srun --ntasks-per-node=1 --export=ALL --overlap --mpi=none)
[[ -z ${SLURM_GPUS_ON_NODE:-} ]] || on_every_node+=(--gres="gpu:$SLURM_GPUS_ON_NODE")
