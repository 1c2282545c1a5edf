#!/usr/bin/env bash
# The runs of 60 epochs: the recipe on CIFAR-100, but a narrow network and a fifth of the images.
# Each takes 25 to 60 minutes on one CPU core, two at a time. Finished runs are skipped, interrupted
# ones resume; in the end it prints the table.
#
#   results/longer.sh
#   JOBS=2 DATA=data RUNS=results/longer results/longer.sh    # only what is not there yet
set -euo pipefail
cd "$(dirname "$0")/.."
export DATA=${DATA:-data} RUNS=${RUNS:-runs/longer} OMP_NUM_THREADS=1

# A run a line: seed, method, its own flags.
runs="
0 simco --loss dcl
1 simco --loss dcl
2 simco
0 simco --loss infonce
0 simco
1 simco
0 simco --dt-m 1
1 simco --dt-m 1
0 moco_v2
0 moco_v2 --moco-k 256
0 simmoco
0 simmoco --loss dcl
0 simmoco --loss infonce
0 simmoco --symmetric
0 moco_v2 --symmetric --moco-k 4096
0 simmoco --probe both
1 simmoco
1 simmoco --loss dcl
"

# one SEED METHOD [FLAGS]: one run, in a directory named after them
one() {
  local seed=$1 method=$2 name=${*:2}
  shift 2
  name=${name// --/-}
  local out=$RUNS/${name// /-}-seed$seed
  if grep -qs '^ "linear_top1"' "$out/result.json"; then
    echo "$out: done"
    return
  fi
  python3 "$method.py" --dataset cifar100 --data "$DATA" --subset 10000 --width 16 --epochs 60 \
    --knn-every 6 --precision bf16 --seed "$seed" --out "$out" "$@"
  python3 linear_eval.py "$out" --cached
}
export -f one

xargs -P "${JOBS:-2}" -L 1 bash -euo pipefail -c 'one "$@"' one <<<"$runs"
echo
python3 linear_eval.py --table "$RUNS"
