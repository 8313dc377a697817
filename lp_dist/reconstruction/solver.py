"""How the survivors of a layer move when others of its weights are removed.

A linear layer computes `X·Wᵀ` from inputs X (tokens, inputs). A row w of W loses the weights `r`, and its survivors
move by d, which is zero elsewhere, so that the outputs change least:

    min over d   ‖X·(d − r)‖² + δ·‖d‖²        so   M·(G + δ)·d = M·G·r        G = XᵀX,  M: the survivors

This is the layer-wise problem of Optimal Brain Surgeon (Hassibi and Stork 1993) with its masks given, as in SparseGPT
(arXiv 2301.00774), solved for all rows at once: by conjugate gradients in the space of the survivors, with the
diagonal of G as the preconditioner. No matrix is factorized, and a row needs nothing of another one.

A removed weight may be kept as a latent one, which returns to the model when it has grown. Then only what the
survivors have not taken over of it may return, else it would count twice: the value that would be best for it in the
place of zero, with the others as they are now. That is 0 where it is all taken over, and the weight itself where its
input goes with no other one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Iterations of the conjugate gradients. With 30 the outputs are nearer by less than a hundredth.
ITERATIONS = 12
# δ as a share of the mean of G's diagonal, where inputs are known from any number of tokens: what hardly ever comes is
# not moved along.
DAMPING = 0.01


def damping_for(gram: Tensor, block_squares: float, block_share: float) -> float:
    """δ as a share of the mean of G's diagonal, for how well the tokens tell how inputs go together.

    Few tokens say little of it, and survivors that follow their chance correlations do harm. So G is shrunk to a
    multiple of the identity, (1 − ρ)·G + ρ·mean(diag G)·I, which is a damping of ρ/(1 − ρ). ρ is that of Ledoit and
    Wolf (2004, A well-conditioned estimator for large-dimensional covariance matrices): the variance of G over its
    squared distance to the identity's multiple. The variance is taken between blocks of neighbouring tokens and not
    between tokens, since the tokens of a text are alike.

    Args:
        gram: XᵀX, (inputs, inputs) fp32.
        block_squares: Σ‖G_b‖² over the blocks of tokens, whose sum G is.
        block_share: Σ(n_b/n)² of the blocks' tokens; 1 for a single block.
    Returns:
        At least `DAMPING`; inf where G says nothing.
    """
    trace, squares = float(gram.trace()), float(torch.linalg.vector_norm(gram)) ** 2
    apart = squares - trace**2 / len(gram)
    variance = block_squares - block_share * squares
    # Of a single block, or of inputs that are all zero, nothing is known. (Rounding leaves some 1e-7 of the squares.)
    if block_share >= 1.0 or apart <= 1e-6 * squares:
        return math.inf
    rho = max(0.0, variance / ((1.0 - block_share) * apart))
    return DAMPING + rho / (1.0 - rho) if rho < 1.0 else math.inf


@torch.no_grad()
def move_survivors(
    before: Tensor,
    after: Tensor,
    gram: Tensor,
    iterations: int = ITERATIONS,
    damping: float = DAMPING,
    remainders: bool = False,
) -> Tensor:
    """The weights that are left after some were removed, moved so that the layer's outputs change least.

    Args:
        before: (rows, inputs) fp32, the weights before.
        after: the same with zeros where weights are removed. What is zero in it stays zero.
        gram: XᵀX of the layer's inputs, (inputs, inputs) fp32; any multiple of it gives the same.
        iterations: of the conjugate gradients.
        damping: δ, as a share of the mean of the diagonal of `gram`; inf: nothing moves.
        remainders: whether what is not taken over is returned in the places of the removed weights, instead of zeros:
            between 0 and what they were.
    Returns:
        (rows, inputs) fp32, new. It is `after` in rows that lose nothing, where all inputs were zero, or that have no
        survivors. A survivor that would come to be zero stays where it was.
    """
    if damping == math.inf:
        return before.clone() if remainders else after.clone()
    survives = after != 0
    diagonal = gram.diagonal()
    delta = damping * diagonal.mean()
    preconditioner = torch.where(diagonal + delta > 0, diagonal + delta, 1.0).reciprocal()
    move = torch.zeros_like(after)
    residual = (before - after).mm(gram).mul_(survives)
    direction = residual * preconditioner
    decline = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        product = direction.mm(gram).add_(direction, alpha=float(delta)).mul_(survives)
        curvature = (direction * product).sum(1, keepdim=True)
        # 0 where a row is solved.
        step = torch.where(curvature > 0, decline / curvature, 0.0)
        move.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1.0)
        scaled = residual * preconditioner
        last, decline = decline, (residual * scaled).sum(1, keepdim=True)
        direction.mul_(torch.where(last > 0, decline / last, 0.0)).add_(scaled)
    moved = after + move
    moved = torch.where(survives & (moved != 0) & moved.isfinite(), moved, after)
    if not remainders:
        return moved
    removed = (before != 0) & ~survives
    best = (before - moved).mm(gram).add_(before, alpha=float(delta)).mul_(preconditioner)
    share = best.div_(before)
    # Of a row whose inputs were not finite nothing is taken over.
    share = torch.where(share.isfinite(), share, 1.0).clamp_(0.0, 1.0)
    return torch.where(removed, share.mul_(before), moved)
