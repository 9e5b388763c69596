"""
Many ranks: sharding with FSDP2, sums over ranks.

    4 ranks       rank 0        rank 1        rank 2        rank 3
    none          all           all           all           all          replicas
    full          quarter 1     quarter 2     quarter 3     quarter 4    of every block
    hybrid        half 1        half 2        half 1        half 2       shard_ranks=2: two replicas

Every rank works on its share of a batch's rows. Losses and gradients are sums over ranks, never
means, because each loss is divided by a count of the whole batch beforehand. Without torchrun there
is one rank, and all of this does nothing.
"""
import functools

import torch
import torch.distributed as dist

from runtime import LOCAL_WORLD, WORLD


def destroy_process_group():
    """Leave the process group, once all ranks have come here."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


@functools.cache
def gloo_group():
    """A second group of all ranks: a thread saves over it while the main one trains.

    Made at the first call, which all ranks must make together."""
    return dist.new_group(backend="gloo")


def barrier():
    """Wait for all ranks."""
    if WORLD > 1:
        dist.barrier()


def shard_model(model, how, device, compute_dtype, shard_ranks=0):
    """Shard every block, and the rest, over the ranks, in place; before weights are read.

    how: 'none' (replicas), 'full' (over all ranks) or 'hybrid' (over groups of `shard_ranks`, by
    default a node's; the groups are replicas). Weights are gathered in compute_dtype, gradients are
    summed in fp32 at least."""
    if how == "none" or WORLD == 1:
        return model
    # imported where it is used: it takes as long as torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    if how == "full":
        mesh = init_device_mesh(device.type, (WORLD,))
    else:
        group = shard_ranks or LOCAL_WORLD
        names = ("replicas", "shards")
        mesh = init_device_mesh(device.type, (WORLD // group, group), mesh_dim_names=names)

    # the rotary tables are inputs of a block and stay in fp32
    reduce_dtype = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # what is outside the blocks stays gathered: it is needed at both ends of a forward pass
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # gather the next block while one computes; the backward pass does so by itself
    for block, next_block in zip(model.layers, model.layers[1:]):
        block.set_modules_to_forward_prefetch([next_block])
    # sum gradients instead of averaging them
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model):
    """Whether shard_model has sharded it: FSDP adds methods to the class of a module."""
    return hasattr(model, "reshard")


def all_reduce(*numbers, device):
    """Sums of numbers over all ranks, as floats; equal on all of them."""
    if WORLD == 1:
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_gradients(parameters, bucket=2 ** 26):
    """Sum the gradients of replicas over all ranks, in flat buckets of fp32 at least."""
    if WORLD == 1:
        return
    waiting = [p.grad for p in parameters if p.grad is not None]
    while waiting:
        # fill a bucket
        grads = [waiting.pop()]
        size = grads[0].numel()
        while waiting and size + waiting[-1].numel() <= bucket:
            grads.append(waiting.pop())
            size += grads[-1].numel()
        # one sum over ranks, then back to where the parts came from
        flat = torch.cat([grad.flatten() for grad in grads])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        dist.all_reduce(flat)
        sums = flat.split([grad.numel() for grad in grads])
        for grad, total in zip(grads, sums):
            grad.copy_(total.view_as(grad))


def check_replicas(parameters):
    """Raise ValueError unless all ranks hold the same parameters, judged by their sum."""
    if WORLD == 1:
        return
    sums = [p.detach().sum(dtype=torch.float64) for p in parameters]
    total = torch.stack(sums).sum()
    extremes = torch.stack([total, -total])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes[0], -extremes[1]
    if largest != smallest:
        raise ValueError("replicas drifted apart: their trained weights add up to "
                         f"{smallest.item()} to {largest.item()}")
