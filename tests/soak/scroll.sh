#!/usr/bin/env bash
# A long scroll: its memory and time per column over its length, and whether it is right.
#
#   bash tests/soak/scroll.sh COLUMNS OUT [sample.py's options]
#
# Prints tiles, seconds and MiB each tenth.  A copy of the state taken halfway is continued by
# another process for 10 tiles, and the finished scroll by 1: their tiles must be the same bytes.
set -euo pipefail
columns=$1 out=$2 tile=256
sample=(python "$(dirname "$0")/../../sample.py" --steps 2 --classes forest:200,sea:200
        --tile-columns $tile "${@:3}")
tiles() { ls "$out" 2>/dev/null | grep -c tile || true; }
"${sample[@]}" --scroll "$columns" --out "$out" >/dev/null 2>&1 &
pid=$! begun=$SECONDS shown=0
while kill -0 $pid 2>/dev/null; do
  sleep 1
  done=$(($(tiles) * tile * 10 / columns))
  if [ "$done" -gt "$shown" ]; then
    echo "$(tiles) tiles, $((SECONDS - begun)) s, $(awk '/VmRSS/ {print int($2 / 1024)}' /proc/$pid/status) MiB" || true
    shown=$done
    [ "$done" -lt 5 ] || [ -e "$out-half" ] || cp -r "$out" "$out-half"
  fi
done
wait $pid
half=$(ls "$out-half" | grep -c tile)
"${sample[@]}" --scroll $(((half + 10) * tile)) --out "$out-half" --resume >/dev/null 2>&1
"${sample[@]}" --scroll $((columns + tile)) --out "$out" --resume >/dev/null 2>&1
for i in $(seq 0 $((half + 8))); do
  name=$(printf 'tile-%06d.png' "$i")
  cmp "$out/$name" "$out-half/$name"
done
echo "$(tiles) tiles: those of both runs are the same, and the finished scroll was continued"
