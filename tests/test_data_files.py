"""Inputs and targets from tables and folders of images."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record import data_files
from ntkscope.record.data_files import check_same_classes, read_csv, read_images


def table(tmp_path, text):
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_last_column_is_the_target(tmp_path):
    inputs, targets = read_csv(table(tmp_path, "a,b,c\n1,2,0\n3.5,-4,1\n"))
    assert torch.equal(inputs, torch.tensor([[1.0, 2.0], [3.5, -4.0]]))
    assert torch.equal(targets, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["target", "Label", "y"])
def test_a_named_column_is_the_target(tmp_path, name):
    inputs, targets = read_csv(table(tmp_path, f'a,{name},"b, c"\n1,7,2\n3,8,4\n'))
    assert torch.equal(inputs, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert targets.tolist() == [7, 8]


def test_texts_are_classes_in_alphabetical_order(tmp_path):
    _, targets = read_csv(table(tmp_path, "a,label\n1,dog\n2,cat\n3,dog\n\n"))
    assert targets.tolist() == [1, 0, 1]


def test_other_numbers_are_values(tmp_path):
    _, targets = read_csv(table(tmp_path, "a,y\n1,0.5\n2,-3\n"))
    assert torch.equal(targets, torch.tensor([[0.5], [-3.0]]))


def test_a_byte_order_mark_is_no_part_of_the_head(tmp_path):
    assert read_csv(table(tmp_path, "\ufeffy,a\n3,1\n4,2\n"))[1].tolist() == [3, 4]


BAD_TABLES = {
    "no row": ("a,b\n", "has no example: it needs a head and rows"),
    "one column": ("a\n1\n", "at least one input column and the target"),
    "ragged": ("a,b\n1,2\n1\n", r"row 3 has 1 cells, the head has 2"),
    "no head": ("0.5,1\n2,0\n", r"has numbers in its first row, where the names"),
    "semicolons": ("a;b\n1;2\n", r"separated by commas"),
    "text": ("a,b\n1,2\nx,3\n", r"row 3, column 'a': 'x' is no finite number. Encode texts"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_csv(table(tmp_path, text))


def test_bad_encoding(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(InputError, match=r"Give a .csv file in UTF-8 with a head"):
        read_csv(path)


def test_bad_path_of_a_table(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.csv cannot be read as a table"):
        read_csv(tmp_path / "nowhere.csv")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def test_each_folder_is_a_class(tmp_path):
    save(tmp_path / "b" / "2.png", [[0, 255], [51, 102]])
    save(tmp_path / "a" / "1.png", [[255, 0], [0, 0]])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    inputs, targets = read_images(tmp_path)
    assert targets.tolist() == [0, 1]
    assert torch.equal(inputs, torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 1.0], [0.2, 0.4]]]]))


def test_colours_come_first(tmp_path):
    save(tmp_path / "a" / "1.png", [[[255, 0, 51]]])
    save(tmp_path / "a" / "2.png", [[102]])  # grey among colours
    inputs, _ = read_images(tmp_path)
    assert torch.allclose(inputs[:, :, 0, 0], torch.tensor([[1.0, 0.0, 0.2], [0.4, 0.4, 0.4]]))


def test_bad_sizes(tmp_path):
    save(tmp_path / "a" / "1.png", [[1, 2]])
    save(tmp_path / "a" / "2.png", [[1]])
    with pytest.raises(InputError, match=r"differ in size: 1.png has 2 x 1, 2.png has 1 x 1. Resize"):
        read_images(tmp_path)


def test_bad_image(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"1.png is no image that Pillow reads"):
        read_images(tmp_path)


def test_bad_folder_without_images(tmp_path):
    with pytest.raises(InputError, match=r"holds no images. Put those of each class in a folder"):
        read_images(tmp_path)


def test_without_pillow_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "Image", None)
    with pytest.raises(UnsupportedError, match=r"pip install pillow, or save the tensors as .npz"):
        read_images(tmp_path)


def test_a_head_of_numbers_as_pandas_makes_it_is_a_head(tmp_path):
    assert read_csv(table(tmp_path, "0,1\n5,1\n6,0\n"))[1].tolist() == [1, 0]


def test_how_classes_are_numbered_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ntkscope"):
        read_csv(table(tmp_path, "a,label\n1,dog\n2,cat\n"))
    assert caplog.messages == [f"{tmp_path / 'data.csv'}: classes by name: 0 is cat, 1 is dog."]


def test_classes_of_two_sources_are_numbered_alike_or_refused(tmp_path):
    data, query = tmp_path / "data.csv", tmp_path / "query.csv"
    data.write_text("a,label\n1,cat\n2,cow\n3,dog\n")
    query.write_text("a,label\n1,dog\n2,cow\n")
    with pytest.raises(InputError, match=r"data.csv has the classes cat, cow, dog, and .*query.csv cow, dog; .* they would mix"):
        check_same_classes(str(data), str(query))
    query.write_text("a,label\n1,dog\n2,cow\n2,cat\n")
    check_same_classes(str(data), str(query))
    for place in ("train/cat/1.png", "train/dog/1.png", "test/dog/1.png"):
        save(tmp_path / place, [[1]])
    with pytest.raises(InputError, match=r"an empty folder will do"):
        check_same_classes(str(tmp_path / "train"), str(tmp_path / "test"))
    (tmp_path / "test" / "cat").mkdir()
    check_same_classes(str(tmp_path / "train"), str(tmp_path / "test"))
    check_same_classes("data.py:train", str(query))
