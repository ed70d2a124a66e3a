import os

import torch

# CI has two cores, and results must not depend on the machine. Side by side, each worker has one:
# OpenMP threads that outnumber the cores wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
