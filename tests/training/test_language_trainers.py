"""`HapTrainerMixin` in front of TRL's `SFTTrainer`."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from any_trainers import COMMON, CONFIG, agreement, texts
from datasets import Dataset
from script_inputs import save_model
from tiny import WHOLE_HEADS
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertTokenizerFast
from zoo import ZOO

from hap_transformers import HapTrainerMixin, PruningPlan, estimate_sensitivity


@pytest.fixture(scope="module", autouse=True)
def library():
    """The library takes seconds to import, which collecting the tests should not."""
    return pytest.importorskip("trl")


def sft(tmp_path, model=None, bases=(), hap_config=CONFIG, teacher=None, columns=None, **arguments):
    import trl

    tokenizer = BertTokenizerFast.from_pretrained(save_model(tmp_path))
    tokenizer.eos_token = "[SEP]"
    if model is None:
        task = dataclasses.replace(ZOO["llama"], task="ForCausalLM")
        model = task.model(torch.float32, eos_token_id=tokenizer.eos_token_id)
    PrunedSFT = type("PrunedSFT", (*bases, HapTrainerMixin, trl.SFTTrainer), {})
    settings = {**COMMON, "bf16": False, "gradient_checkpointing": False, "max_length": 12, **arguments}
    data = Dataset.from_dict(columns or {"text": texts()})
    return PrunedSFT(
        model,
        trl.SFTConfig(str(tmp_path / "out"), **settings),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tokenizer,
        hap_config=hap_config,
        teacher=teacher,
    )


def batch_of(trainer):
    return next(iter(trainer.get_eval_dataloader()))


def test_sft_trainer(tmp_path):
    config = dataclasses.replace(CONFIG, distillation=0.9, refit=False, recovery_epochs=8, components=WHOLE_HEADS)
    trainer = sft(tmp_path, hap_config=config)
    trainer.train()
    dense = copy.deepcopy(trainer.model.state_dict())
    trainer.prune()
    assert trainer.pruning_plan.count("neurons") and "hap_flops" in trainer.state.log_history[-1]
    batch = batch_of(trainer)
    whole = type(trainer.model)(copy.deepcopy(trainer.teacher.config)).eval()
    whole.load_state_dict(dense)
    with torch.no_grad():  # The teacher is the dense model, not the pruned one by another name.
        torch.testing.assert_close(trainer.teacher.eval()(**batch).logits, whole(**batch).logits)
    evaluated = trainer.evaluate()
    before = agreement(trainer.model, whole, batch)
    trainer.train()
    assert trainer._has_distilled and agreement(trainer.model, whole, batch) > before
    logged = [entry for entry in trainer.state.log_history if "loss" in entry or "train_loss" in entry]
    assert logged and evaluated["eval_mean_token_accuracy"] >= 0 and evaluated["eval_entropy"] > 0
    trainer.save_model()
    expected = trainer.model.eval()(input_ids=batch["input_ids"][:1]).logits[0, -1].tolist()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = reloaded(input_ids=batch["input_ids"][:1]).logits[0, -1].tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    generated = trainer.model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > batch["input_ids"].shape[1]


def test_sft_scores_are_those_of_the_models_loss(tmp_path):
    """And metrics of scoring are not those of the next evaluation."""
    trainer = sft(tmp_path, hap_config=dataclasses.replace(CONFIG, components=WHOLE_HEADS))
    copied = AutoModelForCausalLM.from_config(copy.deepcopy(trainer.model.config))
    copied.load_state_dict(trainer.model.state_dict())
    before = trainer.evaluate()
    batches = [{**batch} for batch in trainer.calibration_batches()]
    found = trainer.estimate_sensitivity()
    expected = estimate_sensitivity(copied, batches, max_examples=16, seed=trainer.args.seed, progress=False)
    for kind, layers in expected.scores.items():
        torch.testing.assert_close(found.scores[kind], layers, rtol=1e-3, atol=1e-7)
    after = trainer.evaluate()
    assert {k: v for k, v in before.items() if "entropy" in k} == {k: v for k, v in after.items() if "entropy" in k}


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"packing": True, "max_length": 16},
        {"padding_free": True, "max_length": None},
        {"loss_type": "dft"},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_sft_settings(tmp_path, settings):
    config = dataclasses.replace(CONFIG, distillation_hidden=0.1, max_examples=4)
    trainer = sft(tmp_path, hap_config=config, max_steps=2, **settings)
    trainer.train()
    trainer.prune()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer._has_distilled and np.isfinite(trainer.evaluate()["eval_loss"])
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_sft_distillation_alone_is_the_divergence_of_counted_tokens(tmp_path):
    """Prompts do not count; the loss is computed here anew."""
    columns = {"prompt": texts(8), "completion": ["good", "bad plot"] * 4}
    config = dataclasses.replace(CONFIG, refit=False, distillation=1.0, distillation_temperature=1.0)
    trainer = sft(tmp_path, hap_config=config, columns=columns)
    trainer.prune(PruningPlan.for_model(trainer.model, neurons={0: range(12)}))
    trainer._phase = "recovered"
    trainer.teacher.eval()
    batch = batch_of(trainer)
    assert 0 < (batch["labels"] != -100).sum() < (batch["attention_mask"] == 1).sum()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        logs = [one(**inputs).logits[:, :-1].log_softmax(-1) for one in (trainer.model, trainer.teacher)]
    counted = batch["labels"][:, 1:] != -100
    expected = F.kl_div(logs[0][counted], logs[1][counted], log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert trainer.model.model.layers[0].mlp.down_proj.weight.grad.any()


def test_sft_with_a_loss_of_ones_own_on_top(tmp_path):
    class Doubled:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)
            return (2 * found[0], found[1]) if return_outputs else 2 * found

    config = dataclasses.replace(CONFIG, components=WHOLE_HEADS)
    plain, doubled = (sft(tmp_path, bases=bases, hap_config=config) for bases in ((), (Doubled,)))
    for kind, layers in plain.estimate_sensitivity().scores.items():
        twice = [2 * scores for scores in layers]
        torch.testing.assert_close(doubled.estimate_sensitivity().scores[kind], twice, rtol=1e-3, atol=1e-7)


def test_adapters_before_pruning_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    task = dataclasses.replace(ZOO["llama"], task="ForCausalLM")
    adapted = peft.get_peft_model(task.model(torch.float32), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"Merge its adapters first \(`merge_and_unload`\)"):
        sft(tmp_path, adapted)


@pytest.mark.parametrize("name", ["DPO", "GRPO", "KTO", "RLOO"])
def test_trainers_whose_loss_is_of_several_calls_are_refused_at_once(tmp_path, name):
    import trl

    base = getattr(trl, f"{name}Trainer")
    refused = type("Refused", (HapTrainerMixin, base), {})
    pairs = {"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["d c"] * 4}
    answers = {"prompt": ["a b"] * 4, "completion": ["c d"] * 4, "label": [True, False] * 2}
    mixed = sft(tmp_path, hap_config=None)
    settings = {**COMMON, "bf16": False, "gradient_checkpointing": False}
    arguments = {"processing_class": mixed.processing_class}
    if name in ("GRPO", "RLOO"):
        settings |= {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 2}
        settings["beta"] = 0.0  # Or a reference model is loaded by the model's name.
        arguments["reward_funcs"] = lambda completions, **columns: [0.0] * len(completions)
    else:
        arguments["ref_model"] = copy.deepcopy(mixed.model)
    arguments["args"] = getattr(trl, f"{name}Config")(str(tmp_path / "out"), **settings)
    arguments["train_dataset"] = Dataset.from_dict(answers if name == "KTO" else pairs)
    with pytest.raises(ValueError, match=f"Refused is a {name}Trainer.*Prune with HapTrainer or SFTTrainer"):
        refused(mixed.model, hap_config=CONFIG, **arguments)
    if name == "DPO":
        refused(mixed.model, hap_config=None, **arguments).train()


def test_a_reward_is_scored_by_methods_without_curvature_in_the_logits(tmp_path):
    import trl

    rewarded = type("Rewarded", (HapTrainerMixin, trl.RewardTrainer), {})
    tokenizer = BertTokenizerFast.from_pretrained(save_model(tmp_path))
    tokenizer.eos_token = "[SEP]"
    model = ZOO["llama"].model(torch.float32, eos_token_id=tokenizer.eos_token_id, num_labels=1)
    args = trl.RewardConfig(str(tmp_path / "out"), **COMMON, bf16=False, gradient_checkpointing=False)
    data = Dataset.from_dict({"chosen": texts(), "rejected": texts()[::-1]})
    arguments = {"args": args, "train_dataset": data, "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r"Rewarded is a RewardTrainer.*method='kronecker'.*one of.* gradient"):
        rewarded(model, hap_config=dataclasses.replace(CONFIG, method="kronecker"), **arguments)
    config = dataclasses.replace(CONFIG, method="gradient", components=WHOLE_HEADS)
    trainer = rewarded(model, hap_config=config, **arguments)
    trainer.prune()
    trainer.train()
    assert trainer.pruning_plan.count("neurons") and trainer.pruning_plan.count("heads")


def test_the_mixin_in_front_of_sft_changes_nothing(tmp_path):
    import trl

    trained = []
    for folder, bases in (("plain", (trl.SFTTrainer,)), ("mixed", (HapTrainerMixin, trl.SFTTrainer))):
        (tmp_path / folder).mkdir()
        mixed = sft(tmp_path / folder, hap_config=None)
        trainer = type("Any", bases, {})(
            mixed.model, mixed.args, train_dataset=mixed.train_dataset, processing_class=mixed.processing_class
        )
        trainer.train()
        trained.append(trainer.model.state_dict())
        trainer.create_model_card(model_name="any")
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
