"""Recorded speech with its transcripts: the prompts of the Asterisk telephone exchange, joined to half a minute."""

import gzip
import random
import re
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from transformers import WhisperFeatureExtractor


RATE, RATE_OF_PROMPTS = 16000, 8000
SECONDS, PAUSE = 28, 0.4


@dataclass
class Speech:
    """A recording, 16,000 samples a second, and what is said."""

    samples: np.ndarray
    text: str


def read_prompts(sounds: Path, transcripts: Path) -> list[Speech]:
    """Reads all prompts that have a recording, are more than tones, and fit into half a minute; each text once.

    Whisper hears 30 seconds. Of a longer recording the rest would count as words that it missed.

    Args:
        sounds (`Path`): The folder of recordings, from Debian's package `asterisk-core-sounds-en-wav`.
        transcripts (`Path`): `core-sounds-en.txt.gz` of the package `asterisk-core-sounds-en`.

    Raises:
        FileNotFoundError: If one of them is missing.
    """
    if not sounds.is_dir() or not transcripts.is_file():
        raise FileNotFoundError(
            f"'{sounds}' or '{transcripts}' is missing. On Debian, run `apt-get install asterisk-core-sounds-en-wav "
            "asterisk-core-sounds-en`, or pass --sounds_dir and --transcripts."
        )
    lines = gzip.decompress(transcripts.read_bytes()).decode().splitlines()
    named = (re.fullmatch(r"([\w/-]+):\s+([^\[\]]+)", line) for line in lines)
    found = [(sounds / f"{match[1]}.wav", match[2]) for match in named if match]
    by_text = {text.lower(): (file, text) for file, text in found if file.is_file()}
    prompts = [Speech(read_wave(file), text) for file, text in by_text.values()]
    return [prompt for prompt in prompts if len(prompt.samples) <= SECONDS * RATE]


def read_wave(file: Path) -> np.ndarray:
    """Reads a recording of 8,000 samples a second, and doubles them."""
    with wave.open(str(file)) as recording:
        samples = np.frombuffer(recording.readframes(recording.getnframes()), np.int16)
    return resample_poly(samples / 32768, RATE // RATE_OF_PROMPTS, 1).astype(np.float32)


def split(prompts: Sequence[Speech], seed: int) -> tuple[list[Speech], list[Speech]]:
    """Splits prompts at random into halves: to calibrate on, and to measure."""
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    return shuffled[::2], shuffled[1::2]


def windows(prompts: Sequence[Speech], count: int | None = None, seed: int = 0) -> list[Speech]:
    """Joins prompts, with pauses, to recordings of at most 28 seconds.

    Args:
        prompts (`Sequence[Speech]`): The prompts.
        count (`int`, *optional*): How many windows to make, of prompts in ever new orders. By default every prompt is
            there once.
        seed (`int`, *optional*, defaults to 0): Seed of the orders.
    """
    generator, found = random.Random(seed), list[Speech]()
    while len(found) < (count or 1):
        found += _joined(generator.sample(prompts, len(prompts)))
    return found[:count]


def _joined(prompts: Sequence[Speech]) -> Iterator[Speech]:
    pause = np.zeros(int(PAUSE * RATE), np.float32)
    parts, texts, length = list[np.ndarray](), list[str](), 0
    for prompt in prompts:
        if length + len(prompt.samples) > SECONDS * RATE and parts:
            yield Speech(np.concatenate(parts), " ".join(texts))
            parts, texts, length = [], [], 0
        parts += [prompt.samples, pause]
        texts.append(prompt.text)
        length += len(prompt.samples) + len(pause)
    yield Speech(np.concatenate(parts), " ".join(texts))


def features_of(speech: Sequence[Speech], bins: int) -> torch.Tensor:
    """Log-mel spectrograms as Whisper reads them, shape `(recordings, bins, 3000)`."""
    extractor = WhisperFeatureExtractor(feature_size=bins)
    return extractor([each.samples for each in speech], sampling_rate=RATE, return_tensors="pt").input_features
