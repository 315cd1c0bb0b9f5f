"""Tables: nn.Embedding, nn.EmbeddingBag, and a parameter indexed by tokens.

The kernel is that of matching tokens; no gradient is as wide as the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkscope.kernel.rules.use import Seen, TokenUse, bind

if TYPE_CHECKING:
    from ntkscope.kernel.watch import WeightWatch

BAG_SUM, BAG_MEAN = 0, 1


def embedding(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """torch.embedding, which F.embedding calls."""
    given = bind(("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"), args, kwargs)
    output = func(*args, **kwargs)
    if given["scale_grad_by_freq"]:  # the gradient of an example depends on its neighbours
        return Seen(output, output)
    ignored = -1 if given["padding_idx"] is None else given["padding_idx"]
    return Seen(output, output, (TokenUse(given["weight"], tokens=given["indices"].detach(), ignored=ignored),))


def lookup(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`table[tokens]` with one integer tensor."""
    table, index = args
    output = func(*args, **kwargs)
    is_tokens = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool
    if not (is_tokens and watch.is_weight(table) and table.ndim == 2):
        return Seen(output, output)
    tokens = index.detach()
    return Seen(output, output, (TokenUse(table, tokens=torch.where(tokens < 0, tokens + len(table), tokens)),))


def embedding_bag(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """torch.embedding_bag with bags of equal length, summed or averaged."""
    names = (
        "weight",
        "indices",
        "offsets",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "per_sample_weights",
        "include_last_offset",
        "padding_idx",
    )
    given = bind(names, args, kwargs)
    result = func(*args, **kwargs)
    output, indices, offsets = result[0], given["indices"].detach(), given["offsets"]
    num_bags = len(output)
    length = len(indices) // max(1, num_bags)
    is_regular = (
        given["mode"] in (BAG_SUM, BAG_MEAN)
        and not given["scale_grad_by_freq"]
        and num_bags * length == len(indices)
        and torch.equal(offsets[:num_bags], torch.arange(num_bags, device=offsets.device, dtype=offsets.dtype) * length)
    )
    if not is_regular or not watch.is_weight(given["weight"]) or watch.is_weight(given["per_sample_weights"]):
        return Seen(result, output)
    tokens = indices.view(num_bags, length)
    ignored = -1 if given["padding_idx"] is None else given["padding_idx"]
    gains = torch.ones_like(tokens, dtype=output.dtype)
    if given["per_sample_weights"] is not None:
        gains = given["per_sample_weights"].detach().view(num_bags, length)
    elif given["mode"] == BAG_MEAN:
        gains = gains / (tokens != ignored).sum(dim=1, keepdim=True).clamp(min=1)
    return Seen(result, output, (TokenUse(given["weight"], tokens=tokens, gains=gains, ignored=ignored),))
