#!/usr/bin/env bash
# harness.train through torchrun, from any folder, on all GPUs of one machine:
#     bash launch/torchrun.sh configs/scale.yaml train.epochs=2
# or of several, started on each, NODE_RANK counting from 0, MASTER_ADDR being the machine with NODE_RANK 0:
#     NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 LAUNCH=zero2 bash launch/torchrun.sh configs/scale.yaml --resume auto
# In a Slurm job (slurm.sbatch is easier) srun wants the job's cores again, from Slurm 22.05 on, else all have one:
#     srun --ntasks 1 --cpus-per-task "$SLURM_CPUS_ON_NODE" bash launch/torchrun.sh configs/scale.yaml
# LAUNCH is described in engine.sh. NPROC_PER_NODE (all GPUs), MASTER_PORT (29500), PYTHON (python) are optional.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

processes=${NPROC_PER_NODE:-gpu} # torchrun's word for all of them
if [ "$processes" = gpu ] && ! nvidia-smi -L >/dev/null 2>&1; then
    stop "this machine has no GPU; NPROC_PER_NODE=2 starts two processes on the CPU"
fi
where=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    [ -n "${NODE_RANK:-}" ] || stop "NNODES=$NNODES needs NODE_RANK, from 0 to $((NNODES - 1)) on the machines"
    [ -n "${MASTER_ADDR:-}" ] || stop "NNODES=$NNODES needs MASTER_ADDR, the machine with NODE_RANK=0"
    where=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
    where+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi

# In a session of its own, so that a signal comes to this script alone, which hands it to the run itself: torchrun would
# kill it 30 seconds later, saved or not.
setsid "$python" -m torch.distributed.run "${where[@]}" --nproc_per_node "$processes" -m harness.train "$@" &
torchrun=$!
asked=""
forward() {
    asked=yes
    "$python" - "$torchrun" <<'PY' || true # one that has ended already is no reason to leave the others
import psutil, sys
torchrun = psutil.Process(int(sys.argv[1]))
for process in torchrun.children() or [torchrun]:
    if process.is_running():
        process.terminate()
PY
}
trap forward TERM INT HUP
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends `wait`, not the run
    wait "$torchrun" || true
done
code=0
wait "$torchrun" || code=$? # bash keeps it; the loop may have seen no more than the signal's 128 + number
[ -n "$asked" ] && [ "$code" != 0 ] && code=143
exit "$code"
