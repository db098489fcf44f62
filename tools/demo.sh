#!/usr/bin/env bash
# The main job on real text: trains softmax, softmax matched in parameters, and Parallax on the same
# tokens in the same order, and shows how they compare.
#   tools/demo.sh [PATH...]   files and folders of text; by default the Python standard library
# Everything goes to runs/demo/. Another demo replaces what this one made there, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

parallax=build/parallax
out=runs/demo
marker=$out/.made-by-demo
arms=(softmax softmax-matched parallax)
# Eight tenths of a million tokens an arm, scored ten times on the way: all of it ends within five
# minutes on two cores.
settings=(data.path=$out/data train.steps=400 train.eval_every=40 train.eval_batches=4)
# Threads that spin while they wait cost a busy machine most of its speed, and gain an idle one
# little.
export OMP_WAIT_POLICY=passive

fail() {
  echo "demo: $*" >&2
  exit 1
}

# Nothing of an earlier demo goes before this one can start.
check() {
  [ -x $parallax ] || fail "$parallax is not built: run 'make demo', or 'make build' first"
  if [ -e $out ] && [ ! -e $marker ]; then
    fail "$out is there but no demo made it: move it away, then try again"
  fi
  for path in "$@"; do
    [ -e "$path" ] || fail "no file or folder '$path': name text to train on in DATA=..."
  done
}

start_fresh() {
  mkdir -p $out
  touch $marker
  for name in data "${arms[@]}"; do rm -rf "${out:?}/$name"; done
  rm -f $out/report.html
}

# The text: what the caller named, or sources that every machine with Python has.
tokenize() {
  if [ $# -gt 0 ]; then
    echo "== text: $*"
    $parallax tokenize "$@" --out $out/data
  else
    local stdlib
    stdlib=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    echo "== text: the Python standard library in $stdlib"
    $parallax tokenize "$stdlib" --extensions py --val-fraction 0.02 --out $out/data
  fi
}

# train ARM CONFIG
train() {
  echo
  echo "== train $1 ($2)"
  $parallax train --config "$2" --set "${settings[@]}" --out "$out/$1"
}

# Ctrl-C ends the demo, not only the run that saves and exits on it.
trap 'fail "stopped; the runs so far are in $out"' INT TERM

prompt=
[ $# -gt 0 ] || prompt="def "
check "$@"
start_fresh
tokenize "$@"
train softmax configs/tiny-softmax.toml
train softmax-matched configs/tiny-softmax-matched.toml
train parallax configs/tiny.toml
echo
echo "== result"
$parallax report "${arms[@]/#/$out/}" --out $out/report.html --prompt "$prompt"
