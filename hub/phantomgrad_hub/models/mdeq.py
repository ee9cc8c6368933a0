"""The Multiscale Deep Equilibrium classifier: stem, block at its equilibrium, head."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

import phantomgrad
from phantomgrad_hub.checkpoint import load_checkpoint, save_checkpoint
from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.download import locate
from phantomgrad_hub.errors import CheckpointError, LabelError
from phantomgrad_hub.facts import Facts, Source
from phantomgrad_hub.labels import LabelLike, default_labels, parse_labels
from phantomgrad_hub.models.block import MultiscaleBlock, State
from phantomgrad_hub.models.head import build_head
from phantomgrad_hub.models.stem import Stem
from phantomgrad_hub.photos import ImageSource
from phantomgrad_hub.preprocessing import Preprocessing
from phantomgrad_hub.remote.pull import Access

if TYPE_CHECKING:
    from phantomgrad_hub.remote.push import Pushed

_CLASSIFY_BATCH = 32


class MDEQ(nn.Module):
    """Classify images by the equilibrium of a multiscale block, trained with phantom gradients.

    `model(images)` maps `(B, 3, H, W)` to logits `(B, num_classes)`; `model.classify(photo)` takes a file or PIL image.
    `model.block(z0, injection)` is attached: it returns its equilibrium, found by the config's solver and carrying the
    config's gradient. Bai, Koltun and Kolter, "Multiscale Deep Equilibrium Models", 2020.
    """

    def __init__(
        self,
        config: MDEQConfig,
        *,
        labels: Sequence[LabelLike] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.classes = default_labels(config.num_classes) if labels is None else parse_labels(labels)
        """Name and, where known, WordNet id of each class: a tuple of `ClassLabel`."""
        if len(self.classes) != config.num_classes:
            raise LabelError(f"labels names {len(self.classes)} classes, num_classes is {config.num_classes}")
        self.preprocessing = Preprocessing(size=config.image_size) if preprocessing is None else preprocessing
        self.facts = Facts()
        """What its card tells: results, training, terms."""
        self.source: Source | None = None
        """The repository and the resolved commit that it was fetched from; None for a model made or saved here."""
        self.stem = Stem(config)
        self.block = MultiscaleBlock(config)
        self.head = build_head(config)
        self._initialise()
        phantomgrad.attach(
            self.block,
            config.gradient,
            solver=config.solver,
            eval_solver=config.eval_solver,
            batched_inputs=("injection", "masks"),
        )

    @property
    def labels(self) -> list[str]:
        """The unique name of each class."""
        return [label.name for label in self.classes]

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        return self.head(self.equilibrium(self.inject(images)))

    def inject(self, images: Tensor) -> Tensor:
        """The injection `(B, channels[0], H', W')` of images `(B, 3, H, W)`, constant during the solve."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"expected float images (B, 3, H, W), got {got}; `preprocess` makes them of a photo")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"expected float images (B, 3, H, W), got shape {tuple(images.shape)}")
        return self.stem(images)

    def initial_state(self, injection: Tensor) -> State:
        """The zero state, one feature map per branch, from which the equilibrium is sought."""
        return self.block.initial_state(injection)

    def equilibrium(self, injection: Tensor) -> State:
        """The fixed point of the block for `injection`, one feature map per branch."""
        return self.block(self.initial_state(injection), *self.block_inputs(injection))

    def block_inputs(self, injection: Tensor) -> tuple[Any, ...]:
        """What the block takes beside its state: the injection, and dropout masks where there is dropout."""
        masks = self._draw_masks(injection)
        return (injection,) if masks is None else (injection, masks)

    def preprocess(self, image: ImageSource) -> Tensor:
        """The photo as `(1, 3, H, W)`, as this model was trained to see it; raises `ImageError` if it is unreadable."""
        return self.preprocessing(image)

    @overload
    def classify(self, images: ImageSource, top: int = 5) -> list[tuple[str, float]]: ...
    @overload
    def classify(self, images: list[Any] | tuple[Any, ...], top: int = 5) -> list[list[tuple[str, float]]]: ...
    @torch.no_grad()
    def classify(
        self, images: ImageSource | list[Any] | tuple[Any, ...], top: int = 5
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """The `top` classes of a photo with their probabilities, best first; for a list, one such list per photo.

        A photo is a path, the bytes of a file, an open binary file or a PIL image. The model is used in eval mode and
        left in the mode it was in.
        """
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise ValueError(f"top must be an integer of at least 1, got {top!r}")
        photos = list(images) if isinstance(images, list | tuple) else [images]
        parameter = self.head.classifier.weight
        was_training = self.training
        results = []
        try:
            self.train(False)
            for start in range(0, len(photos), _CLASSIFY_BATCH):
                batch = torch.cat([self.preprocess(photo) for photo in photos[start : start + _CLASSIFY_BATCH]])
                probabilities = self(batch.to(parameter.device, parameter.dtype)).float().softmax(dim=1)
                values, indices = probabilities.topk(min(top, len(self.classes)), dim=1)
                for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True):
                    names = [self.classes[index].name for index in row_indices]
                    results.append(list(zip(names, row_values, strict=True)))
        finally:
            self.train(was_training)
        return results if isinstance(images, list | tuple) else results[0]

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write a checkpoint folder; float16 or bfloat16 weights take half the space and are read as float32."""
        save_checkpoint(self, folder, dtype=dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        overwrite_card: bool = False,
        dtype: torch.dtype = torch.float32,
        token: str | bool | None = None,
    ) -> Pushed:
        """Publish the model as `repo_id` in one commit, with a card made of `model.facts`.

        As `phantomgrad_hub.remote.push.push`, which says what is kept and what is refused.
        """
        from phantomgrad_hub.remote.push import push

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            self.save_pretrained(folder, dtype=dtype)
            return push(
                folder,
                repo_id,
                private=private,
                revision=revision,
                message=commit_message,
                overwrite_card=overwrite_card,
                token=token,
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        revision: str | None = None,
        labels: Sequence[LabelLike] | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> MDEQ:
        """The model of a checkpoint, in eval mode.

        `path_or_repo`: a folder, `embedded` (the checkpoint inside this package) or a repository of the Hugging Face
        Hub, at `revision` (a branch, tag or commit) if given; `user/name@revision` says both. The resolved commit is
        kept as `model.source`. `labels` other than the checkpoint's make a new, random classifier for them.
        `token`, `cache_dir` and `local_files_only` are those of `huggingface_hub`.
        Raises `CheckpointError` that lists what is missing, unknown or of another shape, and `HubError` where the Hub
        cannot be reached or refuses.
        """
        access = Access(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        found = locate(path_or_repo, revision, access)
        try:
            return load_checkpoint(found.folder, labels, found.source)
        except CheckpointError as error:
            if found.source is None:
                raise
            # Where in the cache it lies says nothing to the reader.
            told = str(error).replace(str(found.folder), f"{found.source.repository} at {found.source.commit[:12]}")
            raise type(error)(told) from error

    def _initialise(self) -> None:
        """Draw convolutions without weight norm from `N(0, conv_init_std**2)`, as the official code does."""
        std = self.config.conv_init_std
        for module in self.modules():
            if std is not None and isinstance(module, nn.Conv2d) and not hasattr(module, "parametrizations"):
                nn.init.normal_(module.weight, 0.0, std)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0.0, std)

    def _draw_masks(self, injection: Tensor) -> list[list[Tensor]] | None:
        """One dropout mask `(B, channels[i], 1, 1)` for each residual layer; None where nothing is dropped."""
        keep = 1.0 - self.config.dropout
        if not self.training or keep == 1.0:
            return None
        batch, dtype = injection.shape[0], torch.promote_types(injection.dtype, torch.float32)
        return [
            [injection.new_empty((batch, channels, 1, 1), dtype=dtype).bernoulli_(keep) / keep for _ in range(count)]
            for channels, count in zip(self.config.channels, self.config.blocks_per_branch, strict=True)
        ]
