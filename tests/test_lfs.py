"""A git-lfs pointer in the place of any file that is read is named, with the command that fetches the content."""

from pathlib import Path

import pytest
from small_text import tokenizer_json
from test_data import write as write_hdf5
from test_lerobot import make as make_lerobot
from test_rlds import content
from test_rlds import make as make_rlds

from vlarft.data import load_episodes
from vlarft.data.check import check
from vlarft.pretrained.files import read_json, read_weights
from vlarft.pretrained.text import from_vocabulary, read_text_tokenizer
from vlarft.run.checkpoint import read_header
from vlarft.run.lfs import refuse_pointer

TEXT = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4711\n"
NAMED = r"is a git-lfs pointer, not the file's content: .*git lfs pull"


def point(*paths: Path) -> None:
    """Replace files by their pointers."""
    assert paths
    for path in paths:
        path.write_text(TEXT)


@pytest.mark.parametrize("suffix", ["parquet", "mp4", "jsonl", "json"])
def test_lerobot(tmp_path, suffix):
    make_lerobot(tmp_path / "set", "v2.1")
    point(*(tmp_path / "set").rglob(f"*.{suffix}"))
    with pytest.raises(ValueError, match=rf"\.{suffix} {NAMED}"):
        load_episodes(tmp_path)
    report, _ = check(tmp_path)
    assert len(report.errors) >= 1 and all("git lfs pull" in error for error in report.errors)


@pytest.mark.parametrize("suffix", ["hdf5", "tfrecord"])
def test_hdf5_and_rlds(tmp_path, suffix):
    if suffix == "hdf5":
        write_hdf5(tmp_path / "suite" / "task_demo.hdf5")
    else:
        make_rlds(tmp_path, [content(0), content(1)])
    point(*tmp_path.rglob(f"*.{suffix}*"))
    with pytest.raises(ValueError, match=rf"\.{suffix}.* {NAMED}"):
        load_episodes(tmp_path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", read_header),  # written here
        ("model.safetensors", read_weights),
        ("model.pt", read_weights),
        ("model.safetensors", lambda path: read_weights(path.parent)),
        ("config.json", read_json),
        ("tokenizer.json", read_text_tokenizer),
        ("vocab.json", lambda path: from_vocabulary(path, path.with_name("merges.txt"))),
    ],
)
def test_models(tmp_path, name, read):
    point(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} {NAMED}"):
        read(tmp_path / name)


def test_other_files_pass(tmp_path):
    for text in ("", TEXT[:20], "x" + TEXT, tokenizer_json()):
        (tmp_path / "file").write_text(text)
        refuse_pointer(tmp_path / "file")
