"""What `HapTrainer` refuses when it is made instead of after hours, and what works besides `Trainer`'s defaults."""

import copy
import dataclasses

import pytest
import torch
from datasets import IterableDataset
from tiny import make_batch, untouched
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from trainers import Rows, make_trainer
from transformers import BertForSequenceClassification, BertModel
from zoo import ZOO

from hap_transformers import HapConfig, PruningPlan, apply_plan, estimate_sensitivity
from hap_transformers.components.releases import TRANSFORMERS_4


def bert(task="ForSequenceClassification", **config):
    return dataclasses.replace(ZOO["bert"], task=task).model(torch.float32, **config)


def projection_of(model):
    return model.bert.encoder.layer[0].attention.self.query


# Arguments


@pytest.mark.parametrize("flag, dtype", [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_evaluation_that_casts_for_good_is_refused(tmp_path, flag, dtype):
    with pytest.raises(ValueError, match=f"{flag}=True casts the weights to {dtype}.*{flag[:4]}=True evaluates in"):
        make_trainer(tmp_path, **{flag: True})
    make_trainer(tmp_path, hap_config=None, **{flag: True})
    make_trainer(tmp_path, model=bert().to(dtype), **{flag: True})  # Casts nothing.


@pytest.mark.skipif(not TRANSFORMERS_4, reason="Transformers 5 saves nothing but safetensors")
def test_checkpoints_that_could_not_be_loaded_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save_safetensors=False saves pytorch_model.bin"):
        make_trainer(tmp_path, save_safetensors=False)
    make_trainer(tmp_path, hap_config=None, save_safetensors=False)


def test_epochs_of_a_stream_are_refused(tmp_path):
    def stream(**config):
        rows = IterableDataset.from_generator(lambda: iter(Rows(8).rows))
        config = HapConfig(ratio=0.5, budget="heads", **config)
        return make_trainer(tmp_path, rows=rows, max_steps=2, hap_config=config)

    with pytest.raises(ValueError, match="recovery_epochs=2 needs a data set with a length, and the train_"):
        stream(recovery_epochs=2)
    stream()


# Models


@pytest.mark.parametrize(
    "change, parts",
    [
        (parametrizations.weight_norm, "parametrizations.weight.original0"),
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
        (parametrizations.orthogonal, "parametrizations.weight"),
        (nn.utils.weight_norm, "weight_g, weight_v"),
        (nn.utils.spectral_norm, "weight_orig"),
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), "weight_orig"),
        (lambda module: prune.random_unstructured(module, "bias", 0.5), "bias_orig"),
    ],
    ids=["weight norm", "spectral norm", "orthogonal", "old weight norm", "old spectral norm", "mask", "bias mask"],
)
def test_computed_weights_are_refused(tmp_path, change, parts):
    model = bert()
    change(projection_of(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="attention.self.query.*Remove the parametrization first") as caught:
        make_trainer(tmp_path, model=model)
    assert parts in str(caught.value)
    with pytest.raises(ValueError, match="Remove the parametrization first"):
        estimate_sensitivity(model, [make_batch()], progress=False)
    with pytest.raises(ValueError, match="Remove the parametrization first"):
        apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}))
    assert untouched(model, before)


def test_they_are_taken_once_made_permanent(tmp_path):
    model = bert()
    parametrizations.weight_norm(projection_of(model))
    prune.l1_unstructured(model.bert.encoder.layer[1].intermediate.dense, "weight", 0.5)
    nn.utils.parametrize.remove_parametrizations(projection_of(model), "weight")
    nn.utils.remove_weight_norm(nn.utils.weight_norm(projection_of(model)))
    nn.utils.remove_spectral_norm(nn.utils.spectral_norm(projection_of(model)))
    prune.remove(model.bert.encoder.layer[1].intermediate.dense, "weight")
    make_trainer(tmp_path, model=model).prune(PruningPlan.for_model(model, heads={0: [1]}, neurons={1: [0]}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_modules_are_named(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(bert().eval(), {nn.Linear}, dtype=torch.qint8)
    named = r"self.query' is a torch.ao.nn.quantized.dynamic.*Linear, whose weight is no tensor. Prune before quant"
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match=named):
        estimate_sensitivity(model, [make_batch()], progress=False)
    with pytest.raises(ValueError, match=named):
        apply_plan(model, PruningPlan({"heads": {0: [1]}}, "bert"))


def test_computed_weights_elsewhere_do_not_matter(tmp_path):
    model = bert()
    parametrizations.weight_norm(model.classifier)
    trainer = make_trainer(tmp_path, model=model)
    assert trainer.prune().count("heads") == 4


class Tagger(nn.Module):
    """A module around a model, with the model's config, as `SentenceTransformer` and taggers are."""

    def __init__(self):
        super().__init__()
        self.encoder = BertModel(bert().config)
        self.config, self.head = self.encoder.config, nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.encoder(input_ids, attention_mask=attention_mask).pooler_output)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_wrapper_is_refused_and_the_model_inside_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"Tagger is no model of Transformers.*give its encoder \(BertModel\)"):
        make_trainer(tmp_path, model=Tagger())
    with pytest.raises(TypeError, match=r"give its encoder \(BertModel\)"):
        estimate_sensitivity(Tagger(), [make_batch()], progress=False)
    wrapper = nn.Sequential(Tagger())
    with pytest.raises(TypeError, match=r"Sequential is no model of Transformers.*give its 0.encoder \(BertModel\)"):
        estimate_sensitivity(wrapper, [make_batch()], progress=False)
    with pytest.raises(TypeError, match="Linear is no model of Transformers.*such as BertModel"):
        estimate_sensitivity(nn.Linear(2, 2), [make_batch()], progress=False)


def test_the_model_inside_of_a_wrapper_is_pruned(tmp_path):
    tagger = Tagger()

    def loss_fn(model, batch):
        return F.cross_entropy(tagger.head(model(batch["input_ids"]).pooler_output), batch["labels"])

    scores = estimate_sensitivity(tagger.encoder, [make_batch()], "gradient", loss_fn=loss_fn, progress=False)
    assert all(layer.any() for layer in scores.heads)
    apply_plan(tagger.encoder, PruningPlan.for_model(tagger.encoder, heads={0: [1]}))
    assert tagger(**make_batch())["logits"].isfinite().all()


def test_a_forward_without_hidden_states_is_refused(tmp_path):
    class Plain(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels)

    plain, config = Plain(bert().config), HapConfig(distillation_hidden=0.5)
    with pytest.raises(ValueError, match=r"The model \(Plain\) takes no argument output_hidden_states"):
        make_trainer(tmp_path, model=plain, hap_config=config)
    with pytest.raises(ValueError, match=r"The teacher \(Plain\) takes no argument output_hidden_states"):
        make_trainer(tmp_path, teacher=plain, hap_config=config)
    make_trainer(tmp_path, model=plain, teacher=Plain(plain.config), hap_config=HapConfig())  # Logits need none.

    class Any(Plain):
        def forward(self, *args, **kwargs):
            return BertForSequenceClassification.forward(self, *args, **kwargs)

    make_trainer(tmp_path, model=Any(bert().config), hap_config=config)


# Teachers


def renamed(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


HIDDEN = HapConfig(distillation_hidden=0.5)
TEACHERS = {
    "a string": ("a/folder", {}, TypeError, "The teacher is a str; give a model of Transformers"),
    "a module": (nn.Linear(2, 2), {}, TypeError, "The teacher is a Linear"),
    "labels": (bert(num_labels=3), {}, ValueError, "differ in the number of labels: 3 and 2"),
    "order of labels": (
        bert(**renamed("positive", "negative")),
        {"model": bert(**renamed("negative", "positive"))},
        ValueError,
        r"differ in the order of labels: \('positive', 'negative'\) and \('negative', 'positive'\)",
    ),
    "output form": (bert(return_dict=False), {}, ValueError, r"differ in the output form \(config.return_dict\)"),
    "task": (bert("ForTokenClassification"), {}, ValueError, "in the task: ForTokenClassification and ForSequence"),
    "regression": (bert(num_labels=1), {}, ValueError, "differ in the number of labels: 1 and 2"),
    "a base model": (bert("Model"), {}, ValueError, "BertModel"),
    "vocabulary": (bert(vocab_size=30), {}, ValueError, "differ in the vocabulary: the teacher reads 30 tokens"),
    "problem type": (
        bert(problem_type="multi_label_classification"),
        {"model": bert(problem_type="single_label_classification")},
        ValueError,
        "in the problem type: multi_label_classification and single_label_classification",
    ),
    "positions": (
        bert(max_position_embeddings=16),
        {"model": bert(max_position_embeddings=24)},
        ValueError,
        "in the length of texts: the teacher reads 16 positions, the model 24",
    ),
    "token types": (
        bert(type_vocab_size=1),
        {"model": bert(type_vocab_size=2)},
        ValueError,
        "in the types of tokens: the teacher reads 1 types, the model 2",
    ),
    "image size": (
        ZOO["vit"].model(torch.float32, image_size=16),
        {"model": ZOO["vit"].model(torch.float32, image_size=32)},
        ValueError,
        "in the image size: 16 and 32",
    ),
    "meta": (bert().to("meta"), {}, ValueError, "BertForSequenceClassification. are not in memory.*from_pretrained"),
    "hidden size": (
        bert(hidden_size=32),
        {"hap_config": HIDDEN},
        ValueError,
        "differ in the hidden size: 32 and 16",
    ),
    "layers": (
        bert(num_hidden_layers=3),
        {"hap_config": HIDDEN},
        ValueError,
        "differ in the number of layers: 3 and 2",
    ),
    "predicted tokens": (
        bert("ForMaskedLM", vocab_size=50),
        {"model": bert("ForMaskedLM")},
        ValueError,
        "differ in the number of predicted tokens: 50 and 40",
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, name):
    teacher, settings, error, message = TEACHERS[name]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, teacher=teacher, **{"hap_config": HapConfig(), **settings})


def test_a_teacher_that_is_not_needed_only_has_to_be_a_model(tmp_path):
    for name in ("labels", "vocabulary"):
        make_trainer(tmp_path, teacher=TEACHERS[name][0], hap_config=HapConfig(distillation=0))
    with pytest.raises(TypeError):
        make_trainer(tmp_path, teacher="a/folder", hap_config=HapConfig(distillation=0))


FITTING = {
    "names unlike in case": (bert(**renamed("Yes", "No")), bert(**renamed("yes", "no"))),
    "numbers for names": (bert(**renamed("yes", "no")), bert()),
    "a larger vocabulary": (bert(vocab_size=50), bert()),
    "more positions": (bert(max_position_embeddings=24), bert(max_position_embeddings=16)),
    "an unknown problem type": (bert(problem_type="single_label_classification"), bert()),
    "a wider model": (bert(hidden_size=32, num_hidden_layers=1), bert()),
    "another architecture": (ZOO["distilbert"].model(torch.float32), bert()),
}


@pytest.mark.parametrize("name", FITTING)
def test_a_teacher_that_fits_teaches(tmp_path, name):
    teacher, model = (copy.deepcopy(model) for model in FITTING[name])
    config = HapConfig(distillation=1.0, refit=False)
    trainer = make_trainer(tmp_path, model=model, teacher=teacher, hap_config=config, max_steps=1)
    trainer.prune(PruningPlan.for_model(model, heads={0: [1]}))
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert trainer._has_distilled and not torch.equal(before["classifier.weight"], model.classifier.weight)


def test_embeddings_that_were_resized_in_between_are_named(tmp_path):
    """A teacher reads the tokens that were added to the model, and does not know them."""
    model = bert()
    config = HapConfig(refit=False)
    trainer = make_trainer(tmp_path, model=model, teacher=bert(), hap_config=config, max_steps=1)
    trainer.prune(PruningPlan.for_model(model, heads={0: [1]}))
    model.resize_token_embeddings(45)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the teacher reads 40 tokens, the model 45. Resize the embeddings of both"):
        trainer.train()
    assert untouched(trainer.teacher, bert().state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    trainer.teacher.resize_token_embeddings(45)
    trainer.train()


def test_embeddings_of_a_masked_language_model_that_were_resized(tmp_path):
    """Its own dense model becomes the teacher."""
    rows = Rows()
    for row in rows.rows:
        row["labels"] = row["input_ids"]
    model = bert("ForMaskedLM")
    trainer = make_trainer(tmp_path, model=model, rows=rows, hap_config=HapConfig(ratio=0.3, max_examples=8))
    trainer.prune()
    model.resize_token_embeddings(45)
    with pytest.raises(ValueError, match="differ in the number of predicted tokens: 40 and 45"):
        trainer.train()
