#!/usr/bin/env bash
# One training process, started by the launcher of node.sh: bound to its share of the node's CPUs.
set -euo pipefail
read -r -a shares <<<"$CPU_SHARES"
exec taskset --cpu-list "${shares[${LOCAL_RANK:-0}]}" "$PYTHON" -u "$@"
