# Sourced by torchrun.sh and slurm.sbatch: checks what they share, and tells harness the engine by environment variables,
# as `accelerate launch` does. LAUNCH: multi_gpu (DDP), zero2, zero2_offload or zero3_offload; ZERO_STAGE: another
# stage, with zero2 and zero2_offload.
set -euo pipefail

stop() {
    echo "harness: $*" >&2
    exit 2
}

python=${PYTHON:-python}
installed() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

command -v "$python" >/dev/null || stop "there is no $python: activate harness' environment, or name its PYTHON=..."
installed harness || stop "harness is not installed for $(command -v "$python"): pip install -e '.[mlflow]' in its checkout, or PYTHON=..."
[ "$#" -gt 0 ] || stop "a config is missing, as in configs/scale.yaml"

export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # threads that spin slow their neighbours 100 times
unset ACCELERATE_USE_CPU ACCELERATE_USE_DEEPSPEED                       # LAUNCH alone decides
case ${LAUNCH:=multi_gpu}${ZERO_STAGE:-} in
multi_gpu) ;;
zero2 | zero2[0-3] | zero2_offload | zero2_offload[1-3] | zero3_offload)
    installed deepspeed || stop "LAUNCH=$LAUNCH needs DeepSpeed: pip install -e '.[deepspeed]' in the checkout"
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE="launch/deepspeed/$LAUNCH.json"
    export ACCELERATE_DEEPSPEED_ZERO3_INIT=false ACCELERATE_DEEPSPEED_ZERO_STAGE="${ZERO_STAGE:-${LAUNCH:4:1}}"
    ;;
*)
    stop "LAUNCH=$LAUNCH ${ZERO_STAGE:+with ZERO_STAGE=$ZERO_STAGE}: expected multi_gpu, zero2, zero2_offload or" \
        "zero3_offload, and a stage with zero2 and zero2_offload alone"
    ;;
esac
