#!/usr/bin/env bash
# What slurm/train.sh starts once on each of its nodes, through srun: copies the data to the node's own disk and launches
# the node's processes. Everything but train.py's options comes through the environment.
set -euo pipefail

say() { printf 'node %s: %s\n' "$SLURM_NODEID" "$1" >&2; }

# Ignored here and in all that this starts; only train.py's processes listen to it again. The launcher would die of it and
# leave them behind.
trap '' USR1
# A preempted job's processes get it, and all others' when one node has failed. The launcher's end is waited for.
terminated=
trap 'terminated=1; [[ -e $FAILED_FILE ]] || touch "$STOP_FILE"' TERM

links=$RUN_DIR/.data-$SLURM_JOB_ID-$SLURM_NODEID
for base in "${SLURM_TMPDIR:-}" "${TMPDIR:-}" /tmp; do # another job's may be gone
  [[ ! -d $base || ! -w $base ]] || break
done
local=$base/mnist_fast-$SLURM_JOB_ID-$SLURM_NODEID

# shellcheck disable=SC2317 # called by the trap, on every way out but SIGKILL
leave() {
  code=$?
  rm -rf "$links" "$local"
  ((code == 0)) || [[ -e $STOP_FILE || -e $FAILED_FILE ]] || printf '%d\n' "$code" >"$FAILED_FILE"
}
trap leave EXIT

if [[ -n ${SLURM_GPUS_ON_NODE:-} && $SLURM_GPUS_ON_NODE -lt $PROCESSES_PER_NODE ]]; then
  say "$SLURM_GPUS_ON_NODE GPUs for $PROCESSES_PER_NODE processes: ask for the same number on every node (--gpus-per-node)"
  exit 2
fi

verified() { # verified FOLDER: size and sha256 of its betons are those of its manifest
  "$PYTHON" -c '
import sys
from data_prep.manifest import check
from mnist_fast.errors import run_main
sys.exit(run_main(lambda: bool(check(sys.argv[1])) - 1, "data"))' "$1"
}

# The copies lose their names at once and are reached through this shell's open files. So the kernel frees their space
# when this ends, even by SIGKILL.
stage() {
  rm -rf "$local" "$links" && mkdir -p "$local" "$links" &&
    cp "$DATA_DIR"/{train,test}.beton "$DATA_DIR"/manifest.json "$local" &&
    exec 8<"$local/train.beton" 9<"$local/test.beton" &&
    ln -s "/proc/$$/fd/8" "$links/train.beton" && ln -s "/proc/$$/fd/9" "$links/test.beton" &&
    mv "$local/manifest.json" "$links" && rm -rf "$local" && verified "$links"
}

data=$links
if stage || stage; then # a second time: the copy may have met a busy file server
  say "data copied to $local and verified"
else
  say "data is read from $DATA_DIR: it could not be copied to $local"
  data=$DATA_DIR
fi

mapfile -t lines < <("$PYTHON" slurm/cpus.py "$PROCESSES_PER_NODE")
export CPU_SHARES=${lines[*]:1}
threads=${lines[0]}
if [[ ${SLURM_CPUS_ON_NODE:-1} -lt $PROCESSES_PER_NODE ]]; then
  say "$SLURM_CPUS_ON_NODE CPUs for $PROCESSES_PER_NODE processes is slow: ask for more (--cpus-per-gpu, --cpus-per-task, --exclusive)"
fi
say "$PROCESSES_PER_NODE processes with $threads threads each, on CPUs $CPU_SHARES"

[[ -z $terminated ]] || exit 143
"$PYTHON" -m accelerate.commands.accelerate_cli launch --config_file accelerate_config.yaml --mixed_precision no \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --num_processes $((SLURM_NNODES * PROCESSES_PER_NODE)) \
  --main_process_ip "$HEAD_ADDRESS" --main_process_port "$HEAD_PORT" \
  --no_python slurm/process.sh train.py --threads "$threads" "$@" \
  --data_dir "$data" --run_dir "$RUN_DIR" &
launcher=$!

while kill -0 "$launcher" 2>/dev/null; do
  if found=$(pgrep --parent "$launcher"); then workers=$found; fi
  # Again and again: a process that has just started does not listen yet.
  [[ ! -e $STOP_FILE ]] || pkill -USR1 --parent "$launcher" || true
  sleep 1
done
code=0
wait "$launcher" || code=$?
# The launcher of a single process ends at SIGTERM, before its process has saved a checkpoint.
for ((tenths = 0; tenths < 600; tenths++)); do
  # shellcheck disable=SC2086 # a list of numbers, or nothing
  kill -0 ${workers:-} 2>/dev/null || break
  sleep 0.1
done
exit "$code"
