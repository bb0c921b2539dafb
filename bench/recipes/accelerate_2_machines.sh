#!/bin/bash
# Two machines of eight GPUs. On each, from the clone, with its number and the address of machine 0:
#
#     bash bench/recipes/accelerate_2_machines.sh 0 10.0.0.1 -c imagenet --data-dir FOLDER -b 8 --experiment NAME
#     bash bench/recipes/accelerate_2_machines.sh 1 10.0.0.1 -c imagenet --data-dir FOLDER -b 8 --experiment NAME
#
# Each machine reads FOLDER on its own disk. Machine 0 writes the run folder. After a failure run both lines again.
set -euo pipefail
rank=$1 address=$2 gpus=${GPUS:-8}
shift 2
exec accelerate launch --multi_gpu --num_machines 2 --machine_rank "$rank" --num_processes $((2 * gpus)) \
    --main_process_ip "$address" --main_process_port "${PORT:-29500}" --mixed_precision no --dynamo_backend no \
    bench/train.py "$@" --require-processes $((2 * gpus)) --resume auto
