"""`HapTrainerMixin` in front of the trainers of Sentence Transformers."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from any_trainers import COMMON, CONFIG, texts, without_dropout
from datasets import Dataset, DatasetDict
from script_inputs import save_model
from tiny import WHOLE_HEADS, untouched
from torch.nn import functional as F

from hap_transformers import HapConfig, HapTrainerMixin, SelfLoss, estimate_sensitivity
from hap_transformers.components.structure import recorded_structure


@pytest.fixture(scope="module", autouse=True)
def library():
    """The library takes seconds to import, which collecting the tests should not."""
    return pytest.importorskip("sentence_transformers")


def encoder_of(tmp_path, normalize=True):
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(str(save_model(tmp_path)), max_seq_length=16)
    parts = [transformer, models.Pooling(16), *([models.Normalize()] if normalize else [])]
    encoder = SentenceTransformer(modules=parts, device="cpu")
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return without_dropout(encoder)


def sentence_trainer(tmp_path, encoder=None, columns=None, loss=None, hap_config=CONFIG, teacher=None, **arguments):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    PrunedEncoder = type("PrunedEncoder", (HapTrainerMixin, SentenceTransformerTrainer), {})
    encoder = encoder or encoder_of(tmp_path)
    columns = columns or {"anchor": texts(), "positive": [text + " film" for text in texts()]}
    return PrunedEncoder(
        model=encoder,
        args=SentenceTransformerTrainingArguments(str(tmp_path / "out"), **{**COMMON, **arguments}),
        train_dataset=Dataset.from_dict(columns) if type(columns) is dict else columns,
        loss=loss and loss(encoder),
        hap_config=hap_config,
        teacher=teacher,
    )


def cosine(encoder, dense, sentences):
    found, wanted = (torch.tensor(one.encode(sentences, show_progress_bar=False)) for one in (encoder, dense))
    return F.cosine_similarity(found, wanted).mean().item()


def ranking(encoder):
    from sentence_transformers import losses

    return losses.MultipleNegativesRankingLoss(encoder)


@pytest.mark.parametrize("distillation", [0.9, 1.0])
def test_sentence_transformer_trainer(tmp_path, distillation):
    settings = {"recovery_epochs": 4, "refit": False, "components": WHOLE_HEADS}  # The teacher has the weights.
    config = dataclasses.replace(CONFIG, distillation=distillation, **settings)
    trainer = sentence_trainer(tmp_path, loss=ranking, hap_config=config, learning_rate=3e-3)
    encoder = trainer.model
    trainer.train()
    dense = copy.deepcopy({k: v.clone() for k, v in encoder.state_dict().items()})
    plan = trainer.prune()
    assert plan.count("neurons") and trainer.model is encoder
    assert recorded_structure(encoder[0].auto_model.config) is not None
    assert {k: v.shape for k, v in trainer.teacher.state_dict().items()} == {k: v.shape for k, v in dense.items()}
    before = cosine(encoder, trainer.teacher, texts())
    trainer.train()
    assert trainer._has_distilled and cosine(encoder, trainer.teacher, texts()) > before
    assert all(torch.equal(tensor, dense[name]) for name, tensor in trainer.teacher.state_dict().items())
    trainer.save_model()
    expected = encoder.encode("good film", show_progress_bar=False)
    reloaded = type(encoder)(str(tmp_path / "out"), device="cpu").encode("good film", show_progress_bar=False)
    np.testing.assert_allclose(reloaded, expected, rtol=1e-5, atol=1e-6)
    # Of what the library saves, tests/test_sentence_encoders.py knows that other processes load it.
    encoder.save_pretrained(str(tmp_path / "library"), create_model_card=False)
    for file in (tmp_path / "library").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "library")).read_bytes(), file
    assert HapConfig.load(tmp_path / "out" / "hap_config.json") == config


def test_the_refit_of_encoders(tmp_path):
    """It brings embeddings nearer to the dense ones."""
    distances = []
    for refit in (True, False):
        trainer = sentence_trainer(tmp_path, hap_config=dataclasses.replace(CONFIG, refit=refit, ratio=0.6))
        trainer.prune()
        distances.append(1 - cosine(trainer.model, trainer.teacher, texts()))
    assert distances[0] < 0.5 * distances[1]


def test_encoders_without_labels_or_a_loss(tmp_path):
    """One column of texts is enough with distillation=1.0."""
    config = dataclasses.replace(CONFIG, distillation=1.0, refit=False, recovery_epochs=10)
    trainer = sentence_trainer(tmp_path, columns={"text": texts()}, hap_config=config, learning_rate=5e-3)
    trainer.prune()
    before = cosine(trainer.model, trainer.teacher, texts())
    trainer.train()
    assert 1 - cosine(trainer.model, trainer.teacher, texts()) < 0.7 * (1 - before)


@pytest.mark.parametrize("normalize", [True, False])
def test_encoders_are_scored_by_embeddings_of_all_columns(tmp_path, normalize):
    config = dataclasses.replace(CONFIG, components=WHOLE_HEADS)
    trainer = sentence_trainer(tmp_path, encoder_of(tmp_path, normalize), hap_config=config)
    inner = copy.deepcopy(trainer.model[0].auto_model)
    found = trainer.estimate_sensitivity()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(trainer.args.seed))
    batches = []
    for part in order[:8].split(4):
        for column in ("anchor", "positive"):
            sentences = [trainer.train_dataset[column][i] for i in part.tolist()]
            batches.append(dict(trainer.model.tokenizer(sentences, padding=True, return_tensors="pt")))
    expected = estimate_sensitivity(inner, batches, loss_fn=SelfLoss("mean", normalize), seed=42, progress=False)
    assert found.num_examples == expected.num_examples == 16
    for kind, layers in expected.scores.items():
        torch.testing.assert_close(found.scores[kind], layers, rtol=1e-3, atol=1e-7)


def cached(encoder):
    from sentence_transformers import losses

    return losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2)


def matryoshka(encoder):
    from sentence_transformers import losses

    return losses.MatryoshkaLoss(encoder, ranking(encoder), [16, 8])


@pytest.mark.parametrize("loss", [cached, matryoshka])
def test_losses_that_call_the_encoder_in_ways_of_their_own(tmp_path, loss):
    config = dataclasses.replace(CONFIG, recovery_epochs=4, refit=False, distillation=0.9)
    trainer = sentence_trainer(tmp_path, loss=loss, hap_config=config, learning_rate=3e-3)
    trainer.prune()
    before = cosine(trainer.model, trainer.teacher, texts())
    trainer.train()
    assert cosine(trainer.model, trainer.teacher, texts()) > before


def test_several_data_sets_and_a_run_that_is_resumed(tmp_path):

    pairs = Dataset.from_dict({"anchor": texts(16), "positive": texts(16)})
    triples = Dataset.from_dict({"anchor": texts(8), "positive": texts(8), "negative": texts(8)[::-1]})
    data = DatasetDict(pairs=pairs, triples=triples)
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = sentence_trainer(tmp_path, columns=data, loss=ranking, **saving, num_train_epochs=1)
    widths = {len(batch) for batch in trainer.calibration_batches()}
    assert trainer.estimate_sensitivity().num_examples == 16 and widths
    trainer.prune()
    trainer.train()
    again = sentence_trainer(tmp_path, trainer.model, columns=data, loss=ranking, **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


@pytest.mark.parametrize("budget", ["flops", "latency"])
def test_budgets_of_an_encoder(tmp_path, budget):
    config = dataclasses.replace(CONFIG, ratio=0.3, budget=budget, refit=False)
    plan = sentence_trainer(tmp_path, hap_config=config).prune()
    assert plan.promise[budget] > 0


def test_what_encoders_refuse(tmp_path):
    from sentence_transformers import models

    encoder = encoder_of(tmp_path)
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(ValueError, match="PrunedEncoder distils what its SentenceTransformer returns.*hidden=0"):
        sentence_trainer(tmp_path, encoder, hap_config=dataclasses.replace(CONFIG, distillation_hidden=0.1))
    with pytest.raises(TypeError, match="teacher is a BertModel; PrunedEncoder distils from a SentenceTransformer"):
        sentence_trainer(tmp_path, encoder, teacher=encoder[0].auto_model)
    wider = encoder_of(tmp_path)
    wider.append(models.Dense(16, 8))
    with pytest.raises(ValueError, match="teacher's embeddings have 8 dimensions, those of the Sentence.* 16"):
        sentence_trainer(tmp_path, encoder, teacher=wider)
    assert untouched(encoder, before)
    sentence_trainer(tmp_path, encoder, teacher=encoder_of(tmp_path))


def test_the_mixin_in_front_changes_nothing(tmp_path):
    from sentence_transformers import SentenceTransformerTrainer

    trained = []
    for bases in ((SentenceTransformerTrainer,), (HapTrainerMixin, SentenceTransformerTrainer)):
        mixed = sentence_trainer(tmp_path, loss=ranking, hap_config=None)
        trainer = type("Any", bases, {})(mixed.model, mixed.args, mixed.train_dataset, loss=ranking(mixed.model))
        trainer.train()
        trainer.save_model()
        trained.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_the_card_of_an_encoder_says_how_to_load_it(tmp_path):
    trainer = sentence_trainer(tmp_path, hap_config=dataclasses.replace(CONFIG, refit=False))
    trainer.prune()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "import hap_transformers" in text and "SentenceTransformer(" in text and "pruned" in text


# CrossEncoderTrainer


@pytest.mark.parametrize("labels", [True, False])
def test_cross_encoder_trainer(tmp_path, labels):
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments

    PrunedReranker = type("PrunedReranker", (HapTrainerMixin, CrossEncoderTrainer), {})
    encoder = CrossEncoder(str(save_model(tmp_path)), num_labels=1, device="cpu")
    torch.manual_seed(0)
    for parameter in without_dropout(encoder).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    columns = {"query": texts(), "response": texts()[::-1], **({"label": [1.0, 0.0] * 12} if labels else {})}
    config = dataclasses.replace(CONFIG, distillation=0.9 if labels else 1.0, refit=False, recovery_epochs=4)
    trainer = PrunedReranker(
        model=encoder,
        args=CrossEncoderTrainingArguments(str(tmp_path / "out"), **{**COMMON, "learning_rate": 3e-3}),
        train_dataset=Dataset.from_dict(columns),
        hap_config=config,
    )
    if labels:
        trainer.train()
    assert trainer.prune().count("neurons")
    pairs = list(zip(texts(), texts()[::-1], strict=True))

    def distance():
        found, wanted = (
            torch.tensor(one.predict(pairs, show_progress_bar=False)) for one in (encoder, trainer.teacher)
        )
        return (found.logit() - wanted.logit()).square().mean().item()

    before = distance()
    trainer.train()
    assert trainer._has_distilled and distance() < before
    trainer.save_model()
    reloaded = CrossEncoder(str(tmp_path / "out"), device="cpu")
    found = reloaded.predict([("good film", "bad plot")], show_progress_bar=False)
    expected = encoder.predict([("good film", "bad plot")], show_progress_bar=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_dense_encoder_runs_in_the_precision_of_the_training(tmp_path):
    trainer, found = sentence_trainer(tmp_path, loss=ranking, bf16=True), []
    trainer.prune()
    module = trainer.teacher[0].auto_model.encoder.layer[0].output.dense
    module.register_forward_hook(lambda module, args, output: found.append(output.dtype))
    trainer.train()
    assert set(found) == {torch.bfloat16}
