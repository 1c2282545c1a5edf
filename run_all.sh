#!/usr/bin/env bash
# The results table: every method at every batch size, each followed by its linear evaluation, and the table at the end.
#
#   ./run_all.sh            the fifteen cells: CIFAR-100, 200 epochs
#   ./run_all.sh demo       a first look in minutes, without download: drawn shapes, a narrow network, a few epochs
#
# What is finished is skipped and what was interrupted goes on, so the script can be stopped and started at will.
# The environment narrows or widens it:
#   METHODS="simco" BATCH_SIZES="256 512" SEEDS="0 1 2" EPOCHS=200 DATASET=cifar100 DATA=data NPROC=8 RUNS=runs ./run_all.sh
# FLAGS and EVAL_FLAGS go as they are to the methods' scripts and to linear_eval.py, for example FLAGS="--width 16".
set -euo pipefail
cd "$(dirname "$0")"

if [ "${1:-}" = demo ]; then
  DATASET=shapes BATCH_SIZES=${BATCH_SIZES:-64} EPOCHS=${EPOCHS:-5} RUNS=${RUNS:-runs/demo}
  # Narrow, and with few steps to go: a high learning rate, and for MoCo v2 a queue that these few steps can fill.
  FLAGS="--width 8 --lr 0.3 ${FLAGS:-}" MOCO_V2_FLAGS="--moco-k 1024" EVAL_FLAGS="--cached --epochs 50 ${EVAL_FLAGS:-}"
elif [ $# -gt 0 ]; then
  echo "usage: ./run_all.sh [demo]   (see the first lines of this file)" >&2
  exit 2
fi

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

for seed in $SEEDS; do
  for method in $METHODS; do
    for batch_size in $BATCH_SIZES; do
      out=$RUNS/$method-$DATASET-bs$batch_size-seed$seed
      if [ -f "$out/result.json" ] && grep -q '^ "linear_top1"' "$out/result.json"; then
        echo "$out: done"
        continue
      fi
      own_flags=
      [ "$method" != moco_v2 ] || own_flags=${MOCO_V2_FLAGS:-}
      # shellcheck disable=SC2086  # the flags are meant to be split into words
      $launch "$method.py" --dataset "$DATASET" --data "$DATA" --epochs "$EPOCHS" --batch-size "$batch_size" \
        --seed "$seed" --out "$out" ${FLAGS:-} $own_flags
      # shellcheck disable=SC2086
      $launch linear_eval.py "$out" ${EVAL_FLAGS:-}
    done
  done
done

if [ "${1:-}" = demo ] && ! grep -q '"untrained"' "$out/result.json"; then
  # shellcheck disable=SC2086
  python linear_eval.py --untrained "$out" ${EVAL_FLAGS:-} # what the same network can do before it has learnt anything
fi
echo
python linear_eval.py --table "$RUNS"
