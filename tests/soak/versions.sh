#!/usr/bin/env bash
# A row of the table of versions in docs/reliability.md: equimini from a wheel in a new environment.
#
#   bash tests/soak/versions.sh python3.10 torch==2.6.0 pillow==10.1.0 numpy==1.21.6
#
# A wheel (FROM=sdist: made from a source archive) beside these packages; from another folder the
# Python interface, every command's --help, the three scripts by path, and TESTS (pytest's words).
# EQUIMINI_BUILD, EQUIMINI_MARCH and CXX choose the build; WORK stays, and is tested again if there.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONPATH= work=${WORK:-$(mktemp -d)}
tests() {
  . "$work/venv/bin/activate" && cd "$work/beside"
  python -m pytest -q -p no:cacheprovider ${TESTS:-tests/method tests/kernel tests/sampling}
}
if [ -d "$work/beside" ]; then tests; exit; fi
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
"$1" -m venv "$work/venv"
. "$work/venv/bin/activate"
pip install -q "${@:2}" "setuptools>=77" wheel ninja
pip freeze | grep -iE "^(torch|numpy|pillow)==" >"$work/asked.txt"
mkdir -p "$work/source" "$work/beside"
git -C "$root" archive HEAD | tar -x -C "$work/source"
cd "$work/source"
cp -r tests csrc docs findings *.py *.md pyproject.toml "$work/beside"
if [ "${FROM:-wheel}" = sdist ]; then
  python setup.py -q sdist -d "$work/sdist" >/dev/null
  cd "$work" && rm -r source
fi
pip wheel -q --no-build-isolation --no-deps -w "$work" $(ls sdist/*.tar.gz 2>/dev/null || echo .)
pip install -q -c "$work/asked.txt" "$(ls "$work"/equimini-*.whl)[test]"  # pytest, matplotlib, …
cd "$work/beside"
python -m equimini.show versions
python -c 'from equimini import load_generator
print("pictures", tuple(load_generator("scenes").sample([0], steps=1, columns=4).shape))'
for name in show bench evaluate convert experiments page training.cache_latents convert.pack; do
  python -m equimini.$name --help >/dev/null || echo "equimini.$name --help fails"
done
small="--steps 2 --batch-size 2 --val-images 2 --workers 0"
python train_tokenizer.py $small --stats-images 2 >/dev/null 2>&1
python train_generator.py $small --preview-steps 1 >/dev/null 2>&1
python sample.py --checkpoint runs/generator/last.pt --steps 1 >/dev/null 2>&1
echo "three scripts: right"
tests
