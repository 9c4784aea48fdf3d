"""Uploads pruned models with a card that says what they are."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .files import whole_file
from .model_card import TAGS, base_model_of, make_model_card
from .remote_code import export_remote_code
from .structure import recorded_structure


PICTURE = "structure.png"
CAPTION = "Heads and neurons left in each layer"
MARK = "<!-- Written by hap_transformers"


def write_card(model: PreTrainedModel, folder: str | Path, **about: Any) -> None:
    """Writes a pruned model's card and its picture into a folder; `about` goes to [`make_model_card`]."""
    from .plots import plot_structure  # Here: matplotlib takes a second, which importing the package should not.

    plot_structure(model, Path(folder) / PICTURE)
    with whole_file(Path(folder) / "README.md") as unfinished:
        make_model_card(model, pictures={CAPTION: PICTURE}, **about).save(unfinished)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    remote_code: bool = False,
    commit_message: str = "Upload pruned model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **save_settings: Any,
) -> CommitInfo:
    """Uploads a pruned model and its card to the Hub in one commit.

    This is what `model.push_to_hub` does for pruned models. A model that came out of `HapTrainer` has its metrics and
    costs in the card. A card that someone wrote, or changed as it says, is kept, with the package's tags added.

    Args:
        model (`PreTrainedModel`): The pruned model.
        repo_id (`str`): The repository; it is made if it does not exist.
        remote_code (`bool`, *optional*, defaults to `False`): Whether to upload the code that rebuilds the model, so
            that `trust_remote_code=True` loads it without this package (see [`export_remote_code`]).
        commit_message, commit_description, private, token, revision, create_pr, tags: As in
            `PreTrainedModel.push_to_hub`.
        save_settings: Further settings of `save_pretrained`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save_settings)
        if remote_code:
            export_remote_code(folder)
        card = None
        if api.file_exists(repo_id, "README.md", revision=revision):
            card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
        if card is not None and MARK not in card.text:
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS, *(tags or [])]))
            card.save(Path(folder) / "README.md")
        else:
            known = ModelCardData() if card is None else card.data
            evaluated = known.eval_results[0] if known.eval_results else None
            write_card(
                model,
                folder,
                results=getattr(model, "pruning_results", None),
                plan=getattr(model, "pruning_plan", None),
                base_model=base_model_of(model) or known.base_model,
                dataset=evaluated.dataset_name if evaluated else None,
                dataset_tags=known.datasets,
                dataset_args=evaluated.dataset_config if evaluated else None,
                model_name=repo_id.split("/")[-1],
                language=known.language,
                license=known.license,
                tags=[*(known.tags or []), *(tags or [])],
            )
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


_push_dense_model = PreTrainedModel.push_to_hub


def _push_to_hub_method(self: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> CommitInfo | str:
    """Uploads the model to the Hub; pruned models as [`hap_transformers.hub.push_to_hub`] does."""
    if recorded_structure(self.config) is None:
        return _push_dense_model(self, repo_id, *args, **kwargs)
    return push_to_hub(self, repo_id, *args, **kwargs)


PreTrainedModel.push_to_hub = _push_to_hub_method  # type: ignore[method-assign, assignment]
