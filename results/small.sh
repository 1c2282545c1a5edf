#!/usr/bin/env bash
# The small-scale study: the recipe on CIFAR-100, but a narrow network, a fifth of the images and 15
# epochs. 29 runs, each 6 to 15 minutes on one CPU core that has bf16. Finished runs are skipped,
# interrupted ones resume.
#
#   results/small.sh
#   SEEDS="0 1" DATA=data RUNS=runs/small results/small.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1} DATA=${DATA:-data} RUNS=${RUNS:-runs/small}
[[ $DATA != "~/"* ]] || DATA=$HOME/${DATA:2}
[[ $RUNS != "~/"* ]] || RUNS=$HOME/${RUNS:2}

# A run is done if it was evaluated after its last epoch. If its checkpoint is still there, the scripts
# are started nevertheless: they compare the flags, and leave alone what is finished.
is_done() {
  local epochs
  epochs=$(sed -n 's/^ "epochs": \([0-9]*\),*$/\1/p' "$1/args.json" 2>/dev/null) || true
  grep -qs "^ \"epoch\": ${epochs:-none},*$" "$1/result.json"
}

# small SEED METHOD [its own flags]: one run, in a directory named after them
small() {
  local seed=$1 method=$2 name=${*:2}
  shift 2
  name=${name// --/-}
  out=$RUNS/${name// /-}-seed$seed
  if is_done "$out" && [ ! -e "$out/checkpoint.pth" ]; then
    echo "$out: skipped; it has a result but no checkpoint, so its flags were not compared"
    return
  fi
  python3 "$method.py" --dataset cifar100 --data "$DATA" --subset 10000 --width 16 --epochs 15 \
    --knn-every 3 --seed "$seed" --out "$out" "$@"
  python3 linear_eval.py "$out" --cached
}

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

if ! grep -qs '"untrained"' "$RUNS"/*/result.json; then
  python3 linear_eval.py "$out" --untrained --cached # what the network can do before training
fi
echo
python3 results/table.py "$RUNS"
