"""A tiny Llama and the text that it learns in the demo: this package's own documentation."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


DOCS = Path(__file__).resolve().parents[1] / "docs"
VOCABULARY = 1024
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def demo_text() -> str:
    """The pages of the documentation, one after the other.

    Raises:
        FileNotFoundError: If they are not beside the scripts, as they are in a checkout.
    """
    pages = sorted(DOCS.rglob("*.md"))
    if not pages:
        raise FileNotFoundError(f"There is no documentation in '{DOCS}' to learn from; pass --train_file.")
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def demo_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Trains a byte-level tokenizer on a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text.split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def demo_model(length: int) -> LlamaForCausalLM:
    """A Llama with random weights for blocks of so many tokens."""
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4 * length, eos_token_id=0, **SIZES)
    return LlamaForCausalLM(config)
