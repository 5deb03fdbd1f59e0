"""Least squares in the metric of measured moments: the factors of a form nearest to a target.

For a layer with target weight W, gram matrix A of its inputs and half metric S of its outputs,
every fit minimises ‖S (X − W) A^½‖² over the weights X that have the form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .forms import Factors, Form, Shape, exact_rank, weight_only
from .moments import Moments

RIDGE = 1e-3
"""weight of the original in the target, relative to the mean variance of the inputs"""
BLEND = 0.5
"""share of the plain squared error in the metric of the outputs"""
LEAST_STEPS, MOST_WORK = 12, 3e10
"""steps of the optimiser that every fit may take, and multiply-adds to spend on more"""
JITTER = 1e-9
"""least eigenvalue of a gram matrix, relative to its mean one"""


@dataclass(frozen=True)
class Target:
    """What one group of a layer is fitted to, in float64."""

    weight: Tensor
    """W `[N, C, P]`"""
    gram: Tensor | None
    """A `[C × P, C × P]`, positive definite; None for the identity"""
    half: Tensor | None = None
    """S `[N, N]`, symmetric positive definite; None for the identity"""
    scale: float = 1.0
    """factor from squared error in this metric to the predicted divergence of the outputs"""

    @property
    def shape(self) -> Shape:
        """The sizes of the group."""
        return Shape(1, *self.weight.shape)

    def weighted(self, weight: Tensor) -> Tensor:
        """S X `[N, C × P]` of a weight X."""
        flat = weight.flatten(1)
        return flat if self.half is None else self.half @ flat

    @cached_property
    def known(self) -> Tensor:
        """S W A `[N, C × P]`."""
        weighted = self.weighted(self.weight)
        return weighted if self.gram is None else weighted @ self.gram

    def norm(self, weight: Tensor) -> float:
        """‖S X A^½‖² of a weight X `[N, C, P]`."""
        weighted = self.weighted(weight)
        seen = weighted if self.gram is None else weighted @ self.gram
        return float((seen * weighted).sum())


def targets(
    weight: Tensor, moments: Moments | None, fisher: Tensor | None, own: bool = False
) -> list[Target]:
    """The targets of each group of a layer.

    W is the least-squares map from the inputs that the layer gets to the outputs it should have,
    with a ridge towards the original weight W₀, so directions that the samples never show keep it:
    W = W₀ + (S_yu − W₀ S_uu)(S_uu + λI)⁻¹.

    Args:
        weight: the original weight W₀ `[G, N, C, P]`.
        moments: of the layer's inputs and wanted outputs; None for the plain norm of the weights.
        fisher: summed outer products of the output's gradients per input `[G, N, N]`, or None.
        own: whether the inputs are those of the original network, where W is W₀.
    """
    result = []
    for group, original in enumerate(weight.double()):
        if moments is None:
            result.append(Target(original, None))
            continue
        gram = moments.gram[group] / moments.count
        ridge = RIDGE * (float(gram.diagonal().mean()) or 1.0)
        fitted = original
        if not own:
            residual = moments.cross[group] / moments.count - original.flatten(1) @ gram
        gram.diagonal().add_(ridge)
        if not own:
            step = torch.cholesky_solve(residual.mT, torch.linalg.cholesky(gram)).mT
            fitted = original + step.view_as(original)
        if fisher is None:
            result.append(Target(fitted, gram))
        else:
            mean = float(fisher[group].diagonal().mean()) or 1.0
            metric = (1 - BLEND) * fisher[group]
            metric.diagonal().add_(BLEND * mean)
            result.append(Target(fitted, gram, _root(metric)[0], 0.5))
    return result


def bias_of(dense: Tensor, moments: Moments) -> Tensor:
    """The bias `[G × N]` that gives a weight `[G, N, C, P]` the wanted mean outputs."""
    seen = torch.einsum("gnf,gf->gn", dense.flatten(2).to(moments.mean), moments.mean)
    return (moments.target - seen).flatten()


def fit(target: Target, form: Form, rank: int, steps: int = 100) -> Factors:
    """The factors of a form and rank for one group, with a leading group dimension of 1.

    Closed forms are taken where they are optimal: at a rank where the form is exact, and in the
    plain norm of the weights. Elsewhere the optimiser takes at most `steps` steps.
    """
    if target.gram is None or rank >= exact_rank(form, target.shape):
        closed = weight_only(target.weight[None], form, rank)
        if closed is not None:
            return closed
    if form == "low-rank":
        return _low_rank(target, rank)
    if form == "pointwise-depthwise":
        return _pointwise_depthwise(target, rank, steps)
    return _variable_projection(target, form, rank, steps)


def curve(target: Target, form: Form, most: int) -> Tensor:
    """The error ‖S (X − W) A^½‖² at ranks 1 to `most`, from closed-form starts, `[most]`.

    An upper bound that ranks layers and ranks against each other; `fit` comes out lower. The
    filters of a start are nested, so one Cholesky factor serves all ranks: the energy that each
    filter adds to the ones before it is a square in the solution of a triangular system.
    """
    white = _White.of(target, mix=form != "depthwise-pointwise")
    energy = float(white.energy)
    if form == "low-rank":
        values = torch.linalg.svdvals(target.weighted(target.weight) @ _root(white.gram)[0])
        explained = values.square().cumsum(0)[:most]
    elif form == "pointwise-depthwise":
        lead, spatial = _start(white, form, most)
        ranks = range(1, most + 1)
        left = [_difference(white, lead[:, :rank], spatial[:, :rank]) for rank in ranks]
        explained = energy - torch.stack(left)
    else:
        covariance, cross = _Problem.of(white, form).normal(_start(white, form, most))
        # depthwise-pointwise has a filter per channel in each term
        per_term = len(covariance) // most
        explained = _explained(covariance, cross).cumsum(0)[per_term - 1 :: per_term]
    errors: Tensor = (energy - explained).clamp_min(0).cummin(0).values
    return errors


@dataclass(frozen=True)
class _White:
    """A target, and coordinates for its factors where its gram matrix is near the identity.

    The gram matrix is close to a Kronecker product of a channel and a tap covariance; taking
    their roots out leaves the optimiser a well-conditioned problem. Only factors change their
    coordinates, which is cheap; the gram matrix keeps its own.
    """

    target: Target
    gram: Tensor
    """`[C × P, C × P]`"""
    weight: Tensor
    """`[N, C, P]` in white coordinates, before the metric of the outputs"""
    channels: Tensor
    """from white channel factors back to the original ones"""
    taps: Tensor

    @property
    def energy(self) -> Tensor:
        """The error of leaving the layer out."""
        return (self.target.known * self.target.weighted(self.target.weight)).sum()

    @classmethod
    def of(cls, target: Target, mix: bool) -> _White:
        """Whiten the taps, and the channels too where the form may mix them."""
        _, inputs, taps = target.weight.shape
        gram = target.gram
        if gram is None:
            gram = torch.eye(inputs * taps).to(target.weight)
        blocks = gram.view(inputs, taps, inputs, taps)
        root_c = back_c = torch.eye(inputs).to(target.weight)
        if mix:
            root_c, back_c = _root(torch.einsum("cpdp->cd", blocks) / taps)
        root_p, back_p = _root(torch.einsum("cpcq->pq", blocks) / inputs)
        weight = torch.einsum("ncp,cd,pq->ndq", target.weight, root_c, root_p)
        return cls(target, gram, weight, back_c, back_p)


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots and their inverses, of matrices lifted to be positive definite."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[..., -1:] * JITTER
    values = torch.maximum(values, torch.where(floor > 0, floor, 1.0))
    scale = values.sqrt()[..., None, :]
    return (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT


def _start(white: _White, form: Form, rank: int) -> tuple[Tensor, ...]:
    """Closed-form first factors, the most important term first."""
    outputs, inputs, taps = white.weight.shape
    tensor = white.target.weighted(white.weight).view(outputs, inputs, taps)
    if form == "depthwise-pointwise":
        blocks = white.gram.view(inputs, taps, inputs, taps).diagonal(dim1=0, dim2=2)
        root, back = _root(white.taps @ blocks.permute(2, 0, 1) @ white.taps)
        _, _, right = torch.linalg.svd(tensor.transpose(0, 1) @ root, full_matrices=False)
        return (right[:, :rank] @ back,)
    if form == "pointwise-depthwise":
        left, values, right = torch.linalg.svd(white.weight, full_matrices=False)
        lead = (left[:, :, :rank] * values[:, None, :rank]).mT
        return lead.contiguous(), right[:, :rank].contiguous()
    # pairs of principal channel and tap directions, by the energy on them
    _, _, channel = torch.linalg.svd(tensor.transpose(1, 2).flatten(0, 1), full_matrices=False)
    _, _, tap = torch.linalg.svd(tensor.flatten(0, 1), full_matrices=False)
    energy = torch.einsum("ncp,ac,bp->abn", tensor, channel, tap).square().sum(2)
    order = energy.flatten().argsort(descending=True, stable=True)[:rank]
    return channel[order // len(tap)], tap[order % len(tap)]


@dataclass(frozen=True)
class _Problem:
    """The normal equations of the last pointwise convolution, given the filters before it."""

    white: _White
    blocks: Tensor
    """the gram matrix by input channel, `[C, C × P, P]`, for depthwise filters"""

    @classmethod
    def of(cls, white: _White, form: Form) -> _Problem:
        """Lay out the gram matrix as the form's products read it."""
        if form != "depthwise-pointwise":
            return cls(white, white.gram)
        _, inputs, taps = white.weight.shape
        return cls(white, white.gram.view(-1, inputs, taps).movedim(1, 0).contiguous())

    def normal(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Covariance `[R, R]` of the filters' outputs and cross-covariance `[N, R]` with y.

        Depthwise filters come term by term, the channels within.
        """
        outputs, inputs, taps = self.white.weight.shape
        known = self.white.target.known
        spatial = _unit(parts[-1]) @ self.white.taps
        if len(parts) == 2:
            lead = _unit(parts[0]) @ self.white.channels
            filters = torch.einsum("rc,rp->cpr", lead, spatial).flatten(0, 1)
            return _quadratic(filters.mT @ (self.white.gram @ filters.detach())), known @ filters
        # spatial is [C, T, P]
        right = torch.bmm(self.blocks, spatial.detach().mT).view(inputs, inputs, taps, -1)
        covariance = torch.einsum("ctp,ecpu->tcue", spatial, right)
        cross = torch.einsum("ncp,ctp->ntc", known.view(outputs, inputs, taps), spatial)
        size = inputs * spatial.shape[1]
        return _quadratic(covariance.reshape(size, size)), cross.flatten(1)


def _quadratic(product: Tensor) -> Tensor:
    """A symmetric product xᵀ(Ax) with the slope it has in both x, where Ax was held constant.

    Differentiating through Ax as well would multiply by the gram matrix A once more.
    """
    return 2 * product - product.detach()


def _unit(part: Tensor) -> Tensor:
    norms = part.norm(dim=-1, keepdim=True)
    return part / torch.where(norms > 0, norms, 1.0)


def _explained(covariance: Tensor, cross: Tensor) -> Tensor:
    """The energy that each filter adds to what the ones before it explain, `[R]`."""
    solved = torch.linalg.solve_triangular(_lifted(covariance), cross.mT, upper=False)
    energies: Tensor = solved.square().sum(1)
    return energies


def _lifted(covariance: Tensor) -> Tensor:
    """Cholesky factor of a covariance, lifted against terms that diverge and cancel."""
    lift = 1e-7 * covariance.diagonal().mean().detach() + 1e-300
    lifted = covariance + lift * torch.eye(len(covariance)).to(covariance)
    factor: Tensor = torch.linalg.cholesky(lifted)
    return factor


def _variable_projection(target: Target, form: Form, rank: int, steps: int) -> Factors:
    """Fit a form that ends in a pointwise convolution.

    For given filters the last convolution has a closed form, so the error is a function of the
    filters alone (variable projection, Golub and Pereyra 1973), and L-BFGS minimises it. No term
    ever has to follow another that it cancels with, which is what makes alternating least squares
    on this model slow and its terms diverge (Phan et al. 2020).
    """
    white = _White.of(target, mix=form != "depthwise-pointwise")
    problem = _Problem.of(white, form)
    energy = white.energy

    def loss(*parts: Tensor) -> Tensor:
        covariance, cross = problem.normal(parts)
        return 1 - _explained(covariance, cross).sum() / energy

    parts = _start(white, form, rank)
    if energy > 0:
        # depthwise filters take few multiply-adds, but each reads the whole gram matrix
        work = (rank if len(parts) == 2 else 16 * rank) * len(white.gram) ** 2
        parts = _minimise(loss, parts, work, steps)
    covariance, cross = problem.normal(parts)
    last = torch.cholesky_solve(cross.mT, _lifted(covariance)).mT
    if target.half is not None:
        last = torch.linalg.solve(target.half, last)
    if form == "depthwise-pointwise":
        spatial = _unit(parts[0]) @ white.taps
        last = last.unflatten(1, (rank, -1)).transpose(1, 2)
        return Factors(form, None, spatial[None], last[None])
    lead, spatial = _unit(parts[0]) @ white.channels, _unit(parts[1]) @ white.taps
    return Factors(form, lead[None], spatial[None], last[None])


def _difference(white: _White, lead: Tensor, spatial: Tensor) -> Tensor:
    lead, spatial = lead @ white.channels, spatial @ white.taps
    gap = (torch.einsum("ntc,ntp->ncp", lead, spatial) - white.target.weight).flatten(1)
    gap = white.target.weighted(gap)
    return _quadratic(((gap.detach() @ white.gram) * gap).sum())


def _pointwise_depthwise(target: Target, rank: int, steps: int) -> Factors:
    """Fit the form that ends in a depthwise convolution, with L-BFGS on both factors."""
    white = _White.of(target, mix=True)
    energy = white.energy
    parts = _start(white, "pointwise-depthwise", rank)
    if energy > 0:
        work = len(white.weight) * len(white.gram) ** 2
        parts = _minimise(lambda *now: _difference(white, *now) / energy, parts, work, steps)
    lead, spatial = parts[0] @ white.channels, parts[1] @ white.taps
    return Factors("pointwise-depthwise", lead[None], spatial[None], None)


def _low_rank(target: Target, rank: int) -> Factors:
    """Reduced-rank regression (Izenman 1975): a truncated SVD in the two metrics."""
    assert target.gram is not None
    root, back = _root(target.gram)
    left, values, right = torch.linalg.svd(target.weighted(target.weight) @ root)
    last, spatial = left[:, :rank] * values[:rank], right[:rank] @ back
    if target.half is not None:
        last = torch.linalg.solve(target.half, last)
    shape = target.weight.shape
    return Factors("low-rank", None, spatial.view(1, rank, *shape[1:]), last[None])


def _minimise(
    loss: Callable[..., Tensor], parts: tuple[Tensor, ...], work: float, most: int
) -> tuple[Tensor, ...]:
    """L-BFGS from a start, for at most `most` steps, fewer where a step is much `work` (MACs)."""
    steps = int(min(most, max(LEAST_STEPS, MOST_WORK / work)))
    parts = tuple(part.detach().clone().requires_grad_() for part in parts)
    optimiser = torch.optim.LBFGS(
        parts,
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        with torch.enable_grad():
            value = loss(*parts)
            for part, slope in zip(parts, torch.autograd.grad(value, parts), strict=True):
                part.grad = slope.contiguous()
        return float(value.detach())

    optimiser.step(closure)
    return tuple(part.detach() for part in parts)
