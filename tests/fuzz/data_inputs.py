"""Mutated datasets: HDF5 in D4RL's layout, NPZ, Minari folders, flat caches."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from judge import CANARY, Case
from material import INFO, TRAIN, Material, write_hdf5
from mutate import Rng, as_file, bytes_of, copied, json_file, json_text, value_of


def _command(dataset: Path, rng: Rng) -> list[str]:
    """What reads a dataset; mostly the cheapest."""
    name = str(dataset)
    return rng.choice(
        [["data", "info", name, "--json", "--no-cache"]] * 6
        + [["data", "info", name], ["data", "info", name, "--json", "--semantics", "d4rl", "--no-cache"]]
        + [["data", "convert", name, "converted.npz"], ["data", "convert", name, "converted-v0"]]
        + [[*TRAIN, "agent=bc", f"dataset='{name}'", "out=runs", "data.cache=false"]]
    )


def _info(rng: Rng) -> tuple[str, str]:
    """A mutated `offrl_info`."""
    if rng.random() < 0.15:
        data, what = bytes_of(json.dumps(INFO).encode(), rng)
        return data.decode("latin-1").replace("\0", "?"), what
    value, what = value_of(INFO, rng)
    return json_text(value), what


# ---- arrays --------------------------------------------------------------------------------------------------------


def _columns(data: dict[str, Any], rng: Rng) -> tuple[dict[str, Any], str]:
    """One to three changes of names, types, shapes and numbers."""
    data, done = dict(data), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice(sorted(data))
        kind = rng.choice(["remove", "rename", "type", "shape", "number", "length", "more"])
        value = np.asarray(data[key])
        if kind == "remove":
            del data[key]
        elif kind == "rename":
            new = rng.choice(
                ["obs", "dones", "terminations", "action", "é", "a b", "infos", "masks", "metadata", "x" * 300]
            )
            data[new] = data.pop(key)
        elif kind == "type":
            new = rng.choice(["f8", "f2", "i8", "i1", "u8", "?", "c8", "S3", ">f4", "U4"])
            data[key] = value.astype(new)
        elif kind == "shape":
            value = np.atleast_1d(value)
            shapes = [
                value[:, None],
                value.reshape(-1),
                value[None],
                value[:0],
                value.reshape(-1)[0],
                value[..., None, None],
                value.T,
            ]
            new = rng.randrange(len(shapes))
            data[key] = shapes[new]
        elif kind == "number":
            new = rng.choice([np.nan, np.inf, -np.inf, 1e38, -1e300, 2, -1])
            value = value.astype("f8")
            value.reshape(-1)[rng.randrange(value.size) if value.size else slice(0)] = new
            data[key] = value
        elif kind == "length":
            new = rng.choice([1, 2, len(value) - 1]) if value.ndim else 0
            data[key] = value[:new] if value.ndim else value
        else:
            new = rng.choice(
                ["timeouts", "masks", "dones", "infos/qpos", "truncations", "episode_terminals", "returns"]
            )
            data[new] = value
        done.append(f"{kind} {key}" + ("" if kind == "remove" else f" {new}"))
    return data, ", ".join(done)


def hdf5(material: Material, folder: Path, rng: Rng) -> Case:
    """D4RL's layout: damaged bytes, changed columns, links and storage elsewhere, huge claims, odd items."""
    path = folder / rng.choice(["x.hdf5", "x.h5", "hopper-medium-v2.hdf5", "antmaze-x.hdf5", "a b,c=1.hdf5"])
    kind = rng.choice(
        ["bytes", "bytes", "bytes", "columns", "columns", "info", "foreign", "claim", "item", "attributes"]
    )
    data = dict(material.columns)
    if kind == "bytes":
        changed, what = bytes_of(material.hdf5.read_bytes(), rng)
        path.write_bytes(changed)
        return Case(_command(path, rng), what)
    if kind == "columns":
        data, what = _columns(data, rng)
        with h5py.File(path, "w") as file:
            for key, value in data.items():
                text = np.asarray(value).dtype.kind == "U"
                file.create_dataset(key, data=np.asarray(value).astype("S8") if text else value)
        return Case(_command(path, rng), what)
    text, what = _info(rng)
    write_hdf5(
        path,
        data,
        **rng.choice(
            [{}, {"chunks": True, "compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True, "fletcher32": True}]
        ),
    )
    key = rng.choice(sorted(data))
    with h5py.File(path, "r+") as file:
        if kind == "info":
            place = file if len(text) > 60_000 else file.attrs  # HDF5's attributes hold less than 64 KiB
            plain = text.replace("\0", "?").encode("utf-8", "replace").decode()
            place["offrl_info"] = rng.choice([plain, plain, plain, np.bytes_(plain.encode()), 5, [1, 2], np.zeros(0)])
        elif kind == "foreign":
            what = f"{key} {_elsewhere(file, key, material.outside, rng)}"
        elif kind == "claim":
            what = f"{key} {_claim(file, key, rng)}"
        elif kind == "item":
            what = f"{key} {_odd_item(file, key, rng)}"
        else:
            what = "attributes"
            target = rng.choice([file, file[key]])
            for name in ("bound", "episode_id", "total_steps", "created_at"):
                target.attrs[name] = rng.choice([np.nan, "x" * 100, 10**18, [1.0, 2.0]])
    return Case(_command(path, rng), f"{kind}: {what}")


def _elsewhere(file: h5py.File, key: str, outside: tuple[Path, ...], rng: Rng) -> str:
    text, _, numbers = outside
    value = file[key][()]
    del file[key]
    kind = rng.choice(
        ["external link", "dangling link", "soft loop", "raw storage", "virtual", "virtual of nothing", "deep link"]
    )
    if kind in ("external link", "dangling link"):
        file[key] = h5py.ExternalLink(str(numbers) if kind[0] == "e" else "nothing.hdf5", f"/{key}")
    elif kind == "soft loop":
        file[key] = h5py.SoftLink(f"/{key}")
    elif kind == "raw storage":
        file.create_dataset(key, value.shape, value.dtype, external=[(str(text), 0, h5py.h5f.UNLIMITED)])
    elif kind == "deep link":
        file["a/b"] = h5py.ExternalLink(str(numbers), "/")
        file[key] = h5py.SoftLink(f"/a/b/{key}")
    else:
        layout = h5py.VirtualLayout(value.shape, value.dtype)
        layout[:] = h5py.VirtualSource(str(numbers) if kind == "virtual" else "nothing.hdf5", key, value.shape)
        file.create_virtual_dataset(key, layout)
    return kind


def _claim(file: h5py.File, key: str, rng: Rng) -> str:
    value = file[key][()]
    rows = rng.choice([10**6, 10**9, 10**12, 2**62])
    keys = [key] if rng.random() < 0.5 else sorted(file)
    for name in keys:
        value = file[name][()]
        del file[name]
        options = rng.choice([{"chunks": True}, {"chunks": True, "compression": "gzip"}])
        file.create_dataset(name, (rows, *value.shape[1:]), value.dtype, **options)
    return f"claims {rows} rows ({len(keys)} keys)"


def _odd_item(file: h5py.File, key: str, rng: Rng) -> str:
    del file[key]
    kind = rng.choice(["group", "empty", "compound", "text", "reference", "ragged", "enum", "type", "loop"])
    if kind == "group":
        file.create_group(f"{key}/inner")
    elif kind == "empty":
        file[key] = h5py.Empty("f4")
    elif kind == "compound":
        file[key] = np.zeros(140, [("a", "f4"), ("b", "i4")])
    elif kind == "text":
        file[key] = ["a"] * 140
    elif kind == "reference":
        file[key] = np.array([file.ref] * 140, dtype=h5py.ref_dtype)
    elif kind == "ragged":
        file.create_dataset(key, (140,), h5py.vlen_dtype(np.float32))
    elif kind == "enum":
        file.create_dataset(key, (140,), h5py.enum_dtype({"a": 0, "b": 1}))
    elif kind == "type":
        file[key] = np.dtype("f4")
    else:
        file[key] = file["/"]
    return kind


# ---- NPZ -------------------------------------------------------------------------------------------------------------


class _Opener:
    """Unpickling it would make the file that says so."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (__import__, (CANARY,))


def npz(material: Material, folder: Path, rng: Rng) -> Case:
    """Damaged zips, zip flags, bombs, pickles, members of other kinds, changed columns, `offrl_info`."""
    path = folder / rng.choice(["x.npz", "hopper-medium-v2.npz", "données (1).npz", "run=3,step=10.npz"])
    kind = rng.choice(
        ["bytes", "bytes", "columns", "columns", "info", "info", "flags", "bomb", "pickle", "member", "header"]
    )
    what = ""
    if kind == "bytes":
        changed, what = bytes_of(material.npz.read_bytes(), rng)
        path.write_bytes(changed)
    elif kind == "columns":
        data, what = _columns(material.columns, rng)
        np.savez(path, **{key.replace("/", "."): value for key, value in data.items()})
    elif kind == "info":
        text, what = _info(rng)
        values: list[Any] = [text, text, text, text.encode("utf-8", "replace"), 5, [1, 2], ["a", "b"]]
        np.savez(path, **material.columns, offrl_info=rng.choice(values))
    elif kind == "pickle":
        value = np.array([_Opener(), None], dtype=object)
        key = rng.choice([*material.columns, "offrl_info", "more"])
        np.savez(path, **{**material.columns, key: value})
        what = key
    elif kind == "flags":
        what = _zip_flags(material.npz.read_bytes(), path, rng)
    else:
        key = rng.choice(sorted(material.columns))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, value in material.columns.items():
                out.writestr(f"{name}.npy", _odd_member(kind, value, rng) if name == key else _npy(value))
        what = key
    return Case(_command(path, rng), f"{kind}: {what}")


def _npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def _header(text: str, rest: bytes = b"") -> bytes:
    """An NPY file with a header of one's own."""
    padded = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(padded)) + padded + rest


def _odd_member(kind: str, value: np.ndarray, rng: Rng) -> bytes:
    if kind == "bomb":
        rows = rng.choice([10**7, 10**10, 10**18, -1])
        shape = (rows, *value.shape[1:])
        return _header(f"{{'descr': '{value.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}", bytes(8 << 20))
    if kind == "member":
        return rng.choice([b"", b"text", b"\x80\x04.", b"PK\x03\x04", b"\x93NUMPY", b"\x89HDF\r\n\x1a\n"])
    return _header(
        rng.choice(
            [
                "{'descr': '<f4'}",
                f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'(' * 500}",
                "__import__('os').system('true')",
                "{'descr': '|O', 'fortran_order': False, 'shape': (140,), }",
                "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (140,), }",
                "{'descr': '<M8[s]', 'fortran_order': True, 'shape': (140,), }",
                "{'descr': '<f4', 'fortran_order': 3, 'shape': (True,), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1e3,), }",
                "{'descr': '|V0', 'fortran_order': False, 'shape': (140,), }",
                "9" * 9000,
            ]
        ),
        bytes(560),
    )


def _zip_flags(data: bytes, path: Path, rng: Rng) -> str:
    """Change a field of one of the zip's directory entries: flags (encrypted), method, sizes, offset."""
    out, at = bytearray(data), -1
    for _ in range(rng.randrange(1, 7)):
        at = data.find(b"PK\x01\x02", at + 1)
    at = at if at >= 0 else data.find(b"PK\x01\x02")
    offset, width = rng.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4), (6, 2)])
    new = rng.choice([1, 9, 12, 14, 93, 99, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x801])
    out[at + offset : at + offset + width] = (new & (256**width - 1)).to_bytes(width, "little")
    path.write_bytes(bytes(out))
    return f"directory entry's {width} bytes at {offset} = {new}"


# ---- Minari, flat ----------------------------------------------------------------------------------------------------


def minari(material: Material, folder: Path, rng: Rng) -> Case:
    """Metadata of other types (the spaces' JSON, too), files of other kinds, damaged or changed data."""
    target = copied(material.minari, folder, rng.choice(["base-v0", "x", "D4RL-pen-human-v2"]))
    described, numbers = target / "data/metadata.json", target / "data/main_data.hdf5"
    kind = rng.choice(["metadata", "metadata", "space", "space", "spec", "files", "bytes", "items", "items"])
    if kind == "metadata":
        what = json_file(described, rng)
    elif kind in ("space", "spec"):
        value = json.loads(described.read_text())
        key = "env_spec" if kind == "spec" else rng.choice(["observation_space", "action_space"])
        inner, what = value_of(json.loads(value[key]), rng, [*_SPACES, *_PLACES] if rng.random() < 0.5 else None)
        text = json_text(inner)
        value[key] = text if len(text) < 10**6 else "[" * 100_000
        described.write_text(json.dumps(value))
        what = f"{key}: {what}"
    elif kind == "files":
        what = as_file(rng.choice([described, numbers]), rng, material.outside)
    elif kind == "bytes":
        changed, what = bytes_of(numbers.read_bytes(), rng)
        numbers.write_bytes(changed)
    else:
        with h5py.File(numbers, "r+") as file:
            group = file[rng.choice(["episode_0", "episode_2"])]
            key = rng.choice(sorted(group))
            what = rng.choice([_elsewhere, _odd_item_of, _claim_of])(group, key, material.outside, rng)
            what = f"{group.name}/{key} {what}"
    return Case(_command(target, rng), f"{kind}: {what}")


def _odd_item_of(group: h5py.Group, key: str, _: tuple[Path, ...], rng: Rng) -> str:
    return _odd_item(group, key, rng)


def _claim_of(group: h5py.Group, key: str, _: tuple[Path, ...], rng: Rng) -> str:
    return _claim(group, key, rng)


_BOX = {"type": "Box", "dtype": "float32", "shape": [3], "low": [-1.0] * 3, "high": [1.0] * 3}
_NESTED: dict[str, Any] = _BOX
for _ in range(150):
    _NESTED = {"type": "Tuple", "subspaces": [_NESTED]}
_SPACES: list[Any] = [
    {"type": "Discrete", "n": 3}, {"type": "Discrete", "n": 10**12},
    {"type": "Dict", "subspaces": {"": _BOX, "a.b": _BOX}},
    {"type": "Tuple", "subspaces": [_BOX, _BOX]}, {"type": "MultiDiscrete", "nvec": [2, 10**9]},
    {"type": "MultiBinary", "n": [3]},
    {"type": "Text"}, {"type": "Graph"}, {"type": "Sequence", "feature_space": _BOX}, _NESTED,
    {**_BOX, "shape": [10**6, 10**6]},
    {**_BOX, "dtype": "object"}, {**_BOX, "dtype": "float128"}, {**_BOX, "shape": []}, {**_BOX, "low": "nan"},
    {**_BOX, "low": 5},
]  # fmt: skip
_PLACES: list[Any] = [f"{CANARY}:Thing-v0", f"{CANARY}:Thing", f"{CANARY}.Thing", "../../x", "Nope-v0"]


def flat(material: Material, folder: Path, rng: Rng) -> Case:
    """Safetensors named directly: header's JSON, offsets, types, `offrl`, bytes."""
    path = folder / "x.safetensors"
    data = material.flat.read_bytes()
    if rng.random() < 0.3:
        data, what = bytes_of(data, rng)
    else:
        data, what = safetensors(data, rng)
    path.write_bytes(data)
    return Case(_command(path, rng), what)


def safetensors(data: bytes, rng: Rng, owner: str = "offrl") -> tuple[bytes, str]:
    """A safetensors file with a changed header: its entries, or the JSON that offrl keeps in it under the key `owner`."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.choice(["entry", "entry", "facts", "facts", "facts", "numbers", "length"])
    if kind == "facts" and owner:
        facts, what = value_of(json.loads(header["__metadata__"][owner]), rng)
        header["__metadata__"][owner] = json_text(facts)
        header["__metadata__"].pop("checksum", None)
        text = json.dumps(header)
    elif kind in ("entry", "facts"):
        odd = [
            "F64",
            "I64",
            "F32",
            "BOOL",
            "X",
            [0, 10**12],
            [0, 4],
            [3],
            [10**9, 10**9],
            [-1],
            0,
            None,
            [],
            {},
            [2**63],
            "@deep",
        ]
        changed, what = value_of(header, rng, odd)
        if isinstance(changed, dict) and isinstance(changed.get("__metadata__"), dict) and rng.random() < 0.8:
            changed["__metadata__"].pop("checksum", None)
        text = json_text(changed)
    elif kind == "numbers":
        at = rng.randrange(max(1, len(rest) // 4)) * 4
        rest = rest[:at] + rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff"]) + rest[at + 4 :]
        if rng.random() < 0.5:
            header["__metadata__"].pop("checksum", None)
        text, what = json.dumps(header), f"number at {at}"
    else:
        text, what = json.dumps(header), "length"
        claimed = rng.choice([0, 1, len(text) - 1, len(text) + 1, 10**12, 2**64 - 1])
        return claimed.to_bytes(8, "little") + text.encode() + rest, f"header's length {claimed}"
    encoded = text.encode("utf-8", "replace")
    return len(encoded).to_bytes(8, "little") + encoded + rest, f"{kind}: {what}"
