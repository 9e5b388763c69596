"""Many ranks: sharding with FSDP2, sums over ranks.

Every rank works on its share of a batch's rows; losses and gradients are sums over ranks, never means, because each
loss is divided by a count of the whole batch beforehand. Without torchrun there is one rank and all of this is idle.
"""
import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime import LOCAL_WORLD, WORLD


def destroy_process_group():
    """Leave the process group, in step with the others."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


@functools.cache
def own_group():
    """A group of all ranks for what a thread says while the main one trains; asked for by all ranks at once."""
    return dist.new_group(backend="gloo")


def barrier():
    if WORLD > 1:
        dist.barrier()


def shard_model(model, how, device, compute_dtype, shard_ranks=0):
    """Shard every block, and the rest, over the ranks, in place; before weights are read (model on meta).

    how: 'none' (replicas), 'full' (over all ranks) or 'hybrid' (over groups of `shard_ranks`, by default a node's;
    the groups are replicas). Weights are gathered in compute_dtype, gradients are summed in fp32 at least."""
    if how == "none" or WORLD == 1:
        return model
    inside = shard_ranks or LOCAL_WORLD
    mesh = (init_device_mesh(device.type, (WORLD,)) if how == "full" else
            init_device_mesh(device.type, (WORLD // inside, inside), mesh_dim_names=("replicas", "shards")))
    # the rotary tables are inputs of a block and stay in fp32
    policy = MixedPrecisionPolicy(compute_dtype, torch.promote_types(compute_dtype, torch.float32), cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # its parts are needed at both ends
    for block, after in zip(model.layers, model.layers[1:]):  # gather the next block while one computes; backward does anyway
        block.set_modules_to_forward_prefetch([after])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model):
    return isinstance(model, FSDPModule)


def all_reduce(*numbers, device):
    """Sums of numbers over all ranks, as floats; equal on all of them."""
    if WORLD == 1:
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_gradients(parameters, bucket=2 ** 26):
    """Sum the gradients of replicas over all ranks, once a step, in flat buckets of fp32 at least."""
    if WORLD == 1:
        return
    waiting = [p.grad for p in parameters if p.grad is not None]
    while waiting:
        grads, size = [], 0
        while waiting and (not grads or size + waiting[-1].numel() <= bucket):
            grads.append(waiting.pop())
            size += grads[-1].numel()
        flat = torch.cat([g.flatten() for g in grads]).to(torch.promote_types(grads[0].dtype, torch.float32))
        dist.all_reduce(flat)
        for g, total in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(total.view_as(g))


def check_replicas(parameters):
    """Raise ValueError unless all ranks hold the same parameters, as replicas must, by their sum."""
    if WORLD == 1:
        return
    total = torch.stack([p.detach().sum(dtype=torch.float64) for p in parameters]).sum()
    extremes = torch.stack([total, -total])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"replicas drifted apart: their trained weights add up to {-extremes[1].item()} to {extremes[0].item()}")
