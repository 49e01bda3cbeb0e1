"""The repository's root on the path, so that `python -m pytest` and `pytest` both find it; one thread a test."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
