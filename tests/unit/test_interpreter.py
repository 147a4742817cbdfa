"""The Triton kernels are their references, in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support import python_environment


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
def test_kernels_are_the_references() -> None:
    # In a process of its own: Triton looks at the variable when the kernels are defined.
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = python_environment(TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr[-2000:]
