"""A softmax over all instances, computed chunk by chunk: memory O(batch x chunk) instead of O(batch x N) logits.

Forward adds each chunk of the bank to sums of exponentials relative to a running maximum (Milakov & Gimelshein, 2018),
and to the sums of rows that make up the gradient, so that backward only scales them. If the bank is trained, or if two
temperatures need two softmaxes, backward computes the logits again, which costs less than those sums.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_core.blocks.cutmix import Mixed

BITS = 1 / math.log(2)  # exp(x) = exp2(BITS * x); torch's exp2 takes a third of the time of exp on CPUs
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # logits in memory at once: fits the cache of a core, fills a GPU


class InstanceSoftmax(NamedTuple):
    """Properties of the softmax of each embedding over all instances, each (batch,)."""

    log_normalizer: Tensor  # logsumexp of the logits
    negative_entropy: Tensor  # sum of p log p, at `entropy_temperature`
    to_square_root: Tensor  # -sum of p log u with u ~ sqrt(p), at `entropy_temperature`; carries no gradient
    is_nearest: Tensor  # 1 where the row `own` is more similar than all others, else 0; carries no gradient


def instance_softmax(
    embedding: Tensor,
    bank: Tensor,
    *,
    temperature: float,
    entropy_temperature: float | None = None,
    own: Tensor | None = None,
    chunk: int | None = None,
) -> InstanceSoftmax:
    """Compare `embedding` (batch, dim) with all rows of `bank` (N, dim), `chunk` rows at a time, with gradient to both.

    `own` (batch,) is the row of each embedding's image. Without it `is_nearest` is 0, and without `entropy_temperature`
    the two entropies are 0.
    """
    if chunk is None:
        chunk = max(256, CHUNK.get(embedding.device.type, CHUNK["cuda"]) // len(embedding))
    return InstanceSoftmax(*_Stream.apply(embedding, bank, temperature, entropy_temperature, own, chunk))


def instance_loss(
    softmax: InstanceSoftmax, embedding: Tensor, target: Tensor, *, temperature: float, mixed: Mixed | None = None
) -> Tensor:
    """Return the cross-entropy of finding each image's row in the bank, mean over the batch.

    `softmax` is that of `embedding` (batch, dim) over the bank at `temperature`, `target` (batch, dim) has each image's
    row of the bank. For images combined by CutMix the target is the weighted mean of the two images' rows.
    """
    if mixed is not None and mixed.share < 1:
        target = mixed.share * target + (1 - mixed.share) * target[mixed.partner]
    return (softmax.log_normalizer - (embedding * target).sum(dim=1) / temperature).mean()


class _Space:
    """Three buffers of batch x chunk, reused for every chunk: new memory would cost a page fault per 4 KB."""

    def __init__(self, embedding: Tensor, chunk: int) -> None:
        self.batch = len(embedding)
        self.buffers = embedding.new_empty(3, self.batch * chunk)

    def take(self, number: int, rows: Tensor) -> Tensor:
        """Return buffer `number` as a tensor (batch, rows)."""
        return self.buffers[number, : self.batch * len(rows)].view(self.batch, len(rows))


class _Sums:
    """Sums over the bank of e = exp(logit - maximum), at one temperature."""

    def __init__(self, embedding: Tensor, temperature: float, *, entropy: bool, slopes: bool) -> None:
        self.temperature, self.entropy, self.slopes = temperature, entropy, slopes
        self.maximum = embedding.new_full((len(embedding), 1), -1e30)  # finite, so that 0 * maximum is 0
        self.total = torch.zeros_like(self.maximum)  # of e
        self.root = torch.zeros_like(self.maximum)  # of sqrt(e)
        self.first = torch.zeros_like(self.maximum)  # of e * (logit - maximum)
        self.rows = torch.zeros_like(embedding)  # of e * row
        self.first_rows = torch.zeros_like(embedding)  # of e * (logit - maximum) * row

    def add(self, similarity: Tensor, rows: Tensor, largest: Tensor, space: _Space) -> None:
        """Add a chunk: `similarity` (batch, chunk) of each embedding to `rows`, and their maximum (batch, 1)."""
        maximum = torch.maximum(self.maximum, largest / self.temperature)
        self._move(self.maximum - maximum)
        self.maximum = maximum
        if not self.entropy:
            exponent = space.take(1, rows)
            torch.add(-maximum * BITS, similarity, alpha=BITS / self.temperature, out=exponent)
            exponential = exponent.exp2_()
            self.total += exponential.sum(dim=1, keepdim=True)
            if self.slopes:
                self.rows.addmm_(exponential, rows)
            return
        half, root = space.take(1, rows), space.take(2, rows)
        torch.add(-0.5 * BITS * maximum, similarity, alpha=0.5 * BITS / self.temperature, out=half)
        torch.exp2(half, out=root)
        self.root += root.sum(dim=1, keepdim=True)
        self.total += torch.linalg.vecdot(root, root)[:, None]
        weighted = half.mul_(root)
        self.first += 2 / BITS * torch.linalg.vecdot(weighted, root)[:, None]
        if self.slopes:
            self.first_rows.addmm_(weighted.mul_(root), rows, alpha=2 / BITS)
            self.rows.addmm_(root.square_(), rows)

    def _move(self, by: Tensor) -> None:
        """Make all sums relative to a maximum that is higher by -`by`."""
        shrunk = by.exp()
        if self.entropy:
            self.root *= (0.5 * by).exp()
            self.first = shrunk * (self.first + by * self.total)
            if self.slopes:
                self.first_rows = shrunk * (self.first_rows + by * self.rows)
        self.total *= shrunk
        if self.slopes:
            self.rows *= shrunk

    @property
    def log_normalizer(self) -> Tensor:
        return self.maximum + self.total.log()

    @property
    def mean(self) -> Tensor:
        """Expected logit under the softmax."""
        return self.maximum + self.first / self.total

    @property
    def negative_entropy(self) -> Tensor:
        return self.first / self.total - self.total.log()

    @property
    def to_square_root(self) -> Tensor:
        return self.root.log() - 0.5 * self.first / self.total

    def slope(self) -> Tensor:
        """Gradient (batch, dim) of the log-normalizer: sum of p row."""
        return self.rows / (self.temperature * self.total)

    def entropy_slope(self) -> Tensor:
        """Gradient (batch, dim) of the negative entropy: sum of p (logit - expected logit) row."""
        return (self.first_rows - self.first / self.total * self.rows) / (self.temperature * self.total)


class _Search:
    """Finds out whether each embedding's own row is the most similar one; a tie is no hit."""

    def __init__(self, own: Tensor, embedding: Tensor) -> None:
        self.own = own[:, None]
        self.similarity = embedding.new_full((len(embedding), 1), -math.inf)  # to the own row
        self.others = torch.full_like(self.similarity, -math.inf)  # the largest to another row

    def add(self, similarity: Tensor, start: int) -> Tensor:
        """Add a chunk of the bank from row `start` on; return its largest similarity (batch, 1)."""
        column = (self.own - start).clamp(0, similarity.shape[1] - 1)
        value = similarity.gather(1, column)
        is_own = column == self.own - start
        similarity.scatter_(1, column, value.masked_fill(is_own, -math.inf))
        others = similarity.amax(dim=1, keepdim=True)
        similarity.scatter_(1, column, value)
        self.others = torch.maximum(self.others, others)
        self.similarity = torch.where(is_own, value, self.similarity)
        return torch.where(is_own, torch.maximum(others, value), others)

    def is_nearest(self) -> Tensor:
        """Return 1 for each embedding (batch,) whose own row is the nearest, else 0."""
        return (self.similarity > self.others).float()[:, 0]


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        bank: Tensor,
        temperature: float,
        entropy_temperature: float | None,
        own: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = entropy_temperature in (None, temperature)
        ctx.slopes = one and not ctx.needs_input_grad[1]
        sums = _Sums(embedding, temperature, entropy=entropy_temperature == temperature, slopes=ctx.slopes)
        entropy = sums if one else _Sums(embedding, entropy_temperature or 1.0, entropy=True, slopes=False)
        space = _Space(embedding, min(chunk, len(bank)))
        search = None if own is None else _Search(own, embedding)
        for start, rows in zip(range(0, len(bank), chunk), bank.split(chunk)):
            similarity = torch.mm(embedding, rows.T, out=space.take(0, rows))
            largest = similarity.amax(dim=1, keepdim=True) if search is None else search.add(similarity, start)
            sums.add(similarity, rows, largest, space)
            if not one:
                entropy.add(similarity, rows, largest, space)
        ctx.settings = temperature, entropy_temperature, chunk
        if ctx.slopes:
            ctx.save_for_backward(sums.slope(), sums.entropy_slope())
        else:
            ctx.save_for_backward(embedding, bank, sums.log_normalizer, entropy.log_normalizer, entropy.mean)
        results = [sums.log_normalizer, entropy.negative_entropy, entropy.to_square_root]
        if entropy_temperature is None:
            results[1:] = [torch.zeros_like(results[0]) for _ in results[1:]]
        log_normalizer, negative_entropy, to_square_root = (result[:, 0] for result in results)
        is_nearest = torch.zeros_like(log_normalizer) if search is None else search.is_nearest()
        ctx.mark_non_differentiable(to_square_root, is_nearest)
        return log_normalizer, negative_entropy, to_square_root, is_nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_normalizer, by_entropy, *_ = (gradient[:, None] for gradient in gradients)
        if ctx.slopes:
            slope, entropy_slope = ctx.saved_tensors
            return by_normalizer * slope + by_entropy * entropy_slope, None, None, None, None, None
        embedding, bank, log_normalizer, entropy_log_normalizer, mean = ctx.saved_tensors
        temperature, entropy_temperature, chunk = ctx.settings
        by_embedding = torch.zeros_like(embedding)
        by_bank = torch.empty_like(bank) if ctx.needs_input_grad[1] else None
        space = _Space(embedding, min(chunk, len(bank)))
        for start in range(0, len(bank), chunk):
            rows = bank[start : start + chunk]
            similarity, by_similarity, probability = (space.take(number, rows) for number in range(3))
            torch.mm(embedding, rows.T, out=similarity)
            torch.add(-log_normalizer * BITS, similarity, alpha=BITS / temperature, out=by_similarity)
            by_similarity.exp2_().mul_(by_normalizer / temperature)
            if entropy_temperature is not None:
                scale = 1 / entropy_temperature
                torch.add(-entropy_log_normalizer * BITS, similarity, alpha=BITS * scale, out=probability).exp2_()
                about_mean = similarity.mul_(by_entropy * scale**2).sub_(mean * by_entropy * scale)
                by_similarity.addcmul_(probability, about_mean)
            by_embedding.addmm_(by_similarity, rows)
            if by_bank is not None:
                torch.mm(by_similarity.T, embedding, out=by_bank[start : start + chunk])
        return by_embedding, by_bank, None, None, None, None
