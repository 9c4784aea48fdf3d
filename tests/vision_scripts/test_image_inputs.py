"""Images as models take them: decoded, resized, normalized and augmented."""

import numpy as np
import pytest
import torch
from image_files import class_folders, encoded, parquet_folder, pixels_of, write_parquet
from PIL import Image
from transformers import AutoImageProcessor

from vision_scripts import image_inputs
from vision_scripts.image_data import DATASETS, load_image_task
from vision_scripts.image_inputs import ImageCollator, augmented, make_inputs
from vision_scripts.image_processors import load_image_processor, make_image_processor
from vision_scripts.images import DecodedImages, Images, decode, measured_colours


NO_LIMITS = {"train": None, "validation": None}


def folder_of(tmp_path, images, labels=None):
    """A folder whose training images are these."""
    labels = labels or [i % 2 for i in range(len(images))]
    write_parquet(tmp_path / "train.parquet", [encoded(image) for image in images], labels)
    write_parquet(tmp_path / "test.parquet", [encoded(pixels_of(i, i)) for i in range(2)], [0, 1])
    return load_image_task(data_dir=str(tmp_path))


def test_grey_and_transparent_images_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colours = pixels_of(1, 0)
    transparent = np.concatenate([colours, np.full((8, 8, 1), 255, np.uint8)], -1)
    inputs = make_inputs(folder_of(tmp_path, [grey, transparent]), NO_LIMITS, seed=0)
    assert (inputs.train.pixels[0] == torch.from_numpy(grey)).all() and inputs.size == (8, 8)
    assert np.array_equal(inputs.train.pixels[1].permute(1, 2, 0), colours)


@pytest.mark.parametrize(
    "image, message",
    [
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "has pixels that are not finite numbers"),
        (Image.fromarray(np.ones((8, 8), np.float32)), "more than 8 bits"),
        (Image.fromarray(np.full((8, 8), 3000, np.uint16)), "more than 8 bits"),
    ],
)
def test_wide_pixels_are_named(image, message):
    with pytest.raises(ValueError, match=f"Image 3 of the train split .*{message}"):
        decode({"bytes": encoded(image, "TIFF"), "path": None}, "Image 3 of the train split")


def test_what_is_no_image_is_named_before_anything_trains(tmp_path):
    whole = encoded(pixels_of(0, 0, (64, 64)))
    for spoiled in (b"text", whole[: len(whole) // 2]):
        write_parquet(tmp_path / "train.parquet", [encoded(pixels_of(0, 0, (64, 64))), spoiled], [0, 1])
        write_parquet(tmp_path / "test.parquet", [whole] * 2, [0, 1])
        with pytest.raises(ValueError, match="Image 1 of the train split cannot be decoded"):
            make_inputs(load_image_task(data_dir=str(tmp_path)), NO_LIMITS, seed=0)
    with pytest.raises(ValueError, match="Image 9 is missing"):
        decode({"bytes": None, "path": None}, "Image 9")


def test_other_sizes_are_named_or_resized(tmp_path):
    images = [pixels_of(i, i, size) for i, size in enumerate([(8, 8), (8, 8), (6, 10)])]
    task = folder_of(tmp_path, images)
    with pytest.raises(ValueError, match="Image 2 of the train split has 6x10 pixels, others 8x8. Pass --image_size"):
        make_inputs(task, NO_LIMITS, seed=0)
    inputs = make_inputs(task, NO_LIMITS, seed=0, size=12)
    assert inputs.train.pixels.shape == (3, 3, 12, 12) and inputs.size == (12, 12)
    expected = Image.fromarray(images[2]).resize((12, 12), Image.Resampling.BILINEAR)
    assert np.abs(inputs.train.pixels[2].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_images_are_drawn_by_seed_from_all_classes(tmp_path):
    """Files are often sorted by class, so that the first images would be of one class alone."""
    write_parquet(tmp_path / "train.parquet", [encoded(pixels_of(i // 30, i)) for i in range(60)], [0] * 30 + [1] * 30)
    write_parquet(tmp_path / "test.parquet", [encoded(pixels_of(i // 30, i)) for i in range(60)], [0] * 30 + [1] * 30)
    task = load_image_task(data_dir=str(tmp_path))
    first, again, other = (make_inputs(task, {"train": 10, "validation": 12}, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.validation)) == (10, 12) and 0 < first.validation.labels.sum() < 12
    assert torch.equal(first.train.pixels, again.train.pixels) and not torch.equal(
        first.train.pixels, other.train.pixels
    )
    for example in first.train:
        assert example["pixel_values"].float().mean((1, 2)).argmax() == example["labels"]
    with pytest.raises(ValueError, match="has no train images to use"):
        make_inputs(task, {"train": 0, "validation": None}, seed=0)


def test_large_images_are_decoded_when_they_are_asked_for(tmp_path, monkeypatch):
    task = load_image_task(data_dir=str(class_folders(tmp_path / "data", sizes=((8, 8), (7, 9)), count=10)))
    small = make_inputs(task, NO_LIMITS, seed=0, size=8)
    monkeypatch.setattr(image_inputs, "MOST_BYTES", 100)
    large = make_inputs(task, NO_LIMITS, seed=0, size=8)
    assert type(small.train) is DecodedImages and type(large.train) is Images
    for one, other in ((small.train, large.train), (small.validation, large.validation)):
        assert torch.equal(one.pixels, torch.stack([example["pixel_values"] for example in other]))
        assert torch.equal(one.labels, other.labels)
    assert small.processor.image_mean == pytest.approx(large.processor.image_mean)


def test_labels_are_the_outputs_of_the_model(tmp_path):
    task = load_image_task(data_dir=str(parquet_folder(tmp_path)))
    task.numbers = [2, 0, 1]
    assert make_inputs(task, NO_LIMITS, seed=0).validation.labels.tolist() == [2, 0, 1] * 3


def test_colours_are_measured_or_known(tmp_path):
    task = load_image_task(data_dir=str(parquet_folder(tmp_path)))
    values = np.stack([pixels_of(i % 3, i) for i in range(24)]) / 255
    inputs = make_inputs(task, NO_LIMITS, seed=0)
    np.testing.assert_allclose(inputs.processor.image_mean, values.mean((0, 1, 2)), atol=1e-9)
    np.testing.assert_allclose(inputs.processor.image_std, values.std((0, 1, 2)), atol=1e-9)
    task.known = DATASETS["cifar10"]
    assert tuple(make_inputs(task, NO_LIMITS, seed=0).processor.image_mean) == DATASETS["cifar10"].mean
    with pytest.raises(ValueError, match="same colour everywhere"):
        measured_colours(DecodedImages(torch.full((4, 3, 2, 2), 7, dtype=torch.uint8), torch.zeros(4)))


@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_batches_are_what_the_saved_image_processor_makes(tmp_path, size):
    task = load_image_task(data_dir=str(parquet_folder(tmp_path / "data", size=size)))
    inputs = make_inputs(task, NO_LIMITS, seed=0, size=None if size == (8, 8) else 8)
    inputs.processor.save_pretrained(tmp_path / "saved")
    images = [Image.fromarray(pixels_of(i % 3, 100 + i, size)) for i in range(9)]
    expected = AutoImageProcessor.from_pretrained(tmp_path / "saved")(images, return_tensors="pt")["pixel_values"]
    batch = inputs.collator([inputs.validation[i] for i in range(9)])
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=1e-4, atol=1e-4)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].tolist() == [0, 1, 2] * 3
    loaded = load_image_processor(str(tmp_path / "saved"))
    again = make_inputs(task, NO_LIMITS, seed=0, processor=loaded)
    assert torch.equal(again.validation.pixels, inputs.validation.pixels)
    assert load_image_processor(str(tmp_path / "data")) is None


def test_augmented_images_are_crops_of_reflected_ones():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 16, 8)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (1, 1)), mode="reflect")
    moves = []
    for image, wide in zip(augmented(images).numpy(), padded, strict=True):
        for top in range(5):
            for left in range(3):
                crop = wide[:, top : top + 16, left : left + 8]
                moves += [(top, left, step) for step in (1, -1) if np.array_equal(image, crop[:, :, ::step])]
    assert len(moves) == 40 and len(set(moves)) > 15  # Of 30, each as likely as the others.
    assert {step for *_, step in moves} == {1, -1} and len({top for top, *_ in moves}) == 5


def test_normalization_without_a_scale():
    processor = make_image_processor((2, 2), [0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    processor.do_rescale = processor.do_normalize = False
    example = {"pixel_values": torch.full((3, 2, 2), 7, dtype=torch.uint8), "labels": torch.tensor(1)}
    assert (ImageCollator(*image_inputs.normalization(processor))([example])["pixel_values"] == 7).all()
