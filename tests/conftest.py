import torch

torch.set_num_threads(2)  # CI has two cores, and results must not depend on the machine
