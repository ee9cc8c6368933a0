"""A Hugging Face classifier whose encoder is one `BertLayer`, applied until it settles.

Only the layer is exchanged; embeddings, padding masks, dropout, pooler and loss stay the library's. The model, built from
a config, tells which word a sentence favours; counting words would be right for 86 % of the sentences.

    python examples/huggingface.py --steps 80
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from phantomgrad import Anderson, KrylovPhantom, attach

WORDS, LENGTH = 4, 12


class Cell(nn.Module):
    """Adds the input to the state, since the layer has no second argument. Masks and the like go through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # With all of the state 5 solves of a run missed their tolerance, with half of it none. In transformers 4 a
        # layer returns a tuple: attach with output=0, which says where in it the state is.
        return self.layer(0.5 * z + x, *args, **kwargs)


class EquilibriumLayer(nn.Module):
    """Takes a layer's place in an encoder: what the layer was given becomes the injected input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.cell = Cell(layer)
        self.equilibrium = attach(self.cell, KrylovPhantom(), solver=Anderson())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.cell(torch.zeros_like(hidden_states), hidden_states, *args, **kwargs)


def sentences(count: int) -> dict[str, Tensor]:
    """Ids of words 1 to 4 padded with 0, their mask, and as the label the favourite word: half of the sentence."""
    favourite, ids = torch.randint(WORDS, (count,)), torch.randint(1, WORDS + 1, (count, LENGTH))
    ids = torch.where(torch.rand(count, LENGTH) < 0.4, favourite.unsqueeze(1) + 1, ids)
    mask = torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (count, 1))
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long(), "labels": favourite}


def main(steps: int = 80) -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS + 1, num_labels=WORDS, **sizes))
    layers = model.bert.encoder.layer
    layers[0] = EquilibriumLayer(layers[0])
    optimizer, tests = torch.optim.AdamW(model.parameters(), lr=3e-3), sentences(500)
    before = model.eval()(**tests).loss.item()
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**sentences(32)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        result = model.eval()(**tests)
    after, accuracy = result.loss.item(), (result.logits.argmax(-1) == tests["labels"]).float().mean().item()
    print(f"loss on unseen sentences: {before:.3f}, after {steps} training steps {after:.3f}; {accuracy:.1%} are right")
    print(layers[0].equilibrium.solution)
    return model, {"before": before, "after": after, "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    main(**vars(parser.parse_args()))
