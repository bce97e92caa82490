"""What an import brings along, so that it stays short."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("before", "imported"),
    [("torch", "npg, npg.optim, npg.mirror, npg.transport"), ("torch, stable_baselines3", "agents, envs")],
)
def test_an_import_loads_no_package_beside_ours(before, imported):
    code = (
        f"import sys, {before}; before = set(sys.modules); import {imported}; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"npg", "agents", "envs", "torch", "_remote_module_non_scriptable"}
