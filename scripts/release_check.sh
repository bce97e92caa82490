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
needed = ["npg/py.typed", "npg/vision/presets/tuned.yaml", "agents/presets/trpo.yaml", "agents/presets/search.yaml", "agents/cli/train_agent.py"]
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

step "the commands, in the same folder"
export PATH="$work/fresh/bin:$PATH"
for command in "$work"/fresh/bin/npg-*; do
    "$command" --version | grep -q "^npg-toolkit $version, "
    "$command" --help | head -n 1
done
# A console without the signs of the tables, and a reader that leaves, end nothing.
PYTHONIOENCODING=ascii npg-train-agent trpo CartPole-v1 --timesteps 10000 --no-progress --run-dir run | head -n 1
test -s run/last_model.zip && test -s run/final_evaluation.json && test -s run/learning_curve.png
npg-train-agent --resume run --timesteps 20000 --no-progress
npg-evaluate-agent run --episodes 5
npg-export-agent run --format torchscript
npg-train-agent npg CartPole-v1 --timesteps 4000 --seeds 0-1 --no-progress --run-dir seeds
python - <<'PY'
import numpy, pathlib
from PIL import Image
numbers = numpy.random.default_rng(0)
for part, count in (("train", 64), ("test", 16)):
    for name in ("cat", "dog"):
        folder = pathlib.Path("images", part, name)
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)).save(folder / f"{i:02}.png")
PY
npg-train-cifar densenet-basic-10-4 online-ngd --preset report --data images --epochs 1 --batch-size 32 --validation-size 16 \
    --device cpu --run-dir cifar
npg-evaluate-cifar cifar --device cpu
test -z "$(find . -name '*.py')" # nothing of a clone was needed

step "passed"
ls -l "$dist"
