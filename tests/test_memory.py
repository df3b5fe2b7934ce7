import ctypes
import subprocess
import sys

import pytest
import torch

from glmamba_monai.ops import keep_freed_memory

# Pages that the system has to hand out while the same four maps of 48 MB come and go.
COUNT = """
import resource, sys
import torch
from glmamba_monai.ops import keep_freed_memory

def maps():
    for _ in range(3):
        kept = [torch.ones(12_000_000) for _ in range(4)]
        del kept

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(5):  # until the places of all four have been found
    maps()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
maps()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
ALLOWED = "import ctypes, sys; sys.exit(not (hasattr(m := ctypes.CDLL(None), 'mallopt') and m.mallopt(-3, 2**30)))"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_maps_come_from_memory_that_was_used_before():
    if subprocess.run([sys.executable, "-c", ALLOWED], check=False).returncode:
        pytest.skip("no glibc, or an old one, which keeps smaller maps alone")
    pages = [
        int(subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "give back")
    ]
    assert pages[0] < pages[1] / 10


def test_on_a_gpu_nothing_changes():
    assert keep_freed_memory(torch.device("cuda")) is False


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


@pytest.mark.parametrize(("most", "expected"), [(2**40, [2**30]), (2**25, [2**30, 2**25]), (0, [2**30, 2**25])])
def test_the_threshold_of_trimming_moves_only_with_that_of_mapping(monkeypatch, most, expected):
    """Alone it would hold the other at 128 KB, and every tensor would be mapped anew."""
    asked = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            asked.append((option, value))
            return int(option == -1 or value <= most)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert keep_freed_memory() is (most > 0)
    assert asked == [(-3, value) for value in expected] + [(-1, -1)] * (most > 0)
