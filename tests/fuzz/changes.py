"""Changes to valid files. Each takes a generator of random numbers and a path, changes the file, and says in words what it did.

What such a change makes is wrong: it must be refused, or said, unless the result stays the same. Words that begin with "valid: " are about
changes that make another input, as valid as the first."""
import gzip
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import openpyxl
import pandas as pd

Change = Callable[[np.random.Generator, Path], str]


def write(path: Path, content: bytes) -> None:
    "Write a file that shares nothing with the original, of which it may have been a hard link."
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# Files of any kind

def cut(rng: np.random.Generator, path: Path) -> str:
    content = path.read_bytes()
    place = int(rng.integers(0, max(1, len(content))))
    write(path, content[:place])
    return f"cut after {place} of {len(content)} bytes"


def flip(rng: np.random.Generator, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = rng.integers(0, len(content), rng.integers(1, 6))
    for place in places:
        content[place] ^= int(rng.integers(1, 256))
    write(path, bytes(content))
    return f"bytes {places.tolist()} flipped"


def flip_start(rng: np.random.Generator, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = rng.integers(0, min(len(content), 400), rng.integers(1, 4))
    for place in places:
        content[place] ^= int(rng.integers(1, 256))
    write(path, bytes(content))
    return f"bytes {places.tolist()} flipped"


def erase(rng: np.random.Generator, path: Path) -> str:
    content = bytearray(path.read_bytes())
    start = int(rng.integers(0, len(content)))
    size = int(rng.integers(1, 2000))
    content[start:start + size] = bytes(len(content[start:start + size]))
    write(path, bytes(content))
    return f"{size} bytes from {start} set to 0"


def drop(rng: np.random.Generator, path: Path) -> str:
    content = path.read_bytes()
    start, size = int(rng.integers(0, len(content))), int(rng.integers(1, 500))
    write(path, content[:start] + content[start + size:])
    return f"{size} bytes from {start} taken out"


def insert(rng: np.random.Generator, path: Path) -> str:
    content = path.read_bytes()
    start, size = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 500))
    write(path, content[:start] + rng.bytes(size) + content[start:])
    return f"{size} random bytes put in at {start}"


def other_kind(rng: np.random.Generator, path: Path) -> str:
    kinds = {"empty": b"", "text": b"subject,age\n1,70\n", "picture": b"\x89PNG\r\n\x1a\n" + bytes(300), "page": b"<html>404 Not Found</html>",
             "random bytes": rng.bytes(4000), "zip": b"PK\x03\x04" + bytes(200), "gzip": gzip.compress(b"no scan" * 50), "null bytes": bytes(5000),
             "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.", "git annex": b"/annex/objects/MD5E-s1--0.nii.gz\n",
             "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"}
    name = str(rng.choice(sorted(kinds)))
    write(path, kinds[name])
    return f"replaced by {name}"


def no_file(rng: np.random.Generator, path: Path) -> str:
    how = str(rng.choice(["missing", "folder", "link to nothing", "link to itself", "FIFO", "/dev/zero", "/dev/null", "/dev/random"]))
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "FIFO":
        os.mkfifo(path)
    elif how != "missing":
        path.symlink_to({"link to nothing": "nowhere", "link to itself": path.name}.get(how, how))
    return how


BYTES: list[Change] = [cut, flip, flip_start, erase, drop, insert, other_kind, no_file]


# NIfTI

_FIELDS: dict[str, list] = {
    "sizeof_hdr": [0, 1, 540, -1], "dim": [(0, 0), (0, 8), (0, -1), (1, 0), (1, -1), (2, 32767), (3, 1), (3, -5), (0, 2), (1, 122), (4, 2)],
    "datatype": [0, 1, 2, 128, 1536, 2048, 9999, -1], "pixdim": [(1, 0), (1, -3), (2, np.nan), (3, 1e30), (1, 6), (0, 0), (0, np.nan), (0, -1)],
    "vox_offset": [0, -1, np.nan, 1e30, 353, 1000], "scl_slope": [1e38, -1, np.inf, 1e-30, 100], "scl_inter": [1e38, -100, np.nan, 1000],
    "xyzt_units": [1, 3, 7, 255], "qform_code": [0, 99, -1], "sform_code": [0, 99, -1],
    "srow_x": [(0, 0), (0, np.nan), (0, -1), (0, 1e30), (3, 1e30), (3, 0), (1, 0.2)], "srow_z": [(2, 0), (2, np.inf), (2, -3), (3, 100)],
    "quatern_b": [5, np.nan, 0.7, 1e30], "quatern_d": [2, 0.5], "qoffset_x": [np.nan, 1e30, 100], "magic": [b"n+2", b"", b"ni1", b"xxx"],
}


def header_field(rng: np.random.Generator, path: Path) -> str:
    content = path.read_bytes()
    packed = content[:2] == b"\x1f\x8b"
    content = gzip.decompress(content) if packed else content
    header = nib.Nifti1Header(content[:348], check=False)
    name = str(rng.choice(sorted(_FIELDS)))
    value = _FIELDS[name][rng.integers(len(_FIELDS[name]))]
    with np.errstate(all="ignore"):
        if isinstance(value, tuple):
            header._structarr[name][value[0]] = value[1]
        else:
            header._structarr[name] = value
    content = header._structarr.tobytes() + content[348:]
    write(path, gzip.compress(content, 1) if packed else content)
    return f"{name} set to {value}"


def voxels(rng: np.random.Generator, path: Path) -> str:
    image = nib.load(path)
    values = np.asarray(image.dataobj, np.float32)
    how = str(rng.choice(["NaN in one voxel", "inf in one voxel", "all 0", "times 1e38", "times 255", "negated", "NaN background", "all NaN", "constant"]))
    middle = tuple(size // 2 for size in values.shape)
    if "one voxel" in how:
        values[middle] = np.nan if "NaN" in how else np.inf
    elif how == "NaN background":
        values[values == 0] = np.nan
    else:
        values = {"all 0": values * 0, "times 1e38": values / values.max() * np.float32(1e38), "times 255": values * 255, "negated": -values,
                  "all NaN": values * np.nan, "constant": values * 0 + 1}[how]
    content = nib.Nifti1Image(values, image.affine).to_bytes()
    write(path, gzip.compress(content, 1) if path.name.endswith(".gz") else content)
    return how


def geometry(rng: np.random.Generator, path: Path) -> str:
    image = nib.load(path)
    values, affine = np.asarray(image.dataobj, np.float32), image.affine.copy()
    how = str(rng.choice(["voxel size", "shifted by 2 mm", "turned by 5 degrees", "cut in half", "4D", "two volumes", "no position", "flat"]))
    if how == "voxel size":
        affine[:3, :3] *= 1.5
    elif how == "shifted by 2 mm":
        affine[0, 3] += 2
    elif how == "turned by 5 degrees":
        angle = np.deg2rad(5)
        affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ affine[:2, :2]
    elif how == "cut in half":
        values = values[:values.shape[0] // 2]
    elif how == "4D":
        values = np.stack([values] * 3, -1)
    elif how == "two volumes":
        values = np.stack([values, values * 0], -1)
    elif how == "flat":
        values = values[:, :, :1]
    made = nib.Nifti1Image(values, affine)
    if how == "no position":
        made.set_sform(None, 0), made.set_qform(None, 0)
    write(path, gzip.compress(made.to_bytes(), 1) if path.name.endswith(".gz") else made.to_bytes())
    return how


def bomb(rng: np.random.Generator, path: Path) -> str:
    size = int(rng.choice([200, 1500]))
    packer = io.BytesIO()
    content = path.read_bytes()
    start = gzip.decompress(content)[:352] if content[:2] == b"\x1f\x8b" else content[:352]
    header = nib.Nifti1Header(start[:348], check=False)
    if rng.random() < 0.5:
        header["dim"][1:4] = [1500, 1500, size]
    with gzip.GzipFile(fileobj=packer, mode="wb", compresslevel=1) as file:
        file.write(header._structarr.tobytes() + start[348:])
        for _ in range(size):
            file.write(bytes(1_000_000))
    write(path, packer.getvalue())
    return f"{size} MB of zeros, compressed"


# Tables

def _edit_table(path: Path, edit: Callable[[list[list[str]]], str]) -> str:
    rows = pd.read_excel(path, header=None, dtype=str).fillna("").values.tolist() if path.suffix == ".xlsx" else \
        [line.split("\t" if path.suffix == ".tsv" else ",") for line in path.read_text().splitlines()]
    words = edit(rows)
    if path.suffix == ".xlsx":
        path.unlink()
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        write(path, ("\n".join(separator.join(row) for row in rows) + "\n").encode(errors="surrogateescape"))
    return words


_CELLS = ["", "n/a", "-4", "999", "abc", "1e400", "NaN", "inf", "70,5", "0", "-70", "700", "07", "=1+1", "2020-01-01", "\U0001f600", "a\u0308" * 3,
          "x" * 300, "../../etc/passwd", "/dev/zero", "$\\alpha$", "<b>", "%s%n", "\u202eabc", "null", "TRUE", "1_000", "0x1F"]


def table_cell(rng: np.random.Generator, path: Path) -> str:
    def edit(rows: list[list[str]]) -> str:
        row, column = int(rng.integers(1, len(rows))), int(rng.integers(0, len(rows[0])))
        before, rows[row][column] = rows[row][column], str(rng.choice(_CELLS))
        return f"valid: {rows[0][column]} of row {row + 1}: {before!r} became {rows[row][column]!r}"
    return _edit_table(path, edit)


def table_heading(rng: np.random.Generator, path: Path) -> str:
    def edit(rows: list[list[str]]) -> str:
        column = int(rng.integers(0, len(rows[0])))
        other = rows[0][int(rng.integers(0, len(rows[0])))]
        before, rows[0][column] = rows[0][column], str(rng.choice(["", "Age at scan", other, rows[0][column].upper() + " ", "path,", "x" * 5000]))
        return f"heading {before!r} became {rows[0][column][:40]!r}"
    return _edit_table(path, edit)


def table_rows(rng: np.random.Generator, path: Path) -> str:
    def edit(rows: list[list[str]]) -> str:
        row = int(rng.integers(1, len(rows)))
        how = str(rng.choice(["twice", "longer", "shorter", "only headings", "empty rows", "comment", "subject twice", "one group"]))
        if how == "twice":
            rows.append(list(rows[row]))
        elif how == "longer":
            rows[row].append("surplus")
        elif how == "shorter":
            rows[row] = rows[row][:-2]
        elif how == "only headings":
            del rows[1:]
        elif how == "empty rows":
            rows[row:row] = [[""] * len(rows[0])] * 3
        elif how == "comment":
            rows.insert(0, ["# made by hand"] + [""] * (len(rows[0]) - 1))
        elif how == "subject twice":
            rows.append([*rows[row][:1], rows[1][1], *rows[row][2:]])
        else:
            for one in rows[1:]:
                one[rows[0].index("group")] = "CN"
        return f"{how} (row {row + 1})"
    return _edit_table(path, edit)


def table_column(rng: np.random.Generator, path: Path) -> str:
    def edit(rows: list[list[str]]) -> str:
        column = int(rng.integers(0, len(rows[0])))
        name, how = rows[0][column], str(rng.choice(["dropped", "emptied", "decimal commas", "words", "constant", "tab inside", "times 1000"]))
        first = rows[1][column]
        for row in rows[1 if how != "dropped" else 0:]:
            value = row[column]
            row[column] = {"emptied": "", "decimal commas": value.replace(".", ","), "words": f"v{value}", "constant": first,
                           "tab inside": f'"{value}\n"'}.get(how, f"{value}000")
            if how == "dropped":
                del row[column]
        return f"{'valid: ' if how in ('words', 'constant') or name in ('path', 'subject', 'session', 'group') else ''}column {name} {how}"
    return _edit_table(path, edit)


def table_encoding(rng: np.random.Generator, path: Path) -> str:
    if path.suffix == ".xlsx":
        return flip(rng, path)
    text = path.read_text()
    how = str(rng.choice(["utf-16", "cp1252", "utf-8-sig", "utf-32", "null byte", "carriage returns", "quote", "bad utf-8"]))
    if how in ("null byte", "quote"):
        text = text.replace("CN", "C\0N" if how == "null byte" else '"CN', 1)
    elif how == "cp1252":
        text = text.replace("sub-0001", "Müller", 1)
    elif how == "carriage returns":
        text = text.replace("\n", "\r")
    write(path, text.encode(how if how in ("utf-16", "cp1252", "utf-8-sig", "utf-32") else "utf-8") + (b"\xff\xfe\xfa" if how == "bad utf-8" else b""))
    return how


def table_size(rng: np.random.Generator, path: Path) -> str:
    if path.suffix == ".xlsx":
        book = openpyxl.load_workbook(path)
        cell = str(rng.choice(["A1048576", "XFD1", "A99999999", "A200000"]))
        if cell == "A99999999":
            return _far_cell(path)
        book.active[cell] = "x"
        path.unlink()
        book.save(path)
        return f"an entry in {cell}"
    lines, count = path.read_text().splitlines(), int(rng.choice([300_000, 3_000_000]))
    if rng.random() < 0.5:
        write(path, ("\n".join([*lines, *[lines[1]] * count]) + "\n").encode())
        return f"{count} rows"
    separator = "\t" if path.suffix == ".tsv" else ","
    write(path, "\n".join(line + separator * 20_000 for line in lines).encode())
    return "20000 empty columns"


def _far_cell(path: Path) -> str:
    with zipfile.ZipFile(path) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    sheet = next(name for name in parts if name.endswith("sheet1.xml"))
    row = b'<row r="99999999"><c r="A99999999" t="inlineStr"><is><t>x</t></is></c></row>'
    parts[sheet] = parts[sheet].replace(b"</sheetData>", row + b"</sheetData>")
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    return "an entry in A99999999"


TABLES: list[Change] = [table_cell, table_cell, table_heading, table_rows, table_column, table_encoding, table_size]


# Zip files

def zip_member(rng: np.random.Generator, path: Path) -> str:
    with zipfile.ZipFile(path) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    names = sorted(parts)
    one, other = (str(name) for name in rng.choice(names, 2))
    how = str(rng.choice(["renamed", "outside", "swapped", "left out", "emptied", "in capitals", "long name", "bomb", "all gone", "cut member"]))
    if how == "swapped":
        parts[one], parts[other] = parts[other], parts[one]
    elif how == "left out":
        del parts[one]
    elif how == "emptied":
        parts[one] = b""
    elif how == "cut member":
        parts[one] = parts[one][:len(parts[one]) // 2]
    elif how == "bomb":
        parts[one] = bytes(1_500_000_000)
    elif how == "all gone":
        parts = {}
    else:
        new = {"renamed": "x/y.bin", "outside": "../../outside.dcm", "in capitals": one.upper(), "long name": "n" * 5000 + ".dcm"}[how]
        parts[new] = parts.pop(one)
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    return f"{one}: {how}"


def zip_size(rng: np.random.Generator, path: Path) -> str:
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02", 0, int(rng.integers(len(content) // 2, len(content))))
    place = place if place >= 0 else content.find(b"PK\x01\x02")
    size = int(rng.choice([0, 10, 2**31 - 1, 2**32 - 2]))
    content[place + 24:place + 28] = struct.pack("<I", size)
    write(path, bytes(content))
    return f"a member declares {size} bytes"


# JSON

_VALUES: list[Any] = [None, -1, 0, 1e308, "text", [], {}, True, "../../x", 10**12, [1, 2, 3], {"a": 1}, float("nan"), "\ud800"]


def json_value(rng: np.random.Generator, path: Path) -> str:
    content = json.loads(path.read_text())
    places: list[tuple] = []

    def walk(value: Any, place: tuple) -> None:
        if place:
            places.append(place)
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            walk(inner, (*place, key))

    walk(content, ())
    place = places[rng.integers(len(places))]
    above = content
    for key in place[:-1]:
        above = above[key]
    how = str(rng.choice(["replaced", "dropped", "renamed"]))
    before = above[place[-1]]
    if how == "replaced":
        above[place[-1]] = _VALUES[rng.integers(len(_VALUES))]
        how = f"replaced by {above[place[-1]]!r}"
    elif how == "dropped" or isinstance(above, list):
        del above[place[-1]]
    else:
        above[f"{place[-1]}x"] = above.pop(place[-1])
    write(path, json.dumps(content).encode())
    return f"{'.'.join(map(str, place))} ({str(before)[:30]}) {how}"


def replace_by(other: str) -> Change:
    "A change that puts another file of the folder into a file's place."
    def change(rng: np.random.Generator, path: Path) -> str:
        content = (path.parent / other).read_bytes()
        write(path, content)
        return f"replaced by {other}"
    change.__name__ = "another_file"
    return change


def remove_tree(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
