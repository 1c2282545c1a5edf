#!/usr/bin/env bash
# The results table: every method at every batch size, with its linear evaluation.
#
#   ./run_all.sh         the fifteen cells: CIFAR-100, 200 epochs
#   ./run_all.sh demo    a first look in minutes, without download: drawn shapes, a narrow network
#
# Stop the script and start it again at will: interrupted runs resume, and what is finished is not
# done again. If a run was begun with other flags, the script stops there and says which.
# These variables narrow or widen it:
#   METHODS="simco" BATCH_SIZES="256 512" SEEDS="0 1 2" EPOCHS=200 DATASET=cifar100 DATA=data \
#     NPROC=8 RUNS=runs PYTHON=python3 ./run_all.sh
# FLAGS and EVAL_FLAGS go to the methods' scripts and to linear_eval.py, as FLAGS="--width 16";
# MOCO_V2_FLAGS and SIMMOCO_FLAGS to one script only.
set -euo pipefail
cd "$(dirname "$0")"

DATA=${DATA:-data}
RUNS=${RUNS:-} # "" stands for runs/demo, or runs
[[ $DATA != "~/"* ]] || DATA=$HOME/${DATA:2}
[[ $RUNS != "~/"* ]] || RUNS=$HOME/${RUNS:2}
case "${*:-table}" in
  table) ;;
  demo)
    [ "${DATASET:-shapes}" = shapes ] || { echo "the demo has no DATASET but shapes" >&2; exit 2; }
    DATASET=shapes BATCH_SIZES=${BATCH_SIZES:-32} EPOCHS=${EPOCHS:-7} RUNS=${RUNS:-runs/demo}
    # A new network gives all images nearly the same query. BatchNorm in the head spreads them, and
    # so few steps need a high learning rate, a key encoder that follows sooner, and a short queue.
    FLAGS="--width 8 --stem-padding 1 --head-bn --moco-t 0.4 --lr 0.2 --knn-every 1 ${FLAGS:-}"
    MOCO_V2_FLAGS="--moco-m 0.95 --moco-k 256 ${MOCO_V2_FLAGS:-}"
    SIMMOCO_FLAGS="--moco-m 0.95 ${SIMMOCO_FLAGS:-}"
    EVAL_FLAGS="--cached --epochs 50 ${EVAL_FLAGS:-}"
    data=$DATA/shapes.npz
    [ -e "$data" ] || ${PYTHON:-python3} results/prepare.py shapes --out "$data"
    ;;
  *)
    echo "usage: ./run_all.sh [demo]   (see the first lines of this file)" >&2
    exit 2
    ;;
esac

METHODS=${METHODS:-moco_v2 simmoco simco}
BATCH_SIZES=${BATCH_SIZES:-64 128 256 512 1024}
SEEDS=${SEEDS:-0}
EPOCHS=${EPOCHS:-200}
DATASET=${DATASET:-cifar100}
NPROC=${NPROC:-1}
RUNS=${RUNS:-runs}
PYTHON=${PYTHON:-python3}

launch=$PYTHON
[ "$NPROC" = 1 ] || launch="$PYTHON -m torch.distributed.run --standalone --nproc_per_node=$NPROC"

total=$(($(wc -w <<<"$SEEDS") * $(wc -w <<<"$METHODS") * $(wc -w <<<"$BATCH_SIZES")))
cell=0 done_here=0

# shellcheck disable=SC2086  # the flags are meant to be split into words
for seed in $SEEDS; do
  for method in $METHODS; do
    own_flags=
    [ "$method" != moco_v2 ] || own_flags=${MOCO_V2_FLAGS:-}
    [ "$method" != simmoco ] || own_flags=${SIMMOCO_FLAGS:-}
    for batch_size in $BATCH_SIZES; do
      out=$RUNS/$method-$DATASET-bs$batch_size-seed$seed
      cell=$((cell + 1))
      left=
      if [ "$done_here" -gt 0 ]; then # as long as those before; SimCo takes longer than the others
        minutes=$((SECONDS * (total - cell + 1) / done_here / 60))
        left=" (about $((minutes / 60)) h $((minutes % 60)) min left)"
      fi
      echo "cell $cell of $total$left: $out"
      if [ -e "$out/result.json" ] && [ ! -e "$out/checkpoint.pth" ]; then
        echo "skipped: it has a result but no checkpoint, so its flags were not compared"
        continue
      fi
      before=$(cat "$out/result.json" 2>/dev/null || true)
      $launch "$method.py" --dataset "$DATASET" --data "$DATA" --epochs "$EPOCHS" \
        --batch-size "$batch_size" --seed "$seed" --out "$out" ${FLAGS:-} $own_flags
      $launch linear_eval.py "$out" ${EVAL_FLAGS:-}
      [ "$before" = "$(cat "$out/result.json")" ] || done_here=$((done_here + 1))
    done
  done
done

if [ "${1:-}" = demo ]; then
  # shellcheck disable=SC2086
  $PYTHON linear_eval.py --untrained "$out" ${EVAL_FLAGS:-} # the floor: the network before training
fi
echo
$PYTHON results/table.py "$RUNS"
