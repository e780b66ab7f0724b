"""The projector `probe`: it aligns hosts by their activations on the same fixed words, the probe words.

Shape suffixes: W words, I in, O out, Q canonical width, N spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.adapters.unihyperlora.projectors import Fixed, codes_of, read_codes, write_codes
from fastpeft.adapters.unihyperlora.quantise import dequantise, quantise
from fastpeft.adapters.unihyperlora.sites import Site
from fastpeft.errors import UserError
from fastpeft.models.fast.last_layer import every_token

SENTENCES = """
the old man walked slowly along the river and looked for his lost dog
she did not like the film because the story was too long and the end was sad
after the war many people left the city and moved to small towns near the coast
water boils at a lower temperature high in the mountains than it does by the sea
we have three tickets for the concert on friday but nobody wants to go with us
the company said that its profit fell by nine percent in the first quarter of the year
can you tell me where the nearest hospital is and how much a taxi would cost
his brother plays the violin very well although he never had a good teacher
the new phone is fast and light and its camera takes beautiful pictures at night
if it rains tomorrow the match will be moved to the large hall behind the school
scientists found a fish that lives deep in the ocean and makes its own light
the bread was stale the soup was cold and the waiter forgot our drinks twice
in the north of the country winters are dark and cold while summers are short
the program stops when the file is empty or when the user presses a key
""".strip().splitlines()
WORDS = [sentence.split() for sentence in SENTENCES]
NUM_WORDS = sum(map(len, WORDS))


@dataclass(frozen=True)
class Space:
    """A canonical space of the source host, to which a set of codes belongs."""

    depth: float
    what: str
    """`in.` and the kind of input, or `out.` and a role."""


@dataclass(frozen=True)
class Codes:
    """Codes of the probe words in each space, in 8 bits."""

    spaces: tuple[Space, ...]
    codes_NQW: torch.Tensor
    """int8."""
    scale_NQ: torch.Tensor

    def of(self, depth: float, *whats: str) -> torch.Tensor:
        """(W, Q), codes at the nearest depth of the first of `whats` that has any.

        Raises:
            UserError: there are no codes for any of them.
        """
        for what in whats:
            there = [i for i, space in enumerate(self.spaces) if space.what == what]
            if there:
                i = min(there, key=lambda i: abs(self.spaces[i].depth - depth))
                return dequantise(self.codes_NQW[i], self.scale_NQ[i]).t()
        had = ", ".join(sorted({space.what for space in self.spaces}))
        raise UserError(f"the adapter has no codes for {whats[0]} of this host; it has {had}")


@torch.no_grad()
def activations(
    model: nn.Module, tokenizer: Any, sites: Sequence[Site]
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[str, torch.Tensor]]:
    """Activations of a host on the probe words, averaged over the tokens of each word.

    Returns:
        inputs (W, I) by layer and kind of input; outputs (W, O) by site name.

    Raises:
        UserError: the tokenizer cannot map tokens to words.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("projector probe needs a tokenizer that maps tokens to words (tokenizer.json); take coordinate")
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    own: torch.Tensor | None = None

    def kept(site: Site) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
            assert own is not None
            x = args[0]
            if x.numel() != own.shape[1] * site.num_in:  # DeBERTa also projects its relative position embeddings
                return
            if (key := (site.layer, site.reads)) not in inputs or len(inputs[key]) < len(
                outputs.get(site.name, ())
            ) + 1:
                inputs.setdefault(key, []).append(own @ x.reshape(-1, site.num_in).float())
            outputs.setdefault(site.name, []).append(own @ y.reshape(-1, site.num_out).float())

        return keep

    hooks = [model.get_submodule(site.name).register_forward_hook(kept(site)) for site in sites]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with every_token(model):
            for words in WORDS:
                encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
                own = _word_means(encoded.word_ids(0), len(words)).to(device)
                model(input_ids=encoded["input_ids"].to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {key: torch.cat(x) for key, x in inputs.items()}, {name: torch.cat(y) for name, y in outputs.items()}


def _word_means(word_ids: list[int | None], num_words: int) -> torch.Tensor:
    """(num_words, tokens): row w averages over the tokens of word w."""
    member = torch.zeros(num_words, len(word_ids))
    for token, word in enumerate(word_ids):
        if word is not None:
            member[word, token] = 1.0
    return member / member.sum(1, keepdim=True).clamp_min(1.0)


def make_codes(model: nn.Module, tokenizer: Any, sites: Sequence[Site], width: int) -> Codes:
    """Codes of the probe words for each canonical space of a source host."""
    inputs, outputs = activations(model, tokenizer, sites)
    depth = {site.layer: site.depth for site in sites}
    spaces = [Space(depth[layer], f"in.{reads}") for layer, reads in inputs]
    spaces += [Space(site.depth, f"out.{site.role}") for site in sites]
    found = [codes_of(x, width) for x in inputs.values()] + [codes_of(outputs[site.name], width) for site in sites]
    quantised = [quantise(codes_WQ.t(), 8) for codes_WQ in found]
    return Codes(
        tuple(spaces), torch.stack([q.cpu() for q, _ in quantised]), torch.stack([s.cpu() for _, s in quantised])
    )


def fit(model: nn.Module, tokenizer: Any, sites: Sequence[Site], codes: Codes) -> dict[str, Fixed]:
    """Projections by site name, fitted so that the host's activations map to the codes."""
    inputs, outputs = activations(model, tokenizer, sites)
    device = next(model.parameters()).device
    read = {
        (s.layer, s.reads): read_codes(inputs[s.layer, s.reads], codes.of(s.depth, f"in.{s.reads}").to(device))
        for s in {(s.layer, s.reads): s for s in sites}.values()
    }
    found = {}
    for site in sites:
        phi_in, offset = read[site.layer, site.reads]
        other = ("out.up",) if site.role == "gate" else ()
        phi_out = write_codes(outputs[site.name], codes.of(site.depth, f"out.{site.role}", *other).to(device))
        found[site.name] = Fixed(phi_in, phi_out, offset)
    return found
