#!/usr/bin/env bash
# Trains on several machines without a scheduler. Start the same command on each of them, from the repository's root:
#   HEAD=node1 NODES=2 examples/multi_node/torchrun.sh configs/papers/wang2025.yaml [options of lit-rlvr fit]
# Start it again, on all of them, and the run goes on from its last checkpoint.
set -euo pipefail
config=$1
shift
nodes=${NODES:-1} devices=${DEVICES:-8}
export RUN=${RUN:-runs/multi_node}
# Seconds that a process is given to end its rollout phase when torchrun is told to stop. A phase that takes longer is
# lost and sampled again; `lit-rlvr explain --cluster=2x8xH100` estimates one, and a run's log has time/phase_s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-14100}

resume=()
if [[ -e $RUN/checkpoints/last.ckpt ]]; then
  resume=("--ckpt_path=$RUN/checkpoints/last.ckpt")
fi
exec torchrun --nnodes="$nodes" --nproc-per-node="$devices" --rdzv-backend=c10d --rdzv-id="${JOB:-lit-rlvr}" \
  --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" \
  -m lit_rlvr fit --config "$config" --config examples/multi_node/cluster.yaml \
  --trainer.num_nodes="$nodes" --trainer.devices="$devices" "${resume[@]}" "$@"
