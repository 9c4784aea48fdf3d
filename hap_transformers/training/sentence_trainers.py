"""What is special about the trainers of Sentence Transformers: they train pipelines, on columns of texts."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..components.forwards import eager_copy
from ..data.calibration import calibration_batches
from ..refit.dense_copy import own_all
from ..sensitivity.self_loss import SelfLoss, head_of
from ..sentence_encoders import EmbeddingLoss, transformer_of
from .config import HapConfig
from .distillation import distillation_loss, embedding_loss
from .hooks import ComputeLoss, TrainerHooks, register_hooks


@dataclass
class TakingTurns:
    """Batches of several loaders, one of each in turn."""

    loaders: list[Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return (batch for turn in zip_longest(*self.loaders) for batch in turn if batch is not None)


class PipelineHooks(TrainerHooks):
    """Hooks of trainers whose model is a pipeline of modules, of which the first holds the model of Transformers.

    That model is pruned, scored and refitted. In recovery the pipeline follows the dense pipeline: on the texts of
    each call that the trainer's loss makes, or, with `distillation=1.0`, on all columns of texts without that loss.
    """

    package = "sentence_transformers"
    several_datasets = True
    # Name of the pipeline's result.
    output: str

    def features(self, batch: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Makes inputs of the pipeline of a training batch."""
        raise NotImplementedError

    def distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Returns the mean distance between results of both pipelines."""
        raise NotImplementedError

    @property
    def pipeline(self) -> Any:
        """The pipeline that the trainer trains."""
        return self.trainer._trained_model()

    def validate(self, config: HapConfig) -> None:
        """Refuses pipelines that begin with no transformer, and distillation of hidden states."""
        transformer_of(self.pipeline)
        if config.distillation_hidden:
            raise ValueError(
                f"{type(self.trainer).__name__} distils what its {type(self.pipeline).__name__} returns, not the "
                "hidden states inside. Set distillation_hidden=0."
            )

    def validate_teacher(self, teacher: Any, config: HapConfig | None) -> None:
        """Refuses what is no pipeline of the same sort, or has another transformer than the pipeline can follow."""
        wanted = self.trainer.model_class
        if not isinstance(teacher, wanted):
            raise TypeError(
                f"The teacher is a {type(teacher).__name__}; {type(self.trainer).__name__} distils from a "
                f"{wanted.__name__}. Give one, such as {wanted.__name__}('FOLDER')."
            )
        super().validate_teacher(teacher, config)

    def validate_labels(self, compute_loss: ComputeLoss, config: HapConfig) -> None:
        """Leaves it to the loss of the trainer whether it needs labels."""

    def model(self, trained: Any) -> PreTrainedModel:
        """Returns the transformer of a pipeline, or a pipeline without one."""
        inner = getattr(trained[0], "auto_model", None)
        return inner if isinstance(inner, PreTrainedModel) else trained

    def teacher(self, dense: PreTrainedModel) -> nn.Module:
        """Makes a dense pipeline."""
        own_all(dense, self.student)
        card = self.pipeline.model_card_data  # It refers to the trainer.
        return eager_copy(self.pipeline, {id(self.student): dense, id(card): card})

    def card(self) -> dict[str, Any]:
        """The class that loads the pipeline."""
        return {"loader": f"sentence_transformers.{type(self.pipeline).__name__}"}

    def loader(self, dataset: Any, max_examples: int) -> Iterable[Any]:
        """Draws examples; of several data sets as many as their share."""
        trainer = self.trainer
        parts = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
        total = sum(map(len, parts)) if len(parts) > 1 else 1
        counts = [max(1, max_examples * len(part) // total) if len(parts) > 1 else max_examples for part in parts]
        size, collate = trainer._train_batch_size, trainer.data_collator
        return TakingTurns(
            [
                calibration_batches(part, count, trainer.args.seed, size, collate)
                for part, count in zip(parts, counts, strict=True)
            ]
        )

    def inputs(self, batch: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Makes a batch of every column of texts."""
        return self.features(batch)

    def forward_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the tensors, which are what the transformer takes."""
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        """Runs the transformer, pruned or dense, alone."""
        return model(**self.forward_inputs(inputs))[0]

    def recovery_loss(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Adds the distance from the dense pipeline to the trainer's loss, which is not computed if it weighs 0."""
        weight, teacher = self.config.distillation, self.trainer.teacher
        loss, calls = torch.zeros((), device=self.student.device), list[Any]()
        if weight < 1:
            with _called(self.pipeline) as calls:
                loss = compute_loss(model, dict(inputs))
        # Losses that cache gradients call it without any.
        seen = [(given, found[self.output]) for given, found in calls if found[self.output].requires_grad]
        if not seen:
            seen = [((given, {}), model(dict(given))[self.output]) for given in self.features(dict(inputs))]
        distances = []
        for (features, kwargs), student in seen:
            with torch.no_grad(), self.trainer.accelerator.autocast():
                target = teacher(features, **kwargs)[self.output]
            distances.append(self.distance(student, target))
        return (1 - weight) * loss + weight * torch.stack(distances).mean(), {}


class SentenceHooks(PipelineHooks):
    """Hooks of `SentenceTransformerTrainer`.

    Its losses compare embeddings of several texts: most are no mean over examples that do not depend on each other,
    nor of one call of the model. So components are scored without them, by the squared distance of the pipeline's
    embedding to itself ([`SelfLoss`][hap_transformers.SelfLoss]), on all columns of texts.
    """

    output = "sentence_embedding"

    def validate_teacher(self, teacher: Any, config: HapConfig | None) -> None:
        """Refuses teachers whose embeddings have another size, too."""
        super().validate_teacher(teacher, config)
        sizes = [_dimension(pipeline) for pipeline in (teacher, self.pipeline)]
        if config is not None and config.distils and sizes[0] != sizes[1]:
            raise ValueError(
                f"The teacher's embeddings have {sizes[0]} dimensions, those of the {type(self.pipeline).__name__} "
                f"{sizes[1]}. Give a teacher with embeddings of the same size, or set distillation=0."
            )

    def features(self, batch: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Returns the columns of texts."""
        return self.trainer.collect_features(batch)[0]

    def scoring_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the squared distance of embeddings to themselves."""
        loss, tensors = EmbeddingLoss(self.pipeline), self.forward_inputs(inputs)
        # Other than its default prompt, the prompts are those of the training arguments.
        loss.beside = {name: value for name, value in inputs.items() if name not in tensors}
        return loss(model, tensors)

    def distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """One minus the cosine; of embeddings that the loss cuts short (Matryoshka), of as many dimensions."""
        return embedding_loss(student, teacher[..., : student.shape[-1]])


class CrossEncoderHooks(PipelineHooks):
    """Hooks of `CrossEncoderTrainer`.

    Components are scored without its losses, some of which compare pairs with each other, by the distance of logits to
    themselves ([`SelfLoss`][hap_transformers.SelfLoss]). The pairs are those of the first column of texts with each
    other column. Recovery distils logits.
    """

    output = "scores"

    def validate(self, config: HapConfig) -> None:
        """Refuses rerankers that are no classifiers, too."""
        super().validate(config)
        if head_of(self.student) != "ForSequenceClassification":
            raise ValueError(
                f"The {type(self.pipeline).__name__} holds a {type(self.student).__name__}. Only classifiers of "
                "sequences are pruned as cross-encoders."
            )

    def features(self, batch: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Returns the pairs of each column with the first, tokenized. A column may hold lists of texts."""
        beside = {name: batch.get(name) for name in ("prompt", "task")}
        columns = [value for name, value in batch.items() if isinstance(value, list) and name != "label"]
        for column in columns[1:]:
            pairs = [
                (first, text)
                for first, texts in zip(columns[0], column, strict=True)
                for text in ([texts] if isinstance(texts, str) else texts)
                if isinstance(text, str)
            ]
            if pairs:
                features = self.trainer._prepare_input(self.pipeline.preprocess(pairs, **beside))
                yield cast(dict[str, Any], features)

    def scoring_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the distance of logits to themselves."""
        return SelfLoss()(model, self.forward_inputs(inputs))

    def distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The distance of logits, as for other classifiers."""
        kind, temperature = self.student.config.problem_type, self.config.distillation_temperature
        return distillation_loss({"logits": student}, {"logits": teacher}, temperature, problem_type=kind)


@contextmanager
def _called(pipeline: nn.Module) -> Iterator[list[Any]]:
    """Collects what a pipeline was given, without what its modules add to it, and what it returned."""
    given: list[Any] = []
    calls: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((dict(args[0]), kwargs))

    before = pipeline.register_forward_pre_hook(note, with_kwargs=True)
    after = pipeline.register_forward_hook(lambda module, args, outputs: calls.append((given.pop(), outputs)))
    try:
        yield calls
    finally:
        before.remove()
        after.remove()


def _dimension(pipeline: Any) -> int | None:
    of_release_6 = getattr(pipeline, "get_embedding_dimension", None)
    return (of_release_6 or pipeline.get_sentence_embedding_dimension)()


register_hooks("sentence_transformers", "SentenceTransformerTrainer", SentenceHooks)
register_hooks("sentence_transformers", "CrossEncoderTrainer", CrossEncoderHooks)
