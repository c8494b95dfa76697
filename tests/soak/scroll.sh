#!/usr/bin/env bash
# A long scroll: bash tests/soak/scroll.sh COLUMNS OUT [sample.py's options]
#
# Prints tiles, seconds and memory each tenth.  A copy of the state taken halfway is continued by
# another process for 10 tiles, and the finished scroll by 1: their tiles must be the same bytes.
set -euo pipefail
columns=$1 out=$2 tile=256 shown=0
sample=(python "$(dirname "$0")/../../sample.py" --steps 2 --classes forest:200,sea:200
        --tile-columns $tile "${@:3}")
tiles() { find "$1" -name 'tile-*' 2>/dev/null | wc -l || true; }
"${sample[@]}" --scroll "$columns" --out "$out" >/dev/null 2>&1 &
while kill -0 $! 2>/dev/null; do
  sleep 1
  done=$(($(tiles "$out") * tile * 10 / columns))
  [ "$done" -gt "$shown" ] && shown=$done || continue
  echo "$(tiles "$out") tiles, $SECONDS s, $(ps -o rss= $! || true) KiB"
  [ "$done" -lt 5 ] || [ -e "$out-half" ] || cp -r "$out" "$out-half"
done
wait $!
half=$(tiles "$out-half")
"${sample[@]}" --scroll $(((half + 10) * tile)) --out "$out-half" --resume >/dev/null 2>&1
"${sample[@]}" --scroll $((columns + tile)) --out "$out" --resume >/dev/null 2>&1
for i in $(seq -f %06g 0 $((half + 8))); do cmp "$out/tile-$i.png" "$out-half/tile-$i.png"; done
echo "$(tiles "$out") tiles: those of both runs are the same, and the finished scroll was continued"
