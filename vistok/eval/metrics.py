"""Scores of feature sets: Frechet distance, Inception Score, kernel distance, precision and recall.

Pure functions of tensors, on whatever device those lie; no network and no file is touched. Letters in shapes:
N samples, D feature width, C classes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

# Pairwise distances are computed in blocks of this many rows and columns, 100 MB each in float32. The ADM suite's
# blocks have 10,000. That matters only if a float16 distance overflows: its whole block is then computed in float32.
BLOCK = 5_000
ROWS_AT_A_TIME = 1000  # parts of a block, for steps whose temporaries would exceed the block itself


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) in float64, all that the Frechet distance needs of a feature set."""

    mean: Tensor
    covariance: Tensor


class Spread(NamedTuple):
    """Mean and (biased) standard deviation of a score over its splits or subsets."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float

    @classmethod
    def of(cls, generated_inside: Tensor, real_inside: Tensor) -> PrecisionRecall:
        """The shares of members among the results of ``inside_manifold``."""
        return cls(*(float(members.double().mean()) for members in (generated_inside, real_inside)))

    @property
    def f_score(self) -> float:
        """Harmonic mean of both; 0 if both are 0."""
        return 2 * self.precision * self.recall / max(1e-5, self.precision + self.recall)


class Moments:
    """Running first and second moments of features in float64, which add up over batches and processes.

    Holds count, sum (D,) and outer = sum of x x^T (D, D). They give mean and covariance in little memory (34 MB at
    D = 2048), so the features themselves need not be kept.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of one feature set (N, D)."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Add a batch of features (B, D).

        Raises:
            ValueError: the features have another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"expected features of shape (B, {len(self.sum)}), got {tuple(features.shape)}")
        features = features.to(self.sum.device).double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together; neither is changed.

        Raises:
            ValueError: the other moments are of another feature width.
        """
        if len(other.sum) != len(self.sum):
            raise ValueError(f"cannot merge moments of {len(self.sum)} and of {len(other.sum)} features")
        merged = Moments(len(self.sum), self.sum.device)
        merged.count = self.count + other.count
        merged.sum += self.sum + other.sum.to(self.sum.device)
        merged.outer += self.outer + other.outer.to(self.outer.device)
        return merged

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on ``device``."""
        moved = Moments(0)
        moved.count, moved.sum, moved.outer = self.count, self.sum.to(device), self.outer.to(device)
        return moved

    @property
    def mean(self) -> Tensor:
        """(D,) in float64."""
        self._require(1)
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) in float64, normalised by N - 1 as numpy.cov does."""
        self._require(2)
        return (self.outer - torch.outer(self.sum, self.mean)) / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance together, as ``frechet_distance`` takes them."""
        return Gaussian(self.mean, self.covariance)

    def fit(self, ddof: int) -> Gaussian:
        """Mean, and covariance normalised by N - ``ddof``.

        Args:
            ddof: 1 is usual for images; StyleGAN-V and LARP take 0 for clips.

        Raises:
            ValueError: ``ddof`` is neither 0 nor 1, or there are too few samples.
        """
        if ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 (covariance over N) or 1 (over N - 1), got {ddof}")
        if ddof == 1:
            return self.gaussian
        mean = self.mean
        return Gaussian(mean, self.outer / self.count - torch.outer(mean, mean))

    def _require(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"needs at least {count} samples, got {self.count}")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is computed as sum sqrt(eig(R^T B R)) with A = R R^T. These two symmetric
    eigen-decompositions are about six times as fast as scipy's sqrtm of the product, and never complex. Directions
    without variance (N < D) are left out, because they would only add rounding errors. (Heusel et al. 2017, eq. 6.)

    Raises:
        ValueError: the widths differ, moments are not finite or not real, or a matrix is no covariance.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise ValueError(
            f"feature widths differ: {len(a.mean)} and {len(b.mean)}; were both sets made by the same network?"
        )
    if any(moment.is_complex() for moment in (*a, *b)):
        raise ValueError("the moments are complex numbers; means and covariances are real")
    mean_a, covariance_a, mean_b, covariance_b = (moment.double() for moment in (*a, *b))
    if not all(bool(moment.isfinite().all()) for moment in (mean_a, covariance_a, mean_b, covariance_b)):
        raise ValueError("the moments hold values that are not finite; were the images or the weights damaged?")
    check_symmetric(covariance_a)
    check_symmetric(covariance_b)
    if torch.equal(mean_a, mean_b) and torch.equal(covariance_a, covariance_b):
        return 0.0  # the arithmetic below would leave rounding errors
    values, vectors = torch.linalg.eigh(covariance_a)
    _check_not_negative(values)
    kept = _is_no_rounding_error(values)
    root = vectors[:, kept] * values[kept].sqrt()  # (D, rank)
    squares = torch.linalg.eigvalsh(root.T @ covariance_b @ root)
    _check_not_negative(squares)
    cross = squares[_is_no_rounding_error(squares)].sqrt().sum()
    difference = mean_a - mean_b
    distance = float(difference @ difference + covariance_a.trace() + covariance_b.trace() - 2 * cross)
    if not math.isfinite(distance):
        raise ValueError("the moments are so large that their distance is not finite; were they scaled?")
    return max(distance, 0.0)


NEGLIGIBLE = 1e-4
"""Largest error that float32 files and rounding cause in a covariance of thousands of features, as a share of its
largest value."""


def check_symmetric(covariance: Tensor) -> None:
    """Raise ValueError unless a matrix (D, D) is symmetric, up to rounding."""
    if covariance.numel() and (covariance - covariance.T).abs().max() > NEGLIGIBLE * covariance.abs().max():
        raise ValueError("the covariance is not symmetric, so it is none")


def is_positive(covariance: Tensor) -> bool:
    """Whether a symmetric matrix (D, D) has no negative eigenvalues, up to rounding (the cheapest such test)."""
    if not covariance.any():
        return True
    allowed = NEGLIGIBLE * covariance.abs().max() * torch.eye(len(covariance), dtype=covariance.dtype)
    return int(torch.linalg.cholesky_ex(covariance + allowed).info) == 0


def _check_not_negative(eigenvalues: Tensor) -> None:
    if len(eigenvalues) and eigenvalues.min() < -NEGLIGIBLE * eigenvalues.abs().max():
        raise ValueError(
            f"a covariance has negative eigenvalues (down to {float(eigenvalues.min()):.3g}), so it is none; were the "
            "moments made by other means than cov(features)?"
        )


def _is_no_rounding_error(eigenvalues: Tensor) -> Tensor:
    """Which eigenvalues of a positive semi-definite matrix exceed its rounding errors: (D,) bool.

    Args:
        eigenvalues: (D,), ascending.
    """
    if not len(eigenvalues):
        return eigenvalues > 0
    return eigenvalues > eigenvalues[-1].clamp_min(0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def split_into_chunks(count: int, split_size: int) -> list[slice]:
    """The splits of the ADM suite: consecutive chunks of ``split_size``, of which the last one may be shorter."""
    return [slice(start, min(start + split_size, count)) for start in range(0, count, split_size)]


def split_evenly(count: int, splits: int) -> list[slice]:
    """The splits of torch-fidelity: ``splits`` consecutive parts, where part i begins at i * count // splits.

    Raises:
        ValueError: there are fewer samples than splits.
    """
    if count < splits:
        raise ValueError(f"{splits} splits need at least {splits} samples, got {count}")
    return [slice(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def shuffled(features: Tensor, seed: int = 2020) -> Tensor:
    """The rows (N, ...) in the order of torch-fidelity's permutation (NumPy's legacy generator)."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(features)))
    return features[order.to(features.device)]


def inception_score(logits: Tensor, splits: list[slice]) -> Spread:
    """Inception Score: exp of the mean KL divergence of class probabilities from their mean (Salimans et al. 2016).

    The order of the rows decides which samples share a split: a set sorted by class scores far lower than a shuffled
    one. The ADM suite scores ``split_into_chunks(N, 5000)`` in file order; torch-fidelity scores
    ``split_evenly(N, 10)`` of ``shuffled`` rows.

    Args:
        logits: (N, C); both suites compute them without the bias.
        splits: which rows are scored together.

    Returns:
        Mean and standard deviation over the splits.
    """
    log_p = logits.double().log_softmax(1)
    scores = []
    for rows in splits:
        part = log_p[rows]
        # In logarithms, so that a probability that underflows contributes 0 and not NaN.
        log_mean = part.logsumexp(0, keepdim=True) - np.log(len(part))
        scores.append(float((part.exp() * (part - log_mean)).sum(1).mean().exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


class PolynomialKernel(NamedTuple):
    """(gamma x.y + coef0)^degree; gamma None stands for 1 / D."""

    degree: int = 3
    gamma: float | None = None
    coef0: float = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Kernel values (N_x, N_y) of the rows of ``x`` and ``y``."""
        gamma = 1 / x.shape[1] if self.gamma is None else self.gamma
        return (gamma * x @ y.T + self.coef0) ** self.degree


class GaussianKernel(NamedTuple):
    """exp(-|x - y|^2 / (2 sigma^2))."""

    sigma: float = 10.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Kernel values (N_x, N_y) of the rows of ``x`` and ``y``."""
        return torch.exp(-_squared_euclidean(x, y) / (2 * self.sigma**2))


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    kernel: PolynomialKernel | GaussianKernel = PolynomialKernel(),  # noqa: B008 (immutable)
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> Spread:
    """Kernel (Inception) distance: unbiased squared MMD over random subsets (Binkowski et al. 2018).

    Subsets and formula are torch-fidelity's, but computed in float64. The distance is a small difference of large
    means: torch-fidelity's float32 keeps only four or five digits of it, and these change with the last digit of any
    feature.

    Args:
        generated, real: (N, D) features.
        subset_size: samples per subset, at least 2.
        seed: of the random subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: a set is smaller than ``subset_size``, or ``subset_size`` is below 2.
    """
    if subset_size < 2:
        raise ValueError(f"subsets need at least 2 samples, got {subset_size}")
    if min(len(generated), len(real)) < subset_size:
        raise ValueError(
            f"subsets of {subset_size} need as many samples on both sides, got {len(generated)} and {len(real)}"
        )
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        subset, real_subset = (
            features[torch.from_numpy(random.choice(len(features), subset_size, replace=False))].double()
            for features in (generated, real)
        )
        distances.append(_squared_mmd(subset, real_subset, kernel))
    return Spread(float(np.mean(distances)), float(np.std(distances)))


def _squared_mmd(x: Tensor, y: Tensor, kernel: PolynomialKernel | GaussianKernel) -> float:
    """Unbiased: no sample is compared with itself. (Gretton et al. 2012, eq. 3.)"""
    count = len(x)
    within = sum((values.sum() - values.trace()) / (count * (count - 1)) for values in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


Distance = Literal["euclidean", "squared_euclidean", "squared_euclidean_float16"]
Boundary = Literal["included", "excluded"]
"""Whether a point at exactly a ball's radius counts as inside: in ADM and torch-fidelity it does, in dgm-eval not."""


def pairwise_distance(a: Tensor, b: Tensor, distance: Distance) -> Tensor:
    """Distances (N_a, N_b) between the rows of ``a`` and of ``b``: float32, or float16 where they are rounded to it.

    - ``euclidean``: torch-fidelity's, torch.cdist in float32.
    - ``squared_euclidean``: |a|^2 - 2 a.b + |b|^2 in float32, clamped at 0.
    - ``squared_euclidean_float16``: the ADM suite's, behind every published number. The same formula, with features
      and every intermediate result rounded to float16. If a value overflows, the whole block is computed in float32.
      The coarse grid of float16 makes ties, which count as hits.
    """
    a, b = a.float(), b.float()
    if distance == "euclidean":
        return torch.cdist(a, b)
    if distance == "squared_euclidean":
        return _squared_euclidean(a, b)
    if distance == "squared_euclidean_float16":
        rounded = _squared_euclidean_float16(a, b)
        return rounded if bool(rounded.amax().isfinite()) else _squared_euclidean(a, b)  # the largest is NaN if any is
    raise ValueError(f"unknown distance {distance!r}; known: {', '.join(Distance.__args__)}")


def _squared_euclidean(a: Tensor, b: Tensor) -> Tensor:
    # In place: a block is 100 MB.
    return (a @ b.T).mul_(-2).add_(a.square().sum(1, keepdim=True)).add_(b.square().sum(1)).clamp_min_(0)


def _squared_euclidean_float16(a: Tensor, b: Tensor) -> Tensor:
    """Sums and products accumulate in float32 and are rounded once, as in half-precision kernels. On a CPU this is
    also much faster than half tensors."""
    a, b = a.half(), b.half()
    norm_a = a.square().float().sum(1, keepdim=True).half()  # (N_a, 1)
    norm_b = b.square().float().sum(1).half()  # (N_b,)
    product = a.new_empty(len(a), len(b))
    columns = b.float().T
    for rows, target in zip(a.split(ROWS_AT_A_TIME), product.split(ROWS_AT_A_TIME)):
        target.copy_(rows.float() @ columns)
    return product.mul_(-2).add_(norm_a).add_(norm_b).clamp_min_(0)


def manifold_radii(
    features: Tensor, *, neighbours: int = 3, distance: Distance = "squared_euclidean_float16", block: int = BLOCK
) -> Tensor:
    """Distance (N,) of every feature to its k-th nearest neighbour in its own set, itself not counted.

    Args:
        features: (N, D).
        neighbours: k.
        block: rows and columns whose distances are computed at a time.

    Raises:
        ValueError: there are fewer than k + 1 features.
    """
    if len(features) <= neighbours:
        raise ValueError(f"{neighbours} nearest neighbours need at least {neighbours + 1} samples, got {len(features)}")
    return torch.cat([_kth_nearest(rows, features, neighbours, distance, block) for rows in features.split(block)])


def _kth_nearest(rows: Tensor, features: Tensor, neighbours: int, distance: Distance, block: int) -> Tensor:
    nearest = rows.new_empty(len(rows), 0, dtype=torch.float32)
    for columns in features.split(block):
        candidates = torch.cat([nearest, _smallest(pairwise_distance(rows, columns, distance), neighbours + 1)], dim=1)
        nearest = _smallest(candidates, neighbours + 1)  # one more than asked for: the row itself is among them
    return nearest[:, -1]


def _smallest(distances: Tensor, count: int) -> Tensor:
    """The ``count`` smallest entries of every row, ascending; all of them if there are fewer."""
    return distances.topk(min(count, distances.shape[1]), largest=False, sorted=True).values


def inside_manifold(
    generated: Tensor,
    real: Tensor,
    *,
    neighbours: int = 3,
    distance: Distance = "squared_euclidean_float16",
    boundary: Boundary = "included",
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Which features of each set lie in the manifold of the other set.

    The manifold of a set is the union of a ball around each of its features. The ball's radius is the distance to the
    k-th nearest neighbour in the same set (``manifold_radii``). Only one block of distances exists at a time.

    Returns:
        Whether each generated feature lies in the manifold of the real ones, (N_g,) bool, and whether each real feature
        lies in the manifold of the generated ones, (N_r,) bool.

    Raises:
        ValueError: a side has fewer than k + 1 features, or the boundary is unknown.
    """
    if boundary not in get_args(Boundary):
        raise ValueError(f"unknown boundary {boundary!r}; known: {', '.join(get_args(Boundary))}")
    within = torch.le if boundary == "included" else torch.lt
    generated_radii = manifold_radii(generated, neighbours=neighbours, distance=distance, block=block)
    real_radii = manifold_radii(real, neighbours=neighbours, distance=distance, block=block)
    generated_inside = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i in range(0, len(real), block):
        for j in range(0, len(generated), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            between = pairwise_distance(real[rows], generated[columns], distance)  # (real, generated)
            for some, radii, inside in zip(
                *(part.split(ROWS_AT_A_TIME) for part in (between, real_radii[rows], real_inside[rows]))
            ):
                generated_inside[columns] |= within(some, radii[:, None]).any(0)
                inside |= within(some, generated_radii[columns]).any(1)  # a view: this is real_inside
    return generated_inside, real_inside


def precision_recall(
    generated: Tensor,
    real: Tensor,
    *,
    neighbours: int = 3,
    distance: Distance = "squared_euclidean_float16",
    boundary: Boundary = "included",
    block: int = BLOCK,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of generated features in the manifold of the real ones; recall is the share of real features
    in the manifold of the generated ones. See ``inside_manifold``.

    Args:
        generated, real: (N, D) features of one network.
        neighbours: k of the manifolds' radii.
        distance: ``squared_euclidean_float16`` is the ADM suite's, ``euclidean`` is torch-fidelity's.

    Raises:
        ValueError: a side has fewer than k + 1 features.
    """
    inside = inside_manifold(generated, real, neighbours=neighbours, distance=distance, boundary=boundary, block=block)
    return PrecisionRecall.of(*inside)
