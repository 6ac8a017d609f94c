"""Denoising diffusion with a learned variance, in discrete time.

DDPM: Ho et al., arXiv 2006.11239. Cosine schedule, variance range and the hybrid objective: Nichol & Dhariwal, arXiv
2102.09672. A network reads noisy data x and a timestep, and returns (eps, v): the noise, and for every channel where
its log-variance lies between the posterior's (v = -1) and log beta (v = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DenoisingNetwork = Callable[[Tensor, int], Tensor]
"""(x (M, d), timestep) to (M, 2d): noise, then variance values."""


class DiffusionState(NamedTuple):
    """A trajectory after a reverse step: the step's (original) timestep, and the samples x (M, d) that it led to."""

    timestep: int
    x: Tensor


class GaussianDiffusion:
    """The tables of a diffusion process, its loss and its sampler. Tables are float64; results have the data's dtype.

    Args:
        betas: variances of the forward steps, (T,).
        timesteps: the T timesteps as the network knows them; None counts from 0.
    """

    def __init__(self, betas: Sequence[float] | Tensor, timesteps: Sequence[int] | None = None):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if len(betas) < 2:
            raise ValueError(f"diffusion needs at least 2 steps, got {len(betas)}")
        self.timesteps = tuple(timesteps) if timesteps is not None else tuple(range(len(betas)))
        self.betas, self.alphas_cumprod = betas, (1 - betas).cumprod(0)
        previous = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.posterior_variance = betas * (1 - previous) / (1 - self.alphas_cumprod)
        # The variance is 0 at the first timestep, whose logarithm is replaced by that of the second.
        self.posterior_log_variance_clipped = self.posterior_variance[[1, *range(1, len(betas))]].log()
        self.posterior_mean_coef1 = betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - previous) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = self.alphas_cumprod.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.log_betas = betas.log()
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def cosine(cls, num_timesteps: int = 1000) -> GaussianDiffusion:
        """The cosine schedule, betas at most 0.999."""

        def alpha_bar(share: float) -> float:
            return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

        pairs = ((i / num_timesteps, (i + 1) / num_timesteps) for i in range(num_timesteps))
        return cls([min(1 - alpha_bar(end) / alpha_bar(start), 0.999) for start, end in pairs])

    def respaced(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The process that visits these timesteps only, with the same marginals there."""
        kept = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[list(timesteps)]])
        return GaussianDiffusion(1 - kept[1:] / kept[:-1], timesteps)

    def __len__(self) -> int:
        return len(self.betas)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of data and noise (M, d) at indices t (M,)."""
        signal, spread = self._at("sqrt_alphas_cumprod", t, data), self._at("sqrt_one_minus_alphas_cumprod", t, data)
        return signal * data + spread * noise

    def predict(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (M, d) of the reverse step at indices t (M,), from the network's output (M, 2d)."""
        eps, v = output.chunk(2, -1)
        data = self._at("sqrt_recip_alphas_cumprod", t, x) * x - self._at("sqrt_recipm1_alphas_cumprod", t, x) * eps
        least, most = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
        share = (v + 1) / 2
        return self._posterior_mean(data, x, t), share * most + (1 - share) * least

    def _posterior_mean(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self._at("posterior_mean_coef1", t, x) * data + self._at("posterior_mean_coef2", t, x) * x

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (M,) of a table as a column (M, 1), on the device and in the dtype of ``like``."""
        key = (table, like.device, like.dtype)
        if key not in self._copies:  # kept, because a copy to a device synchronises with it
            self._copies[key] = getattr(self, table).to(like.device, like.dtype)
        return self._copies[key][t].unsqueeze(-1)

    def loss_terms(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the hybrid objective, (M,) each.

        Args:
            output: the network's, (M, 2d), at ``add_noise(data, noise, t)``.
            data, noise: (M, d).
            t: (M,) indices.

        Returns:
            the mean squared error of the noise; and the variational bound in bits per channel, whose gradient reaches
            only the variance: KL of the reverse step, or at t = 0 the negative log-likelihood of 8-bit data in [-1, 1].
        """
        eps, v = output.chunk(2, -1)
        x = self.add_noise(data, noise, t)
        mean, log_variance = self.predict(torch.cat([eps.detach(), v], -1), x, t)
        true_mean = self._posterior_mean(data, x, t)
        true_log_variance = self._at("posterior_log_variance_clipped", t, x)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance).mean(-1)
        likelihood = discretised_log_likelihood(data, mean, log_variance).mean(-1)
        bound = torch.where(t == 0, -likelihood, kl) / math.log(2)
        return (noise - eps).square().mean(-1), bound

    def ancestral(
        self, network: DenoisingNetwork, x: Tensor, noise: Sequence[Tensor], *, temperature: float = 1.0
    ) -> Iterator[DiffusionState]:
        """Reverse steps from noise x (M, d), the first at the last timestep; nothing is clipped.

        Args:
            noise: standard normal (M, d), one per step; the last step adds none.
            temperature: factor of the noise that the steps add.
        """
        for step, index in enumerate(reversed(range(len(self)))):
            t = torch.full(x.shape[:1], index, device=x.device)
            mean, log_variance = self.predict(network(x, self.timesteps[index]), x, t)
            x = mean + (log_variance / 2).exp() * noise[step] * temperature if index else mean
            yield DiffusionState(self.timesteps[index], x)


def even_timesteps(total: int, count: int) -> list[int]:
    """``count`` timesteps spread from 0 to total - 1, ends included, rounded to integers.

    Raises:
        ValueError: count is below 2 or above ``total``.
    """
    if not 2 <= count <= total:
        raise ValueError(f"num_steps must lie between 2 and the {total} timesteps of training, got {count}")
    stride, position, timesteps = (total - 1) / (count - 1), 0.0, []
    for _ in range(count):
        timesteps.append(round(position))
        position += stride  # accumulated, as in the reference: a product may round to another integer
    return timesteps


def strided_timesteps(total: int, count: int) -> list[int]:
    """Every k-th timestep from 0 on, with the k that gives ``count`` of them.

    Raises:
        ValueError: no k gives ``count`` timesteps, or count is below 2.
    """
    for stride in range(1, total):
        if count > 1 and len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise ValueError(f"no stride through {total} timesteps visits num_steps {count} of them (at least 2)")


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL of the first normal distribution to the second in nats, elementwise."""
    spread = torch.exp(log_variance1 - log_variance2) + (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + spread)


def discretised_log_likelihood(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the normal probability of the 8-bit bin that data in [-1, 1] lie in, elementwise; the outer bins are open.

    The normal CDF is approximated as in DDPM.
    """
    centred, sharpness = data - mean, torch.exp(-log_variance / 2)
    upper, lower = (_normal_cdf(sharpness * (centred + edge)) for edge in (1 / 255, -1 / 255))
    inside = torch.where(data > 0.999, 1 - lower, upper - lower)
    return torch.where(data < -0.999, upper, inside).clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
