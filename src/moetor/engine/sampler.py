"""From logits to tokens, for all rows of a step at once, on the device.

Shape letters: R sampled rows of a step, V vocabulary, N log-probabilities asked for, P rows of the
runner's tables, G rows with a grammar.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moetor.engine.grammar_masks import allowed_tokens
from moetor.engine.sequence import Scheduled, Sequence
from moetor.engine.transfer import columns_to_device, to_device, to_host
from moetor.kernels.triton import support
from moetor.kernels.triton.draw import draw

_MASK = 2**64 - 1
# How many of the likeliest tokens are looked at before the whole vocabulary is sorted.
_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the rows that asked: of the token taken, and of the likeliest ones.

    Attributes:
        rows: of the step's sampled rows.
        taken_R: float32, and rank_R: int64, 1 for the likeliest.
        top_RN, ids_RN: the likeliest tokens, in order.
    """

    rows: list[int]
    taken_R: Tensor
    rank_R: Tensor
    top_RN: Tensor
    ids_RN: Tensor

    def to_host(self) -> TokenLogprobs:
        """Copies that are read when the step's event has come."""
        columns = (self.taken_R, self.rank_R, self.top_RN, self.ids_RN)
        return TokenLogprobs(self.rows, *map(to_host, columns))


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled, on the device."""

    tokens_R: Tensor
    logprobs: TokenLogprobs | None


class Sampler:
    """Applies every field of `SamplingParams` that changes which token is taken.

    A draw is a function of the logits, the sequence's seed and the token's position: nothing else
    in the batch matters to it.

    Args:
        rows: P, of the runner's tables.
        device: of the logits.
        batch_invariant: rows are taken one by one, so that no row's bits depend on the others.
    """

    def __init__(self, rows: int, device: torch.device, *, batch_invariant: bool = False) -> None:
        self._rows, self._device = rows, device
        self._one_by_one = batch_invariant
        self._counts_PV: Tensor | None = None
        self._prompt_PV: Tensor | None = None
        self._holders: dict[int, Sequence] = {}
        # On a GPU a sort of the vocabulary takes longer than the model.
        self._in_one_launch = support.device_refusal(device.type) is None

    @staticmethod
    def plain(parts: Items[Scheduled]) -> bool:
        """Whether each row takes its likeliest token and nothing else is asked."""
        return not any(
            p.penalised
            or p.logit_bias
            or not p.greedy
            or p.logprobs is not None
            or p.min_tokens
            or p.structured_outputs is not None
            for p in (part.sequence.params for part in parts)
        )

    def sample(self, logits_RV: Tensor, parts: Items[Scheduled]) -> Sampled:
        """One token for each row.

        Args:
            logits_RV: any floating dtype; not changed.
            parts: the sequence's part for each row.
        """
        params = [part.sequence.params for part in parts]
        if self.plain(parts):
            return Sampled(logits_RV.argmax(-1), None)
        if self._one_by_one and len(parts) > 1:
            rows = logits_RV.split(1)
            return _joined([self.sample(row, [one]) for row, one in zip(rows, parts, strict=True)])
        raw_RV = logits_RV.float()
        shaped_RV = self._penalised(self._biased(raw_RV, parts), parts)
        shaped_RV = self._in_form(shaped_RV, parts)
        drawn = [row for row, p in enumerate(params) if not p.greedy]
        if len(drawn) == len(parts):
            tokens_R = self._draw(shaped_RV, parts)
        else:
            tokens_R = shaped_RV.argmax(-1)
            if drawn:
                rows = self._tensor(drawn)
                tokens_R[rows] = self._draw(shaped_RV[rows], [parts[row] for row in drawn])
        self._count(tokens_R, parts)
        asked = [row for row, p in enumerate(params) if p.logprobs is not None]
        if not asked:
            return Sampled(tokens_R, None)
        rows = self._tensor(asked)
        most = max(params[row].logprobs or 0 for row in asked)
        return Sampled(tokens_R, token_logprobs(raw_RV[rows], tokens_R[rows], most, asked))

    def _tensor(self, values: Items[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return to_device(values, self._device, dtype)

    def _biased(self, logits_RV: Tensor, parts: Items[Scheduled]) -> Tensor:
        """With `logit_bias`, and without end tokens before `min_tokens`."""
        rows: list[int] = []
        ids: list[int] = []
        added: list[float] = []
        for row, part in enumerate(parts):
            params = part.sequence.params
            for token, bias in (params.logit_bias or {}).items():
                rows.append(row)
                ids.append(token)
                added.append(bias)
            if part.position < params.min_tokens and part.sequence.grammar is None:
                for token in part.sequence.ends:
                    rows.append(row)
                    ids.append(token)
                    added.append(-torch.inf)
        if not rows:
            return logits_RV
        where = (self._tensor(rows), self._tensor(ids))
        return logits_RV.index_put(where, self._tensor(added, torch.float32), accumulate=True)

    def _in_form(self, logits_RV: Tensor, parts: Items[Scheduled]) -> Tensor:
        """With -inf for tokens that a row's grammar does not allow."""
        chosen = [row for row, part in enumerate(parts) if part.sequence.grammar is not None]
        if not chosen:
            return logits_RV
        masks = allowed_tokens([parts[row] for row in chosen])
        bytes_GW = masks.to(self._device, non_blocking=True).view(torch.uint8)
        bits = torch.arange(8, dtype=torch.uint8, device=self._device)
        banned_GV = ((bytes_GW[:, :, None] >> bits) & 1).flatten(1)[:, : logits_RV.shape[1]] == 0
        if len(chosen) == len(parts):
            return logits_RV.masked_fill(banned_GV, -torch.inf)
        rows = self._tensor(chosen)
        return logits_RV.index_copy(0, rows, logits_RV[rows].masked_fill(banned_GV, -torch.inf))

    def _penalised(self, logits_RV: Tensor, parts: Items[Scheduled]) -> Tensor:
        chosen = [row for row, part in enumerate(parts) if part.sequence.params.penalised]
        if not chosen:
            return logits_RV
        for row in chosen:
            self._hold(parts[row].sequence, logits_RV.shape[1])
        assert self._counts_PV is not None
        assert self._prompt_PV is not None
        rows = self._tensor(chosen)
        table = self._tensor([_row(parts[row]) for row in chosen])
        params = [parts[row].sequence.params for row in chosen]

        def column(name: str) -> Tensor:
            return self._tensor([getattr(p, name) for p in params], torch.float32)[:, None]

        counts = self._counts_PV[table]
        seen = (counts > 0) | self._prompt_PV[table]
        some = logits_RV[rows]
        factor = column("repetition_penalty")
        repeated = torch.where(some > 0, some / factor, some * factor)
        some = torch.where(seen, repeated, some)
        some = some - column("frequency_penalty") * counts
        some = some - column("presence_penalty") * (counts > 0)
        return logits_RV.index_copy(0, rows, some)

    def _hold(self, sequence: Sequence, vocabulary: int) -> None:
        """Makes the tables' row that of this sequence; it holds the row from then on."""
        row = sequence.row
        assert row is not None
        if self._holders.get(row) is sequence:
            return
        if self._counts_PV is None or self._prompt_PV is None:
            size = (self._rows, vocabulary)
            self._counts_PV = torch.zeros(size, dtype=torch.int32, device=self._device)
            self._prompt_PV = torch.zeros(size, dtype=torch.bool, device=self._device)
        prompt = self._tensor(sequence.token_ids[: sequence.prompt_len])
        output = self._tensor(sequence.output_ids)
        self._prompt_PV[row] = False
        # Assigning through an index would copy the value from the host, and wait.
        self._prompt_PV[row].index_fill_(0, prompt, True)
        self._counts_PV[row] = 0
        self._counts_PV[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self._holders[row] = sequence

    def _count(self, tokens_R: Tensor, parts: Items[Scheduled]) -> None:
        chosen = [row for row, part in enumerate(parts) if part.sequence.params.penalised]
        if chosen and self._counts_PV is not None:
            table = self._tensor([_row(parts[row]) for row in chosen])
            one = torch.ones(len(chosen), dtype=torch.int32, device=self._device)
            tokens = tokens_R[self._tensor(chosen)]
            self._counts_PV.index_put_((table, tokens), one, accumulate=True)

    def forget(self, sequence: Sequence) -> None:
        """Lets go of a sequence that left its row."""
        for row, holder in list(self._holders.items()):
            if holder is sequence:
                del self._holders[row]

    def _draw(self, logits_RV: Tensor, parts: Items[Scheduled]) -> Tensor:
        params = [part.sequence.params for part in parts]
        size = logits_RV.shape[1]
        draws = [uniform(part.sequence.seed, part.position) for part in parts]
        heat, top_p, min_p, places, top_k = columns_to_device(
            [
                torch.tensor([p.temperature for p in params], dtype=torch.float32),
                torch.tensor([p.top_p for p in params], dtype=torch.float32),
                torch.tensor([p.min_p for p in params], dtype=torch.float32),
                torch.tensor(draws, dtype=torch.float32),
                torch.tensor(
                    [p.top_k if 0 < p.top_k < size else size for p in params], dtype=torch.int32
                ),
            ],
            self._device,
        )
        range_ = torch.finfo(torch.float32)  # outside of it they would be 0 and infinite
        heat = heat.clamp(range_.tiny, range_.max)[:, None]
        # The largest is taken off first: a tiny temperature would make infinities otherwise.
        scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / heat
        chosen = [row for row, p in enumerate(params) if p.truncated]
        if chosen and self._in_one_launch:
            return draw(scaled_RV, top_k, top_p, min_p, places)
        limits = tuple(column[:, None] for column in (top_k, top_p, min_p))
        if len(chosen) == len(params):
            scaled_RV = self._truncated(scaled_RV, *limits)
        elif chosen:
            rows = self._tensor(chosen)
            some = self._truncated(scaled_RV[rows], *(column[rows] for column in limits))
            scaled_RV = scaled_RV.index_copy(0, rows, some)
        sums_RV = scaled_RV.softmax(-1).cumsum(-1)
        # Below the last sum, so that the token found has a probability.
        place_R1 = places[:, None] * sums_RV[:, -1:]
        found = torch.searchsorted(sums_RV, place_R1, right=True)[:, 0]
        last = (sums_RV < sums_RV[:, -1:]).sum(-1)
        return torch.minimum(found, last)

    def _truncated(self, scaled_RV: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """With -inf for tokens outside the limits [R, 1]."""
        size = scaled_RV.shape[1]
        # Sorting a whole vocabulary is slow on a CPU.
        ordered, order, enough = scaled_RV, scaled_RV, False
        if self._device.type == "cpu" and size > _CANDIDATES:
            ordered, order = scaled_RV.topk(_CANDIDATES, dim=-1)
            probable, before = _probable(ordered, scaled_RV, top_k)
            smallest = probable[:, -1:]
            complete = (top_k <= _CANDIDATES) | (before[:, -1:] + smallest >= top_p)
            enough = bool((complete | (smallest < min_p * probable[:, :1])).all())
        if not enough:
            ordered, order = scaled_RV.sort(dim=-1, descending=True, stable=True)
            probable, before = _probable(ordered, scaled_RV, top_k)
        # The likeliest has nothing before it and always stays.
        out = (before >= top_p) | (probable < min_p * probable[:, :1]) | (probable == 0)
        out[:, 0] = False
        ordered = ordered.masked_fill(out, -torch.inf)
        return torch.full_like(scaled_RV, -torch.inf).scatter_(-1, order, ordered)


def _probable(ordered_RN: Tensor, scaled_RV: Tensor, top_k_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the likeliest tokens among the `top_k` likeliest, 0 for those beyond, and
    the sum of those before each.
    """
    places = torch.arange(ordered_RN.shape[1], device=ordered_RN.device)
    kept_RN = ordered_RN.masked_fill(places >= top_k_R1, -torch.inf)
    some_R1 = kept_RN.logsumexp(-1, keepdim=True)
    all_R1 = scaled_RV.logsumexp(-1, keepdim=True)
    total_R1 = torch.where(top_k_R1 < scaled_RV.shape[1], some_R1, all_R1)
    probable_RN = (kept_RN - total_R1).exp()
    return probable_RN, probable_RN.cumsum(-1) - probable_RN


def _row(part: Scheduled) -> int:
    assert part.sequence.row is not None
    return part.sequence.row


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 24 bits, from two numbers (SplitMix64, Steele et al. 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        state = mixed ^ (mixed >> 31)
    return (state >> 40) * 2.0**-24


def token_logprobs(
    logits_RV: Tensor, tokens_R: Tensor, most: int, rows: list[int]
) -> TokenLogprobs:
    """Log-probabilities under the model's own logits, which no parameter has changed.

    Args:
        logits_RV: float32.
        tokens_R: the tokens taken.
        most: N.
        rows: what the rows are called in the answer.
    """
    normal_RV = logits_RV.log_softmax(-1)
    taken_R1 = normal_RV.gather(1, tokens_R[:, None])
    top_RN, ids_RN = normal_RV.topk(min(most, normal_RV.shape[1]), dim=-1)
    rank_R = (normal_RV > taken_R1).sum(-1) + 1
    return TokenLogprobs(rows, taken_R1[:, 0], rank_R, top_RN, ids_RN)


def joined_logprobs(found: Items[TokenLogprobs]) -> TokenLogprobs:
    """Those of several calls as those of one; likeliest tokens as many as the call with the most
    has, behind the others' minus infinity.
    """
    most = max(one.top_RN.shape[1] for one in found)
    missing = [most - one.top_RN.shape[1] for one in found]
    return TokenLogprobs(
        [row for one in found for row in one.rows],
        torch.cat([one.taken_R for one in found]),
        torch.cat([one.rank_R for one in found]),
        torch.cat(
            [
                F.pad(one.top_RN, (0, n), value=-torch.inf)
                for n, one in zip(missing, found, strict=True)
            ]
        ),
        torch.cat([F.pad(one.ids_RN, (0, n)) for n, one in zip(missing, found, strict=True)]),
    )


def _joined(found: Items[Sampled]) -> Sampled:
    """One row each."""
    asked = [
        replace(one.logprobs, rows=[row])
        for row, one in enumerate(found)
        if one.logprobs is not None
    ]
    tokens_R = torch.cat([one.tokens_R for one in found])
    return Sampled(tokens_R, joined_logprobs(asked) if asked else None)
