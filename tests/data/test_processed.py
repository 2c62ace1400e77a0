"""The processed folder: written and read by hand, refused where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recformer.data.features import _item_columns
from recformer.data.processed import (
    INTERACTION_FILE,
    ITEM_FEATURES_FILE,
    ProcessedFolder,
    Sequences,
    read_columns,
    split_hash,
    write_mapping,
    write_processed,
)
from recformer.data.processed_files import check_table
from recformer.files import UserError

# Four users, four items. Leave-one-out for users 0 and 1, user 2 trains only, user 3 has items
# after a temporal cut and nothing before it.
PUBLISHED = {
    "train.json": {"0": [0, 1], "1": [2], "2": [1, 1]},
    "val.json": {"0": [2], "1": [3]},
    "test.json": {"0": [3], "1": [0], "3": [2, 0, 1]},
    "smap.json": {"B0": 0, "B1": 1, "B2": 2, "B3": 3},
    "meta_data.json": {
        "B1": {"title": "one", "brand": "", "category": "a b"},
        "B0": {"title": "zero", "brand": "x", "category": "c"},
        "B3": {"category": "d", "title": "three"},
        "B9": {"title": "nobody met it"},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in PUBLISHED.items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


def rows(sequences: Sequences) -> list[list[int]]:
    return [sequences[row].tolist() for row in range(len(sequences))]


def test_sequences_are_rows_laid_end_to_end() -> None:
    sequences = Sequences.from_lists([[3, 1], [], [2]])
    assert sequences.offsets.tolist() == [0, 2, 2, 3]
    assert sequences.items.tolist() == [3, 1, 2]
    assert sequences.items.dtype == np.int32
    assert sequences.offsets.dtype == np.int64
    assert sequences.lengths.tolist() == [2, 0, 1]
    assert sequences.rows.tolist() == [0, 0, 2]
    assert len(sequences) == 3
    assert rows(sequences) == [[3, 1], [], [2]]
    with pytest.raises(IndexError):
        sequences[3]


def test_sequences_from_rows_keep_the_order_within_a_row() -> None:
    sequences = Sequences.from_rows(np.array([2, 0, 2, 0]), np.array([5, 6, 4, 7]), 4)
    assert rows(sequences) == [[6, 7], [], [5, 4], []]


def test_a_published_folder_reads_unchanged(folder: Path) -> None:
    data = ProcessedFolder.load(folder)
    assert (data.num_users, data.num_items) == (4, 4)
    assert rows(data.train) == [[0, 1], [2], [1, 1], []]
    assert rows(data.val) == [[2], [3], [], []]
    assert rows(data.test) == [[3], [0], [], [2, 0, 1]]
    assert data.asins == ["B0", "B1", "B2", "B3"]
    # In item id order, attributes in file order, an item without metadata in its own place.
    assert data.items == [
        {"title": "zero", "brand": "x", "category": "c"},
        {"title": "one", "brand": "", "category": "a b"},
        {},
        {"category": "d", "title": "three"},
    ]
    assert list(data.items[3]) == ["category", "title"]
    assert data.num_without_metadata == 1
    assert data.dataset is None


def test_other_file_names(folder: Path) -> None:
    (folder / "train.json").rename(folder / "sequences.json")
    (folder / "smap.json").rename(folder / "items.json")
    data = ProcessedFolder.load(folder, train_file="sequences.json", item2id_file="items.json")
    assert rows(data.train) == [[0, 1], [2], [1, 1], []]


def test_null_is_absent_and_numbers_are_text(folder: Path) -> None:
    meta = {"B0": {"title": None, "year": 1999, "price": 2.5}}
    (folder / "meta_data.json").write_text(json.dumps(meta))
    data = ProcessedFolder.load(folder)
    assert data.items == [{"year": "1999", "price": "2.5"}, {}, {}, {}]
    assert data.num_without_metadata == 3


def test_evaluation_examples(folder: Path) -> None:
    data = ProcessedFolder.load(folder)

    val = data.eval_examples("val")
    assert val.user_ids.tolist() == [0, 1]
    assert rows(val.histories) == [[0, 1], [2]]
    assert val.targets.tolist() == [2, 3]
    assert val.num_without_history == 0

    test = data.eval_examples("test")
    assert len(test) == 3
    assert test.user_ids.tolist() == [0, 1, 3]
    assert rows(test.histories) == [[0, 1, 2], [2, 3], [2, 0]]
    assert test.targets.tolist() == [3, 0, 1]

    with pytest.raises(ValueError, match="'dev'"):
        data.eval_examples("dev")  # type: ignore[arg-type]


def test_users_without_history_are_left_out_and_counted(folder: Path) -> None:
    (folder / "val.json").write_text('{"3": [1], "0": [2]}')
    (folder / "test.json").write_text('{"2": [0], "4": [3], "5": []}')
    data = ProcessedFolder.load(folder)
    val = data.eval_examples("val")
    assert (val.user_ids.tolist(), val.num_without_history) == ([0], 1)
    test = data.eval_examples("test")
    assert (test.user_ids.tolist(), test.num_without_history) == ([2], 1)
    assert rows(test.histories) == [[1, 1]]


@given(
    st.lists(
        st.tuples(*[st.lists(st.integers(0, 9), max_size=4)] * 3).filter(any),
        min_size=1,
        max_size=8,
    )
)
def test_evaluation_examples_by_a_plain_loop(users: list[tuple[list[int], ...]]) -> None:
    train, val, test = (Sequences.from_lists([user[part] for user in users]) for part in range(3))
    data = ProcessedFolder(
        path=Path("."),
        train=train,
        val=val,
        test=test,
        num_users=len(users),
        num_items=10,
        items=[{}] * 10,
        asins=[str(item) for item in range(10)],
        split_hash="",
        num_without_metadata=10,
        dataset=None,
    )
    for split, before in (("val", (0,)), ("test", (0, 1))):
        held_out = 1 if split == "val" else 2
        expected = []
        for user, parts in enumerate(users):
            history = [item for part in before for item in parts[part]] + parts[held_out][:-1]
            if parts[held_out] and history:
                expected.append((user, history, parts[held_out][-1]))
        examples = data.eval_examples(split)  # type: ignore[arg-type]
        found = zip(examples.user_ids.tolist(), rows(examples.histories), examples.targets.tolist())
        assert list(found) == expected
        plain = Sequences.from_lists([history for _, history, _ in expected])
        for name in ("lengths", "offsets", "items"):
            own = getattr(examples.histories, name)
            assert own.dtype == getattr(plain, name).dtype
            assert own.tolist() == getattr(plain, name).tolist()
        assert rows(examples.histories.between(1, 9)) == rows(plain)[1:9]
        with_target = sum(bool(parts[held_out]) for parts in users)
        assert examples.num_without_history == with_target - len(expected)


def write(folder: Path, **changes: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "train": Sequences.from_lists([[0, 1], [1]]),
        "val": Sequences.from_lists([[2], []]),
        "test": Sequences.from_lists([[0], []]),
        "user_names": ["A", "Ü"],
        "asins": ["B0", "B1", "B2"],
        "meta": {"B0": {"title": "nought “0”"}, "B1": {}, "B7": {"title": "unmet"}},
        "dataset": {"parameters": {"seed": 3}},
    }
    return write_processed(folder, **(arguments | changes))  # type: ignore[arg-type]


def test_written_files_have_the_published_shape(tmp_path: Path) -> None:
    about = write(tmp_path / "new" / "folder")
    found = {
        path.name: json.loads(path.read_text())
        for path in (tmp_path / "new" / "folder").glob("*.json")
    }
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {*found, "interactions.parquet"}
    assert found == {
        "train.json": {"0": [0, 1], "1": [1]},
        "val.json": {"0": [2]},
        "test.json": {"0": [0]},
        "umap.json": {"A": 0, "Ü": 1},
        "smap.json": {"B0": 0, "B1": 1, "B2": 2},
        "meta_data.json": {"B0": {"title": "nought “0”"}, "B1": {}, "B7": {"title": "unmet"}},
        "dataset.json": about,
    }
    assert about["parameters"] == {"seed": 3}
    assert (about["num_users"], about["num_items"], about["num_interactions"]) == (2, 3, 5)

    data = ProcessedFolder.load(tmp_path / "new" / "folder")
    assert data.dataset == about
    assert data.split_hash == about["split_hash"]
    assert data.items == [{"title": "nought “0”"}, {}, {}]


def test_write_mapping_of_nothing(tmp_path: Path) -> None:
    with open(tmp_path / "empty.json", "w") as handle:
        write_mapping(handle, [])
    assert json.loads((tmp_path / "empty.json").read_text()) == {}


def test_a_failed_write_leaves_the_older_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write(tmp_path, asins=["X0", "X1", "X2"], meta={"X0": {"title": object()}})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_split_hash_is_of_the_content() -> None:
    def digest(
        train: list[list[int]], val: list[list[int]], test: list[list[int]], asins: str = "wxyz"
    ) -> str:
        lists = (Sequences.from_lists(part) for part in (train, val, test))
        return split_hash(*lists, list(asins))

    same = digest([[0, 1], []], [[2], []], [[3], []])
    assert same == digest([[0, 1]], [[2]], [[3]])  # a row without items is no user of the split
    assert same == split_hash(
        Sequences.from_lists([[0, 1]]),
        Sequences.from_lists([[2]]),
        Sequences.from_lists([[3]]),
        {"z": 3, "x": 1, "w": 0, "y": 2},
    )
    assert len(same) == 64
    others = {
        digest([[1, 0]], [[2]], [[3]]),
        digest([[0, 1, 2]], [[]], [[3]]),
        digest([[0, 1]], [[3]], [[2]]),
        digest([[], [0, 1]], [[], [2]], [[], [3]]),
        digest([[0, 1]], [[2]], [[3]], "wxzy"),
        digest([[0], [1]], [[2]], [[3]]),
    }
    assert len(others) == 6
    assert same not in others


def test_a_half_rewritten_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train.json").write_text('{"0": [0, 1], "1": [2]}')
    with pytest.raises(UserError, match=r"dataset\.json describes.*partly rewritten"):
        ProcessedFolder.load(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert rows(ProcessedFolder.load(tmp_path).train) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "", "train.json is empty"),
        ("train.json", "{", "train.json is not valid JSON"),
        ("train.json", "{}", "train.json holds no user"),
        ("train.json", "[[0, 1]]", "train.json holds a list, expected a JSON object"),
        ("val.json", '{"-1": [0]}', "val.json has the user '-1'"),
        ("val.json", '{"A1": [0]}', "val.json has the user 'A1'"),
        ("test.json", '{"0": 3}', "test.json: user 0 has 3, expected a list of item ids"),
        ("test.json", '{"0": ["B1"]}', r'user 0 has \["B1"\], expected a list of item ids'),
        ("test.json", '{"0": [1.5]}', "expected a list of item ids"),
        ("test.json", '{"0": [true]}', "expected a list of item ids"),
        ("test.json", '{"0": [1, 4]}', "test.json: user 0 has item id 4.*ids 0 to 3"),
        ("train.json", '{"0": [-1]}', "user 0 has item id -1"),
        ("smap.json", "{}", "smap.json holds no item"),
        ("smap.json", '{"B0": 0, "B1": 0}', "gives item id 0 to both 'B0' and 'B1'"),
        ("smap.json", '{"B0": 0, "B1": 2}', "maps 'B1' to 2; with 2 items"),
        ("smap.json", '{"B0": "0"}', "maps 'B0' to '0'"),
        ("meta_data.json", '{"B0": "title"}', 'B0 has "title", expected {attribute: text}'),
        ("meta_data.json", '{"B0": {"category": ["a"]}}', r'B0 has \["a"\] as its \'category\''),
        ("meta_data.json", "[]", "meta_data.json holds a list"),
        ("train.json", '{"7": [0, 1], "007": [2]}', "train.json has user 7 twice, once as '007'"),
        (
            "val.json",
            '{"0": [0], "0": [1]}',
            "val.json is not valid JSON: the key '0' stands twice",
        ),
        ("smap.json", '{"B0": 0, "B0": 1}', "smap.json is not valid JSON: the key 'B0' stands"),
        ("smap.json", "[" * 200_000, "smap.json is not valid JSON: nested too deep"),
        ("smap.json", f'{{"B0": {"9" * 5000}}}', "smap.json is not valid JSON: Exceeds the limit"),
        ("train.json", '{"2000000000": [0, 1]}', "has the user id 2,000,000,000 among . users"),
        ("test.json", f'{{"{10**30}": [0, 1]}}', "has the user id 1,000,000,000,000,000,000"),
    ],
)
def test_wrong_files_are_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        ProcessedFolder.load(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "val.json").unlink()
    (folder / "smap.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks val\.json, smap\.json"):
        ProcessedFolder.load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        ProcessedFolder.load(folder / "nowhere")


def test_no_bit_of_the_parquet_files_is_believed(tmp_path: Path) -> None:
    about = write(
        tmp_path, times=np.arange(5), columns={"feature f": np.arange(5.0)},
        item_columns={"feature g": np.arange(3.0)},
    )  # fmt: skip
    data = ProcessedFolder.load(tmp_path)
    assert data.dataset == about
    for name in (INTERACTION_FILE, ITEM_FEATURES_FILE):
        path = tmp_path / name
        sound = path.read_bytes()
        check_table(path, data.dataset)
        for place in range(0, len(sound), 13):
            raw = bytearray(sound)
            raw[place] ^= 1 << place % 8
            path.write_bytes(raw)
            with pytest.raises(UserError, match=f"{name} is damaged or of another preparation"):
                check_table(path, data.dataset)
    with pytest.raises(UserError, match="item_features.parquet is damaged"):
        _item_columns(data, ["feature g"])
    with pytest.raises(UserError, match="interactions.parquet is damaged"):
        read_columns(data, ["feature f"])
