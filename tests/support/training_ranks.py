"""One process of a data-parallel training step with trainable attention, on the CPU.

    python training_ranks.py ddp|fsdp RANK FOLDER

Rank 0 writes the gradients to FOLDER/gradients.pt; the ranks find each other by a file in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sage_kernels.training import emulated_attention

RANKS, TOKENS, WIDTH, HEADS = 2, 40, 32, 2


class Block(nn.Module):
    """Projections around attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        return self.out(emulated_attention(q, k, v, is_causal=True, layout="BNHD").flatten(2))


def make_model_and_data():
    """The same in every process: the model, and a batch with one sample for each rank."""
    torch.manual_seed(0)
    return Block(), torch.randn(RANKS, TOKENS, WIDTH)


def main():
    kind, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=RANKS)
    model, batch = make_model_and_data()
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 only recent torch has it

        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    wrapped(batch[rank : rank + 1]).square().mean().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
