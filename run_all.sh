#!/usr/bin/env bash
# The results table: every method at every batch size, each followed by its linear evaluation, and the table at the end.
#
#   ./run_all.sh            the fifteen cells: CIFAR-100, 200 epochs
#   ./run_all.sh demo       a first look in minutes, without download: drawn shapes, a narrow network, a few epochs
#   ./run_all.sh small      the small-scale study, on CIFAR-100: a narrow network, a fifth of the images, 15 epochs; hours
#
# What is finished is skipped and what was interrupted goes on, so the script can be stopped and started at will.
# The environment narrows or widens it:
#   METHODS="simco" BATCH_SIZES="256 512" SEEDS="0 1 2" EPOCHS=200 DATASET=cifar100 DATA=data NPROC=8 RUNS=runs ./run_all.sh
# FLAGS and EVAL_FLAGS go as they are to the methods' scripts and to linear_eval.py, for example FLAGS="--width 16".
set -euo pipefail
cd "$(dirname "$0")"

case ${1:-table} in
  table) ;;
  demo)
    DATASET=shapes BATCH_SIZES=${BATCH_SIZES:-64} EPOCHS=${EPOCHS:-5} RUNS=${RUNS:-runs/demo}
    # Narrow, and with few steps to go: a high learning rate, and for MoCo v2 a queue that these few steps can fill.
    FLAGS="--width 8 --lr 0.3 ${FLAGS:-}" MOCO_V2_FLAGS="--moco-k 1024" EVAL_FLAGS="--cached --epochs 50 ${EVAL_FLAGS:-}"
    ;;
  small)
    # The recipe, but for what makes it take a quarter of an hour on one CPU core.
    EPOCHS=15 RUNS=${RUNS:-runs/small} SEEDS=${SEEDS:-0 1} EVAL_FLAGS="--cached ${EVAL_FLAGS:-}"
    FLAGS="--subset 10000 --width 16 --knn-every 3 --precision bf16 ${FLAGS:-}"
    ;;
  *)
    echo "usage: ./run_all.sh [demo | small]   (see the first lines of this file)" >&2
    exit 2
    ;;
esac

METHODS=${METHODS:-moco_v2 simmoco simco}
BATCH_SIZES=${BATCH_SIZES:-64 128 256 512 1024}
SEEDS=${SEEDS:-0}
EPOCHS=${EPOCHS:-200}
DATASET=${DATASET:-cifar100}
DATA=${DATA:-data}
NPROC=${NPROC:-1}
RUNS=${RUNS:-runs}

launch=python
[ "$NPROC" = 1 ] || launch="torchrun --standalone --nproc_per_node=$NPROC"

# One cell, unless it is done: cell DIRECTORY BATCH_SIZE SEED METHOD [its own flags]
# shellcheck disable=SC2086  # the flags are meant to be split into words
cell() {
  local batch_size=$2 seed=$3 method=$4
  out=$1
  shift 4
  if [ -f "$out/result.json" ] && grep -q '^ "linear_top1"' "$out/result.json"; then
    echo "$out: done"
    return
  fi
  $launch "$method.py" --dataset "$DATASET" --data "$DATA" --epochs "$EPOCHS" --batch-size "$batch_size" \
    --seed "$seed" --out "$out" ${FLAGS:-} "$@"
  $launch linear_eval.py "$out" ${EVAL_FLAGS:-}
}

# A cell of the small-scale study: small SEED METHOD [its own flags], in a directory named after them.
small() {
  local seed=$1 name=${*:2}
  name=${name// --/-}
  cell "$RUNS/${name// /-}-seed$seed" 256 "$@"
}

if [ "${1:-}" = small ]; then
  for seed in $SEEDS; do
    small "$seed" simco
    small "$seed" simco --dt-m 1 # InfoNCE
    for method in moco_v2 simmoco; do # what symmetry alone does
      small "$seed" $method
      small "$seed" $method --symmetric
    done
    small "$seed" simmoco --symmetric --moco-m 0 # SimCo, but for the gradient through the keys
    # SiMo's claim: few negatives are enough if they count as many
    small "$seed" simmoco --loss infonce --num-negatives 16
    small "$seed" simmoco --loss eqco --alpha 256 --num-negatives 16
  done
  small 0 simmoco --loss infonce --num-negatives 255
  small 0 simmoco --loss eqco --alpha 256 --num-negatives 255
  for dt_m in 3 30; do # temperature: 10 is the default
    small 0 simco --dt-m $dt_m
  done
  for moco_k in 256 4096; do # dictionary size: 65536 is the default, and there EqCo is InfoNCE
    small 0 moco_v2 --moco-k $moco_k
    small 0 moco_v2 --moco-k $moco_k --loss eqco --alpha 65536
    small 0 moco_v2 --moco-k $moco_k --loss dual
  done
  small 0 moco_v2 --loss dual
else
  for seed in $SEEDS; do
    for method in $METHODS; do
      for batch_size in $BATCH_SIZES; do
        own_flags=
        [ "$method" != moco_v2 ] || own_flags=${MOCO_V2_FLAGS:-}
        # shellcheck disable=SC2086
        cell "$RUNS/$method-$DATASET-bs$batch_size-seed$seed" "$batch_size" "$seed" "$method" $own_flags
      done
    done
  done
fi

if [ $# -gt 0 ] && ! grep -qs '"untrained"' "$RUNS"/*/result.json; then
  # shellcheck disable=SC2086
  python linear_eval.py --untrained "$out" ${EVAL_FLAGS:-} # what the same network can do before it has learnt anything
fi
echo
python linear_eval.py --table "$RUNS"
