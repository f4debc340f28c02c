# SPDX-License-Identifier: Apache-2.0
"""A transformer block that Python's parallelize_module divides over two processes: weights, losses, gradients.

    tensor_parallel.py [FOLDER]    writes tensor_parallel.json.gz there, by default beside this script
"""

import os
import shutil
import sys
import tempfile

from same_everywhere import HERE, plain, run_again_without_special_kernels, write

RANKS = 2
STEPS = 5
WORDS, SIZE, HEAD, HIDDEN = 12, 8, 2, 16


def make_net():
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.output = (nn.Linear(SIZE, SIZE) for _ in range(4))

        def forward(self, x):
            def heads(y):
                return y.unflatten(-1, (-1, HEAD)).transpose(1, 2)

            mixed = nn.functional.scaled_dot_product_attention(
                heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), is_causal=True
            )
            return self.output(mixed.transpose(1, 2).flatten(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(WORDS, SIZE)
            self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
            self.attention = Attention()
            self.up, self.down = nn.Linear(SIZE, HIDDEN), nn.Linear(HIDDEN, SIZE)
            self.head = nn.Linear(SIZE, WORDS)

        def forward(self, words):
            x = self.embedding(words)
            x = x + self.attention(self.norm1(x))
            x = x + self.down(torch.relu(self.up(self.norm2(x))))
            return self.head(x)

    torch.manual_seed(8)
    return Net().double()


def run(rank, folder):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def full(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    net = make_net()
    content = {"weights": plain(net.state_dict())}
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(),
        "up": ColwiseParallel(output_layouts=Replicate()),
        "down": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(net, init_device_mesh("cpu", (RANKS,)), plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    words = torch.randint(WORDS, (STEPS, 3, 7), generator=torch.Generator().manual_seed(3))
    content.update(words=plain(words), losses=[])
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = net(words[step, :, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), words[step, :, 1:].flatten())
        loss.backward()
        if step == 0:
            content["gradients"] = plain({name: full(p.grad) for name, p in net.named_parameters()})
        optimizer.step()
        content["losses"].append(plain(loss))
    content["trained"] = plain({name: full(p) for name, p in net.named_parameters()})
    if rank == 0:
        write(os.path.join(folder, "tensor_parallel.json.gz"), content)
    dist.barrier()
    os._exit(0)  # past the end of PyTorch's threads, at which a process sometimes aborts


def main():
    run_again_without_special_kernels()
    import torch.multiprocessing

    target = sys.argv[1] if len(sys.argv) > 1 else HERE
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (folder,), nprocs=RANKS)
        shutil.move(os.path.join(folder, "tensor_parallel.json.gz"), os.path.join(target, "tensor_parallel.json.gz"))


if __name__ == "__main__":
    main()
