#!/usr/bin/env bash
# One run on one or many nodes, with GPUs or without. Submit it from the top of the repository; sbatch's own options come
# first, train.py's behind the script:
#
#   sbatch --nodes=1 --gpus-per-node=8 --exclusive slurm/train.sh --recipe scale
#
# Two minutes before the time limit the run saves a checkpoint and stops, and the job is queued again; there it goes on.
# Exit status: 0 the run is finished, 2 options, data or head node were refused, anything else a failure.
#
# From the environment: PYTHON (default .venv/bin/python), PROCESSES_PER_NODE (default: one per GPU, or one),
# MAX_REQUEUES (default 10), SRUN_OPTIONS (further words for srun). slurm/site.sh is read first if there is one: see
# docs/clusters.md.
#SBATCH --job-name=mnist_fast
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  printf 'slurm/train.sh: error: %s\n' "$1" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "runs under SLURM only: sbatch slurm/train.sh"

# A request to stop is noted. Slurm sends USR1 before the time limit, an administrator perhaps TERM; both reach this script
# alone. Every node's wrapper looks for the file: a signal to the step would reach W&B's and the launcher's processes too.
asked='' STOP_FILE=''
# shellcheck disable=SC2317 # called by the traps
stop() {
  asked=$1
  [[ -z $STOP_FILE ]] || touch "$STOP_FILE" || scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM INT

# The top of the repository: where the job was submitted, or around this script, of which Slurm runs a copy.
own=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's|^ *Command=\(/.*\)/slurm/train\.sh.*|\1|p') || true
for top in "$PWD" "${SLURM_SUBMIT_DIR:-}" "$own" "$(dirname "${BASH_SOURCE[0]}")/.." ''; do
  [[ ! -f $top/train.py || ! -f $top/slurm/node.sh ]] || break
done
[[ -n $top ]] || fail "the repository is neither in $PWD nor around this script: submit from its top, or with --chdir=TOP"
cd "$top"
# shellcheck source=slurm/job.sh
source slurm/job.sh

# Seconds from the job's start to its time limit. Slurm does not tell a job how long before that it warns: what --signal
# replaced this file's 120 by is not seen here.
limit=1000000000
if [[ $JOB =~ StartTime=([0-9T:-]+)\ EndTime=([0-9T:-]+) ]]; then
  limit=$(($(date -d "${BASH_REMATCH[2]}" +%s) - $(date -d "${BASH_REMATCH[1]}" +%s)))
fi
warning=${SBATCH_SIGNAL:-@120}
warning=${warning##*@}
[[ $warning =~ ^[0-9]+$ ]] || warning=60 # Slurm's default
((limit >= warning)) || fail "the time limit of $limit s is shorter than the warning of $warning s before its end: ask for \
a longer --time, or for a later warning with SBATCH_SIGNAL=B:USR1@30 before sbatch, since the job cannot see --signal"

# What train.py would make of its options; a mistake in them ends the job here.
settings=$("$PYTHON" -c '
import sys
from mnist_fast import cli, errors
def main():
    chosen = cli.load()
    print(chosen.dataset, chosen.data_dir or "", chosen.run_dir or "", sep="\n")
    return 0
sys.exit(errors.run_main(main, "train.py"))' "$@") || exit
mapfile -t settings <<<"$settings"
dataset=${settings[0]}
[[ $dataset != auto ]] || fail "--dataset auto: say mnist or digits, so that every node takes the same"
DATA_DIR=${settings[1]:-data/betons/$dataset}
RUN_DIR=${settings[2]:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
mkdir -p "$RUN_DIR" || fail "$RUN_DIR cannot be made: choose another --run_dir"
if [[ ! -f $DATA_DIR/manifest.json ]]; then
  "$PYTHON" -m data_prep --dataset "$dataset" --out "$DATA_DIR" || exit
fi

# The batch script runs on the first node, which is the head: what listens on its ports can be seen here.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
HEAD_ADDRESS=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
getent hosts "${HEAD_ADDRESS:=$head}" >/dev/null || fail "the head node $HEAD_ADDRESS cannot be resolved"
HEAD_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$HEAD_PORT") 2>/dev/null; do HEAD_PORT=$((HEAD_PORT + 1)); done

# Queued again, it goes on from its own checkpoints, whatever --resume said the first time.
if ((${SLURM_RESTART_COUNT:-0})) && compgen -G "$RUN_DIR/checkpoints/step-*" >/dev/null; then
  set -- "$@" --resume auto
fi

if (($(grep -o ' GRES=gpu:[^ (]*' <<<"$JOB" | sort -u | wc -l) > 1)); then
  fail "the nodes give different numbers of GPUs: ask for the same number on every node (--gpus-per-node)"
fi
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
FAILED_FILE=$RUN_DIR/.failed-$SLURM_JOB_ID # the exit status of the first node that failed
rm -f "$FAILED_FILE" "$RUN_DIR/.stop-$SLURM_JOB_ID"
STOP_FILE=$RUN_DIR/.stop-$SLURM_JOB_ID
export DATA_DIR RUN_DIR HEAD_ADDRESS HEAD_PORT PROCESSES_PER_NODE STOP_FILE FAILED_FILE
start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
printf 'job %s on %s: %d nodes with %d processes each, head %s:%d, run folder %s\n' \
  "$start" "$SLURM_JOB_NODELIST" "$SLURM_NNODES" "$PROCESSES_PER_NODE" "$HEAD_ADDRESS" "$HEAD_PORT" "$RUN_DIR"

code=0
if [[ -z $asked ]]; then
  read -r -a more <<<"${SRUN_OPTIONS:-}"
  "${on_every_node[@]}" --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --kill-on-bad-exit=1 --wait=60 \
    "${more[@]}" bash slurm/node.sh "$@" &
  step=$!
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    code=0
    wait "$step" || code=$?
  done
fi
failed=
[[ ! -e $STOP_FILE ]] || : "${asked:=TERM}" # a node was signalled itself, as Slurm does before it preempts a job
[[ ! -e $FAILED_FILE ]] || failed=$(<"$FAILED_FILE")
rm -f "$STOP_FILE" "$FAILED_FILE"
STOP_FILE='' # a request comes too late now

# A launcher's exit status does not tell why it ended; the run's own word does, if it is about this start of the job.
status=$("$PYTHON" -c '
import json, sys
try:
    status = json.load(open(sys.argv[1]))
    print(status["status"] if status["job"] == sys.argv[2] else "unknown")
except (OSError, ValueError, LookupError, TypeError):
    print("unknown")' "$RUN_DIR/status.json" "$start")
printf 'job %s: the run is %s, srun ended with status %d\n' "$start" "$status" "$code"

[[ $status != finished ]] || exit 0
[[ -z $failed ]] || exit "$failed"
# Another way of asking than those above may have reached the run. A job that was cancelled is asked as well.
if [[ -n $asked || $status == stopped ]] && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
  if ((${SLURM_RESTART_COUNT:-0} && limit < 900)) && [[ $asked == USR1 ]] &&
    ! compgen -G "$RUN_DIR/checkpoints/step-*" >/dev/null; then
    fail "warned in two starts before the first step: ask for a longer --time than $limit s, or for a later warning, \
as with --signal=B:USR1@30"
  elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-10})); then
    printf 'job %s: not queued again after %d requeues (MAX_REQUEUES)\n' "$start" "${SLURM_RESTART_COUNT:-0}" >&2
  else
    printf 'job %s: asks Slurm to queue it again\n' "$start"
    ! scontrol requeue "$SLURM_JOB_ID" || sleep 120 # Slurm ends this script before that
  fi
fi
exit $((code ? code : 1))
