# SPDX-License-Identifier: Apache-2.0
"""Python Lightning Fabric's first training step on two processes, in the same program as the C++ one."""

import logging
import warnings

import torch
from lightning.fabric import Fabric
from torch import nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
optimizer.zero_grad()
fabric.backward(model(torch.ones(32, 64)).mean())
optimizer.step()
if fabric.is_global_zero:
    print("stepped", flush=True)
