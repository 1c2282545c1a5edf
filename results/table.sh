#!/usr/bin/env bash
# The table in miniature, every method at three batch sizes, and then the other runs that
# results/README.md compares: other losses, InfoNCE at twice the learning rate, symmetric variants,
# more seeds, and as many steps at batch size 64 as at 256. All are the recipe on CIFAR-100, but for
# a narrow network, a fifth of the images and 60 epochs (15 for as many steps). There are 33 runs of
# 20 minutes to two hours each, on one CPU core and with up to 6 GB of memory.
# Finished runs are skipped, interrupted ones resume. What a run prints is in RUNS/NAME.log.
#
#   results/table.sh
#   JOBS=2 DATA=data RUNS=results/longer results/table.sh    # only what is not there yet
set -euo pipefail
cd "$(dirname "$0")/.."
export DATA=${DATA:-data} RUNS=${RUNS:-runs/longer} OMP_NUM_THREADS=1
[[ $DATA != "~/"* ]] || DATA=$HOME/${DATA:2}
[[ $RUNS != "~/"* ]] || RUNS=$HOME/${RUNS:2}

# A run a line: seed, method, its own flags. First the table; batch size 256 is the default.
runs=$(
  for batch_size in "" " --batch-size "{1024,64}; do
    for method in simco simmoco moco_v2; do
      echo "0 $method$batch_size"
    done
  done
)
runs+="
0 simco --batch-size 64 --epochs 15
0 simmoco --batch-size 64 --epochs 15
0 moco_v2 --batch-size 64 --epochs 15
0 simco --loss infonce --lr 0.06
0 simmoco --loss infonce --lr 0.06
0 simco --batch-size 64 --loss infonce
0 simco --batch-size 64 --loss infonce --lr 0.06
0 simco --batch-size 64 --loss dcl
1 simco --batch-size 64
1 simco
2 simco
0 simco --loss dcl
1 simco --loss dcl
0 simco --loss infonce
0 simco --dt-m 1
1 simco --dt-m 1
1 simmoco
0 simmoco --loss dcl
1 simmoco --loss dcl
0 simmoco --loss infonce
0 simmoco --symmetric
0 moco_v2 --symmetric --moco-k 4096
0 moco_v2 --moco-k 256
1 moco_v2
"
TOTAL=$(grep -c . <<<"$runs")

# A run is done if it was evaluated after its last epoch. If its checkpoint is still there, the scripts
# are started nevertheless: they compare the flags, and leave alone what is finished.
is_done() {
  local epochs
  epochs=$(sed -n 's/^ "epochs": \([0-9]*\),*$/\1/p' "$1/args.json" 2>/dev/null) || true
  grep -qs "^ \"epoch\": ${epochs:-none},*$" "$1/result.json"
}

how_far() {
  local finished=0 run
  for run in "$RUNS"/*/; do
    ! is_done "$run" || finished=$((finished + 1))
  done
  echo "$finished of $TOTAL runs are done"
}

# one SEED METHOD [FLAGS]: one run, in a directory named after them
one() {
  local seed=$1 method=$2 name=${*:2} out
  shift 2
  name=${name// --/-}
  name=${name// /-}-seed$seed
  out=$RUNS/$name
  if ! is_done "$out"; then
    echo "$name begins"
  elif [ ! -e "$out/checkpoint.pth" ]; then
    return 0
  fi
  {
    python3 "$method.py" --dataset cifar100 --data "$DATA" --subset 10000 --width 16 --epochs 60 \
      --knn-every 6 --seed "$seed" --out "$out" "$@" &&
      python3 linear_eval.py "$out" --cached
  } >>"$out.log" 2>&1 || { echo "$name did not finish: see $out.log" >&2; return 1; }
  echo "$name is done; $(how_far)"
}
export -f one how_far is_done
export TOTAL

# Download the data first, so that runs side by side do not each download it.
python3 -c 'import common, os, simco
args = simco.arguments().parse_args(["--data", os.environ["DATA"]])
common.launch(lambda: common.read_dataset(args))'
mkdir -p "$RUNS"
how_far
status=0
xargs -P "${JOBS:-2}" -L 1 bash -euo pipefail -c 'one "$@"' one <<<"$runs" || status=$?
echo
python3 results/table.py "$RUNS"
exit $status
