"""Batches that need no state, and folders that are not what they should be."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10_data import NUM_SEEDS, Cifar10, DataError, _labels_of, augmented
from cifar10_jobs import SEED_OF_ONCE_QAT, shown_batches
from examples.pictures import write_pictures

SHEETS = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), num_per_file=8)


@pytest.fixture
def data(folder):
    return Cifar10.load(folder)


def test_the_last_fifth_is_held_out_and_the_test_file_stands_beside_it(data):
    sizes = [len(labels) for labels in (data.train_labels, data.test_labels, data.official_labels)]
    assert sizes == [32, 8, 8]


def test_fewer_images_to_train_on_leave_the_held_out_ones_as_they_are(data, folder):
    few = Cifar10.load(folder, num_train=10)
    assert torch.equal(few.train_images, data.train_images[:10])
    assert torch.equal(few.test_images, data.test_images)


@pytest.mark.parametrize("num_train", [0, 33])
def test_more_images_than_there_are_or_none_are_refused(folder, num_train):
    with pytest.raises(DataError, match=r"8 are held out\. Give 1 to 32"):
        Cifar10.load(folder, num_train=num_train)


def test_the_same_step_gives_the_same_batch(data):
    for first, again in zip(data.batch(5, 8, seed=3), data.batch(5, 8, seed=3), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("other", [{"step": 6, "seed": 3}, {"step": 5, "seed": 4}], ids=str)
def test_another_step_or_seed_gives_another_batch(data, other):
    images, _ = data.batch(5, 8, seed=3)
    assert not torch.equal(images, data.batch(other["step"], 8, seed=other["seed"])[0])


def test_any_seed_gives_a_batch_and_seeds_below_ten_thousand_are_not_folded(data):
    assert data.batch(5, 8, seed=2**62)[0].shape == (8, 3, 32, 32)
    of_once_qat, epoch, index = 9_999 + SEED_OF_ONCE_QAT, 10_000, 50_000
    assert (of_once_qat * 1_000_003 + epoch) * 1_000_003 + index + 1 < NUM_SEEDS


def test_an_epoch_visits_every_image_once(data):
    visited = torch.cat([data.batch(step, 8, seed=0)[1] for step in range(4)])
    assert visited.sort()[0].tolist() == data.train_labels.sort()[0].tolist()


def test_the_parts_of_several_processes_are_the_whole_batch(data):
    images, labels = data.batch(2, 8, seed=0)
    for part in range(2):
        mine, of_mine = data.batch(2, 8, seed=0, part=part, parts=2)
        assert torch.equal(mine, images[part::2])
        assert torch.equal(of_mine, labels[part::2])


def test_augmentation_shifts_and_mirrors_as_a_human_would():
    image = torch.arange(1, 10).view(1, 1, 3, 3).expand(1, 3, 3, 3)
    same = augmented(image, torch.tensor([[4, 4]]), torch.tensor([False]))
    assert torch.equal(same, image)
    mirrored = augmented(image, torch.tensor([[4, 4]]), torch.tensor([True]))
    assert mirrored[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    # The crop begins a row lower and a column further left: a black column comes in from there.
    moved = augmented(image, torch.tensor([[5, 3]]), torch.tensor([False]))
    assert moved[0, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]


def test_the_images_shown_while_training_are_the_first_2000_of_those_held_out(data):
    images = torch.arange(2_100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    labels = torch.arange(2_100)
    many = Cifar10(*list(vars(data).values())[:2], images, labels, images[:0], labels[:0])
    for ours, theirs in zip(shown_batches(many), many.test_batches()[:16], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_without_official_images_there_are_no_batches_of_them(data):
    none = Cifar10(
        *list(vars(data).values())[:4], data.official_images[:0], data.official_labels[:0]
    )
    assert none.test_batches(official=True) == []


def test_other_images_or_labels_have_another_fingerprint(data):
    labels = data.train_labels.clone()
    labels[0] += 1
    other = Cifar10(data.train_images, labels, *list(vars(data).values())[2:])
    assert data.fingerprint != other.fingerprint


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    write_pictures(tmp_path, num_per_file=8)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match=r"data_batch_3 is not a batch .* builtins\.print"):
        Cifar10.load(tmp_path)


def test_pictures_of_another_size_are_refused(tmp_path):
    write_pictures(tmp_path, num_per_file=8)
    entry = {"data": np.zeros((8, 3 * 28 * 28), dtype=np.uint8), "labels": [0] * 8}
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(entry))
    with pytest.raises(DataError, match=r"data_batch_2 has no labelled images of 32 x 32"):
        Cifar10.load(tmp_path)


def test_labels_that_are_an_empty_file_are_named(tmp_path):
    (tmp_path / "labels.npy").touch()
    with pytest.raises(DataError, match=r"labels\.npy holds no labels"):
        _labels_of(tmp_path / "labels.npy")


def test_a_missing_file_is_named(tmp_path):
    write_pictures(tmp_path, num_per_file=8)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match="test_batch is missing"):
        Cifar10.load(tmp_path)


def test_a_missing_sheet_is_named(tmp_path):
    np.save(tmp_path / "labels.npy", np.zeros(51_000, dtype=np.uint8))
    with pytest.raises(DataError, match=r"b00\.webp is not a sheet"):
        Cifar10.load(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not SHEETS.is_dir(), reason="the sheets of CIFAR-10 are not beside this folder")
def test_the_sheets_hold_what_the_protocol_says():
    data = Cifar10.load(SHEETS)
    assert data.train_images.shape == (40_000, 3, 32, 32)
    assert len(data.test_labels) == 10_000
    assert len(data.official_labels) == 1_000
    # The first official training image is a frog, the first test image a cat.
    assert [int(data.train_labels[0]), int(data.official_labels[0])] == [6, 3]
