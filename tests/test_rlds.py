"""RLDS in TFRecord files whose bytes are built by hand: read, and refused if they are damaged."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import every_camera
from PIL import Image

from vlarft.data import load_episodes
from vlarft.data.check import check
from vlarft.data.convert import main as convert
from vlarft.data.tfrecord import crc32c, parse_example, read_records

STEPS, SIZE = 12, 24


def slow_crc(data: bytes) -> int:
    """The textbook's CRC-32C, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = slow_crc(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    out = b""
    value &= (1 << 64) - 1
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values, packed=True) -> bytes:
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, v) for v in values))
    if isinstance(values[0], int):
        if packed:
            return field(3, field(1, b"".join(map(varint, values))))
        return field(3, b"".join(varint(1 << 3) + varint(v) for v in values))
    if packed:
        return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
    return field(2, b"".join(varint(1 << 3 | 5) + struct.pack("<f", v) for v in values))


def example(features: dict, packed=True) -> bytes:
    entries = [field(1, field(1, k.encode()) + field(2, feature(v, packed))) for k, v in features.items()]
    return field(1, b"".join(entries))


def jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=95)
    return file.getvalue()


def content(seed: int, steps: int = STEPS) -> dict:
    rng = np.random.default_rng(seed)
    shades = rng.integers(0, 256, (steps, 1, 1, 3), dtype=np.uint8) + np.zeros((1, SIZE, SIZE, 1), np.uint8)
    actions = rng.uniform(-1, 1, (steps, 7))
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
    return {
        "steps/observation/image": [jpeg(image) for image in shades],
        "steps/observation/wrist_image": [jpeg(255 - image) for image in shades],
        "steps/observation/state": rng.normal(size=steps * 8).tolist(),
        "steps/observation/joint_state": rng.normal(size=steps * 7).tolist(),
        "steps/action": actions.ravel().tolist(),
        "steps/language_instruction": [b"pick up the bowl"] * steps,
        "steps/is_first": [int(t == 0) for t in range(steps)],
        "episode_metadata/file_path": [b"x.hdf5"],
    }


def make(root: Path, episodes: list[dict], shards: int = 1, packed=True) -> list[Path]:
    folder = root / "libero_goal_no_noops" / "1.0.0"
    folder.mkdir(parents=True)
    paths = []
    for shard in range(shards):
        paths.append(folder / f"libero_goal-train.tfrecord-{shard:05d}-of-{shards:05d}")
        paths[-1].write_bytes(b"".join(record(example(e, packed)) for e in episodes[shard::shards]))
    return paths


@pytest.mark.parametrize("packed", [True, False])
def test_episodes_are_what_was_written(tmp_path, packed):
    written = [content(i, STEPS + i) for i in range(3)]
    make(tmp_path, written, shards=2, packed=packed)
    episodes = every_camera(tmp_path)
    assert [len(e) for e in episodes] == [12, 14, 13]  # in the order of the shards
    for episode, true in zip(episodes, (written[0], written[2], written[1])):
        assert episode.instruction == "pick up the bowl" and list(episode.cameras) == ["image", "wrist_image"]
        np.testing.assert_array_equal(episode.actions.ravel(), np.float32(true["steps/action"]))
        np.testing.assert_array_equal(episode.proprio.ravel(), np.float32(true["steps/observation/state"]))
        for camera in ("image", "wrist_image"):
            first = [np.asarray(Image.open(io.BytesIO(b))) for b in true[f"steps/observation/{camera}"]]
            np.testing.assert_array_equal(episode.cameras[camera], np.stack(first))
    assert episodes[1].name == "libero_goal_no_noops/libero_goal-train.tfrecord-00000-of-00002/episode_1"
    wrist = load_episodes(tmp_path, "eye_in_hand", names=[episodes[1].name])[0]
    assert list(wrist.cameras) == ["wrist_image"]
    np.testing.assert_array_equal(wrist.images[3:5], episodes[1].cameras["wrist_image"][3:5])


def test_cameras_that_an_episode_lacks(tmp_path):
    """Bridge has placeholders for them; and 16-bit PNGs are depth."""
    deep = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE), 1000, np.uint16)).save(deep, "png")
    first = {**content(0), "steps/observation/depth": [deep.getvalue()] * STEPS, "episode_metadata/has_image": [1]}
    first["episode_metadata/has_wrist_image"] = [0]
    make(tmp_path, [first, content(1)])
    assert list(every_camera(tmp_path)[0].cameras) == ["image", "wrist_image"] and len(load_episodes(tmp_path)) == 2
    with pytest.warns(
        UserWarning, match="1 episodes say that they have no camera eye_in_hand, first .*episode_0: left out"
    ):
        assert len(load_episodes(tmp_path, "eye_in_hand")) == 1


def test_a_download_leaves_hidden_files(tmp_path):
    make(tmp_path, [content(0)])
    hidden = tmp_path / ".cache" / "huggingface" / "download"
    hidden.mkdir(parents=True)
    for end in ("metadata", "lock"):
        (hidden / f"libero_goal-train.tfrecord-00000-of-00001.{end}").write_text("x")
    assert len(every_camera(tmp_path)) == 1


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 4095, 4096, 4097, 12_289, 40_001])
def test_checksum(length):
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    assert crc32c(data) == slow_crc(data.tobytes())
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # the standard's check value


def test_numbers_of_all_kinds():
    values = [0, 1, -1, 300, -(1 << 63), (1 << 63) - 1]
    for packed in (True, False):
        data = example({"n": values, "x": [0.5, -2.0], "none": [b""]}, packed)
        data += field(7, b"unknown fields are skipped")
        found = parse_example(np.frombuffer(data, np.uint8), 0)
        assert found["n"].tolist() == values and found["x"].tolist() == [0.5, -2.0] and found["none"].sizes == [0]


def test_damaged_files_are_refused(tmp_path):
    path = make(tmp_path, [content(0), content(1)])[0]
    good = path.read_bytes()
    assert len(list(read_records(path))) == 2
    for end, text in ((len(good) - 5, r"is truncated in record 1 \(.* needed\)"), (8, "in the header of record 0")):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match=text):
            load_episodes(path)
    for at, text in ((3, "the length of record 0 has a wrong checksum"), (500, "record 0 has a wrong checksum")):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        with pytest.raises(ValueError, match=rf"tfrecord-00000-of-00001: {text}"):
            load_episodes(path)
    path.write_bytes(record(b"\x0a\xff\x01 no example"))
    with pytest.raises(ValueError, match="record 0 is not a tf.train.Example"):
        load_episodes(path)


def test_missing_parts_are_named(tmp_path):
    paths = make(tmp_path, [content(0), content(1)], shards=2)
    with pytest.raises(ValueError, match=r"record 0 has no camera 'front'; it has image, wrist_image: give --camera"):
        load_episodes(tmp_path, "front")
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"tfrecord-00001-of-00002 is missing beside .*: the download is incomplete"):
        load_episodes(tmp_path)
    for key, value, text in (
        ("steps/action", None, r"record 0 has no numbers in steps/action; it has episode_metadata/file_path"),
        ("steps/action", [0.5] * 83, r"steps/action has 83 numbers, not a multiple of the 12 images"),
        ("steps/action", [0.5] * 83 + [float("nan")], r"steps/action has nan at row 11, column 6"),
        ("steps/language_instruction", [b"\xff"], r"record 0/steps/language_instruction is not text in UTF-8 \("),
        ("episode_metadata/file_path", [b"\xff"], r"one.tfrecord: record 0/episode_metadata/file_path is not text"),
        ("steps/language_instruction", [b"a", b"b"], r"language_instruction must be one text, got \['a', 'b'\]"),
        (
            "steps/observation/wrist_image",
            content(0)["steps/observation/image"][1:],
            r"lengths differ: .*wrist_image': 11",
        ),
    ):
        features = {**content(0), key: value}
        path = tmp_path / "one.tfrecord"
        path.write_bytes(record(example({k: v for k, v in features.items() if v is not None})))
        with pytest.raises(ValueError, match=text):
            every_camera(path)
    load_episodes(path)  # the wrist camera, which is a frame short, is not read


def test_metadata_that_nothing_reads_need_not_be_text(tmp_path):
    make(tmp_path, [{**content(i), "episode_metadata/note": [b"\xff"]} for i in range(2)])
    assert len(every_camera(tmp_path)) == 2


def test_becomes_a_lerobot_set(tmp_path):
    written = [content(i) for i in range(2)]
    make(tmp_path / "rlds", written)
    arguments = [str(tmp_path / "rlds"), str(tmp_path / "set"), "--format", "lerobot", "--images", "png"]
    with pytest.raises(ValueError, match=r"does not state its control steps per second: give --fps \(LIBERO: 20\)"):
        convert(arguments)
    convert([*arguments, "--fps", "20"])
    for one, two in zip(load_episodes(tmp_path / "rlds"), every_camera(tmp_path / "set"), strict=True):
        assert (two.fps, two.instruction, list(two.cameras)) == (20, "pick up the bowl", ["image", "image2"])
        np.testing.assert_array_equal(one.actions, two.actions)
        np.testing.assert_array_equal(one.images, two.images)


def test_images_that_are_empty_or_damaged_are_found(tmp_path):
    bad = content(0)
    images = bad["steps/observation/image"]
    path = tmp_path / "one.tfrecord"
    path.write_bytes(record(example({**bad, "steps/observation/image": [*images[:3], b"", *images[4:]]})))
    with pytest.raises(ValueError, match=r"observation/image, frame 3 is empty \(1 of 12 frames\); remove the record"):
        load_episodes(path)
    path.write_bytes(record(example({**bad, "steps/observation/image": [*images[:3], b"no image", *images[4:]]})))
    report, episodes = check(path)
    assert len(report.errors) == 1 and "image, frame 3 is not a readable image (8 bytes" in report.errors[0]
    assert not episodes
    assert not any("frame" in text for text in check(path, "wrist_image")[0].errors)
