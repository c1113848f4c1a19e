"""Minimum-cost assignment of targets to queries (Hungarian matching), every layer and image at
once, on the device.

Shortest augmenting paths (Jonker and Volgenant 1987; the form of Crouse 2016 that SciPy uses), one
problem a program. Only the columns' dual prices are stored: the row's price is its assigned cost
minus that column's price.
"""

import torch
from torch import Tensor

from kernels.jit import SIZES, jit, next_power_of_2, on_device, tl

MAX_SIZE = 128  # queries or targets that fit one program; see `is_supported`
LIMIT = 1e6  # costs that are not finite count as this much


def is_supported(cost):
    """Whether a problem fits one program: cost [L, B, Q, T]."""
    return max(cost.shape[2:]) <= MAX_SIZE


@jit(do_not_specialize=[*SIZES, "stride_problem"])
def assignment_solve_kernel(
    cost_ptr,  # fp32 [L*B, Q, T], any strides
    counts_ptr,  # int32 [B]
    matched_ptr,  # out: int64 [L*B, T], filled with -1
    bad_ptr,  # out: int8 [L*B]
    B,
    Q,
    T,
    stride_problem,
    stride_q,
    stride_t,
    limit,
    BLOCK_N: tl.constexpr,
):
    """matched = argmin over assignments a of sum over rows i of cost[i, a(i)]; rows are the fewer
    of targets and queries, columns the others. The block owns one problem: BLOCK_N columns, in
    registers.

    Row by row the shortest augmenting path to a free column is found (Dijkstra on the costs less
    the dual prices) and the assignment flipped along it.
    """
    problem = tl.program_id(0)
    count = tl.load(counts_ptr + problem % B)
    swapped = count > Q  # rows are queries
    rows = tl.minimum(count, Q)
    columns = tl.maximum(count, Q)
    stride_row = tl.where(swapped, stride_q, stride_t)
    stride_column = tl.where(swapped, stride_t, stride_q)
    column = tl.arange(0, BLOCK_N)
    inside = column < columns
    base = cost_ptr + problem.to(tl.int64) * stride_problem + column * stride_column
    infinity = float("inf")
    price = tl.zeros((BLOCK_N,), tl.float32)
    owner = tl.full((BLOCK_N,), -1, tl.int32)  # the row of each column
    bad = column < 0
    row = 0
    while row < rows:
        shortest = tl.full((BLOCK_N,), infinity, tl.float32)
        before = tl.full((BLOCK_N,), -1, tl.int32)  # the row from which the path comes
        scanned = column < 0
        here = column < 0  # the column that `current` has
        current = row
        reached = 0.0  # length of the path so far
        sink = -1
        steps = 0
        while (sink < 0) & (steps <= rows):
            c = tl.load(base + current * stride_row, mask=inside, other=0.0)
            bad |= (tl.abs(c) < infinity) == 0  # NaN, too
            c = tl.where(c == c, tl.minimum(tl.maximum(c, -limit), limit), limit)
            own = tl.sum(tl.where(here, c - price, 0.0), 0)  # the row's price; 0 at first
            length = reached + (c - price - own)
            unscanned = inside & (scanned == 0)
            better = unscanned & (length < shortest)
            shortest = tl.where(better, length, shortest)
            before = tl.where(better, current, before)
            open_lengths = tl.where(unscanned, shortest, infinity)
            reached, nearest = tl.min(open_lengths, 0, return_indices=True)
            here = column == nearest
            scanned = scanned | here
            next_row = tl.max(tl.where(here, owner, -1), 0)
            sink = tl.where(next_row < 0, nearest, -1)
            current = tl.where(next_row < 0, current, next_row)
            steps += 1
        price = tl.where(scanned, price - (reached - shortest), price)
        at = sink
        steps = 0
        unfinished = 1
        while (unfinished > 0) & (steps <= rows):
            here = column == at
            source = tl.max(tl.where(here, before, -1), 0)
            at = tl.max(tl.where(owner == source, column, -1), 0)  # where that row was until now
            owner = tl.where(here, source, owner)
            unfinished = tl.where(source == row, 0, 1)
            steps += 1
        row += 1
    target = tl.where(swapped, column, owner)
    query = tl.where(swapped, owner, column)
    out = matched_ptr + problem.to(tl.int64) * T + target
    tl.store(out, query.to(tl.int64), mask=inside & (owner >= 0))
    tl.store(bad_ptr + problem, tl.max(bad.to(tl.int8), 0))


@on_device
def launch(cost, counts):
    """cost [L, B, Q, T], counts [B] -> (query of each target int64 [L, B, T], bool [L, B]: a cost
    was not finite). See `is_supported`.

    -1 where a target is padding (its number is at least the image's count) or has no query because
    there are too few.
    """
    L, B, Q, T = cost.shape
    matched = torch.full((L, B, T), -1, dtype=torch.int64, device=cost.device)
    bad = torch.zeros(L, B, dtype=torch.int8, device=cost.device)
    if cost.numel():
        cost = cost.float().flatten(0, 1)
        assignment_solve_kernel[(L * B,)](
            cost,
            counts.to(cost.device, torch.int32).contiguous(),
            matched,
            bad,
            B,
            Q,
            T,
            *cost.stride(),
            LIMIT,
            BLOCK_N=next_power_of_2(max(Q, T)),
            num_warps=1,
        )
    return matched, bad.bool()


@torch.library.custom_op("zsseg::assignment", mutates_args=(), device_types="cuda")
def assignment(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """See `launch`; no host sync."""
    return launch(cost, counts)


@assignment.register_fake
def _(cost, counts):
    L, B, _, T = cost.shape
    return cost.new_empty(L, B, T, dtype=torch.int64), cost.new_empty(L, B, dtype=torch.bool)
