#!/usr/bin/env bash
# The experiments of experiments.md, on drawn shapes: 13 runs with three seeds each, in eight
# minutes on two CPU cores. What a run prints is in RUNS/NAME-seedN.log. Finished runs are kept: if
# you change a line below, delete its runs.
#
#   results/experiments.sh                           # all
#   results/experiments.sh views                     # one
#   RUNS=runs/fp32 FLAGS="--precision fp32" JOBS=1 OMP_NUM_THREADS=2 SEEDS="0 1" results/experiments.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export DATA=${DATA:-data} RUNS=${RUNS:-runs/experiments} FLAGS=${FLAGS:-} PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ $DATA != "~/"* ]] || DATA=$HOME/${DATA:2}
[[ $RUNS != "~/"* ]] || RUNS=$HOME/${RUNS:2}

# A run a line: its experiments, its name, method and flags, and after :: what it changes in the code.
runs="
views,collapse,loss usual simco
views same-colours simco :: common.color_jitter = lambda images, order, factor: images
collapse alignment simco :: common.nn.BatchNorm1d = common.nn.Identity; \
simco.contrastive_loss = lambda positive, negative, args: -positive.mean()
collapse tiny-alpha simco --loss eqco --alpha 1e-6
negatives negatives-1 simco --loss infonce --num-negatives 1
negatives negatives-31 simco --loss infonce
momentum momentum-0 simmoco --moco-m 0
momentum momentum-0.95 simmoco --moco-m 0.95
momentum momentum-0.9999 simmoco --moco-m 0.9999
queue queue-1024 moco_v2 --moco-k 1024 --moco-m 0.95
queue queue-1024-momentum-0 moco_v2 --moco-k 1024 --moco-m 0
queue queue-65536 moco_v2 --moco-k 65536 --moco-m 0.95
loss uniformity simco :: simco.contrastive_loss = lambda positive, negative, args: \
-2 * positive.mean() + (4 * negative).exp().mean().log()
"
runs=$(awk -v wanted="${1:-}" 'NF && (wanted == "" || index("," $1 ",", "," wanted ","))' <<<"$runs")
if [ -z "$runs" ] || [ $# -gt 1 ]; then
  echo "usage: results/experiments.sh [views|collapse|negatives|momentum|queue|loss]" >&2
  exit 2
fi

# one SEED EXPERIMENTS NAME METHOD [FLAGS] [:: CHANGE]
one() {
  local out=$RUNS/$3-seed$1 method=$4 seed=$1 words=${*:5} change="" flags
  [[ $words != *"::"* ]] || change=${words#*:: } words=${words%%::*}
  # Few steps are enough with BatchNorm in the head, a high learning rate and a warm softmax.
  # shellcheck disable=SC2206  # the flags are meant to be split into words
  flags=(--dataset shapes --data "$DATA" --width 8 --stem-padding 1 --head-bn --moco-t 0.4 --lr 0.2
    --batch-size 32 --epochs 4 --knn-every 4 --seed "$seed" --out "$out" $words $FLAGS)
  if [ -n "$change" ]; then
    set -- -c "import common, $method; $change; common.launch($method.main)"
  else
    set -- "$method.py"
  fi
  [ -e "$out" ] || echo "${out##*/}: $PYTHON $1 ${2:+'$2' }${flags[*]}"
  "$PYTHON" "$@" "${flags[@]}" >>"$out.log" 2>&1 || { echo "$out did not finish: see $out.log" >&2; return 1; }
}
export -f one

mkdir -p "$RUNS"
status=0
[ -e "$DATA/shapes.npz" ] || "$PYTHON" results/prepare.py shapes --out "$DATA/shapes.npz"
for seed in ${SEEDS:-0 1 2}; do
  sed "s/^/$seed /" <<<"$runs"
done | xargs -P "${JOBS:-2}" -L 1 bash -euo pipefail -c 'one "$@"' one || status=$?
echo
# shellcheck disable=SC2046  # a word for each name
"$PYTHON" results/experiments.py "$RUNS" $(awk '{print $2}' <<<"$runs")
exit $status
