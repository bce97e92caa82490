#!/usr/bin/env bash
# What a release must pass: the archives are built and checked, and the wheel does the README's first things in an empty
# folder of a fresh environment. `scripts/release_check.sh [FOLDER]` leaves the archives in FOLDER (dist/).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dist=$(realpath -m "${1:-$root/dist}")
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH  # a clone on it would count as installed
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "build"
python3 -m venv "$work/build"
"$work/build/bin/pip" install -q build twine
rm -rf "$dist"
"$work/build/bin/python" -m build -q --outdir "$dist" "$root"
"$work/build/bin/twine" check --strict "$dist"/*

step "what is inside"
wheel=$(echo "$dist"/npg_toolkit-*.whl)
"$work/build/bin/python" - "$wheel" <<'PY'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
needed = ["npg/py.typed", "npg/vision/presets/tuned.yaml", "agents/presets/trpo.yaml", "agents/presets/search.yaml"]
missing = [name for name in needed if name not in names]
strangers = [n for n in names if n.split("/")[0] not in ("npg", "agents", "envs") and ".dist-info/" not in n]
assert not missing and not strangers, (missing, strangers)
PY
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
grep -q "^version: $version$" "$root/CITATION.cff" || { echo "CITATION.cff has another version than $version"; exit 1; }
grep -qE "^## \[($version|Unreleased)\]" "$root/CHANGELOG.md" || { echo "CHANGELOG.md lacks $version"; exit 1; }

step "install the wheel"
python3 -m venv "$work/fresh"
"$work/fresh/bin/pip" install -q torch==2.13.0 2>/dev/null || "$work/fresh/bin/pip" install -q torch
"$work/fresh/bin/pip" install -q "$wheel"
"$work/fresh/bin/pip" check

step "the README's first things, in an empty folder"
mkdir "$work/empty" && cd "$work/empty"
"$work/fresh/bin/python" - <<'PY'
import torch
from agents import TRPO
from envs import make_vec_env
from npg import Fisher, conjugate_gradient, families
from npg.optim import NGD

model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
x, y = torch.randn(256, 4), torch.randint(3, (256,))
loss = torch.nn.functional.cross_entropy(model(x), y)
gradient = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, model.parameters()))
assert conjugate_gradient(Fisher(model, x, families.Categorical()), gradient, damping=1e-2).x.isfinite().all()
assert NGD(model, families.Categorical(), lr=1.0, damping=1e-2).step(x, y).accepted
TRPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=4, seed=0), n_steps=64).learn(512)
PY
# The commands of the wheel where it has them, else the clone's.
train="$work/fresh/bin/npg-train-agent"
[ -x "$train" ] || train="$work/fresh/bin/python $root/scripts/train_agent.py"
$train trpo CartPole-v1 --timesteps 10000 --no-progress --run-dir run
test -s run/last_model.zip && test -s run/learning_curve.png

step "passed"
ls -l "$dist"
